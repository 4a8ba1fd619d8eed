"""Responses in the form of OpenAI's API, whole or in pieces of a stream."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from delethink.serve.events import (
    Phase,
    SampledText,
    ThinkingEnded,
    ThinkingEvent,
    ToolsCalled,
    TraceEnded,
    TraceUsage,
)
from delethink.serve.plan import RequestPlan
from delethink.serve.settings import ServeSettings
from delethink.serve.thinking import ThinkingModel
from delethink.tokens import Logprobs, TokenIds

_SUMMED = ("chunks", "boundaries", "carried_tokens", "reencoded_tokens")


class TidyText:
    """Text of thinking without its opening mark, and without empty lines before it or an answer."""

    def __init__(self, start_mark: str | None) -> None:
        self._start = start_mark or ""
        self._held: str | None = ""  # ``None`` once the thinking has begun
        self._skips_lines = True
        self._is_answering = False

    def push(self, phase: Phase, text: str) -> str:
        """Return what to show of new text."""
        if phase is Phase.ANSWER:
            if not self._is_answering:
                text = text.lstrip("\r\n")
                self._is_answering = bool(text)
            return text
        if self._held is not None:
            self._held += text
            begun = self._held.lstrip()
            if len(begun) < len(self._start) and self._start.startswith(begun):
                return ""
            has_start = self._start and begun.startswith(self._start)
            text = begun[len(self._start) :] if has_start else self._held
            self._held = None
        if self._skips_lines:
            text = text.lstrip("\r\n")
            self._skips_lines = not text
        return text

    def end_thinking(self) -> str:
        """Return the text of thinking that was held back."""
        held, self._held = self._held or "", None
        return held


@dataclass
class _Choice:
    tidy: TidyText
    texts: dict[Phase, list[str]] = field(default_factory=lambda: {p: [] for p in Phase})
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    counts: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(Phase, 0))
    ended: TraceEnded | None = None
    has_begun: bool = False  # its first piece was sent
    held: list[str] = field(default_factory=list)  # text of an answer that may hold calls
    calls: tuple[Mapping[str, Any], ...] = ()  # of tools


class ResponseWriter:
    """Collects the events of a request, and writes the response.

    Attributes:
        request_id: of the response.
    """

    def __init__(
        self, plan: RequestPlan, settings: ServeSettings, model: ThinkingModel, request_id: str
    ) -> None:
        self._plan, self._settings, self._model = plan, settings, model
        self.request_id, self._created = request_id, int(time.time())
        start = model.marks.start
        self._choices = [_Choice(TidyText(start)) for _ in plan.traces]

    @property
    def is_complete(self) -> bool:
        """Return whether every trace has ended."""
        return all(choice.ended is not None for choice in self._choices)

    def pieces(self, index: int, event: ThinkingEvent) -> list[dict[str, Any]]:
        """Read an event and return the pieces of the stream that it makes."""
        choice, pieces = self._choices[index], list[dict[str, Any]]()
        if self._plan.is_chat and not choice.has_begun:
            pieces.append(self._piece(index, {"role": "assistant", "content": ""}))
        choice.has_begun = True
        for phase, text, ids, logprobs in self.read(index, event):
            hidden = phase is Phase.THINKING and not self._plan.wants_reasoning
            shown = "" if hidden else text
            if not shown and not (len(ids) and self._gives_tokens):
                continue
            pieces.append(self._text_piece(index, phase, shown, ids, logprobs))
        if isinstance(event, ToolsCalled) and event.calls:
            calls = [{"index": i, **call} for i, call in enumerate(event.calls)]
            pieces.append(self._piece(index, {"tool_calls": calls}))
        if choice.ended is not None and isinstance(event, TraceEnded):
            pieces.append(self._last_piece(index, choice))
        return pieces

    @property
    def _gives_tokens(self) -> bool:
        return self._plan.wants_token_ids or self._plan.wants_logprobs

    def read(self, index: int, event: ThinkingEvent) -> list[tuple[Phase, str, TokenIds, Logprobs]]:
        """Read an event and return the text that it adds, with its tokens."""
        choice, added = self._choices[index], list[tuple[Phase, str, TokenIds, Logprobs]]()
        is_chat = self._plan.is_chat
        if isinstance(event, SampledText):
            text = choice.tidy.push(event.phase, event.text) if is_chat else event.text
            choice.counts[event.phase] += len(event.token_ids)
            if self._plan.tools is not None and event.phase is Phase.ANSWER:
                choice.held.append(text)
                text = ""
            added.append((event.phase, text, event.token_ids, event.logprobs))
        elif isinstance(event, ThinkingEnded):
            text = choice.tidy.end_thinking() if is_chat else event.mark
            added.append((Phase.THINKING, text, (), ()))
        elif isinstance(event, ToolsCalled):
            choice.calls = event.calls
            text = event.content if event.calls else "".join(choice.held)
            added.append((Phase.ANSWER, text, (), ()))
        elif isinstance(event, TraceEnded):
            if is_chat and (text := choice.tidy.end_thinking()):
                added.append((Phase.THINKING, text, (), ()))
            choice.ended = event
        if not self._plan.is_stream:
            for phase, text, ids, logprobs in added:
                choice.texts[phase].append(text)
                if self._gives_tokens:
                    choice.token_ids += ids
                    choice.logprobs += logprobs
        return added

    # -- pieces of a stream --------------------------------------------------------------------

    def _text_piece(
        self, index: int, phase: Phase, text: str, ids: TokenIds, logprobs: Logprobs
    ) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if self._plan.wants_logprobs:
            more["logprobs"] = self._logprobs(ids, logprobs)
        if self._plan.wants_token_ids:
            more["token_ids"] = list(ids)
        names = self._settings.reasoning_fields if phase is Phase.THINKING else ("content",)
        return self._piece(index, dict.fromkeys(names, text) if text else {}, text, **more)

    def _last_piece(self, index: int, choice: _Choice) -> dict[str, Any]:
        ended = choice.ended
        assert ended is not None
        return self._piece(
            index,
            {},
            finish_reason=_finish_reason(choice),
            stop_reason=ended.stop_string,
            delethink=_block(ended),
        )

    def _piece(
        self, index: int, delta: Mapping[str, Any], text: str = "", **more: Any
    ) -> dict[str, Any]:
        content = {"delta": dict(delta)} if self._plan.is_chat else {"text": text}
        choice = {"index": index, **content, "logprobs": None, "finish_reason": None, **more}
        piece = self._envelope([choice], is_piece=True)
        if self._plan.continuous_usage:
            piece["usage"] = self.usage()
        return piece

    def usage_piece(self) -> dict[str, Any]:
        """Return the last piece of a stream, which has no choice."""
        return {**self._envelope([], is_piece=True), "usage": self.usage()}

    def _envelope(self, choices: list[dict[str, Any]], *, is_piece: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self._plan.is_chat:
            kind = "chat.completion.chunk" if is_piece else "chat.completion"
        return {
            "id": self.request_id,
            "object": kind,
            "created": self._created,
            "model": self._settings.model_name,
            "choices": choices,
        }

    # -- whole responses -----------------------------------------------------------------------

    def whole(self) -> dict[str, Any]:
        """Return the response after the last event."""
        choices = [self._whole_choice(index) for index in range(len(self._choices))]
        blocks = [_block(choice.ended) for choice in self._choices if choice.ended is not None]
        block = dict(blocks[0])
        for name in _SUMMED:
            block[name] = sum(each[name] for each in blocks)
        if nudges := sum(each.get("nudges", 0) for each in blocks):
            block["nudges"] = nudges
        block["forced_end"] = any(each["forced_end"] for each in blocks)
        whole = self._envelope(choices, is_piece=False)
        return {**whole, "usage": self.usage(), "delethink": block}

    def _whole_choice(self, index: int) -> dict[str, Any]:
        choice, plan = self._choices[index], self._plan
        assert choice.ended is not None
        thinking, answer = ("".join(choice.texts[phase]) for phase in Phase)
        result: dict[str, Any] = {"index": index}
        if plan.is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": answer}
            if plan.wants_reasoning:
                message |= dict.fromkeys(self._settings.reasoning_fields, thinking)
            if choice.calls:
                message["tool_calls"] = list(choice.calls)
            result["message"] = message
        else:
            result["text"] = thinking + answer
        result["logprobs"] = None
        if plan.wants_logprobs:
            result["logprobs"] = self._logprobs(tuple(choice.token_ids), tuple(choice.logprobs))
        if plan.wants_token_ids:
            result["token_ids"] = choice.token_ids
            result["prompt_token_ids"] = list(plan.traces[index].query_ids)
        result["finish_reason"] = _finish_reason(choice)
        result["stop_reason"] = choice.ended.stop_string
        result["delethink"] = _block(choice.ended)
        return result

    def usage(self) -> dict[str, Any]:
        """Return the tokens so far; carried tokens count once, where they were sampled."""
        usages = [
            TraceUsage(
                reasoning_tokens=choice.counts[Phase.THINKING],
                answer_tokens=choice.counts[Phase.ANSWER],
            )
            if choice.ended is None
            else choice.ended.usage
            for choice in self._choices
        ]
        prompt, sampled = self._plan.prompt_tokens, sum(u.completion_tokens for u in usages)
        reasoning = sum(usage.reasoning_tokens for usage in usages)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": sampled,
            "total_tokens": prompt + sampled,
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }

    def _logprobs(self, ids: TokenIds, logprobs: Logprobs) -> dict[str, Any]:
        texts = [str(self._model.tokenizer.decode([token])) for token in ids]
        if not self._plan.is_chat:
            return {
                "tokens": texts,
                "token_logprobs": list(logprobs),
                "top_logprobs": None,
                "text_offset": [],
            }
        entries = [
            {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
            for text, value in zip(texts, logprobs, strict=True)
        ]
        return {"content": entries}


def _finish_reason(choice: _Choice) -> str:
    assert choice.ended is not None
    if choice.ended.is_cut:
        return "length"
    return "tool_calls" if choice.calls else "stop"


def _block(ended: TraceEnded) -> dict[str, Any]:
    """Return the block ``delethink`` of a trace."""
    usage = asdict(ended.usage)
    return {
        "stop_reason": ended.reason.value,
        "forced_end": ended.reason.is_forced,
        **{name: usage[name] for name in _SUMMED},
        **({"nudges": usage["nudges"]} if usage["nudges"] else {}),
    }
