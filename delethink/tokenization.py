"""Conversion of problems to query token ids, and of token ids to the text for rewards."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Any, Protocol

from delethink.errors import ConfigError, ModelError, did_you_mean
from delethink.tokens import as_list
from delethink.types import END_OF_THINKING, Problem, TokenIds


class Tokenizer(Protocol):
    """The tokenizer interface of the library, implemented by tokenizers of ``transformers``."""

    chat_template: Any

    def __call__(self, text: str, **options: Any) -> Any:
        """Return a mapping with the token ids of ``text`` under ``"input_ids"``."""
        ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Return the token ids of a conversation."""
        ...

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Return the text of token ids."""
        ...


def query_ids(
    tokenizer: Tokenizer,
    problem: Problem,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TokenIds:
    """Return q, the token ids of the templated prompt.

    The tokenizer's chat template may open the thinking. Without a template, the messages are joined
    with an empty line between them. ``chat_template_kwargs`` are variables of the template; by
    default those of ``bind_template``.

    Raises:
        ModelError: the template cannot render the messages.
    """
    if tokenizer.chat_template is None:
        text = "\n\n".join(message["content"] for message in problem.messages)
        ids = tuple(tokenizer(text)["input_ids"])
        return ids[: -_adds_end(tokenizer, text, ids) or None]  # the model would begin after it
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    encoded = _apply_template(tokenizer, problem.messages, chat_template_kwargs, options)
    return tuple(encoded["input_ids"])


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


def reward_text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Return the text of a trace for rewards, without special tokens.

    Marks of the end of thinking stay, also where the tokenizer counts them among its special tokens
    (``keep_marks``).
    """
    ids = as_list(token_ids)
    kept: Mapping[int, str] = getattr(tokenizer, _KEPT, {})
    if not kept or kept.keys().isdisjoint(ids):
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    pieces, start = [], 0
    for position, token in enumerate(ids):
        if token in kept:
            pieces += [tokenizer.decode(ids[start:position], skip_special_tokens=True), kept[token]]
            start = position + 1
    pieces.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    return "".join(map(str, pieces))


def keep_marks(tokenizer: Any) -> None:
    """Make ``reward_text`` keep the special tokens in marks of the end of thinking."""
    kept = {
        token: str(tokenizer.decode([token]))
        for mark in thinking_marks(tokenizer)
        for token in encode(tokenizer, mark)
        if not tokenizer.decode([token], skip_special_tokens=True)
    }
    if kept:
        setattr(tokenizer, _KEPT, kept)


# -- chat templates ----------------------------------------------------------------------------

_START_OF_THINKING = "<think>"
_KWARGS = "chat_template_kwargs"
# Arguments of ``apply_chat_template`` that would change more than the text of the prompt.
_RESERVED = frozenset(
    (
        "conversation",
        "messages",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "tokenizer_kwargs",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
    )
)
# Variables with which templates of public models turn thinking on, and values that do.
_THINKING_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "enable_thinking": (True,),  # Qwen3, GLM-4.5, SmolLM3, Hunyuan, EXAONE 4
    "thinking": (True,),  # DeepSeek-V3.1, Granite 3.2, Kimi K2.5
    "reasoning": (True,),  # Command A Reasoning
    "reasoning_effort": ("medium", "high"),  # gpt-oss, Mistral
    "thinking_mode": ("thinking", "on"),  # DeepSeek-V3.2, Ling
}


def bind_template(tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None) -> None:
    """Make these variables of the chat template the default for every query of a tokenizer.

    Raises:
        ConfigError: the tokenizer has no template, or its template has no such variable.
    """
    check_template_kwargs(tokenizer, chat_template_kwargs)
    if chat_template_kwargs:
        tokenizer.chat_template_kwargs = dict(chat_template_kwargs)


def check_template_kwargs(
    tokenizer: Tokenizer, chat_template_kwargs: Mapping[str, Any] | None
) -> None:
    """Refuse variables that the chat template of a tokenizer does not read.

    Raises:
        ConfigError: the tokenizer has no template, or its template has no such variable.
    """
    if not chat_template_kwargs:
        return
    if not isinstance(chat_template_kwargs, Mapping):
        raise ConfigError(
            f"{_KWARGS} must be a mapping such as {{'enable_thinking': True}}, got "
            f"{chat_template_kwargs!r:.80}"
        )
    source = _template_source(tokenizer)
    given = ", ".join(map(str, chat_template_kwargs))
    if source is None:
        raise ConfigError(
            f"{_KWARGS} ({given}) has no effect: the tokenizer has no chat template; leave it out"
        )
    for name in chat_template_kwargs:
        if name in _RESERVED or not _has_variable(source, str(name)):
            known = [option for option in _THINKING_OPTIONS if _has_variable(source, option)]
            raise ConfigError(
                f"{_KWARGS} names {name!r}, which the tokenizer's chat template does not read."
                f"{did_you_mean(str(name), known)}"
            )


def check_thinking_is_open(
    tokenizer: Tokenizer,
    problem: Problem,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Check that the query does not end the thinking, which rewards search later.

    Raises:
        ModelError: the chat template closes the thinking, so every reward would be 0. The text
            names the variable of the template that leaves it open, if there is one.
    """
    if tokenizer.chat_template is None or not _closes(tokenizer, problem, chat_template_kwargs):
        return
    bound = dict(_bound(tokenizer, chat_template_kwargs))
    given = "".join(f", with {name}={value}" for name, value in bound.items())
    option = _opening_option(tokenizer, problem, bound)
    advice = (
        f"set {_KWARGS}.{option} in the recipe, or pass --chat-template-kwargs {option}"
        if option
        else "use a template that leaves the thinking open"
    )
    raise ModelError(
        f"the tokenizer's chat template ends with {END_OF_THINKING}{given}: it closes the thinking "
        f"before the model begins, so no answer is ever found; {advice}"
    )


def _opening_option(tokenizer: Tokenizer, problem: Problem, bound: Mapping[str, Any]) -> str:
    """Return the ``name=value`` with which the template leaves the thinking open, or ``""``."""
    source = _template_source(tokenizer) or ""
    for name, values in _THINKING_OPTIONS.items():
        for value in values if _has_variable(source, name) else ():
            with suppress(ModelError):  # a template may refuse a value
                if not _closes(tokenizer, problem, {**bound, name: value}):
                    return f"{name}={str(value).lower()}"
    return ""


def _closes(
    tokenizer: Tokenizer, problem: Problem, chat_template_kwargs: Mapping[str, Any] | None
) -> bool:
    """Return whether the text that the template adds for the model's turn ends the thinking.

    Texts of the problem and of the system prompt may speak of the marks.
    """
    added = _generation_prompt(tokenizer, problem, chat_template_kwargs)
    if added:
        return added.rfind(END_OF_THINKING) > added.rfind(_START_OF_THINKING)
    query = str(tokenizer.decode(list(query_ids(tokenizer, problem, chat_template_kwargs))))
    user_text = problem.prompt + "".join(message["content"] for message in problem.before)
    return query.rstrip().endswith(END_OF_THINKING) and END_OF_THINKING not in user_text


def _generation_prompt(
    tokenizer: Tokenizer, problem: Problem, chat_template_kwargs: Mapping[str, Any] | None
) -> str:
    """Return the text that a template adds for the model's turn; ``""`` if that is unknown."""
    if not hasattr(tokenizer, "get_chat_template"):
        return ""
    texts = []
    for adds in (True, False):
        options = {"tokenize": False, "add_generation_prompt": adds}
        try:
            texts.append(
                str(_apply_template(tokenizer, problem.messages, chat_template_kwargs, options))
            )
        except ModelError:
            return ""
    pairs = enumerate(zip_longest(*texts))
    return texts[0][next((i for i, (one, other) in pairs if one != other), len(texts[0])) :]


def _apply_template(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    chat_template_kwargs: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> Any:
    """Render messages with the chat template.

    Raises:
        ModelError: the template fails, or refuses the messages.
    """
    variables = _bound(tokenizer, chat_template_kwargs)
    try:
        return tokenizer.apply_chat_template(list(messages), **variables, **options)
    except Exception as error:  # a template is a program and may raise anything
        if not hasattr(tokenizer, "get_chat_template"):
            raise  # not of transformers: a bug of the tokenizer
        roles = ", ".join(message["role"] for message in messages)
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        advice = "use another template, or other messages"
        if "system" in roles:
            advice = "leave out the task's system message, or use another template"
        raise ModelError(
            f"the tokenizer's chat template fails on messages of the roles {roles}: {reason}; "
            f"{advice}"
        ) from error


def _bound(
    tokenizer: Tokenizer, chat_template_kwargs: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """Return the given variables of a template, or those bound to the tokenizer."""
    if chat_template_kwargs is not None:
        return chat_template_kwargs
    bound: Mapping[str, Any] = getattr(tokenizer, _KWARGS, None) or {}
    return bound


def _template_source(tokenizer: Tokenizer) -> str | None:
    """Return the source of the chat template; of several named ones, the default."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return None if template is None else str(template)


def _has_variable(source: str, name: str) -> bool:
    """Return whether a template reads a variable: not an attribute, not a word of a text."""
    code = " ".join(re.findall(r"\{[{%](.*?)[}%]\}", source, re.DOTALL))
    code = re.sub(r"'[^']*'|\"[^\"]*\"", "''", code)
    return re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", code) is not None


# Marks of public models, with those of their start, which a template may show alone.
_MARKS: Mapping[str, tuple[str, ...]] = {
    "[/THINK]": ("[THINK]",),  # Magistral, Mistral
    "<|channel|>final<|message|>": ("<|channel|>",),  # gpt-oss
    "<channel|>": ("<|channel>",),  # Gemma 4
    "</seed:think>": ("<seed:think>",),  # Seed-OSS
    "<|END_THINKING|>": ("<|START_THINKING|>",),  # Command A Reasoning
    "</thought>": ("<thought>",),  # EXAONE Deep
    "\u25c1/think\u25b7": ("\u25c1think\u25b7",),  # Kimi-VL
    "</reasoning>": ("<reasoning>",),
}


def thinking_marks(tokenizer: Any) -> tuple[str, ...]:
    """Return the marks of the end of thinking that the vocabulary or the chat template shows.

    Empty if there is none: a model that was trained without thinking, or a base model.
    """
    vocabulary: Any = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else ()
    source = _template_source(tokenizer) or ""
    known = {END_OF_THINKING: (_START_OF_THINKING,), **_MARKS}
    return tuple(
        end
        for end, starts in known.items()
        if any(mark in vocabulary or mark in source for mark in (end, *starts))
    )


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
            text = str(_apply_template(tokenizer, messages, None, options))
        except ModelError:  # not every template takes an answer; queries are checked elsewhere
            return ()
        before, _, after = text.rpartition(_ANSWER)
        if not before or not after.strip():
            continue
        added = tokenizer.get_added_vocab()
        starts = [token for token in added if token and after.lstrip().startswith(token)]
        ends = [token for token in starts if token not in (_START_OF_THINKING, END_OF_THINKING)]
        return (int(added[max(ends, key=len)]),) if ends else ()
    return ()
