"""The list of traces: growing files, damaged lines, the written index, links that lead out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from delethink import Chunk, Problem, Trace
from delethink.errors import ConfigError, TraceFileError
from delethink.trace_index import TRACE_INDEX, index_lines, without_files
from delethink.trace_io import TraceRecord, write_traces
from delethink.types import StopReason, TraceStop
from delethink.view.index import ListedTrace, TraceIndex, read_part, trace_files
from delethink.view.listing import ListQuery, grouped, matching_rows, sorted_groups
from delethink.view.search import TextSearch
from delethink.view.traces import TraceOpener


def record(
    prompt: str = "1+1", reward: float | None = 1.0, tokens: int = 3, text: str = ""
) -> TraceRecord:
    chunk = Chunk((1, 2), tuple(range(tokens)), (-0.5,) * tokens, StopReason.EOS)
    trace = Trace((1, 2), (chunk,), TraceStop.COMPLETED)
    return TraceRecord(Problem(prompt, "2"), trace, {"exact": reward}, reward=reward, text=text)


def line(**options: Any) -> str:
    return json.dumps(record(**options).to_json()) + "\n"


def refreshed(root: Path) -> TraceIndex:
    index = TraceIndex(root)
    index.refresh()
    return index


def found(index: TraceIndex, **query: Any) -> tuple[list[ListedTrace], str]:
    return matching_rows(index, ListQuery(**query), TextSearch(index, TraceOpener(index)))


def names(index: TraceIndex, **query: Any) -> list[str]:
    return [row.name for row in found(index, **query)[0]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "traces").mkdir()
    (tmp_path / "config.yaml").write_text("model: toy\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    steps = {
        1: [line(reward=0.0), line(reward=1.0, tokens=9)],
        2: [line(prompt="2+2", reward=None, text="say Frog")],
        10: [line(prompt="2+2", reward=0.5)],
    }
    for step, lines in steps.items():
        (tmp_path / f"traces/step_{step:06d}.jsonl").write_text("".join(lines))
    return tmp_path


def test_a_run_lists_its_traces_with_their_steps(run: Path) -> None:
    index = refreshed(run)
    assert [(row.name, row.place) for row in index.rows] == [
        ("traces/step_000001.jsonl:1", "1"),
        ("traces/step_000001.jsonl:2", "1"),
        ("traces/step_000002.jsonl:1", "2"),
        ("traces/step_000010.jsonl:1", "10"),
    ]
    assert index.is_complete
    assert not index.damaged


def test_the_list_is_sorted_by_value_and_filtered(run: Path) -> None:
    index = refreshed(run)
    assert [name[12:18] for name in names(index)] == ["000001", "000001", "000002", "000010"]
    assert names(index, sort="length", descending=True)[0] == "traces/step_000001.jsonl:2"
    assert names(index, sort="reward")[0] == "traces/step_000002.jsonl:1"  # without one
    assert names(index, reward="high") == ["traces/step_000001.jsonl:2"]
    assert len(names(index, reward="low")) == 2
    assert names(index, reward="none") == ["traces/step_000002.jsonl:1"]
    assert names(index, stop="budget") == []


def test_a_search_reads_texts_and_no_token_ids(run: Path) -> None:
    index = refreshed(run)
    assert names(index, text="Frog") == ["traces/step_000002.jsonl:1"]
    assert len(names(index, text="2+2")) == 2
    assert names(index, text="-0.5") == []
    assert names(index, text="output_ids") == []


def test_a_search_knows_no_case_and_reads_texts_outside_ascii(run: Path) -> None:
    with (run / "traces/step_000010.jsonl").open("a") as file:
        file.write(json.dumps(record(text='a "Große" Zahl').to_json(), ensure_ascii=False) + "\n")
    index = refreshed(run)
    assert names(index, text="fROG") == ["traces/step_000002.jsonl:1"]
    assert names(index, text='"große" zahl') == ["traces/step_000010.jsonl:2"]


def test_traces_without_a_text_are_searched_in_their_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Letters:
        def decode(self, ids: Any) -> str:
            return "".join(chr(ord("a") + i) for i in ids)

    monkeypatch.setattr(TraceOpener, "tokenizer", lambda *_: (Letters(), ""))
    values = [record(tokens=tokens).to_json() | {"text": None} for tokens in (3, 9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    assert names(refreshed(tmp_path / "a.jsonl"), text="CDE") == ["a.jsonl:2"]


def test_parquet_is_searched(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write_traces(tmp_path / "a.parquet", [record(text="x"), record(text="say Frog")])
    assert names(refreshed(tmp_path / "a.parquet"), text="frog") == ["a.parquet:2"]


def test_a_search_that_takes_too_long_says_what_it_has_read(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("delethink.view.search._MAX_SEARCH_S", -1.0)
    rows, note = found(refreshed(run), text="Frog")
    assert rows == []
    assert "searched the texts of 1 of 4 traces" in note


def test_what_cannot_be_read_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root, as in containers, may read everything; so the refusal is made here.
    refused, open_file = run / "traces/step_000002.jsonl", Path.open

    def opened(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == refused:
            raise PermissionError(13, "Permission denied", str(self))
        return open_file(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)
    index = refreshed(run)
    assert index.unreadable == {str(refused): "Permission denied"}
    assert len(index.rows) == 3
    monkeypatch.undo()
    index.refresh()
    assert not index.unreadable
    assert len(index.rows) == 4


def test_groups_have_a_best_and_a_worst_trace(run: Path) -> None:
    first, second = grouped(found(refreshed(run))[0])
    assert (first["problem"], first["traces"], first["reward"]) == ("1+1", 2, 0.5)
    assert (first["best"], first["worst"]) == (
        "traces/step_000001.jsonl:2",
        "traces/step_000001.jsonl:1",
    )
    assert second["best"] == second["worst"] == "traces/step_000010.jsonl:1"


def test_groups_are_sorted_by_their_means(run: Path) -> None:
    (run / "traces/step_000011.jsonl").write_text(line(prompt="best", tokens=2))
    rows = found(refreshed(run))[0]

    def problems(sort: str, descending: bool = False) -> list[str]:
        query = ListQuery(sort=sort, descending=descending)
        return [group["problem"] for group in sorted_groups(grouped(rows), query)]

    assert problems("step") == ["1+1", "2+2", "best"]
    assert problems("reward", descending=True)[0] == "best"
    assert problems("length") == ["best", "2+2", "1+1"]
    assert problems("problem", descending=True) == ["best", "2+2", "1+1"]


def test_what_is_appended_is_read_once_it_is_whole(run: Path) -> None:
    index, file = refreshed(run), run / "traces/step_000010.jsonl"
    text = line(prompt="new")
    with file.open("a") as open_file:
        open_file.write(text[:40])
        open_file.flush()
        index.refresh()
        assert len(index.rows) == 4
        open_file.write(text[40:])
    index.refresh()
    assert index.rows[-1].name == "traces/step_000010.jsonl:2"
    assert index.rows[-1].summary.prompt == "new"


@pytest.mark.parametrize(
    "damage",
    ["{broken", "[]", '{"prompt": 3}', "null", "[" * 5000, '{"version": 99}', "\x00\xff"],
    ids=["broken", "list", "type", "null", "deep", "version", "bytes"],
)
def test_a_damaged_line_is_skipped_and_counted(run: Path, damage: str) -> None:
    file = run / "traces/step_000002.jsonl"
    file.write_text(f"{damage}\n" + line(prompt="good"))
    index = refreshed(run)
    assert sum(index.damaged.values()) == 1
    assert "traces/step_000002.jsonl:2" in [row.name for row in index.rows]


def test_a_file_that_is_replaced_is_read_again(run: Path) -> None:
    index, file = refreshed(run), run / "traces/step_000001.jsonl"
    file.write_text(line(prompt="short"))
    index.refresh()
    assert [row.summary.prompt for row in index.rows if row.place == "1"] == ["short"]


def test_a_folder_that_vanishes_is_said_and_its_rows_stay(run: Path) -> None:
    index = refreshed(run)
    run.rename(run.with_name("elsewhere"))
    index.refresh()
    assert index.is_gone
    assert len(index.rows) == 4
    with pytest.raises(TraceFileError, match="cannot be read any more"):
        index.read_line(index.rows[0])


def test_links_out_of_the_folder_are_not_followed(run: Path, tmp_path_factory: Any) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.jsonl").write_text(line(prompt="secret"))
    (run / "traces/link.jsonl").symlink_to(outside / "secret.jsonl")
    (run / "more").symlink_to(outside, target_is_directory=True)
    assert all(row.summary.prompt != "secret" for row in refreshed(run).rows)
    assert len(list(trace_files(run))) == 3
    with pytest.raises(TraceFileError, match="leads out of the folder"):
        read_part(run / "traces/link.jsonl", 0, 10, run, "link")


def test_a_file_that_becomes_a_link_out_is_refused(run: Path, tmp_path_factory: Any) -> None:
    index, file = refreshed(run), run / "traces/step_000001.jsonl"
    outside = tmp_path_factory.mktemp("outside") / "secret.jsonl"
    outside.write_text(line(prompt="secret") * 2)
    file.unlink()
    file.symlink_to(outside)
    with pytest.raises(TraceFileError, match="leads out of the folder"):
        index.read_line(index.rows[0])


def write_index(run: Path) -> None:
    text = ""
    for file in sorted((run / "traces").glob("*.jsonl")):
        lines = file.read_text().splitlines(keepends=True)
        text += index_lines(f"traces/{file.name}", 0, lines, map(json.loads, lines))
    (run / TRACE_INDEX).write_text(text)


def test_the_written_index_gives_the_same_rows_without_reading_the_traces(run: Path) -> None:
    expected = refreshed(run).rows
    write_index(run)
    for file in (run / "traces").glob("*.jsonl"):  # of the same size, and no JSON
        file.write_bytes(b"\n" * file.stat().st_size)
    assert sorted(refreshed(run).rows, key=str) == sorted(expected, key=str)


def test_traces_without_a_line_in_the_index_are_read_themselves(run: Path) -> None:
    write_index(run)
    with (run / "traces/step_000010.jsonl").open("a") as file:
        file.write(line(prompt="later"))
    (run / "traces/step_000011.jsonl").write_text(line(prompt="another"))
    index = refreshed(run)
    assert {row.summary.prompt for row in index.rows} == {"1+1", "2+2", "later", "another"}
    assert len(index.rows) == 6


@pytest.mark.parametrize(
    "bad",
    [
        '["../secret.jsonl", 0, 5, ["a", "b", "c", 1.0, "eos", 1, 1]]',
        '["/etc/passwd", 0, 5, ["a", "b", "c", 1.0, "eos", 1, 1]]',
        '["traces/step_000001.jsonl", 0, 99999999, ["a", "b", "c", 1.0, "eos", 1, 1]]',
        '["traces/step_000001.jsonl", -5, 3, ["a", "b", "c", 1.0, "eos", 1, 1]]',
        '["traces/step_000001.jsonl", 0, 3, ["a"]]',
        "nonsense",
        "[[], 1, 2, 3]",
    ],
)
def test_a_wrong_line_of_the_index_changes_nothing(run: Path, bad: str) -> None:
    (run / TRACE_INDEX).write_text(bad + "\n")
    assert len(refreshed(run).rows) == 4


def test_steps_that_are_sampled_again_leave_the_index(run: Path) -> None:
    write_index(run)
    text = (run / TRACE_INDEX).read_text()
    left = without_files(text, {"traces/step_000010.jsonl"})
    assert "step_000010" not in left
    assert left.count("\n") == 3


def test_parquet_is_listed_too(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write_traces(tmp_path / "a.parquet", [record(), record(prompt="b")])
    index = refreshed(tmp_path / "a.parquet")
    assert [row.name for row in index.rows] == ["a.parquet:1", "a.parquet:2"]
    assert index.rows[1].summary.prompt == "b"


def test_a_query_with_an_unknown_order_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'length'"):
        ListQuery.from_parameters({"sort": "lenght"})
    with pytest.raises(ConfigError, match="offset must be a whole number"):
        ListQuery.from_parameters({"offset": "-1"})


@pytest.mark.parametrize(
    ("marks", "is_usual"),
    [
        (None, True),
        ('{"end_of_thinking": "</think>"}', True),
        ('{"end_of_thinking": "[/THINK]"}', False),
        ('{"end_of_thinking": null}', False),
        ("{", True),
        ('{"end_of_thinking": 3}', True),
    ],
    ids=["none", "usual", "own", "unmarked", "damaged", "type"],
)
def test_the_answer_begins_after_the_mark_that_the_run_names(
    run: Path, marks: str | None, is_usual: bool
) -> None:
    if marks is not None:
        (run / "marks.json").write_text(marks)
    index = refreshed(run)
    answer = TraceOpener(index).open(index.rows[1]).answer  # tokens 0 to 8 of the toy
    assert (answer == (5, 8)) is is_usual
