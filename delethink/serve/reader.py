"""Reads the tokens of a trace: text of thinking and answer, the mark between them, stop strings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from delethink.serve.events import EndReason, Phase, SampledText, ThinkingEnded
from delethink.serve.loops import LoopDetector, LoopRule
from delethink.serve.text import TextStream, first_match, length_held_back
from delethink.tokens import Logprobs, TokenIds

ReadEvent = SampledText | ThinkingEnded


@dataclass(frozen=True)
class ReadingRule:
    """Texts that end a part of a trace."""

    marks: tuple[str, ...]  # of the end of thinking
    eos_ids: Collection[int] = ()  # tokens without a text
    stops: tuple[str, ...] = ()  # stop strings
    stops_in_thinking: bool = False  # stop strings end the thinking too
    loop: LoopRule | None = None  # ends thinking that repeats itself
    nudge_ids: TokenIds | None = None  # carried past a loop, which then ends its chunk alone


class TraceReader:
    """Turns tokens into events.

    Args:
        decode: returns the text of token ids.
        rule: texts to search for.

    Attributes:
        phase: part of the trace that the next token belongs to.
        ended: reason for which no further token of this part is wanted, or ``None``.
        stop_string: the stop string found.
        loop_tokens: of the pattern of the loop found.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], rule: ReadingRule) -> None:
        self._rule = rule
        self._stream = TextStream(decode)
        self._held = ""  # text that may be the start of a mark or a stop string
        self._loop = None if rule.loop is None else LoopDetector(rule.loop)
        self.loop_tokens = 0
        self.phase = Phase.THINKING
        self.ended: EndReason | None = None
        self.stop_string: str | None = None

    def read(self, token_ids: TokenIds, logprobs: Logprobs) -> tuple[list[ReadEvent], int]:
        """Read tokens.

        Returns:
            The events, and the number of tokens read. It is less than the number of tokens where
            ``ended`` was set, or where the thinking ended: the rest belongs to the answer.
        """
        if self.ended is not None:
            return [], 0
        if self._loop is None and (text := self._plain(token_ids)) is not None:
            events = list(self._take(text))
            return _with_tokens(events, self.phase, token_ids, logprobs), len(token_ids)
        events, read, phase = list[ReadEvent](), 0, self.phase
        for token in token_ids:
            read += 1
            events += self._take(self._stream.push(self._with_text((token,))))
            if self.ended is None and phase is Phase.THINKING and self._loop is not None:
                self.loop_tokens = self._loop.push(token)
                self.ended = EndReason.LOOP if self.loop_tokens else None
            if self.ended is not None or self.phase is not phase:
                break
        return _with_tokens(events, phase, token_ids[:read], logprobs[:read]), read

    def _plain(self, token_ids: TokenIds) -> str | None:
        """Return the text of tokens in which nothing is found; then they need no closer look."""
        stream = self._stream.copy()
        text = stream.push(self._with_text(token_ids))
        if first_match(self._held + text, self._needles) is not None:
            return None
        self._stream = stream
        return text

    def _with_text(self, token_ids: TokenIds) -> TokenIds:
        ends = self._rule.eos_ids
        return tuple(token for token in token_ids if token not in ends) if ends else token_ids

    @property
    def _needles(self) -> tuple[str, ...]:
        if self.phase is Phase.ANSWER:
            return self._rule.stops
        return self._rule.marks + (self._rule.stops if self._rule.stops_in_thinking else ())

    def _take(self, text: str) -> Iterator[ReadEvent]:
        """Yield the events of new text."""
        self._held += text
        found = first_match(self._held, self._needles)
        if found is None:
            end = len(self._held) - length_held_back(self._held, self._needles)
            if end:
                yield SampledText(self.phase, self._held[:end])
                self._held = self._held[end:]
            return
        at, needle = found
        before, self._held = self._held[:at], self._held[at + len(needle) :]
        if before:
            yield SampledText(self.phase, before)
        if self.phase is Phase.THINKING and needle in self._rule.marks:
            self.phase = Phase.ANSWER
            yield ThinkingEnded(EndReason.MARK, needle)
            yield from self._take("")  # a token may hold the mark and more
        else:
            self.ended, self.stop_string, self._held = EndReason.STOP, needle, ""

    def pass_loop(self) -> None:
        """Read on after a loop, and look for the next one from here on."""
        assert self._rule.loop is not None
        self.ended, self._loop = None, LoopDetector(self._rule.loop)

    def force_end(self, reason: EndReason, mark: str) -> list[ReadEvent]:
        """End the thinking with a mark that the model did not write."""
        events = self.flush()
        self.ended = None
        if self.phase is Phase.THINKING:
            events.append(ThinkingEnded(reason, mark))
        self.phase = Phase.ANSWER
        return events

    def flush(self) -> list[ReadEvent]:
        """Return what was held back, at the end of the thinking or of the trace."""
        text = self._held + self._stream.flush()
        self._held = ""
        if not text or self.ended is EndReason.STOP:
            return []
        return [SampledText(self.phase, text)]


def _with_tokens(
    events: list[ReadEvent], phase: Phase, token_ids: TokenIds, logprobs: Logprobs
) -> list[ReadEvent]:
    """Give tokens to the first of the events, as they were sampled in the phase before."""
    if not len(token_ids):
        return events
    first = events[0] if events else None
    if isinstance(first, SampledText) and first.phase is phase:
        return [SampledText(phase, first.text, token_ids, logprobs), *events[1:]]
    return [SampledText(phase, "", token_ids, logprobs), *events]
