"""A trace becomes one row, whatever its chunks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delethink.errors import RolloutError
from delethink.training.batching import trace_row
from delethink.types import Chunk, ChunkRole, StopReason, Trace, TraceStop

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


@given(traces(), st.booleans())
def test_a_row_is_all_that_was_sampled_in_order(trace: Trace, in_loss: bool) -> None:
    row = trace_row(trace, pad_id=0, in_loss=in_loss)
    assert tuple(row.prompt_ids) == trace.query_ids
    assert tuple(row.completion_ids) == sum((c.output_ids for c in trace.chunks), ())
    assert tuple(row.logprobs) == sum((c.logprobs for c in trace.chunks), ())
    assert row.env_mask == [int(in_loss)] * trace.length


def test_a_trace_that_failed_at_once_is_one_masked_token() -> None:
    failed = Trace((1, 2), (Chunk((1, 2), (), (), StopReason.ERROR, error="x"),), TraceStop.ERROR)
    assert trace_row(failed, pad_id=9) == ([1, 2], [9], [0.0], [0])


def test_a_trace_that_nobody_sampled_is_not_trained_on() -> None:
    by_hand = Trace((1,), (Chunk((1,), (5, 6), (), StopReason.EOS),), TraceStop.COMPLETED)
    with pytest.raises(RolloutError, match="2 tokens has 0 log-probs"):
        trace_row(by_hand, pad_id=9)


def test_what_was_written_to_be_carried_is_trained_where_it_was_sampled() -> None:
    chunks = (
        Chunk((1,), (5, 6), (-0.1, -0.2), StopReason.LENGTH),
        Chunk((1, 5, 6, 2), (7, 0), (-0.3, -0.4), StopReason.EOS, 3, role=ChunkRole.CARRYOVER),
        Chunk((1, 7), (8, 0), (-0.5, -0.6), StopReason.EOS, 1),
    )
    trace = Trace((1,), chunks, TraceStop.COMPLETED)
    row = trace_row(trace, pad_id=9)
    assert row.completion_ids == [5, 6, 7, 0, 8, 0]
    assert sum(row.env_mask) == trace.length == 6
    assert trace.output_ids == (5, 6, 8, 0)


def test_a_chunk_that_failed_late_leaves_the_earlier_ones() -> None:
    chunks = (
        Chunk((1,), (5, 6), (-1.0, -1.0), StopReason.LENGTH),
        Chunk((1, 6), (), (), StopReason.ERROR, carried=1, error="x"),
    )
    row = trace_row(Trace((1,), chunks, TraceStop.ERROR), pad_id=9)
    assert row.completion_ids == [5, 6]
    assert row.env_mask == [1, 1]
