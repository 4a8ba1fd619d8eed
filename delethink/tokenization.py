"""Conversion of problems to query token ids, and of token ids to the text for rewards."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Any

from delethink.chat_templates import (
    TEMPLATE_KWARGS,
    THINKING_OPTIONS,
    apply_template,
    bound_kwargs,
    generation_prompt,
    has_variable,
    template_source,
)
from delethink.chat_templates import Tokenizer as Tokenizer
from delethink.chat_templates import bind_template as bind_template
from delethink.chat_templates import check_template_kwargs as check_template_kwargs
from delethink.errors import ModelError
from delethink.thinking_marks import (
    OPTION,
    SETTING,
    ThinkingMarks,
    bind_thinking_marks,
    marks_of,
    shown_ends,
)
from delethink.tokens import as_list
from delethink.types import END_OF_THINKING, START_OF_THINKING, Problem, TokenIds


def query_ids(
    tokenizer: Tokenizer,
    problem: Problem,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TokenIds:
    """Return q, the token ids of the templated prompt.

    The tokenizer's chat template may open the thinking. See ``message_ids``.

    Raises:
        ModelError: the template cannot render the messages.
    """
    return message_ids(tokenizer, problem.messages, chat_template_kwargs)


def message_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TokenIds:
    """Return the token ids of a conversation and of the start of the model's turn.

    Without a chat template, the messages are joined with an empty line between them.
    ``chat_template_kwargs`` are variables of the template; by default those of ``bind_template``.

    Raises:
        ModelError: the template cannot render the messages.
    """
    if tokenizer.chat_template is None:
        text = "\n\n".join(message["content"] for message in messages)
        ids = tuple(tokenizer(text)["input_ids"])
        return ids[: -_adds_end(tokenizer, text, ids) or None]  # the model would begin after it
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    encoded = apply_template(tokenizer, messages, chat_template_kwargs, options)
    if not (ids := tuple(encoded["input_ids"])):
        raise ModelError(
            "the tokenizer's chat template writes nothing for a question: correct its "
            "chat_template.jinja, or use another template"
        )
    return ids


def encode(tokenizer: Tokenizer, text: str) -> TokenIds:
    """Return the token ids of ``text`` without added special tokens.

    Special tokens spelled out in the text, such as EOS, become their ids. Some tokenizers add BOS
    or EOS although they are told not to.
    """
    options = {"add_special_tokens": False}
    ids = tuple(tokenizer(text, **options)["input_ids"])
    start = _adds(tokenizer, "bos_token", text.startswith, ids[:2], options)
    return ids[start : -_adds_end(tokenizer, text, ids, options) or None]


def _adds_end(tokenizer: Tokenizer, text: str, ids: TokenIds, options: Any = None) -> bool:
    """Return whether the tokenizer itself has put EOS at the end of the ids of a text."""
    return _adds(tokenizer, "eos_token", text.endswith, ids[:-3:-1], options or {})


def _adds(
    tokenizer: Tokenizer,
    name: str,
    is_at_edge: Callable[[str], bool],
    edge: TokenIds,
    options: Mapping[str, Any],
) -> bool:
    """Return whether the outermost token is one that the tokenizer adds to any text.

    Args:
        tokenizer: the tokenizer.
        name: ``"bos_token"`` or ``"eos_token"``.
        is_at_edge: whether a spelled token stands at this edge of the text.
        edge: the two outermost ids, the outermost first.
        options: those with which the text was encoded.
    """
    token, spelled = getattr(tokenizer, f"{name}_id", None), getattr(tokenizer, name, None)
    if token is None or not spelled or edge[:1] != (token,):
        return False
    if is_at_edge(str(spelled)) and edge != (token, token):
        return False  # the text's own
    return token in tokenizer("", **options)["input_ids"]


_KEPT = "kept_special_tokens"  # attribute: text of special tokens that rewards read, by id
_SPACES = re.compile(r"[\s\u0120\u010a\u2581]")  # also as vocabularies write them
_SINGLE_SPACES, _ALL_SPACES = "Let x be 3 and y be 4", "Let x:\n\ty  be 4\n\nx"


def changed_spaces(tokenizer: Tokenizer, text: str) -> str | None:
    """Return the text after encoding and decoding if its spaces differ, or ``None``.

    A tokenizer that lacks letters of the text says nothing about spaces. Spaces at the start are
    not compared.
    """
    again = str(tokenizer.decode(list(encode(tokenizer, text))))
    if again.lstrip() == text.lstrip() or _SPACES.sub("", again) != _SPACES.sub("", text):
        return None
    return again


def tokenizer_faults(tokenizer: Any, query: TokenIds, ends: Sequence[int]) -> list[tuple[str, str]]:
    """Return faults of a tokenizer and its chat template, each with advice.

    ``query`` has the ids of a problem's query, and ``ends`` are the tokens that end an answer.
    """
    faults, bos = [], getattr(tokenizer, "bos_token_id", None)
    if bos is not None and query[:2] == (bos, bos):
        advice = "remove the token from the chat template: the tokenizer adds it already"
        faults.append((f"a query begins with two {tokenizer.bos_token}", advice))
    added = tuple(tokenizer("")["input_ids"])
    if bos is not None and bos in added and bos not in query:
        advice = "begin the chat template with {{ bos_token }}"
        lacks = f"a query has no {tokenizer.bos_token}, which the tokenizer adds to any text"
        faults.append((lacks, advice))
    elif (
        bos not in (None, getattr(tokenizer, "eos_token_id", None), *query)
        and not tokenizer.chat_template
    ):
        lacks = f"a query has no {tokenizer.bos_token}, the start token, and no chat template"
        advice = (
            "if the model was trained with it, it writes nonsense without: set add_bos_token in "
            "tokenizer_config.json, or a chat template that begins with {{ bos_token }}"
        )
        faults.append((lacks, advice))
    if query[-1:] and query[-1] in ends:
        name = tokenizer.convert_ids_to_tokens(query[-1])
        advice = "end the chat template with the start of the model's turn"
        faults.append((f"a query ends with {name}, which ends an answer", advice))
    for text in (_SINGLE_SPACES, _ALL_SPACES):
        if (again := changed_spaces(tokenizer, text)) is not None:
            advice = "update transformers, or correct the tokenizer's tokenizer_class and files"
            faults.append((f"encoding and decoding makes {text!r} to {again!r}", advice))
            break
    return faults


def loses_spaces(tokenizer: Tokenizer) -> bool:
    """Return whether spaces between words do not come back from the ids of a text."""
    return changed_spaces(tokenizer, _SINGLE_SPACES) is not None


def retokenized_at(tokenizer: Tokenizer, token_ids: Sequence[int]) -> int | None:
    """Return the first position at which decoding and encoding changes the ids, or ``None``.

    Sampled ids need not be the tokenizer's encoding of their text. From this position on, a client
    of the text alone continues from other ids than the sampled ones.
    """
    again = encode(tokenizer, str(tokenizer.decode(as_list(token_ids))))
    pairs = enumerate(zip_longest(token_ids, again))
    return next((i for i, (before, after) in pairs if before != after), None)


def reward_text(tokenizer: Tokenizer, token_ids: Sequence[int], **options: Any) -> str:
    """Return the text of a trace for rewards, without special tokens.

    Marks of the end of thinking stay, also where the tokenizer counts them among its special tokens
    (``keep_marks``). ``options`` are further arguments of ``Tokenizer.decode``.
    """
    ids, options = as_list(token_ids), {**options, "skip_special_tokens": True}
    kept: Mapping[int, str] = getattr(tokenizer, _KEPT, {})
    if not kept or kept.keys().isdisjoint(ids):
        return str(tokenizer.decode(ids, **options))
    pieces, start = [], 0
    for position, token in enumerate(ids):
        if token in kept:
            pieces += [tokenizer.decode(ids[start:position], **options), kept[token]]
            start = position + 1
    pieces.append(tokenizer.decode(ids[start:], **options))
    return "".join(map(str, pieces))


def keep_marks(tokenizer: Any, *marks: str | None) -> None:
    """Make ``reward_text`` keep the special tokens in marks of the end of thinking.

    These are the given ones; by default all that the tokenizer shows.
    """
    kept = {
        token: str(tokenizer.decode([token]))
        for mark in marks or shown_ends(tokenizer)
        for token in encode(tokenizer, mark or "")
        if not tokenizer.decode([token], skip_special_tokens=True)
    }
    if kept:
        setattr(tokenizer, _KEPT, {**getattr(tokenizer, _KEPT, {}), **kept})


def bind_marks(tokenizer: Any, setting: str | None) -> ThinkingMarks:
    """Make these marks of thinking those of a tokenizer (``find_thinking_marks``).

    Special tokens in them stay in ``reward_text``.

    Raises:
        ConfigError: the setting is no mark.
        ModelError: text decoded without special tokens lacks the end of thinking, so rewards would
            find no answer.
    """
    marks = bind_thinking_marks(tokenizer, setting)
    if marks.end is not None:
        keep_marks(tokenizer, marks.end)
        written = reward_text(tokenizer, encode(tokenizer, marks.end))
        # Of a mark that the user gives and nothing shows, the doctor warns.
        if marks.source != SETTING and marks.end.strip() not in written:
            raise ModelError(
                f"the tokenizer cannot write {marks.end}, the end of thinking ({marks.source}), so "
                "no answer would be found; set task.end_of_thinking or --end-of-thinking to the "
                "model's mark or to null, or add the token"
            )
    return marks


# -- closed thinking ---------------------------------------------------------------------------


def check_thinking_is_open(
    tokenizer: Tokenizer,
    problem: Problem,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    marks: ThinkingMarks | None = None,
) -> None:
    """Check that the query does not end the thinking, which rewards search later.

    ``marks`` are by default those of the tokenizer (``marks_of``). Without a mark of the end,
    nothing is refused: rewards read the whole output.

    Raises:
        ModelError: the chat template closes the thinking, so every reward would be 0. The text
            names the variable of the template that leaves it open, if there is one.
    """
    marks = marks_of(tokenizer) if marks is None else marks
    if tokenizer.chat_template is None or marks.end is None:
        return
    if not _closes(tokenizer, problem, chat_template_kwargs, marks):
        return
    bound = dict(bound_kwargs(tokenizer, chat_template_kwargs))
    given = "".join(f", with {name}={value}" for name, value in bound.items())
    option = _opening_option(tokenizer, problem, bound, marks)
    advice = (
        f"set {TEMPLATE_KWARGS}.{option} in the recipe, or pass --chat-template-kwargs {option}"
        if option
        else "use a template that leaves the thinking open"
    )
    raise ModelError(
        f"the tokenizer's chat template ends with {marks.end}{given}: it closes the thinking "
        f"before the model begins, so no answer is ever found; {advice}; or, to grade the whole "
        f"output of a model that does not think, set {OPTION}, to null"
    )


def _opening_option(
    tokenizer: Tokenizer, problem: Problem, bound: Mapping[str, Any], marks: ThinkingMarks
) -> str:
    """Return the ``name=value`` with which the template leaves the thinking open, or ``""``."""
    source = template_source(tokenizer) or ""
    for name, values in THINKING_OPTIONS.items():
        for value in values if has_variable(source, name) else ():
            with suppress(ModelError):  # a template may refuse a value
                if not _closes(tokenizer, problem, {**bound, name: value}, marks):
                    return f"{name}={str(value).lower()}"
    return ""


def _closes(
    tokenizer: Tokenizer,
    problem: Problem,
    chat_template_kwargs: Mapping[str, Any] | None,
    marks: ThinkingMarks,
) -> bool:
    """Return whether the text that the template adds for the model's turn ends the thinking.

    Texts of the problem and of the system prompt may speak of the marks.
    """
    added = generation_prompt(tokenizer, problem, chat_template_kwargs)
    if added:
        return marks.closed_by(added)
    query = str(tokenizer.decode(list(query_ids(tokenizer, problem, chat_template_kwargs))))
    user_text = problem.prompt + "".join(message["content"] for message in problem.before)
    end = str(marks.end)
    return query.rstrip().endswith(end) and end not in user_text


# -- tokens that end an answer -----------------------------------------------------------------

_ANSWER = "ANSWER"  # content of an assistant's message, to find what follows it


def end_tokens(tokenizer: Any, model: Any = None) -> dict[int, str]:
    """Return the tokens that end an answer, and where each was found.

    A model may end its turn with another token than the tokenizer's end-of-sequence token, so all
    places count: tokenizer, generation settings, configuration and chat template. The order is
    theirs.

    Args:
        tokenizer: the tokenizer, of transformers or any other.
        model: anything with ``config`` and ``generation_config``: a model, or ``load_shell``.
    """
    found: dict[int, list[str]] = {}
    for source, ids in (
        ("eos_token of the tokenizer", _as_ids(getattr(tokenizer, "eos_token_id", None))),
        ("generation_config.json", _generation_ends(model)),
        ("config.json", _configured_ends(model)),
        ("the chat template", _template_ends(tokenizer)),
    ):
        for token in dict.fromkeys(ids):
            found.setdefault(token, []).append(source)
    return {token: " and ".join(sources) for token, sources in found.items()}


def _as_ids(value: Any) -> tuple[int, ...]:
    """Return the ids of an ``eos_token_id``: a number, a sequence, or nothing."""
    ids = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    return tuple(i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0)


def _configured_ends(model: Any) -> tuple[int, ...]:
    """Return the end tokens that a ``config.json`` states, not those of a class's defaults."""
    config = getattr(model, "config", None)
    if config is None:
        return ()
    parts = [config]
    if hasattr(config, "get_text_config"):
        parts.append(config.get_text_config())
    return tuple(
        token
        for part in parts
        for token in _as_ids(getattr(part, "eos_token_id", None))
        if (token,) != _default_ends(part)
    )


def _generation_ends(model: Any) -> tuple[int, ...]:
    settings = getattr(model, "generation_config", None)
    ends = _as_ids(getattr(settings, "eos_token_id", None))
    # Without a file, transformers takes them from the configuration, defaults of the class too.
    is_default = getattr(settings, "_from_model_config", False) and ends == _default_ends(
        model.config
    )
    return () if is_default else ends


def _default_ends(config: Any) -> tuple[int, ...]:
    """Return the end tokens of a configuration class.

    They need not be the checkpoint's: Llama's default of 2 is a digit in other vocabularies.
    """
    default = getattr(type(config), "eos_token_id", None)
    return _as_ids(default) if isinstance(default, int | list | tuple) else ()


def _template_ends(tokenizer: Any) -> tuple[int, ...]:
    """Return the token that the chat template puts after an assistant's message, if it is one.

    Where nothing follows the last message, the next turn's first token ends it, as in GLM-4.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return ()
    if not hasattr(tokenizer, "get_chat_template"):
        return ()
    asked = {"role": "user", "content": "QUESTION"}
    said = {"role": "assistant", "content": _ANSWER}
    for messages in ([asked, said], [asked, said, asked]):
        options = {"tokenize": False, "add_generation_prompt": False}
        try:
            text = str(apply_template(tokenizer, messages, None, options))
        except ModelError:  # not every template takes an answer; queries are checked elsewhere
            return ()
        before, _, after = text.rpartition(_ANSWER)
        if not before or not after.strip():
            continue
        added = tokenizer.get_added_vocab()
        starts = [token for token in added if token and after.lstrip().startswith(token)]
        ends = [token for token in starts if token not in (START_OF_THINKING, END_OF_THINKING)]
        return (int(added[max(ends, key=len)]),) if ends else ()
    return ()
