"""Traces of an evaluation are shown as they were sampled: prompts, boundaries, problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_fakes import GuessingPolicy, LetterTokenizer, guessing_problems, opener

from delethink.carryover import SinkWindow
from delethink.evaluation.run import Evaluation, evaluate
from delethink.evaluation.settings import SamplingPlan, make_settings
from delethink.trace_html import token_texts
from delethink.types import TraceStop
from delethink.view.index import TraceIndex
from delethink.view.listing import ListQuery, matching_rows
from delethink.view.search import TextSearch
from delethink.view.traces import TraceOpener


class RecordingPolicy(GuessingPolicy):
    """Remembers each prompt with what was sampled from it."""

    def __init__(self) -> None:
        super().__init__(fails=0.05)
        self.said: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()

    async def generate(self, prompt_ids: Any, max_new_tokens: int, sampling: Any) -> Any:
        found = await super().generate(prompt_ids, max_new_tokens, sampling)
        self.said.add((tuple(prompt_ids), tuple(found.token_ids)))
        return found


def evaluated(path: Path, carryover: Any = None) -> RecordingPolicy:
    options = {"carryover": carryover} if carryover else {"head_size": 3}
    settings = make_settings(["guess"], ["delethink", "longcot"], [20], [10], (4,), **options)
    plan = SamplingPlan(3, temperature=1.0, seed=5)
    policy = RecordingPolicy()
    evaluate(Evaluation(guessing_problems(6), settings, plan), opener(policy), path)
    return policy


@pytest.fixture(autouse=True)
def _letters(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = token_texts(LetterTokenizer())
    monkeypatch.setattr(TraceOpener, "texts", lambda *_: (texts, ""))  # no model has these tokens


@pytest.mark.parametrize("carryover", [None, SinkWindow(num_sinks=2)], ids=["head", "sinks"])
def test_every_shown_chunk_has_the_prompt_it_was_sampled_from(
    tmp_path: Path, carryover: Any
) -> None:
    policy = evaluated(tmp_path / "out", carryover)
    index = TraceIndex(tmp_path / "out")
    index.refresh()
    assert len(index.rows) == 2 * 6 * 3
    opened, shown = TraceOpener(index), 0
    for row in index.rows:
        view = opened.open(row)
        if row.error is not None:
            assert row.summary.stop == "error"
            continue
        for chunk in view.trace.chunks:
            assert (tuple(chunk.prompt_ids), tuple(chunk.output_ids)) in policy.said
            assert len(chunk.logprobs) == len(chunk.output_ids)
            shown += 1
        assert view.notes["problem"].startswith("question")
        assert view.verdict is not None
        assert view.verdict.gold == "1"
        if view.trace.stop is TraceStop.COMPLETED:
            assert view.answer is not None
            assert view.verdict.said in ("0", "1")
            assert view.verdict.word == ("right" if view.verdict.said == "1" else "wrong")
    assert shown > 40


def searched(path: Path, text: str) -> tuple[list[str], str]:
    index = TraceIndex(path)
    index.refresh()
    search = TextSearch(index, TraceOpener(index))
    rows, note = matching_rows(index, ListQuery(text=text), search)
    again, _ = matching_rows(index, ListQuery(text=text), search)  # from what was kept
    assert again == rows
    return [row.name for row in rows], note


def test_a_search_reads_problems_and_what_the_model_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TraceOpener, "tokenizer", lambda *_: (LetterTokenizer(), ""))
    evaluated(tmp_path / "out")
    index = TraceIndex(tmp_path / "out")
    index.refresh()
    views = {row.name: TraceOpener(index).open(row) for row in index.rows if row.error is None}
    ones = [n for n, v in views.items() if "</think>1" in v.sampled_text(0, v.trace.length)]
    assert 3 < len(ones) < len(views)
    found, note = searched(tmp_path / "out", "</THINK>1")
    assert sorted(found) == sorted(ones)
    assert note == ""
    assert len(searched(tmp_path / "out", "question 3")[0]) == 2 * 3
    assert searched(tmp_path / "out", "output_ids")[0] == []


def test_a_search_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    evaluated(tmp_path / "out")
    found, note = searched(tmp_path / "out", "</think>1")
    assert found == []
    assert "texts of tokens were not searched" in note
    assert "--tokenizer NAME" in note


def test_a_long_problem_is_shown_and_searched_whole(tmp_path: Path) -> None:
    evaluated(tmp_path / "out")
    file = tmp_path / "out/problems.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[2]["prompt"] = "é" * 500 + "Needle"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(searched(tmp_path / "out", "needle")[0]) == 2 * 3
    index = TraceIndex(tmp_path / "out")
    index.refresh()
    row = next(row for row in index.rows if row.problem == 2)
    assert TraceOpener(index).open(row).notes["problem"].endswith("Needle")


def test_of_a_trace_that_was_sampled_again_the_last_line_is_listed(tmp_path: Path) -> None:
    evaluated(tmp_path / "out")
    file = tmp_path / "out/traces.jsonl"
    first = json.loads(file.read_text().splitlines()[0])
    index = TraceIndex(tmp_path / "out")
    index.refresh()
    with file.open("a") as lines:
        lines.write(json.dumps({**first, "error": "second try"}) + "\n")
    index.refresh()
    assert len(index.rows) == 2 * 6 * 3
    key = index.rows[-1].key
    assert [row.error for row in index.rows if row.key == key] == ["second try"]


def test_problems_that_are_a_link_out_are_not_read(tmp_path: Path) -> None:
    evaluated(tmp_path / "out")
    file = tmp_path / "out/problems.jsonl"
    file.rename(tmp_path / "secret.jsonl")
    file.symlink_to(tmp_path / "secret.jsonl")
    index = TraceIndex(tmp_path / "out")
    index.refresh()
    assert not any("question" in row.summary.prompt for row in index.rows)


def test_without_stored_tokens_the_rows_stay_and_a_note_says_why(tmp_path: Path) -> None:
    evaluated(tmp_path / "out")
    (tmp_path / "out/tokens.jsonl").unlink()
    index = TraceIndex(tmp_path / "out")
    index.refresh()
    view = TraceOpener(index).open(index.rows[0])
    assert "has not stored the tokens" in view.notes["no tokens"]


def test_an_older_evaluation_without_queries_is_shown(tmp_path: Path) -> None:
    evaluated(tmp_path / "out")
    file = tmp_path / "out/tokens.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        del line["query_ids"], line["logprobs"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "out/problems.jsonl").unlink()
    index = TraceIndex(tmp_path / "out")
    index.refresh()
    view = TraceOpener(index).open(next(row for row in index.rows if row.error is None))
    assert view.trace.length > 0
    assert view.trace.query_ids == ()
