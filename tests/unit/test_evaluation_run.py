"""Evaluations as a whole against a model without weights: records, resuming, kills, failures."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluation_fakes import GuessingPolicy, guessing_problems, opener
from traced_memory import traced_memory

from delethink import Completion, ConfigError, RunDirectoryError, StopReason
from delethink.evaluation.models import check_window
from delethink.evaluation.records import ResultsDirectory
from delethink.evaluation.results import Results
from delethink.evaluation.run import Evaluation, evaluate
from delethink.evaluation.settings import SamplingPlan, make_settings

HERE = Path(__file__).parent


def evaluation(samples: int = 3, chunks: tuple[int, ...] = (3,), **changes: Any) -> Evaluation:
    settings = make_settings(["guess"], ["delethink", "longcot"], [20], [10], chunks, head_size=0)
    plan = SamplingPlan(samples, temperature=1.0, seed=5)
    return replace(Evaluation(guessing_problems(12), settings, plan, in_flight=4), **changes)


def run(path: Path, policy: GuessingPolicy | None = None, **options: Any) -> Results:
    chosen = options.pop("evaluation", None) or evaluation()
    return evaluate(chosen, opener(policy or GuessingPolicy()), path, **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "traces.jsonl").read_text().splitlines()]


def test_one_line_a_trace_and_one_row_a_setting_and_budget(tmp_path: Path) -> None:
    results = run(tmp_path / "out")
    written = lines(tmp_path / "out")
    places = {(r["setting"], r["problem"], r["sample"]) for r in written}
    assert len(places) == len(written) == 2 * 12 * 3
    assert [row.budget for row in results.rows] == [20, 30, 40] * 2
    assert all(row.problems == 12 and row.samples == 36 for row in results.rows)
    for row in results.rows:
        at = [o for r in written if r["setting"] == row.setting for o in r["outcomes"]]
        of_budget = [o for o in at if o["budget"] == row.budget]
        assert row.avg.value == pytest.approx(sum(o["score"] for o in of_budget) / 36)
        assert row.out_of_budget == pytest.approx(sum(o["out_of_budget"] for o in of_budget) / 36)
        assert all(o["length"] <= row.budget for o in of_budget)
    tokens = [json.loads(x) for x in (tmp_path / "out/tokens.jsonl").read_text().splitlines()]
    for record, sampled in zip(written, tokens, strict=True):
        assert sum(map(len, sampled["output_ids"])) == record["outcomes"][-1]["length"]


def test_every_smaller_budget_equals_a_run_of_its_own(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", evaluation=evaluation(chunks=(1, 2, 3, 4)))
    for chunks in (1, 2, 3, 4):
        own = run(tmp_path / str(chunks), evaluation=evaluation(chunks=(chunks, chunks)))
        budget = 10 + 10 * chunks
        assert [row.budget for row in own.rows] == [budget] * 2
        same = [row for row in whole.rows if row.budget == budget]
        assert same == own.rows


def test_traces_in_flight_are_bounded(tmp_path: Path) -> None:
    policy = GuessingPolicy()
    run(tmp_path / "out", policy)
    assert policy.most_in_flight == 4


def test_resuming_a_finished_evaluation_samples_nothing(tmp_path: Path) -> None:
    first = run(tmp_path / "out")
    before = (tmp_path / "out" / "results.json").read_bytes()

    def never(model: str) -> Any:
        raise AssertionError("nothing is missing")

    again = evaluate(evaluation(), never, tmp_path / "out", resume=True)
    assert again.rows == first.rows
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_samples_can_be_added_and_the_result_is_that_of_one_run(tmp_path: Path) -> None:
    run(tmp_path / "a", evaluation=evaluation(samples=1))
    run(tmp_path / "a", evaluation=evaluation(samples=3), resume=True)
    run(tmp_path / "b", evaluation=evaluation(samples=3))
    assert (tmp_path / "a/results.json").read_bytes() == (tmp_path / "b/results.json").read_bytes()


def test_changed_settings_are_refused_unless_forced(tmp_path: Path) -> None:
    run(tmp_path / "out")
    changed = evaluation()
    changed = replace(changed, plan=replace(changed.plan, temperature=0.5))
    with pytest.raises(RunDirectoryError, match=r"temperature was 1.0 and is now 0.5"):
        run(tmp_path / "out", evaluation=changed, resume=True)
    run(tmp_path / "out", evaluation=changed, resume=True, force=True)
    run(tmp_path / "out", evaluation=changed, resume=True)
    said = json.loads((tmp_path / "out/results.json").read_text())
    assert said["forced"] == ["temperature was 1.0 and is now 0.5"]
    other = evaluation(chunks=(2,))
    with pytest.raises(RunDirectoryError, match="settings was"):
        run(tmp_path / "out", evaluation=other, resume=True)
    with pytest.raises(RunDirectoryError, match="already holds an evaluation"):
        run(tmp_path / "out")
    with pytest.raises(RunDirectoryError, match="no evaluation to resume"):
        run(tmp_path / "elsewhere", resume=True)
    assert not (tmp_path / "elsewhere").exists()


def test_other_weights_under_the_same_name_are_refused_and_more_models_are_not(
    tmp_path: Path,
) -> None:
    run(tmp_path / "out", evaluation=evaluation(weights={"guess": "a"}))
    with pytest.raises(RunDirectoryError, match="models was"):
        run(tmp_path / "out", evaluation=evaluation(weights={"guess": "b"}), resume=True)
    run(tmp_path / "out", evaluation=evaluation(weights={"guess": "a", "more": "c"}), resume=True)


def test_two_cannot_write_to_one_folder(tmp_path: Path) -> None:
    settings = evaluation().as_dict()
    directory = ResultsDirectory.create(tmp_path / "out", settings)
    before = (tmp_path / "out/settings.json").read_bytes()
    with pytest.raises(RunDirectoryError, match="another process is writing"):
        ResultsDirectory.resume(tmp_path / "out", {**settings, "samples": 99})
    assert (tmp_path / "out/settings.json").read_bytes() == before
    directory.close()


def test_a_full_disk_is_a_sentence_and_what_was_written_stays_whole(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    size = (tmp_path / "whole/traces.jsonl").stat().st_size // 2
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(RunDirectoryError, match="cannot write"):
            run(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert 0 < len(lines(tmp_path / "out")) < 72
    run(tmp_path / "out", resume=True)
    found, expected = ((tmp_path / name / "results.json").read_bytes() for name in ("out", "whole"))
    assert found == expected


def test_a_failed_trace_is_a_line_with_its_reason_and_never_a_zero(tmp_path: Path) -> None:
    results = run(tmp_path / "out", GuessingPolicy(fails=0.2))
    failed = [record for record in lines(tmp_path / "out") if record["error"]]
    assert 0 < len(failed) < 72
    assert all(r["error"] == "ConnectionError: the engine is gone" for r in failed)
    assert all(r["outcomes"] == [] for r in failed)
    assert sum(sum(reasons.values()) for reasons in results.errors.values()) == len(failed)
    for row in results.rows:
        assert row.samples + row.errors == 36
    perfect = run(tmp_path / "out", resume=True, retry_errors=True)
    assert perfect.errors == {}
    undisturbed = run(tmp_path / "other")
    assert perfect.rows == undisturbed.rows


def test_all_traces_failed_is_no_accuracy(tmp_path: Path) -> None:
    results = run(tmp_path / "out", GuessingPolicy(fails=1.0))
    assert results.rows == []
    assert sum(sum(reasons.values()) for reasons in results.errors.values()) == 72


def test_a_line_cut_short_is_played_again(tmp_path: Path) -> None:
    run(tmp_path / "out")
    whole = (tmp_path / "out/results.json").read_bytes()
    for name in ("traces.jsonl", "tokens.jsonl"):
        path = tmp_path / "out" / name
        path.write_bytes(path.read_bytes()[:-20])
    run(tmp_path / "out", resume=True)
    assert (tmp_path / "out/results.json").read_bytes() == whole
    assert len(lines(tmp_path / "out")) == 72


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run(tmp_path / "out")
    path = tmp_path / "out/traces.jsonl"
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*text[:3], "garbage\n", *text[4:]]))
    with pytest.raises(RunDirectoryError, match="line 4"):
        run(tmp_path / "out", resume=True)


def test_nothing_is_left_behind_where_the_model_does_not_open(tmp_path: Path) -> None:
    def broken(model: str) -> Any:
        raise ConfigError("no such model")

    with pytest.raises(ConfigError):
        evaluate(evaluation(), broken, tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_reward_that_is_neither_right_nor_wrong_is_refused(tmp_path: Path) -> None:
    async def half(attempt: Any) -> float | None:
        return 0.5

    problems = replace(guessing_problems(2), grade=half)
    with pytest.raises(ConfigError, match="0 or 1, got 0.5"):
        run(tmp_path / "out", evaluation=evaluation(problems=problems))
    assert not (tmp_path / "out").exists()


def test_a_grader_that_breaks_is_an_error_and_no_zero(tmp_path: Path) -> None:
    async def breaks(attempt: Any) -> float | None:
        raise RecursionError("deep")

    problems = replace(guessing_problems(2), grade=breaks)
    results = run(tmp_path / "out", evaluation=evaluation(problems=problems))
    assert results.rows == []
    assert {r for reasons in results.errors.values() for r in reasons} == {"RecursionError: deep"}


def test_answers_can_be_asked_for_when_the_budget_is_spent(tmp_path: Path) -> None:
    forced = evaluation()
    forced = replace(forced, plan=replace(forced.plan, forced_answer_tokens=4))
    results = run(tmp_path / "out", evaluation=forced)
    plain = run(tmp_path / "plain")
    for answered, row in zip(results.rows, plain.rows, strict=True):
        assert 0 < answered.forced <= answered.out_of_budget == row.out_of_budget
        assert answered.thinking_tokens == row.thinking_tokens


def test_a_window_too_small_is_refused_with_the_number() -> None:
    delethink, longcot = evaluation().settings
    check_window(longcot, 10, 50)
    with pytest.raises(ConfigError, match=r"needs 50 tokens .* takes 49; .*--cap-longcot .* 39"):
        check_window(longcot, 10, 49)
    with pytest.raises(ConfigError, match="lower -C to 19 or less"):
        check_window(delethink, 10, 29)


KILLED = """
import sys
sys.path[:0] = {folders!r}
from pathlib import Path
from evaluation_fakes import GuessingPolicy, opener
from traced_memory import traced_memory
from test_evaluation_run import evaluation
from delethink.evaluation.run import evaluate
path = Path({path!r})
evaluate(evaluation(), opener(GuessingPolicy(delay_s=0.01)), path, resume=path.exists())
"""


def start(path: Path) -> subprocess.Popen[bytes]:
    code = KILLED.format(folders=[str(HERE), str(HERE.parent / "helpers")], path=str(path))
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)


def grow(path: Path, size: int, process: subprocess.Popen[bytes]) -> None:
    """Waits until the file is larger, or the process has ended."""
    while process.poll() is None and (not path.exists() or path.stat().st_size <= size):
        time.sleep(0.001)


def test_killed_ten_times_and_resumed_it_gives_what_an_undisturbed_run_gives(
    tmp_path: Path,
) -> None:
    rng, traces, kills = random.Random(1), tmp_path / "out" / "traces.jsonl", 0
    while kills < 10:
        size = traces.stat().st_size if traces.exists() else 0
        process = start(tmp_path / "out")
        grow(traces, size, process)
        time.sleep(rng.uniform(0, 0.01))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
    assert kills == 10, "it ended before it was killed often enough"
    _, said = (process := start(tmp_path / "out")).communicate()
    assert process.returncode == 0, said.decode()
    run(tmp_path / "undisturbed")
    found, expected = (
        (tmp_path / name / "results.json").read_bytes() for name in ("out", "undisturbed")
    )
    assert found == expected
    assert len(lines(tmp_path / "out")) == 72


def test_memory_does_not_grow_with_the_number_of_traces(tmp_path: Path) -> None:
    """What is held at a time is the traces in flight; each here has 5,000 tokens."""

    class Endless(GuessingPolicy):
        async def generate(self, prompt_ids: Any, max_new_tokens: int, sampling: Any) -> Completion:
            ids = tuple(range(1000, 1000 + max_new_tokens))
            return Completion(ids, (0.0,) * max_new_tokens, StopReason.LENGTH)

    def peak(samples: int) -> int:
        settings = make_settings(["x"], ["delethink"], [1000], [500], [9], head_size=0)
        long = Evaluation(guessing_problems(4), settings, SamplingPlan(samples), in_flight=1)
        return traced_memory(lambda: run(tmp_path / str(samples), Endless(), evaluation=long)).peak

    few, many = peak(1), peak(20)
    assert many < few + 80 * 5_000  # bytes: an eighth of what the tokens of 80 traces take


def test_samples_of_a_problem_differ_and_settings_begin_alike(tmp_path: Path) -> None:
    run(tmp_path / "out")
    sampled = [json.loads(x) for x in (tmp_path / "out/tokens.jsonl").read_text().splitlines()]
    first = {(s["setting"], s["problem"], s["sample"]): s["output_ids"][0] for s in sampled}
    delethink, longcot = (setting.key for setting in evaluation().settings)
    for problem in range(12):
        samples = [tuple(first[longcot, problem, i]) for i in range(3)]
        assert len(set(samples)) == 3
        for i, whole in enumerate(samples):
            assert tuple(first[delethink, problem, i]) == whole[:20]
