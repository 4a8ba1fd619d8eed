"""Map of a trace: the tokens of each context, their origin, and their fate at the next boundary.

A trace stores prompts and outputs. Which tokens were carried, from which chunk, and which were
dropped follows from comparing each prompt with the context before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from delethink.tokens import as_list
from delethink.types import Chunk, ChunkRole, StopReason, Trace

Kind = Literal["carried", "new", "asked", "written"]
Fate = Literal["kept", "dropped", "last"]

UNKNOWN = -1  # origin of a token that was sampled nowhere, or by an unknown policy


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one context with one kind and one fate."""

    kind: Kind  # asked: an instruction to write the carryover; written: by the model, to carry
    fate: Fate  # last: no boundary follows
    begin: int  # position among the tokens of the context, without the query
    end: int

    def __len__(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class ChunkMap:
    """The tokens of a context after the query: carried or asked ones, then the sampled ones."""

    chunk: Chunk
    number: int  # from 1; a written carryover has the number of the chunk before it
    ids: list[int]
    origins: list[int]  # position of each token among all sampled ones, or ``UNKNOWN``
    num_before: int  # tokens before the sampled ones
    first: int  # position of the first sampled token among all sampled ones
    kept: frozenset[int]  # positions in ``ids`` of the tokens that go over the next boundary
    has_boundary: bool  # a boundary follows

    @cached_property
    def segments(self) -> list[Segment]:
        """Return the runs of tokens with one kind and one fate, in order."""
        written = self.chunk.role is ChunkRole.CARRYOVER
        found: list[Segment] = []
        for place in range(len(self.ids)):
            is_new = place >= self.num_before
            kind: Kind = ("written" if is_new else "asked") if written else _kind(is_new)
            fate: Fate = "last"
            if self.has_boundary:
                fate = "kept" if place in self.kept else "dropped"
            if found and (found[-1].kind, found[-1].fate) == (kind, fate):
                found[-1] = Segment(kind, fate, found[-1].begin, place + 1)
            else:
                found.append(Segment(kind, fate, place, place + 1))
        return found

    @property
    def num_kept(self) -> int:
        """Return the number of tokens that go over the next boundary."""
        return len(self.kept)


def _kind(is_new: bool) -> Kind:
    return "new" if is_new else "carried"


def map_trace(trace: Trace) -> list[ChunkMap]:
    """Return the map of each chunk of a trace, in order."""
    chunks = trace.chunks
    parts: list[tuple[list[int], list[int], int]] = []  # ids and origins of a context, first
    matches: list[list[int]] = []  # for each chunk: places in the contexts before it
    first, number_of_query, head = 0, len(trace.query_ids), _head_of(trace)
    for index, chunk in enumerate(chunks):
        before = as_list(chunk.prompt_ids)[number_of_query:]
        output = as_list(chunk.output_ids)
        places, origins = _sources(before, index, chunks, parts, head)
        matches.append(places)
        sampled = list(range(first, first + len(output)))
        parts.append((before + output, origins + sampled, first))
        first += len(output)
    return [_chunk_map(trace, index, parts, matches) for index in range(len(chunks))]


def _sources(
    before: list[int],
    index: int,
    chunks: Sequence[Chunk],
    parts: Sequence[tuple[list[int], list[int], int]],
    head: int,
) -> tuple[list[int], list[int]]:
    """Return the place of each prompt token in the context before, and its origin."""
    if not index:
        return [UNKNOWN] * len(before), [UNKNOWN] * len(before)
    ids, known, _ = parts[index - 1]
    if chunks[index - 1].role is ChunkRole.CARRYOVER:  # the text that the model wrote
        written = as_list(chunks[index - 1].output_ids)
        if chunks[index - 1].stop is StopReason.EOS:
            written = written[:-1]
        shift = len(ids) - len(chunks[index - 1].output_ids)
        places = match_tokens(before, written)
        places = [place if place == UNKNOWN else place + shift for place in places]
        # A head that is carried beside the text stands at the start of the contexts.
        for place in range(len(before)):
            if places[place] != UNKNOWN or before[place : place + 1] != ids[place : place + 1]:
                break
            places[place] = place
    elif chunks[index].role is ChunkRole.CARRYOVER:
        places = [place if place < len(ids) else UNKNOWN for place in range(len(before))]
    else:
        places = match_tokens(before, ids, head)
    origins = [UNKNOWN if place == UNKNOWN else known[place] for place in places]
    return places, origins


def match_tokens(carried: Sequence[int], context: Sequence[int], head: int = 0) -> list[int]:
    """Return the place in ``context`` of each carried token, or ``UNKNOWN``.

    Policies carry the end of the context, its start and its end, or one block of it. Equal tokens
    may stand at both places; ``head`` are known to come from the start, as at other boundaries.
    """
    count, total = len(carried), len(context)
    first, last = _common(carried, context)
    head = max(head if count - last <= head <= first else 0, count - last)
    if head > first:
        block = _find(list(carried), list(context))
        if block is not None:
            return list(range(block, block + count))
        head = first
    middle = [UNKNOWN] * (count - head - last)
    return [*range(head), *middle, *range(total - (count - head - len(middle)), total)]


def _common(carried: Sequence[int], context: Sequence[int]) -> tuple[int, int]:
    """Return how many tokens are equal from the start, and from the end."""
    most = min(len(carried), len(context))
    first = last = 0
    while first < most and carried[first] == context[first]:
        first += 1
    while last < most and carried[-1 - last] == context[-1 - last]:
        last += 1
    return first, last


def _head_of(trace: Trace) -> int:
    """Return the tokens that surely come from the start of the trace at some boundary."""
    query, head = len(trace.query_ids), 0
    for before, after in itertools.pairwise(trace.chunks):
        if after.role is ChunkRole.THINKING and before.role is ChunkRole.THINKING:
            carried = as_list(after.prompt_ids)[query:]
            context = as_list(before.prompt_ids)[query:] + as_list(before.output_ids)
            first, last = _common(carried, context)
            if len(carried) - last <= first:
                head = max(head, len(carried) - last)
    return head


def _find(part: list[int], whole: list[int]) -> int | None:
    """Return the last place of a run of tokens in a longer one."""
    for begin in range(len(whole) - len(part), -1, -1):
        if whole[begin] == part[0] and whole[begin : begin + len(part)] == part:
            return begin
    return None


def _chunk_map(
    trace: Trace,
    index: int,
    parts: Sequence[tuple[list[int], list[int], int]],
    matches: Sequence[list[int]],
) -> ChunkMap:
    chunk = trace.chunks[index]
    ids, origins, first = parts[index]
    thinking = sum(c.role is ChunkRole.THINKING for c in trace.chunks[: index + 1])
    following = index + 1 < len(trace.chunks)
    kept = frozenset(place for place in matches[index + 1] if place >= 0) if following else None
    if following and trace.chunks[index + 1].role is ChunkRole.CARRYOVER:
        # The tokens stay for the written carryover, and go at the boundary behind it.
        behind = index + 2 < len(trace.chunks)
        head = matches[index + 2] if behind else []
        kept = frozenset(place for place in head if 0 <= place < len(matches[index + 1]))
        kept = frozenset(place for place in kept if place < len(ids))
        following = behind
    return ChunkMap(
        chunk, thinking, ids, origins, len(ids) - len(chunk.output_ids), first,
        kept or frozenset(), following,
    )  # fmt: skip


def chunk_of(maps: Sequence[ChunkMap], position: int) -> ChunkMap | None:
    """Return the chunk that sampled a token, by its position among all sampled ones."""
    for one in maps:
        if one.first <= position < one.first + len(one.chunk.output_ids):
            return one
    return None


def origin_text(one: ChunkMap, maps: Sequence[ChunkMap], segment: Segment) -> str:
    """Return the chunks in which the tokens of a segment were sampled, in words."""
    numbers: dict[int, int] = {}
    unknown = 0
    for origin in one.origins[segment.begin : segment.end]:
        source = chunk_of(maps, origin) if origin != UNKNOWN else None
        if source is None:
            unknown += 1
        else:
            numbers[source.number] = numbers.get(source.number, 0) + 1
    if len(numbers) == 1 and not unknown:
        return f"from chunk {next(iter(numbers))}"
    texts = [f"{count:,} from chunk {number}" for number, count in numbers.items()]
    if unknown and numbers:
        texts.append(f"{unknown:,} made by the carryover policy")
    elif unknown:
        return "made by the carryover policy"
    return ", ".join(texts)
