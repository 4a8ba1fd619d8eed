"""Marks of the start and the end of thinking: found for a model, set by the user, or none.

``find_thinking_marks`` decides for a tokenizer, its chat template and a setting. The facts about
public models are those of vLLM's and llama.cpp's parsers of reasoning, and of the models' own chat
templates. ``bind_thinking_marks`` keeps the decision with the tokenizer, and ``marks_of`` reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from delethink.chat_templates import (
    Tokenizer,
    apply_template,
    bound_kwargs,
    generation_prompt,
    template_source,
)
from delethink.errors import ConfigError, ModelError, did_you_mean
from delethink.types import END_OF_THINKING, START_OF_THINKING, Problem

AUTO = "auto"
ASSUMED = "assumed: neither the chat template nor the added tokens show a mark"
SETTING, TEMPLATE, TOKENS = "the setting", "the chat template", "the added tokens"
OPTION = "task.end_of_thinking in the recipe, or --end-of-thinking"


@dataclass(frozen=True)
class ThinkingMarks:
    """Marks around the thinking of a model, as ``reward_text`` shows them."""

    start: str | None  # None: unknown, or the model does not mark its thinking
    end: str | None  # None: the model does not mark its thinking; the whole output is the answer
    source: str  # where they were found: SETTING, TEMPLATE, TOKENS or ASSUMED
    closing: str | None = None  # text that ends the thinking, if it is longer than the mark

    @property
    def forced(self) -> str:
        """Return the text that ends the thinking of a trace from outside; ``""`` without marks."""
        return self.closing or self.end or ""

    @property
    def is_assumed(self) -> bool:
        """Return whether nothing shows that the model writes the mark."""
        return self.source == ASSUMED

    def ends_in(self, text: str) -> bool:
        """Return whether the thinking ends somewhere in a text; without a mark, in any."""
        return self.end is None or self.end in text

    def closed_by(self, text: str) -> bool:
        """Return whether the text that a template adds for the model's turn ends the thinking."""
        if self.end is None:
            return False
        started = -1 if self.start is None else text.rfind(self.start)
        return text.rfind(self.end) > started

    def rewrite(self, text: str) -> str:
        """Return a text that ends its thinking with ``</think>`` with this mark instead.

        Without a mark, the thinking is left out, as the whole text would be the answer.
        """
        thinking, closing, rest = text.rpartition(END_OF_THINKING)
        if not closing or self.end == END_OF_THINKING:
            return text
        return rest if self.end is None else f"{thinking}{self.end}{rest}"


USUAL = ThinkingMarks(START_OF_THINKING, END_OF_THINKING, ASSUMED)


class _Known(NamedTuple):
    """Marks of public models, and the parts that show them."""

    start: str
    end: str
    hints: tuple[str, ...] = ()  # any of them shows the marks; by default start and end
    needed: tuple[str, ...] = ()  # all of these stand there too
    closing: str | None = None


_KNOWN = (
    # DeepSeek, Qwen, GLM, Kimi, MiniMax, OLMo, Nemotron, Phi, SmolLM, ERNIE, Hunyuan, Step
    _Known(START_OF_THINKING, END_OF_THINKING),
    _Known("[THINK]", "[/THINK]"),  # Magistral, Ministral
    _Known(  # gpt-oss
        "<|channel|>analysis<|message|>",
        "<|channel|>final<|message|>",
        ("<|channel|>",),
        closing="<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    _Known("<|channel>thought", "<channel|>", ("<|channel>", "<channel|>")),  # Gemma 4
    _Known("<seed:think>", "</seed:think>"),  # Seed-OSS
    _Known("<mm:think>", "</mm:think>"),  # MiniMax M3
    _Known("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning, R7B
    _Known("<thought>", "</thought>"),  # EXAONE Deep
    _Known("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1, OpenThinker
    _Known("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi-VL
    _Known("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    _Known("<ifm|think>", "</ifm|think>"),  # K2 Horizon, by its reasoning effort
    _Known("<ifm|think_fast>", "</ifm|think_fast>"),
    _Known("<ifm|think_faster>", "</ifm|think_faster>"),
    _Known(  # Kimi K3
        "<|open|>think<|sep|>",
        "<|close|>think<|sep|>",
        ("<|close|>",),
        needed=("<|open|>", "<|sep|>"),
    ),
    _Known("<|plamo:begin_think:plamo|>", "<|plamo:end_think:plamo|>"),  # PLaMo 3
    _Known(  # Solar Open; Gemma 4 has the first token alone
        "<|think|>",
        "<|content|>",
        needed=("<|think|>", "<|content|>"),
        closing="<|end|><|begin|>assistant<|content|>",
    ),
    _Known(  # Apriel
        "Here are my reasoning steps:",
        "[BEGIN FINAL RESPONSE]",
    ),
    _Known("Here is my thought process:", "Here is my response:"),  # Granite 3.2 and 3.3
    _Known("<reasoning>", "</reasoning>"),  # Reka Flash 3
    _Known("<thinking>", "</thinking>"),
)
_BY_END = {known.end: known for known in _KNOWN}
_STARTS = {known.start: known.end for known in _KNOWN}
_MAX_MARK_CHARACTERS = 80
# Tags of other models: LongCat's <longcat_think>, Hunyuan's <think:opensource>.
_TAG = re.compile(
    r"<(/?)((?!begin|start|end)(?:[\w.-]{1,40}[:_|])?"
    r"(?:think(?:ing)?|thoughts?|reason(?:ing)?)(?::[\w.-]{1,40})?)>"
)
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


def find_thinking_marks(
    tokenizer: Any,
    setting: str | None = AUTO,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> ThinkingMarks:
    """Return the marks of thinking of a model.

    With ``"auto"``, the first place that shows a mark decides: the text that the chat template adds
    for the model's turn, an answer with reasoning that it renders, its source, and the vocabulary.
    A model that shows none gets ``</think>``, with the source ``ASSUMED``.

    Args:
        tokenizer: the tokenizer, of transformers or any other.
        setting: ``"auto"``, a mark of the end, or ``None`` for a model that does not mark it.
        chat_template_kwargs: variables of the chat template; by default those bound to the
            tokenizer.

    Raises:
        ConfigError: the setting is no mark.
    """
    setting = check_mark_setting(setting)
    if setting is None:
        return ThinkingMarks(None, None, SETTING)
    if setting != AUTO:
        return _marks(setting, SETTING)
    kwargs = bound_kwargs(tokenizer, chat_template_kwargs)
    for source, ends in (
        (TEMPLATE, _ends_in_template(tokenizer, kwargs)),
        (TOKENS, _ends_in_vocabulary(tokenizer)),
    ):
        if (end := next(ends, None)) is not None:
            return _marks(end, source)
    return USUAL


def shown_ends(tokenizer: Any) -> tuple[str, ...]:
    """Return every mark of the end of thinking that chat template or vocabulary shows.

    The one that ``find_thinking_marks`` chooses is the first.
    """
    ends = [*_ends_in_template(tokenizer, bound_kwargs(tokenizer, None))]
    return tuple(dict.fromkeys([*ends, *_ends_in_vocabulary(tokenizer)]))


def check_mark_setting(value: Any) -> str | None:
    """Return a setting of the mark of the end of thinking as text, or ``None``.

    YAML reads ``[/THINK]`` without quotes as a list, and ``Response:`` as a mapping; both are taken
    as the mark.

    Raises:
        ConfigError: no mark.
    """
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = f"[{value[0]}]"
    if isinstance(value, Mapping) and list(value.values()) == [None]:
        value = f"{next(iter(value))}:"
    if value is None or value == "null":
        return None
    allowed = f"a mark such as {END_OF_THINKING}, 'auto' or null"
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"the end of thinking is {allowed}, got {value!r:.80}; quote a mark")
    text = value.strip()
    if text.lower() in ("none", "nothing", "no", "false", "off"):
        raise ConfigError(
            f"the end of thinking is {allowed}, got {text!r}. Did you mean null, for a model that "
            "does not mark it?"
        )
    if text.lower() == AUTO:
        return AUTO
    if text in _STARTS:
        raise ConfigError(
            f"{text!r} marks the start of thinking, and the setting names its end: write "
            f"{_STARTS[text]!r}"
        )
    if text.isalpha() and text.isascii():
        raise ConfigError(
            f"the end of thinking is {allowed}, got {text!r}.{did_you_mean(text, [AUTO, 'null'])}"
        )
    return text


# -- marks of a tokenizer ----------------------------------------------------------------------

_BOUND = "thinking_marks"  # attribute: setting of the user
_FOUND = "found_thinking_marks"  # attribute: template with its variables, and the marks found


def bind_thinking_marks(tokenizer: Any, setting: str | None) -> ThinkingMarks:
    """Make these marks those of a tokenizer, for everything that reads its traces.

    Raises:
        ConfigError: the setting is no mark.
    """
    marks = find_thinking_marks(tokenizer, setting)
    setattr(tokenizer, _BOUND, None if setting == AUTO else marks)
    return marks


def marks_of(tokenizer: Any) -> ThinkingMarks:
    """Return the marks bound to a tokenizer, or else those that are found."""
    bound: ThinkingMarks | None = getattr(tokenizer, _BOUND, None)
    if bound is not None:
        return bound
    # A trace asks for them at its end, and rendering the template takes a millisecond.
    key = (template_source(tokenizer), repr(dict(bound_kwargs(tokenizer, None))))
    known = getattr(tokenizer, _FOUND, None)
    if known is None or known[0] != key:
        known = (key, find_thinking_marks(tokenizer))
        with suppress(AttributeError):  # a tokenizer with slots
            setattr(tokenizer, _FOUND, known)
    found: ThinkingMarks = known[1]
    return found


def unmarked_hint(marks: ThinkingMarks) -> str:
    """Return the sentence for results of which no trace has ended its thinking."""
    return (
        f"no trace wrote {marks.end}, the end of thinking ({marks.source}), so none has an answer; "
        "raise the budget, or, if the model marks the end otherwise or never, set "
        f"{OPTION}, to its mark or null"
    )


# -- detection ---------------------------------------------------------------------------------


def _marks(end: str, source: str) -> ThinkingMarks:
    """Return the marks with this end."""
    if (known := _BY_END.get(end)) is not None:
        return ThinkingMarks(known.start, end, source, known.closing)
    return ThinkingMarks(_start_of(end), end, source)


def _start_of(end: str) -> str | None:
    """Return the start that belongs to a mark of the end by its spelling."""
    for closing, opening in (
        ("</", "<"),
        ("[/", "["),
        ("/", ""),
        ("END", "START"),
        ("end", "begin"),
    ):
        if closing in end:
            return end.replace(closing, opening, 1)
    return None


def _ends_in_template(tokenizer: Tokenizer, kwargs: Mapping[str, Any]) -> Iterator[str]:
    """Yield the marks of the end that a chat template shows, the most certain first."""
    source = template_source(tokenizer)
    if source is None:
        return
    text = generation_prompt(tokenizer, Problem("QUESTION", ""), kwargs)
    yield from _ends_in_text(text, is_last_first=True)
    yield from _ends_in_answer(tokenizer, kwargs)
    vocabulary = _vocabulary(tokenizer)
    shown = list(_ends_in_text(_COMMENT.sub("", source)))
    yield from sorted(shown, key=lambda end: end not in vocabulary)  # known ones keep their order


def _ends_in_text(text: str, is_last_first: bool = False) -> Iterator[str]:
    """Yield the ends of the marks in a text; of a prompt, the last mark decides."""
    shown = [known for known in _KNOWN if _shows(known, text.__contains__)]
    if is_last_first:
        shown.sort(key=lambda known: max(map(text.rfind, (known.start, known.end))), reverse=True)
    yield from (known.end for known in shown)
    known_marks = {*_BY_END, *_STARTS}
    for tag in _TAG.finditer(text):
        if tag[0] not in known_marks:
            yield f"</{tag[2]}>"


def _shows(known: _Known, is_there: Callable[[str], bool]) -> bool:
    hints = known.hints or (known.start, known.end)
    return any(map(is_there, hints)) and all(map(is_there, known.needed))


_REASONING, _ANSWER = "REASONING-TEXT", "ANSWER-TEXT"
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # of an assistant's message


def _ends_in_answer(tokenizer: Tokenizer, kwargs: Mapping[str, Any]) -> Iterator[str]:
    """Yield the mark between the reasoning and the content of a rendered answer."""
    if not hasattr(tokenizer, "get_chat_template"):
        return
    said = dict.fromkeys(_REASONING_KEYS, _REASONING) | {"role": "assistant", "content": _ANSWER}
    asked = {"role": "user", "content": "QUESTION"}
    options = {"tokenize": False, "add_generation_prompt": False}
    try:
        text = str(apply_template(tokenizer, [asked, said], kwargs, options))
    except ModelError:  # not every template takes an answer
        return
    before, reasoning, rest = text.rpartition(_REASONING)
    between, answer, _ = rest.partition(_ANSWER)
    if not reasoning or not answer:
        return
    inside = [known.end for known in _KNOWN if known.end in between]
    yield from sorted(inside, key=len, reverse=True)
    mark = between.strip()
    if not inside and _is_tag(mark) and before.rstrip().endswith(mark[-1]):  # after a start
        yield mark


_ONE_TAG = re.compile(r"<[^<>\s]+>|\[[^][\s]+\]|\u25c1[^\u25c1\u25b7\s]+\u25b7")


def _is_tag(text: str) -> bool:
    """Return whether a text is a single mark of an end in brackets, not words of a template."""
    is_end = _start_of(text) is not None
    return is_end and len(text) <= _MAX_MARK_CHARACTERS and bool(_ONE_TAG.fullmatch(text))


def _ends_in_vocabulary(tokenizer: Any) -> Iterator[str]:
    """Yield the marks of the end among the tokens."""
    vocabulary = _vocabulary(tokenizer)
    for known in _KNOWN:
        if _shows(known, vocabulary.__contains__):
            yield known.end
    added: Iterable[str] = tokenizer.get_added_vocab() if _has_vocabulary(tokenizer) else ()
    for token in added:
        tag = _TAG.fullmatch(token)
        if tag is not None and tag[1] and token not in _BY_END:
            yield token


def _vocabulary(tokenizer: Any) -> Mapping[str, Any]:
    vocabulary: Mapping[str, Any] = tokenizer.get_vocab() if _has_vocabulary(tokenizer) else {}
    return vocabulary


def _has_vocabulary(tokenizer: Any) -> bool:
    # Those of transformers have both; reading a large vocabulary takes time, and marks are added.
    return hasattr(tokenizer, "get_vocab") and hasattr(tokenizer, "get_added_vocab")
