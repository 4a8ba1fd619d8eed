"""Parquet files and datasets hold traces without loss; so do the files of a run."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from delethink.carryover import Summary
from delethink.chunking import ChunkSpec
from delethink.envs.spaces import CharacterTokenizer
from delethink.envs.thinking import ThinkingEnv
from delethink.errors import TraceFileError
from delethink.policy import Completion, Sampling, ScriptedPolicy
from delethink.rollout import replay_trace, run_rollout
from delethink.trace_io import TraceRecord, from_dataset, read_traces, to_dataset, write_traces
from delethink.types import Problem, StopReason, Trace

pytestmark = pytest.mark.integration

TOKENIZER = CharacterTokenizer(before_thinking="")
SPEC = ChunkSpec(8, 4, 4, carryover=Summary("\n", ":", ""))
PROBLEM = Problem("01:00000", "11111", {"steps": 1, "nested": {"a": [1, None, 2.5]}, "ü": "\n"})


def played(*said: Any) -> Trace:
    query = tuple(TOKENIZER(PROBLEM.prompt)["input_ids"])
    return asyncio.run(run_rollout(ScriptedPolicy(said), SPEC.bind(TOKENIZER), query, Sampling()))


def records() -> list[TraceRecord]:
    """With a summary, a failure, log-probs that no decimal ends, and nothing at all."""
    thirds = tuple(-(i + 1) / 3 for i in range(8))
    good = played(
        Completion((6, 7, 8, 9, 10, 11, 12, 13), thirds, StopReason.LENGTH, 2),
        Completion((6, 1), (-0.1, -1e-300), StopReason.EOS, 3),
        Completion((6, 1), (-0.1, -745.25), StopReason.EOS, 4),
    )
    failed = played(ConnectionError("worker 3 is gone"))
    return [
        TraceRecord(PROBLEM, good, {"exact": 0.1, "length": None}, -1 / 3, "text é\n"),
        TraceRecord(Problem("", ""), failed, {"exact": None}, None, None),
        TraceRecord(Problem("x", "y", {"steps": 2}), replace(good, chunks=()), {}, 0.0, ""),
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_files_come_back_without_loss(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"traces{suffix}"
    write_traces(path, records())
    assert list(read_traces(path)) == records()
    write_traces(path, [], overwrite=True)
    assert list(read_traces(path)) == []


def test_a_dataset_comes_back_without_loss_from_memory_and_from_disk(tmp_path: Path) -> None:
    import datasets

    dataset = to_dataset(records())
    assert list(from_dataset(dataset)) == records()
    dataset.save_to_disk(str(tmp_path / "saved"))
    assert list(from_dataset(datasets.load_from_disk(str(tmp_path / "saved")))) == records()
    dataset.to_parquet(str(tmp_path / "own.parquet"))
    assert list(read_traces(tmp_path / "own.parquet")) == records()
    write_traces(tmp_path / "ours.parquet", records())
    loaded = datasets.Dataset.from_parquet(
        str(tmp_path / "ours.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert list(from_dataset(loaded)) == records()


def test_a_trace_from_parquet_goes_through_the_environment(tmp_path: Path) -> None:
    write_traces(tmp_path / "x.parquet", records())
    found = next(read_traces(tmp_path / "x.parquet"))
    env = ThinkingEnv(tokenizer=TOKENIZER, chunk_spec=SPEC)
    assert replay_trace(env, found.problem, found.trace) == 0.0


def test_parquet_that_holds_no_traces_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "x.parquet"
    path.write_text("no parquet")
    with pytest.raises(TraceFileError, match="is not Parquet"):
        list(read_traces(path))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"]}), path)
    with pytest.raises(TraceFileError, match="no column 'advantage' and is no file of traces"):
        list(read_traces(path))
    newer = to_dataset(records()).map(lambda row: {"version": 9})
    newer.to_parquet(str(path))
    with pytest.raises(TraceFileError, match="record 1: the trace has version 9"):
        list(read_traces(path))


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("metadata", "[" * 5000, "'metadata' cannot be used: it has more than 100 levels"),
        ("rewards", '{"a": NaN}', "NaN is no JSON number"),
        ("before", None, "'before' must be a text"),
        ("query_ids", [-1], "'query_ids' must be a list of token ids, got -1"),
        ("query_ids", [None], "'query_ids' must be a list of token ids, got None"),
        ("advantage", float("nan"), "'advantage' must be a finite number"),
        ("prompt", None, "'prompt' must be a text"),
        ("chunks", None, "'chunks' must be a list"),
    ],
)
def test_values_of_parquet_are_validated(
    tmp_path: Path, column: str, value: object, says: str
) -> None:
    path = tmp_path / "x.parquet"
    to_dataset(records()[:1]).map(lambda row: {column: value}).to_parquet(str(path))
    with pytest.raises(TraceFileError, match="record 1: ") as caught:
        list(read_traces(path))
    assert says in str(caught.value)


def test_a_folder_is_no_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").mkdir()
    with pytest.raises(TraceFileError, match=r"x\.parquet"):
        list(read_traces(tmp_path / "x.parquet"))
