"""The map of a trace as SVG: a row for each context, placed along the sampled tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from delethink.trace_map import ChunkMap
from delethink.types import ChunkRole

_WIDTH = 1000  # of the drawing, which is stretched to its place
_MAX_ROWS, _HEIGHT = 400, 260  # of a map; its height in pixels, unless rows would be too low
_HIGH_ROW, _LOW_ROW = 14, 3  # height of a row with a name, and of the lowest

_KEY = (
    '<span class="key key-carried">carried over</span> <span class="key key-new">new</span> '
    '<span class="key key-lost">pale: dropped at the next reset</span> '
    '<span class="key key-cut">✂ context reset</span>'
)
_KEY_OF_ANSWER = ' <span class="key key-place">the answer</span>'


class MapBar(NamedTuple):
    """A run of neighbouring sampled tokens in one context."""

    begin: int
    end: int
    kind: str  # carried or new; with "lost" if the tokens are dropped at the next reset


class _Row(NamedTuple):
    place: int  # of the chunk, from 0, written carryovers counted
    map: ChunkMap


def map_svg(
    maps: Sequence[ChunkMap],
    total: int,
    answer: tuple[int, int] | None = None,
    *,
    most: int = _MAX_ROWS,
    height: int = _HEIGHT,
) -> str:
    """Return the map of a trace.

    Args:
        maps: the map of each chunk.
        total: sampled tokens of the trace.
        answer: sampled tokens that hold the answer: begin, end.
        most: rows; of more contexts each second, third ... has one, and the last.
        height: in pixels; more where rows would be too low, less where they are few.
    """
    total = max(1, total)
    rows, contexts = _rows(maps, most)
    count = max(1, len(rows))
    high = max(_LOW_ROW, min(_HIGH_ROW, height // count))
    drawn = [_row_svg(row, line * high, high, total) for line, row in enumerate(rows)]
    # Resets come last, so that no bar hides them.
    drawn += [_cut_svg(row.map, line * high, high, total) for line, row in enumerate(rows)]
    lines = "".join(drawn)
    if answer:
        x = _WIDTH * answer[0] / total
        lines += f'<path class="place" d="M{x:.1f} 0V{count * high}"/>'
    names = [row.map.number for row in rows]
    if high < _HIGH_ROW:
        names = [names[0], names[-1]]
    named = "".join(f"<li>chunk {number:,}</li>" for number in names)
    every = f", of which {len(rows):,} are drawn" * (len(rows) < contexts)
    label = f"map of {contexts:,} contexts{every}, placed along {total:,} sampled tokens"
    return (
        f'<div class="map-box"><ol class="map-names" aria-hidden="true">{named}</ol>'
        f'<svg class="map" viewBox="0 0 {_WIDTH} {count * high}" role="img" '
        f'height="{count * high}" preserveAspectRatio="none" aria-label="{label}">{lines}</svg>'
        "</div>"
    )


def map_key(total: int, has_answer: bool) -> str:
    """Return the explanation of the map."""
    return (
        '<p class="legend">Each row is all that the model sees at a time, beside the query, of the '
        f"{total:,} tokens it sampled. {_KEY}{_KEY_OF_ANSWER * has_answer}</p>"
    )


def _rows(maps: Sequence[ChunkMap], most: int) -> tuple[list[_Row], int]:
    """Return the contexts to draw, and the number of all."""
    found = [_Row(index, one) for index, one in enumerate(maps)
             if one.chunk.role is ChunkRole.THINKING]  # fmt: skip
    every = -(-len(found) // most)
    return (found if every < 2 else [*found[:-1:every], found[-1]]), len(found)


def _row_svg(row: _Row, y: int, high: int, total: int) -> str:
    one, scale = row.map, _WIDTH / total
    gap = 2 if high > 4 else 1
    bars = "".join(
        f'<rect class="{bar.kind}" x="{bar.begin * scale:.1f}" y="{y + gap / 2:g}" '
        f'width="{max(1.5, (bar.end - bar.begin) * scale):.1f}" height="{high - gap}"/>'
        for bar in map_bars(one)
    )
    return (
        f'<g data-chunk="{row.place + 1}"><title>{_row_text(one)}</title>'
        f'<rect class="row" x="0" y="{y}" width="{_WIDTH}" height="{high}"/>{bars}</g>'
    )


def _cut_svg(one: ChunkMap, y: int, high: int, total: int) -> str:
    if not one.has_boundary:
        return ""
    x = (one.first + len(one.chunk.output_ids)) * _WIDTH / total
    return f'<path class="cut" d="M{x:.1f} {y}v{2 * high}"/>'


def _row_text(one: ChunkMap) -> str:
    new = len(one.chunk.output_ids)
    text = f"chunk {one.number:,}: {one.num_before:,} carried + {new:,} new tokens"
    if not one.has_boundary:
        return text
    return f"{text}, {len(one.ids) - one.num_kept:,} dropped at the next reset"


def map_bars(one: ChunkMap) -> Iterator[MapBar]:
    """Yield runs of neighbouring sampled tokens with one kind and one fate."""
    run: list[Any] = []
    for place, origin in enumerate(one.origins):
        if origin < 0:
            continue
        kind = "carried" if place < one.num_before else "new"
        if one.has_boundary and place not in one.kept:
            kind += " lost"
        if run and run[1] == origin and run[2] == kind:
            run[1] = origin + 1
        else:
            if run:
                yield MapBar(*run)
            run = [origin, origin + 1, kind]
    if run:
        yield MapBar(*run)
