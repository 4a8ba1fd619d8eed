"""Traces on disk come back as they were, or not at all, with the reason."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delethink.chunking import ChunkSpec
from delethink.envs.spaces import CharacterTokenizer
from delethink.envs.thinking import ThinkingEnv
from delethink.errors import MissingExtraError, RolloutError, TraceFileError
from delethink.policy import Sampling, ScriptedPolicy
from delethink.rollout import cut_trace, extend_trace, replay_trace, retrace
from delethink.trace_io import (
    TRACE_VERSION,
    TraceRecord,
    read_traces,
    to_dataset,
    write_traces,
)
from delethink.types import Chunk, ChunkRole, Problem, StopReason, Trace, TraceStop

ids = st.lists(st.integers(0, 2**40), max_size=4).map(tuple)
numbers = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), numbers, st.text()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    prompt, output = draw(ids), draw(ids)
    return Chunk(
        prompt_ids=prompt,
        output_ids=output,
        logprobs=tuple(draw(numbers) for _ in output),
        stop=draw(st.sampled_from(StopReason)),
        carried=draw(st.integers(0, len(prompt))),
        policy_version=draw(st.one_of(st.none(), st.integers(0, 9))),
        error=draw(st.one_of(st.none(), st.text())),
        role=draw(st.sampled_from(ChunkRole)),
        worker=draw(st.one_of(st.none(), st.text())),
    )


records = st.builds(
    TraceRecord,
    problem=st.builds(Problem, st.text(), st.text(), st.dictionaries(st.text(), plain, max_size=3)),
    trace=st.builds(
        Trace, ids, st.lists(chunks(), max_size=3).map(tuple), st.sampled_from(TraceStop)
    ),
    rewards=st.dictionaries(st.text(), st.one_of(st.none(), numbers), max_size=3),
    advantage=st.one_of(st.none(), numbers),
    text=st.one_of(st.none(), st.text()),
)


@given(st.lists(records, max_size=3))
def test_json_lines_come_back_without_loss(tmp_path_factory: Any, some: list[TraceRecord]) -> None:
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    write_traces(path, some)
    assert list(read_traces(path)) == some
    assert len(path.read_text().splitlines()) == len(some)


SPEC = ChunkSpec(16, 4, 3, 0)
PROBLEM = Problem("01:00000", "11111", {"steps": 1})
TOKENIZER = CharacterTokenizer(before_thinking="")


def tokens(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text)["input_ids"])


def record() -> TraceRecord:
    env = ThinkingEnv(tokenizer=TOKENIZER, chunk_spec=SPEC)
    env.reset(options={"problem": PROBLEM})
    env.step(tokens("00:11111\n00:1111"))
    env.step(tokens("1\n</think>11111<eos>"))
    return TraceRecord(PROBLEM, env.trace, {"exact": 1.0}, 0.5, "…")


def write(path: Path, **changes: Any) -> Path:
    values = record().to_json() | changes
    values = {key: value for key, value in values.items() if value != "left out"}
    path.write_text(json.dumps(values) + "\n")
    return path


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"version": 9}, f"has version 9; this delethink reads version {TRACE_VERSION}"),
        ({"version": "left out"}, "has version None"),
        ({"version": "1"}, "has version '1'"),
        ({"answer": "left out"}, "has no 'answer', required in version 1"),
        ({"stop": "tired"}, "'tired' is not a valid TraceStop"),
        ({"length": 3}, "its length field is 3"),
        ({"chunks": 3}, "cannot be read"),
        ({"query_ids": None}, "cannot be read"),
    ],
)
def test_an_invalid_record_is_refused_with_its_number(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    path = write(tmp_path / "traces.jsonl", **changes)
    with pytest.raises(TraceFileError) as caught:
        list(read_traces(path))
    assert text in str(caught.value)
    assert str(caught.value).startswith(f"{path}, record 1: ")


def test_a_line_cut_short_keeps_those_before_it(tmp_path: Path) -> None:
    path = write(tmp_path / "traces.jsonl")
    whole = path.read_text()
    path.write_text(whole + "\n" + whole[:100])
    found = read_traces(path)
    assert next(found) == record()
    with pytest.raises(TraceFileError, match="record 3 is not JSON: .*; the line is incomplete"):
        next(found)


@pytest.mark.parametrize("line", ["[]", "3", '"x"', "null"])
def test_a_line_of_something_else_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(TraceFileError, match="a record of a trace must be a mapping"):
        list(read_traces(tmp_path / "x.jsonl"))


def test_places_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceFileError, match=r"'\.json' of .* Did you mean '\.jsonl'"):
        write_traces(tmp_path / "x.json", [])
    with pytest.raises(TraceFileError, match="cannot write .*: No such file"):
        write_traces(tmp_path / "none" / "x.jsonl", [])
    with pytest.raises(TraceFileError, match="cannot read .*: No such file"):
        list(read_traces(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, {1, 2}, float("nan"), b"x", [(1,)]])
def test_metadata_that_would_change_is_refused(tmp_path: Path, value: Any) -> None:
    odd = TraceRecord(Problem("a", "b", {"key": value}), record().trace)
    with pytest.raises(TraceFileError, match="metadata 'key'"):
        write_traces(tmp_path / "x.jsonl", [odd])


def test_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceFileError, match="cannot be written"):
        write_traces(tmp_path / "x.jsonl", [replace(record(), advantage=float("inf"))])


def test_without_the_packages_for_it_parquet_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    for work in (
        lambda: write_traces(tmp_path / "x.parquet", [record()]),
        lambda: list(read_traces(tmp_path / "x.parquet")),
        lambda: to_dataset([record()]),
    ):
        with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[train\]'"):
            work()


# -- what can be done with one ---------------------------------------------------------------------


def test_a_trace_from_a_file_is_replayed_and_scored_anew(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    write_traces(path, [record()])
    (found,) = read_traces(path)
    env = ThinkingEnv(tokenizer=TOKENIZER, chunk_spec=SPEC)
    assert replay_trace(env, found.problem, found.trace) == 1.0
    assert retrace(SPEC, found.trace).stop is TraceStop.COMPLETED
    again = found.rescored("ones", lambda text, answer: float(text.count("1")), TOKENIZER)
    assert again.rewards == {"exact": 1.0, "ones": 15.0}
    assert found.rewards == {"exact": 1.0}
    assert replace(again, rewards=found.rewards) == found


def test_a_trace_is_cut_and_gone_on_with() -> None:
    trace = record().trace
    cut = cut_trace(trace, 1)
    assert (cut.stop, cut.stop.is_failure, len(cut.chunks)) == (TraceStop.CUT, False, 1)
    policy = ScriptedPolicy([trace.chunks[1].output_ids])
    again = asyncio.run(extend_trace(policy, SPEC, cut, Sampling()))
    assert again.output_ids == trace.output_ids
    assert policy.calls == [(trace.chunks[1].prompt_ids, 12)]


def test_a_trace_thinks_on_past_its_old_budget() -> None:
    short, long = ChunkSpec(6, 2, 2, 0), ChunkSpec(6, 2, 4, 0)
    env = ThinkingEnv(tokenizer=TOKENIZER, chunk_spec=short)
    env.reset(options={"problem": PROBLEM})
    env.step(tokens("012345"))
    env.step(tokens("6789"))
    assert env.trace.stop is TraceStop.BUDGET
    policy = ScriptedPolicy([tokens("01<eos>")])
    more = asyncio.run(extend_trace(policy, long, env.trace, Sampling()))
    assert policy.calls == [(tokens("01:00000" + "89"), 4)]
    assert (more.stop, more.length) == (TraceStop.COMPLETED, 13)


@pytest.mark.parametrize("count", [-1, 3])
def test_a_trace_is_not_cut_beyond_its_chunks(count: int) -> None:
    with pytest.raises(RolloutError, match="cannot cut a trace of 2 chunks"):
        cut_trace(record().trace, count)


def test_a_trace_that_does_not_follow_the_spec_is_not_extended() -> None:
    trace, policy = record().trace, ScriptedPolicy([])
    with pytest.raises(RolloutError, match="has ended \\(completed\\)"):
        asyncio.run(extend_trace(policy, SPEC, trace, Sampling()))
    with pytest.raises(RolloutError, match="the prompt of chunk 1 does not follow"):
        retrace(ChunkSpec(16, 5, 3, 0), trace)
    with pytest.raises(RolloutError, match="chunk 0 does not follow"):
        retrace(ChunkSpec(12, 4, 3, 0), trace)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_the_worker_of_a_chunk_is_kept_though_it_makes_no_difference(
    tmp_path: Path, name: str
) -> None:
    chunks = tuple(
        Chunk((1,), (2,), (-0.5,), StopReason.LENGTH, worker=w) for w in ("worker 3", None)
    )
    record = TraceRecord(Problem("p", "a"), Trace((1,), chunks, TraceStop.BUDGET))
    write_traces(tmp_path / name, [record])
    (read,) = read_traces(tmp_path / name)
    assert [chunk.worker for chunk in read.trace.chunks] == ["worker 3", None]
    assert replace(chunks[0], worker="worker 9") == chunks[0]
