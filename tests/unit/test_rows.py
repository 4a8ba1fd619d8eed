"""A trace becomes one row and the row's mask alone says where its chunks lie."""

from hypothesis import given
from hypothesis import strategies as st

from delethink.training.rows import flatten, spans
from delethink.types import Chunk, StopReason, Trace, TraceStop

tokens = st.lists(st.integers(0, 50), min_size=1, max_size=6).map(tuple)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    query = draw(tokens)
    outputs = draw(st.lists(tokens, min_size=1, max_size=5))
    chunks = []
    for i, output in enumerate(outputs):
        prompt = query if i == 0 else query + draw(tokens)
        logprobs = tuple(-float(t) - 0.5 for t in output)
        chunks.append(Chunk(prompt, output, logprobs, StopReason.LENGTH))
    return Trace(query, tuple(chunks), TraceStop.BUDGET)


@given(traces(), st.integers(0, 5))
def test_a_row_gives_back_every_chunk(trace: Trace, padding: int) -> None:
    row = flatten(trace, pad_id=0)
    found = spans(row.mask + [0] * padding)
    assert len(found) == len(trace.chunks)
    for i, (span, chunk) in enumerate(zip(found, trace.chunks, strict=True)):
        prompt = row.completion_ids[span.start : span.output] if i else row.prompt_ids
        assert tuple(prompt) == chunk.prompt_ids
        assert tuple(row.completion_ids[span.output : span.end]) == chunk.output_ids
        assert tuple(row.logprobs[span.output : span.end]) == chunk.logprobs


@given(traces())
def test_the_mask_counts_each_sampled_token_once(trace: Trace) -> None:
    row = flatten(trace, pad_id=0)
    assert sum(row.mask) == trace.length
    assert len(row.mask) == len(row.completion_ids) == len(row.logprobs)


def test_a_worked_example() -> None:
    first = Chunk((1, 2), (5, 6), (-0.1, -0.2), StopReason.LENGTH)
    second = Chunk((1, 2, 6), (7,), (-0.3,), StopReason.EOS, carried=1)
    row = flatten(Trace((1, 2), (first, second), TraceStop.COMPLETED), pad_id=0)
    assert row.prompt_ids == [1, 2]
    assert row.completion_ids == [5, 6, 1, 2, 6, 7]
    assert row.mask == [1, 1, 0, 0, 0, 1]
    assert row.logprobs == [-0.1, -0.2, 0.0, 0.0, 0.0, -0.3]
    assert spans(row.mask) == [(0, 0, 2), (2, 5, 6)]


def test_a_trace_that_failed_at_once_is_one_masked_token() -> None:
    failed = Trace((1, 2), (Chunk((1, 2), (), (), StopReason.ERROR, error="x"),), TraceStop.ERROR)
    assert flatten(failed, pad_id=9) == ([1, 2], [9], [0.0], [0])
    assert spans([0]) == []


def test_a_chunk_that_failed_late_leaves_the_earlier_ones() -> None:
    chunks = (
        Chunk((1,), (5, 6), (-1.0, -1.0), StopReason.LENGTH),
        Chunk((1, 6), (), (), StopReason.ERROR, carried=1, error="x"),
    )
    row = flatten(Trace((1,), chunks, TraceStop.ERROR), pad_id=9)
    assert row.completion_ids == [5, 6]
    assert row.mask == [1, 1]
