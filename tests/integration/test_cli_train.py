"""``delethink train``: a small run, mistakes of the user, and interrupts."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from train_command import (
    RECIPE,
    SMALL,
    TOY,
    assert_metrics_are_in_the_table,
    assert_one_sentence,
    command,
    environment,
    run,
)

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("finished")
    done = run("output=run", "training.trace_token_stats=true", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


def test_a_run_ends_with_a_table_and_its_path(finished: tuple[Path, str]) -> None:
    path, printed = finished
    for row in ("base, one context", "base, LongCoT", "base, Delethink", "after RL, Delethink"):
        assert row in printed
    *_, place, trained, command = printed.strip().splitlines()
    assert place == "run directory: run"
    assert trained == "trained model: run/checkpoints/final"
    assert command == "measure it: delethink eval -m toy,run"
    rows = json.loads((path / "table.json").read_text())
    assert [row["num_problems"] for row in rows] == [16] * 4


def test_values_of_single_tokens_stand_beside_the_traces(finished: tuple[Path, str]) -> None:
    path, _ = finished
    for file in sorted((path / "traces").iterdir()):
        traces = [json.loads(line) for line in file.read_text().splitlines()]
        stats = path / "token_stats" / file.name
        lines = [json.loads(line) for line in stats.read_text().splitlines()]
        assert len(lines) == sum(len(trace["chunks"]) for trace in traces)
        for line in lines:
            engine = traces[line["trace"]]["chunks"][line["chunk"]]["logprobs"]
            assert line["trainer_logprobs"] == pytest.approx(engine, abs=1e-3)
            assert len(line["entropies"]) == len(engine)
            assert min(line["entropies"]) >= 0


def test_a_run_directory_holds_what_a_reader_needs(finished: tuple[Path, str]) -> None:
    path, _ = finished
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert [m["policy_version"] for m in metrics] == [0, 1, 2]
    assert metrics[1]["heldout_accuracy"] is not None
    assert_metrics_are_in_the_table(metrics)
    for m in metrics:
        assert m["trained_tokens"] == m["sampled_tokens"] > 0
        assert m["logprob_difference"] < 1e-4
        assert m["traces"] == 16
        assert m["seconds_sampling"] > 0
        assert m["seconds_training"] > 0
    assert (path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "finished after" in (path / "report.html").read_text()
    assert (path / "trace_index.jsonl").read_text().count("\n") == sum(
        file.read_text().count("\n") for file in (path / "traces").iterdir()
    )
    assert (path / "checkpoints" / "final" / "model.safetensors").exists()
    assert "seed: 0" in (path / "config.yaml").read_text()


def test_traces_are_what_was_sampled_and_trained(finished: tuple[Path, str]) -> None:
    path, _ = finished
    for step in (1, 2, 3):
        text = (path / "traces" / f"step_{step:06d}.jsonl").read_text()
        traces = [json.loads(line) for line in text.splitlines()]
        assert len(traces) == 16
        for trace in traces:
            assert {c["policy_version"] for c in trace["chunks"]} == {step - 1}
            assert trace["length"] == sum(len(c["output_ids"]) for c in trace["chunks"])
            assert trace["rewards"]["exact"] in (0.0, 1.0)
            for chunk in trace["chunks"]:
                assert len(chunk["logprobs"]) == len(chunk["output_ids"])
                carried = chunk["prompt_ids"][len(trace["query_ids"]) :]
                assert len(carried) == chunk["carried"] <= 16


def test_the_trained_checkpoint_loads_and_differs(finished: tuple[Path, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = finished[0] / "checkpoints" / "final"
    trained = AutoModelForCausalLM.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(TOY)
    pairs = zip(trained.parameters(), base.parameters(), strict=True)
    assert any((a != b).any() for a, b in pairs)
    assert AutoTokenizer.from_pretrained(path).eos_token == "<eos>"


def test_the_same_seed_gives_the_same_run(finished: tuple[Path, str], tmp_path: Path) -> None:
    assert run("output=run", "training.max_steps=1", cwd=tmp_path).returncode == 0
    name = "traces/step_000001.jsonl"
    first = [json.loads(line) for line in (finished[0] / name).read_text().splitlines()]
    again = [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]
    assert [t["text"] for t in first] == [t["text"] for t in again]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainig.max_steps=1", ["unknown key 'trainig'", "'training'"]),
        ("thinking.carryover_size=32", ["carryover_size=32", "context_size=32"]),
        ("task.name=automato", ["unknown task", "'automaton'"]),
        ("task.args.widht=3", ["'automaton' has no parameter 'widht'", "'width'"]),
        ("rewards={exakt: 1}", ["unknown reward", "'exact'"]),
        ("model=./nowhere", ["the model folder nowhere does not exist"]),
        ("output=/dev/null/run", ["cannot write the run to /dev/null/run"]),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, override: str, words: list[str]) -> None:
    done = run(override, cwd=tmp_path)
    assert_one_sentence(done, *words)
    assert not (tmp_path / "runs").exists()


def test_a_directory_of_another_run_is_unchanged(finished: tuple[Path, str]) -> None:
    path, _ = finished
    before = (path / "metrics.jsonl").read_bytes()
    done = run(f"output={path}", "seed=1", cwd=path.parent)
    assert_one_sentence(done, "holds a run of another recipe: seed (0 there, 1 here)", "output=")
    assert (path / "metrics.jsonl").read_bytes() == before


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TOY, tmp_path / "model")
    settings = tmp_path / "model" / "tokenizer_config.json"
    values = json.loads(settings.read_text())
    values.pop("eos_token")
    settings.write_text(json.dumps(values))
    done = run("model=./model", cwd=tmp_path)
    assert_one_sentence(done, "end-of-sequence token", "tokenizer_config.json")
    assert not list((tmp_path / "runs").iterdir())


def test_a_query_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TOY, tmp_path / "model")
    settings = tmp_path / "model" / "config.json"
    values = json.loads(settings.read_text())
    values["max_position_embeddings"] = 40
    settings.write_text(json.dumps(values))
    done = run("model=./model", cwd=tmp_path)
    assert_one_sentence(done, "the query has 15 tokens", "may have at most 8")


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes that a run in ``folder`` has started and left behind."""
    left = []
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("DELETHINK_TEST_RUN") == str(folder):
            left.append(process)
    return left


@pytest.mark.slow  # minutes; test_ray_vllm.py has two workers, test_cli_train_together.py Ray Train
def test_two_vllm_workers_on_ray_train_too(tmp_path: Path) -> None:
    done = run("output=run", "engine=vllm", "engine.num_engines=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "starting the engine: vllm" in done.stdout
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [m["policy_version"] for m in metrics] == [0, 1, 2]
    assert_metrics_are_in_the_table(metrics)
    for m in metrics:
        assert m["logprob_difference"] < 1e-3
        assert m["trained_tokens"] == m["sampled_tokens"]
    assert metrics[1]["seconds_weight_update"] > 0
    for step in (1, 2, 3):
        text = (tmp_path / "run" / "traces" / f"step_{step:06d}.jsonl").read_text()
        traces = [json.loads(line) for line in text.splitlines()]
        assert {c["policy_version"] for t in traces for c in t["chunks"]} == {step - 1}
    assert not processes_of(tmp_path)


def wait_for(condition: object, process: subprocess.Popen[str]) -> None:
    assert callable(condition)
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


INTERRUPTS = [
    ("transformers", "sampling", signal.SIGINT),
    ("transformers", "training", signal.SIGTERM),
    pytest.param("transformers", "training", signal.SIGINT, marks=pytest.mark.slow),
    # test_ray_jobs stops a job with the vLLM engine.
    pytest.param("vllm", "sampling", signal.SIGINT, marks=pytest.mark.slow),
    pytest.param("vllm", "training", signal.SIGTERM, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("engine", "phase", "sign"), INTERRUPTS)
def test_an_interrupt_ends_the_run_and_keeps_what_was_written(
    tmp_path: Path, engine: str, phase: str, sign: signal.Signals
) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(
        command("output=run", f"engine={engine}", "training.max_steps=500", "evaluation.every=500"),
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(metrics.exists, process)  # step 1 is done: step 2 samples
        if phase == "training":  # traces are written between sampling and training
            wait_for((tmp_path / "run" / "traces" / "step_000002.jsonl").exists, process)
        process.send_signal(sign)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    kept = "delethink: interrupted; everything written so far is complete"
    assert last == f"{kept}; go on with: delethink train run"
    assert "interrupted: closing files and engines" in errors
    assert all(json.loads(line) for line in metrics.read_text().splitlines())
    psutil.wait_procs(processes_of(tmp_path), timeout=20)  # Ray's processes end a moment later
    assert not processes_of(tmp_path)


STALLS = """
calls = []


def sometimes(text, answer):
    calls.append(text)
    while len(calls) == 3:
        pass
    return 0.5


def theirs(completions, solution, **columns):
    return [float(c[0]["content"].endswith(s)) for c, s in zip(completions, solution)]
"""


@pytest.mark.slow
def test_overlong_queries_are_counted_and_printed(tmp_path: Path) -> None:
    """Train on a task in a file and evaluate on the toy task, each with rewards of its own."""
    rows = [{"problem": "0" * (3 + i % 7), "answer": str(i)} for i in range(40)]
    rows = [row | {"problem": f"{i:02d}" + row["problem"]} for i, row in enumerate(rows)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.read_text().replace("rewards:\n  exact: 1.0\n", "")
    recipe.write_text(text)
    options = [option for option in SMALL if not option.startswith("task.args")]
    done = subprocess.run(
        [
            *[sys.executable, "-m", "delethink.cli.main", "train", str(recipe), *options],
            "output=run",
            "task={name: dataset, max_query_tokens: 6, args: {dataset: data.jsonl,"
            " template: '{problem}', reward: normalized, heldout_share: 0.0}}",
            "evaluation.task={name: automaton, args: {min_steps: 1, max_steps: 2}}",
            "evaluation.num_problems=4",
            "training.max_steps=1",
        ],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert "problems whose queries are too long" in done.stdout
    counts = json.loads((tmp_path / "run" / "problems.json").read_text())
    assert counts["train"]["taken"] == 2
    assert counts["train"]["overlong_queries"] > 0
    assert counts["train"]["longest_query_passed_over"] > 6
    assert "normalized: " in (tmp_path / "run" / "config.yaml").read_text().replace("\n", " ")
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert "rewards/normalized/mean" in metrics


def test_rewards_that_stall_are_counted_and_every_part_is_kept(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(STALLS)
    done = run(
        "output=run",
        "rewards={exact: 1.0, long: {reward: overlong, weight: 0.5, args: {cache: 16}},"
        " stalls: {reward: 'my_rewards:sometimes', weight: 0.1},"
        " theirs: {reward: 'my_rewards:theirs', weight: 0.0}}",
        "scoring={out_of_budget: penalty, penalty: 0.5, timeout: 0.5, num_verifiers: 2}",
        "training.max_failed_share=1.0",
        "training.max_steps=1",
        "evaluation.num_problems=2",
        "evaluation.num_problems_at_intervals=2",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    lines = (tmp_path / "run" / "traces" / "step_000001.jsonl").read_text().splitlines()
    traces = [json.loads(line) for line in lines]
    stalled = [trace for trace in traces if trace["reward_errors"]]
    assert 0 < metrics["verifier/timeout"] == len(stalled) < len(traces)
    assert metrics["rewards/stalls/applied_share"] == 1 - len(stalled) / len(traces)
    for trace in traces:
        parts = trace["rewards"]
        if trace in stalled:
            assert trace["reward"] is None
            assert trace["advantage"] == 0.0
            assert trace["reward_errors"]["stalls"].startswith("timeout: ")
            assert parts["stalls"] is None
        else:
            expected = parts["exact"] + 0.5 * parts["long"] + 0.1 * parts["stalls"]
            expected -= 0.5 * (trace["stop"] == "budget")
            assert trace["reward"] == pytest.approx(expected)
        assert parts["theirs"] == float(
            trace["text"].removesuffix("<eos>").endswith(trace["answer"])
        )
    assert metrics["rewards/exact/mean"] == pytest.approx(
        sum(t["rewards"]["exact"] for t in traces) / len(traces)
    )
    assert not processes_of(tmp_path)


def test_rewards_that_cannot_be_computed_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text("def broken(text):\n    return text.nonsense\n")
    rewards = "rewards={exact: 1.0, broken: {reward: 'my_rewards:broken'}}"
    assert_one_sentence(run(rewards, cwd=tmp_path), "broken cannot score the right answer")
    done = run("output=run", rewards, "evaluation.num_problems=2", "preflight=warn", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "16 of 16 traces failed or could not be scored" in last
    assert "broken: error: AttributeError: 'str' object has no attribute 'nonsense'" in last
