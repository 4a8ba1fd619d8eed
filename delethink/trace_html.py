"""A trace drawn as HTML without scripts: each context, its carryover, and what a reset drops.

Texts of a model are untrusted. All of them pass ``html_text``: secrets are redacted, characters
that move a cursor, hide text or turn its direction are spelled out, and markup is escaped.
"""

from __future__ import annotations

import bisect
import html
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

from delethink.output import safe_text
from delethink.scoring.answer import answer_span
from delethink.tokens import as_list
from delethink.trace_map import ChunkMap, Segment, map_trace, origin_text
from delethink.trace_svg import map_key, map_svg
from delethink.types import END_OF_THINKING, ChunkRole, StopReason, Trace, TraceStop

TokenTexts = Callable[[Sequence[int]], list[str]]
"""Returns the text of each token id."""

# Lower bounds of the shades 1 to 4, in nats. Below the first, a token is not shaded.
SHADES: dict[str, tuple[str, tuple[float, ...]]] = {
    "logprob": (
        "surprise (-log-prob)",
        (0.1, 0.7, 2.3, 4.6),
    ),  # probabilities 0.9, 0.5, 0.1 and 0.01
    "entropy": ("entropy", (0.1, 0.5, 1.0, 2.0)),
    "difference": ("|engine - trainer|", (0.001, 0.01, 0.05, 0.2)),
}
_MAX_SINGLE_TOKENS = 20_000  # of a whole page; a longer trace merges tokens of one shade
MAX_ANSWER_CHARACTERS = 200  # of answers beside each other; the whole is in the trace
_CARD_ROWS, _CARD_HEIGHT = 40, 130  # of the map of a trace beside others
_MARKS = {"kept": "✓", "dropped": "✕", "last": "■"}


@cache
def trace_style() -> str:
    """Return the style sheet of drawn traces."""
    return files("delethink").joinpath("assets/view/trace.css").read_text(encoding="utf-8")


def html_text(text: str) -> str:
    """Return a text for HTML, inside an element or an attribute in double quotes."""
    return html.escape(safe_text(text), quote=True)


def token_texts(tokenizer: Any) -> TokenTexts:
    """Return a function from token ids to the text of each; without a tokenizer, to their numbers.

    The texts join to the decoded text: a character of several tokens stands at its last one.
    """
    if tokenizer is None:
        return lambda ids: [f"⟨{number}⟩" for number in ids]
    alone: dict[tuple[int, ...], str] = {}

    def decode(ids: tuple[int, ...]) -> str:
        if ids not in alone:
            alone[ids] = str(tokenizer.decode(list(ids)))
        return alone[ids]

    def texts(ids: Sequence[int]) -> list[str]:
        found: list[str] = []
        pending: tuple[int, ...] = ()
        before: tuple[int, ...] = ()
        for number in ids:
            pending = (*pending, int(number))
            text = decode(before + pending)
            start = decode(before) if before else ""
            if text.endswith("\ufffd") and len(pending) < _MAX_CHARACTER_TOKENS:
                found.append("")  # part of a character
                continue
            found.append(text[len(start) :] if text.startswith(start) else decode(pending))
            pending, before = (), pending[-1:]
        if pending:
            found[-1] = decode(before + pending)[len(decode(before)) if before else 0 :]
        return found

    return texts


_MAX_CHARACTER_TOKENS = 6


@dataclass(frozen=True)
class JudgedAnswer:
    """The model's own answer beside the gold answer, and its score."""

    gold: str | None  # ``None``: not known
    said: str | None  # ``None``: no answer was found
    score: float | None = None  # 1 if right; ``None``: not scored
    reward: str = ""  # name of the reward that scored

    @property
    def word(self) -> str:
        """Return ``right``, ``wrong``, ``partly right`` or ``not scored``."""
        if self.score is None:
            return "not scored"
        return "right" if self.score >= 1 else "partly right" if self.score > 0 else "wrong"


@dataclass(frozen=True)
class TraceView:
    """A trace with everything to show about it."""

    trace: Trace
    texts: TokenTexts
    title: str = "trace"
    facts: Mapping[str, object] = field(default_factory=dict)  # shown above it, in this order
    notes: Mapping[str, str] = field(default_factory=dict)  # longer texts, such as errors
    answer: tuple[int, int] | None = None  # sampled tokens that hold the answer: begin, end
    # per chunk, a value for each sampled token; beside log-probs, what a run has stored
    values: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    workers: Sequence[str | None] = ()  # of each chunk
    verdict: JudgedAnswer | None = None
    context_size: int | None = None  # C, where it is known
    is_open: bool = False  # the last chunk is still being sampled

    @cached_property
    def maps(self) -> list[ChunkMap]:
        """Return the map of each chunk."""
        return map_trace(self.trace)

    @cached_property
    def shades(self) -> list[str]:
        """Return the names of the shadings with values."""
        has_logprobs = any(len(chunk.logprobs) for chunk in self.trace.chunks)
        return ["logprob"] * has_logprobs + [name for name in SHADES if name in self.values]

    def sampled_text(self, begin: int, end: int) -> str:
        """Return the text of sampled tokens, by their places in the trace."""
        ids = [i for chunk in self.trace.chunks for i in as_list(chunk.output_ids)]
        return "".join(self.texts(ids[begin:end]))

    def value(self, name: str, index: int, place: int) -> float | None:
        """Return the value of a sampled token, by chunk and place in its output."""
        if name == "logprob":
            found: Sequence[float] = self.trace.chunks[index].logprobs
        else:
            found = self.values[name][index] if index < len(self.values[name]) else ()
        return float(found[place]) if place < len(found) else None


def answer_place(
    trace: Trace, texts: TokenTexts, end_of_thinking: str | None = END_OF_THINKING
) -> tuple[int, int] | None:
    """Return the sampled tokens that hold the final answer, as begin and end; ``None`` without."""
    pieces: list[str] = []
    places: list[int] = []  # among all sampled tokens
    first = 0
    for chunk in trace.chunks:
        if chunk.role is ChunkRole.THINKING:
            pieces += texts(as_list(chunk.output_ids))
            places += range(first, first + len(chunk.output_ids))
        first += len(chunk.output_ids)
    text = "".join(pieces)
    if trace.stop is TraceStop.COMPLETED and pieces:
        text = text[: len(text) - len(pieces[-1])]  # the end of the answer is no part of it
    span = answer_span(text, end_of_thinking)
    if span is None:
        return None
    ends = list(itertools.accumulate(map(len, pieces)))
    begin = bisect.bisect_right(ends, span[0])
    end = bisect.bisect_left(ends, span[1])
    return places[begin], places[min(end, len(places) - 1)] + 1


# -- pieces ------------------------------------------------------------------------------------


def tokens_html(view: TraceView, index: int, begin: int, end: int, *, single: bool = True) -> str:
    """Return tokens of a context as spans; ``single`` keeps each token apart, with its values.

    Args:
        view: the trace.
        index: the chunk, from 0.
        begin: first token, a place after the query.
        end: the place after the last token.
        single: one element for each token.
    """
    one = view.maps[index]
    pieces = view.texts(one.ids[begin:end])
    spans, last_class = [], None
    for place, piece in zip(range(begin, end), pieces, strict=True):
        classes = _classes(view, index, one, place)
        if single:
            title = html_text(_title(view, index, one, place))
            spans.append(f'<i class="{classes}" title="{title}">{html_text(piece)}</i>')
        elif classes == last_class:
            spans[-1] += html_text(piece)
        else:
            spans.append(f'</i><i class="{classes}">{html_text(piece)}')
        last_class = classes
    if single:
        return "".join(spans)
    return ("".join(spans).removeprefix("</i>") + "</i>") if spans else ""


def _classes(view: TraceView, index: int, one: ChunkMap, place: int) -> str:
    classes = ["t"]
    sampled = place - one.num_before
    for name in view.shades if sampled >= 0 else ():
        value = view.value(name, index, sampled)
        if value is not None:
            size = -value if name == "logprob" else abs(value)
            level = sum(size >= bound for bound in SHADES[name][1])
            classes += [f"{name[0]}{level}"] * (level > 0)
    origin = one.origins[place]
    if view.answer and view.answer[0] <= origin < view.answer[1]:
        classes.append("answer")
    return " ".join(classes)


def _title(view: TraceView, index: int, one: ChunkMap, place: int) -> str:
    sampled, origin = place - one.num_before, one.origins[place]
    parts = [f"token {origin + 1:,} of the trace" if origin >= 0 else "not sampled"]
    parts.append(f"id {one.ids[place]}")
    if sampled >= 0:
        for name in view.shades:
            value = view.value(name, index, sampled)
            if value is not None:
                parts.append(f"{'log-prob' if name == 'logprob' else name} {value:.3f}")
    return " · ".join(parts)


_KINDS = {
    "carried": "carried over",
    "new": "new",
    "asked": "the context again, with an instruction",
    "written": "written by the model, to be carried",
}
_FATES = {"kept": "survives the next reset", "dropped": "dropped at the next reset", "last": ""}


def segment_heading(view: TraceView, index: int, segment: Segment) -> str:
    """Return the heading of a segment: kind, number of tokens, origin and fate."""
    one = view.maps[index]
    parts = [f"<b>{_KINDS[segment.kind]}</b>"]
    if segment.kind == "carried":
        parts[0] += f" {html_text(origin_text(one, view.maps, segment))}"
    count = len(segment)
    parts.append(f"{count:,} token{'s' * (count != 1)}")
    if segment.fate != "last":
        parts.append(f'<span class="fate">{_MARKS[segment.fate]} {_FATES[segment.fate]}</span>')
    return " · ".join(parts)


def chunk_heading(view: TraceView, index: int) -> str:
    """Return the heading of a context: its number, sizes, policy version, worker and stop."""
    one, chunk = view.maps[index], view.trace.chunks[index]
    total = view.maps[-1].number
    if chunk.role is ChunkRole.CARRYOVER:
        name = f"Carryover written after chunk {one.number}"
        facts = [f"{len(chunk.output_ids):,} tokens"]
    else:
        name = f"Chunk {one.number} of {total}"
        facts = [f"{one.num_before:,} carried + {len(chunk.output_ids):,} new tokens"]
    if chunk.policy_version is not None:
        facts.append(f"policy version {chunk.policy_version}")
    if index < len(view.workers) and view.workers[index] is not None:
        facts.append(str(view.workers[index]))
    facts.append(_stop_text(view, index))
    if view.answer and one.first <= view.answer[0] < one.first + len(chunk.output_ids):
        facts.append(f"the answer is here, at token {view.answer[0] - one.first + 1:,}")
    text = html_text(" · ".join(facts))
    error = f'<p class="error">{html_text(chunk.error)}</p>' if chunk.error else ""
    return f'<h2 id="chunk-{index + 1}">{name} <small>{text}</small></h2>{error}'


def _stop_text(view: TraceView, index: int) -> str:
    chunk, one = view.trace.chunks[index], view.maps[index]
    is_last = index == len(view.trace.chunks) - 1
    if view.is_open and is_last:
        return "being sampled"
    if chunk.stop is not StopReason.LENGTH:
        reasons = {
            StopReason.EOS: "ended by the model (eos)",
            StopReason.ABORT: "aborted (abort)",
            StopReason.ERROR: "failed (error)",
        }
        return reasons[chunk.stop]
    if is_last and view.trace.stop is TraceStop.BUDGET:
        return "stopped: the budget is used up (length)"
    if chunk.role is ChunkRole.CARRYOVER:
        return "stopped: as long as a carryover may be (length)"
    if view.context_size is None or is_last:
        return "stopped (length)" if is_last else "stopped for a context reset (length)"
    if len(one.ids) >= view.context_size:
        return f"stopped: the context of {view.context_size:,} tokens is full (length)"
    return f"stopped early, at {len(one.ids):,} of {view.context_size:,} tokens (length)"


def boundary_html(view: TraceView, index: int) -> str:
    """Return the bar of the boundary after a chunk; empty if none follows."""
    one = view.maps[index]
    following = view.maps[index + 1] if index + 1 < len(view.maps) else None
    if following is None or not one.has_boundary:
        return ""
    if following.chunk.role is ChunkRole.CARRYOVER:
        return ""  # the boundary is behind the text that the model writes
    carried, context = following.num_before, len(one.ids)
    dropped = context - one.num_kept
    return (
        f'<div class="boundary" role="separator"><b>✂ context reset</b> '
        f"{dropped:,} of {context:,} tokens dropped, {carried:,} carried over; "
        "the next chunk sees the query and the carried tokens only</div>"
    )


def verdict_html(view: TraceView) -> str:
    """Return the model's answer beside the gold answer, and the verdict; empty without one."""
    found = view.verdict
    if found is None:
        return ""
    mark = {"right": "✓", "wrong": "✕", "partly right": "◐", "not scored": "?"}[found.word]
    by = ""
    if found.score is not None and found.reward:
        by = f"{html_text(found.reward)} {_shown(float(found.score))}"
    said = "none" if found.said is None else _answer_html(found.said)
    if found.said is None and view.trace.stop is TraceStop.BUDGET:
        said = "none: the budget was used up"
    gold = "not known" if found.gold is None else _answer_html(found.gold)
    return (
        f'<dl class="verdict {found.word.replace(" ", "-")}">'
        f"<div><dt>verdict</dt><dd><b>{mark} {found.word}</b> <small>{by}</small></dd></div>"
        f"<div><dt>the model's answer</dt><dd>{said}</dd></div>"
        f"<div><dt>gold answer</dt><dd>{gold}</dd></div></dl>"
    )


def _answer_html(text: str) -> str:
    cut = "…" * (len(text) > MAX_ANSWER_CHARACTERS)
    return f"<code>{html_text(text[:MAX_ANSWER_CHARACTERS])}{cut}</code>"


def head_html(view: TraceView) -> str:
    """Return everything above the contexts: title, verdict, facts and map."""
    total = view.trace.length
    return (
        f"<h1>{html_text(view.title)}</h1>{verdict_html(view)}{facts_html(view)}"
        f"{map_svg(view.maps, total, view.answer)}{map_key(total, view.answer is not None)}"
    )


# -- whole traces ------------------------------------------------------------------------------


@dataclass(frozen=True)
class TracePart:
    """A piece of a drawn trace: the query, a heading, some tokens, or a boundary."""

    index: int  # the chunk, from 0
    html: str = ""  # of a part without tokens
    segment: Segment | None = None
    begin: int = 0  # tokens of the segment
    end: int = 0

    @property
    def weight(self) -> int:
        """Return a measure of its size on a page: its tokens, or those a line would have."""
        return max(20, self.end - self.begin)


def trace_parts(view: TraceView, most: int) -> list[TracePart]:
    """Return all parts of a trace in order, none with more than ``most`` tokens."""
    parts = [TracePart(0, _query_html(view))]
    for index, one in enumerate(view.maps):
        parts.append(TracePart(index, chunk_heading(view, index)))
        for segment in one.segments:
            for begin in range(segment.begin, segment.end, most):
                end = min(begin + most, segment.end)
                parts.append(TracePart(index, "", segment, begin, end))
        if bar := boundary_html(view, index):
            parts.append(TracePart(index, bar))
    parts.append(TracePart(len(view.maps) - 1, _end_html(view)))
    return parts


def part_html(view: TraceView, part: TracePart, *, single: bool = True) -> str:
    """Return the HTML of a part."""
    if part.segment is None:
        return part.html
    heading = ""
    if part.begin == part.segment.begin:
        heading = f"<h3>{segment_heading(view, part.index, part.segment)}</h3>"
    tokens = tokens_html(view, part.index, part.begin, part.end, single=single)
    # HTML drops one line break after <pre>; the extra one keeps one that the text begins with.
    return (
        f'<div class="seg {part.segment.kind} {part.segment.fate}">{heading}<pre>\n{tokens}</pre>'
        "</div>"
    )


def _query_html(view: TraceView) -> str:
    count = len(view.trace.query_ids)
    text = html_text("".join(view.texts(as_list(view.trace.query_ids))))
    return (
        f'<h2 id="query">Query <small>{count:,} tokens · at the start of every context</small></h2>'
        f'<div class="seg query"><pre>\n{text}</pre></div>'
    )


def _end_html(view: TraceView) -> str:
    if view.is_open:
        return '<div class="end">the trace is not finished</div>'
    words = {
        TraceStop.COMPLETED: "the model ended its answer (completed)",
        TraceStop.BUDGET: "the budget was used up before the model ended its answer (budget)",
        TraceStop.ABORTED: "the trace was aborted (aborted)",
        TraceStop.ERROR: "the trace failed (error)",
        TraceStop.CUT: "chunks were removed from the end (cut)",
    }
    return f'<div class="end">End: {words[view.trace.stop]}</div>'


def facts_html(view: TraceView) -> str:
    """Return the facts and longer notes above a trace."""
    facts = "".join(
        f"<div><dt>{html_text(str(name))}</dt><dd>{html_text(_shown(value))}</dd></div>"
        for name, value in view.facts.items()
    )
    notes = "".join(
        f"<details><summary>{html_text(name)}</summary><pre>\n{html_text(text)}</pre></details>"
        for name, text in view.notes.items()
        if text
    )
    return f'<dl class="facts">{facts}</dl>{notes}'


def _shown(value: object) -> str:
    if value is None:
        return "none"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def card_html(view: TraceView) -> str:
    """Return a trace in short, to stand beside others: verdict and map."""
    drawn = map_svg(view.maps, view.trace.length, view.answer, most=_CARD_ROWS, height=_CARD_HEIGHT)
    return f"{verdict_html(view)}{drawn}"


def shading_html(view: TraceView, group: str) -> str:
    """Return radio buttons that shade the tokens of the trace after them, without a script."""
    choices = ["none", *view.shades]
    buttons = "".join(
        f'<label><input type="radio" name="{group}" class="by-{name}"'
        f"{' checked' * (name == 'none')}> {SHADES[name][0] if name in SHADES else 'no shading'}"
        "</label>"
        for name in choices
    )
    return f'<fieldset class="shading"><legend>Shade tokens by</legend>{buttons}</fieldset>'


def trace_html(view: TraceView, group: str = "shading") -> str:
    """Return a trace as an HTML fragment; ``trace_style`` styles it.

    ``group`` is the name of its radio buttons, different for each trace on a page.
    """
    single = view.trace.length <= _MAX_SINGLE_TOKENS
    parts = "".join(part_html(view, part, single=single) for part in trace_parts(view, 10**9))
    shading = shading_html(view, group) if view.shades else ""
    return f'<article class="trace">{head_html(view)}{shading}{parts}</article>'


def page_html(title: str, body: str) -> str:
    """Return a self-contained page: one file, without scripts, that works offline."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html_text(title)}</title><style>{trace_style()}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def sections_html(parts: Sequence[tuple[str, str, str]], facts: Mapping[str, object]) -> str:
    """Return labelled texts as an HTML fragment with its style, where there is no trace.

    ``parts`` has the class, heading and text of each: query, carried or new.
    """
    sections = "".join(
        f"<section><h3>{html_text(heading)}</h3>"
        f'<div class="seg {html_text(kind)}"><pre>\n{html_text(text)}</pre></div></section>'
        for kind, heading, text in parts
    )
    line = html_text(" · ".join(f"{name} {value}" for name, value in facts.items()))
    return f'<style>{trace_style()}</style><article class="trace"><p>{line}</p>{sections}</article>'
