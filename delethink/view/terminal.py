"""A trace in the terminal, with its boundaries; in colours where the output is a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from delethink.output import open_console, safe_text
from delethink.tokens import as_list
from delethink.trace_html import MAX_ANSWER_CHARACTERS, JudgedAnswer, TraceView
from delethink.trace_map import ChunkMap, Segment, origin_text
from delethink.types import ChunkRole

if TYPE_CHECKING:
    from rich.console import Console

_HEADS = {"carried": "> carried over", "new": "+ new", "asked": "? asked", "written": "= written"}
_FATES = {"kept": ", survives the next reset", "dropped": ", dropped at the next reset", "last": ""}
_STYLES = {"carried": "yellow", "new": "green", "asked": "cyan", "written": "yellow"}


class StyledLine(NamedTuple):
    """A line of the terminal with the style of ``rich``."""

    text: str
    style: str = ""


def trace_lines(view: TraceView) -> Iterator[StyledLine]:
    """Yield the lines of a trace: facts, query, each context, and each boundary."""
    yield StyledLine(view.title, "bold")
    yield StyledLine("  ".join(f"{name} {value}" for name, value in view.facts.items()))
    if view.verdict is not None:
        yield _verdict_line(view.verdict)
    for name, text in view.notes.items():
        if text:
            yield StyledLine(f"{name}: {text}")
    count = len(view.trace.query_ids)
    yield StyledLine(f"\nquery, {count:,} tokens, at the start of every context", "bold blue")
    yield StyledLine("".join(view.texts(as_list(view.trace.query_ids))), "blue")
    total = view.maps[-1].number if view.maps else 0
    for index, one in enumerate(view.maps):
        yield StyledLine(f"\n{_heading(one, total)}", "bold")
        for segment in one.segments:
            yield from _segment_lines(view, index, segment)
        following = view.maps[index + 1] if index + 1 < len(view.maps) else None
        is_boundary = following is not None and following.chunk.role is ChunkRole.THINKING
        if one.has_boundary and is_boundary and following is not None:
            dropped = len(one.ids) - one.num_kept
            yield StyledLine(
                f"\n---- context reset: {dropped:,} of {len(one.ids):,} tokens dropped, "
                f"{following.num_before:,} carried over ----",
                "bold red",
            )
    yield StyledLine(f"\nend: {'not finished' if view.is_open else view.trace.stop.value}", "bold")


def _verdict_line(verdict: JudgedAnswer) -> StyledLine:
    said, gold = (
        "none" if text is None else text[:MAX_ANSWER_CHARACTERS]
        for text in (verdict.said, verdict.gold)
    )
    style = {"right": "bold green", "wrong": "bold red"}.get(verdict.word, "bold")
    return StyledLine(f"{verdict.word}: the model's answer {said}, gold answer {gold}", style)


def _heading(one: ChunkMap, total: int) -> str:
    chunk = one.chunk
    if chunk.role is ChunkRole.CARRYOVER:
        return f"carryover written after chunk {one.number}"
    version = "" if chunk.policy_version is None else f", policy version {chunk.policy_version}"
    error = f", error: {chunk.error}" if chunk.error else ""
    return (
        f"chunk {one.number} of {total}: {one.num_before:,} carried + "
        f"{len(chunk.output_ids):,} new tokens{version}, stop {chunk.stop.value}{error}"
    )


def _segment_lines(view: TraceView, index: int, segment: Segment) -> Iterator[StyledLine]:
    one = view.maps[index]
    origin = f" {origin_text(one, view.maps, segment)}" if segment.kind == "carried" else ""
    head = f"{_HEADS[segment.kind]}{origin}, {len(segment):,} tokens{_FATES[segment.fate]}"
    style = _STYLES[segment.kind]
    yield StyledLine(head, f"bold {style}")
    text = "".join(view.texts(one.ids[segment.begin : segment.end]))
    yield StyledLine(text, f"{style} strike" if segment.fate == "dropped" else style)


def print_trace(view: TraceView, console: Console | None = None) -> None:
    """Print a trace, on standard output by default."""
    from rich.text import Text

    console = console or open_console()
    for line in trace_lines(view):
        console.print(Text(safe_text(line.text), style=line.style), soft_wrap=True)
