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
        assert view.facts["gold answer"] == "1"
        if view.trace.stop is TraceStop.COMPLETED:
            assert view.answer is not None
    assert shown > 40


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
