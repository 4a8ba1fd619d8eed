"""The command ``delethink cost``: reports, JSON, error texts, calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from delethink.cli.main import main
from delethink.cost.calibrate import read_efficiency
from delethink.cost.estimate import Lengths, Workload, estimate
from delethink.cost.flops import LONGCOT, Cut
from delethink.cost.hardware import Efficiency, accelerator
from delethink.cost.models import model_shape

QWEN = "--model Qwen/Qwen2.5-1.5B"


def cost_text(capsys: pytest.CaptureFixture[str], words: str) -> str:
    assert main(["cost", *words.split()]) == 0
    printed = capsys.readouterr()
    assert not printed.err
    return printed.out


def cost_json(capsys: pytest.CaptureFixture[str], words: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(cost_text(capsys, words + " --json"), parse_constant=refuse)


def error_text(capsys: pytest.CaptureFixture[str], words: str) -> str:
    assert main(["cost", *words.split()]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    (line,) = printed.err.strip().splitlines()
    return line


def test_the_whole_report(capsys: pytest.CaptureFixture[str]) -> None:
    text = cost_text(
        capsys,
        f"{QWEN} --thinking 24k,96k,1M -C 8192 --carryover-size 4096 --gpu h100 --gpus 8 "
        "--group 8 --prompts 128 --steps 1000 --price 2",
    )
    for part in (
        "Qwen/Qwen2.5-1.5B: 1.54 B parameters, 28 layers",
        "1,048,576 thinking tokens per trace",
        "price of the run",
        "Delethink is always cheaper beyond",
        "times fewer GPU-hours than LongCoT",
    ):
        assert part in text
    assert "nan" not in text
    assert max(map(len, text.splitlines()[:20])) < 100


def test_json_equals_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    answer = cost_json(
        capsys, f"{QWEN} --thinking 96k -C 8k --carryover-size 2k --gpu a100 --query 300"
    )
    cost = estimate(
        model_shape("Qwen/Qwen2.5-1.5B"),
        Lengths.constant(96 * 1024),
        Cut(8192, 2048, 0, 100),
        accelerator("a100"),
        workload=Workload(query=300),
    )
    (row,) = answer["thinking"]
    assert row["delethink"]["gpu_hours"] == pytest.approx(float(cost.gpu_hours))
    low, high = row["delethink"]["gpu_hours_5_95"]
    assert low < row["delethink"]["gpu_hours"] < high
    assert answer["crossings"].keys() == {"sampling_flops", "training_flops", "step_seconds"}


def test_the_summary_mentions_bounded_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Only 12 of 48 layers" in cost_text(capsys, "--model Qwen/Qwen3-Next-80B-A3B-Thinking")
    bounded = cost_text(capsys, "--model mistralai/Mistral-7B-v0.1 --thinking 96k")
    assert "LongCoT is linear already" in bounded
    assert "never" in bounded
    assert "any length" in bounded
    assert cost_json(capsys, "--model mistralai/Mistral-7B-v0.1 --thinking 96k")["crossings"] == {
        "sampling_flops": None,
        "training_flops": None,
        "step_seconds": None,
    }


def test_a_model_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--model Qwen/Qwen2.5-7B --gpu rtx4090 --gpus 8 --thinking 10M"
    text = cost_text(capsys, words)
    assert "does not fit" in text
    assert "in one context does not fit on this hardware" in text
    assert "training needs" in text
    assert cost_json(capsys, words)["thinking"][0]["longcot"]["gpu_hours"] is None


@pytest.mark.parametrize("name", ["flops", "figure2c", "throughput", "months"])
def test_reproductions(capsys: pytest.CaptureFixture[str], name: str) -> None:
    text = cost_text(capsys, f"--reproduce {name}")
    says = {
        "flops": ["28,850", "17.76", "44,082", "11.80"],
        "figure2c": ["22,100", "6,150", "The largest error is"],
        "throughput": ["8,500", "6,000"],
        "months": ["does not reproduce", "30.3"],
    }
    for part in says[name]:
        assert part in text
    assert cost_json(capsys, f"--reproduce {name}")


def test_the_papers_accounting_for_any_model(capsys: pytest.CaptureFixture[str]) -> None:
    answer = cost_json(
        capsys, "--accounting paper --thinking 1000000 -C 8192 --carryover-size 4096"
    )
    (row,) = answer["training_flops"]
    assert answer["crossing"] == 28_850
    assert row["longcot"] / row["delethink"] == pytest.approx(17.76, abs=0.005)
    assert "5.27e+17" in cost_text(capsys, "--accounting paper --thinking 1000000").replace(
        "5.268", "5.27"
    )


def test_a_carryover_policy_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{QWEN} --thinking 96k -C 8k --carryover-size 4k"
    hours = {
        name: cost_json(capsys, f"{words} --carryover {name}")["thinking"][0]["delethink"]
        for name in ("head_tail", "tail", "none")
    }
    assert hours["none"]["gpu_hours"] < hours["tail"]["gpu_hours"]
    assert hours["head_tail"]["chunks"] == hours["tail"]["chunks"] > hours["none"]["chunks"]
    assert hours["head_tail"] == cost_json(capsys, words)["thinking"][0]["delethink"]


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "openai/gpt-oss-120b" in cost_text(capsys, "--models").splitlines()


def test_lengths_from_a_histogram(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text("# tokens,traces\n4000,6\n20000,3\n90000\n")
    seen = cost_json(capsys, f"{QWEN} --lengths {file}")["thinking"][0]
    assert seen["longcot"]["thinking"] == pytest.approx((6 * 4000 + 3 * 20_000 + 90_000) / 10)
    stretched = cost_json(capsys, f"{QWEN} --lengths {file} --thinking 96k")["thinking"][0]
    assert stretched["longcot"]["thinking"] == pytest.approx(96 * 1024)
    equal = cost_json(capsys, f"{QWEN} --thinking 96k")["thinking"][0]
    assert stretched["longcot"]["sampling_seconds"] > 1.3 * equal["longcot"]["sampling_seconds"]


def test_lengths_that_fit_in_a_context_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", *f"{QWEN} --thinking 256,1k,24k,96k -C 8k --json".split()]) == 0
    printed = capsys.readouterr()
    assert "left out: 256, 1,024 thinking tokens fit in the first context" in printed.err
    thinking = [each["longcot"]["thinking"] for each in json.loads(printed.out)["thinking"]]
    assert thinking == [24 * 1024, 96 * 1024]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--thinking 4k", "4,096 thinking tokens fit in the first context of C = 8,192"),
        ("--thinking ten", "--thinking: a whole number of tokens, at least 1, like 24576, 24k"),
        ("--thinking 24k,,96k", "got ''"),
        ("--thinking -5", "got '-5'"),
        ("-C 0", "-C: a whole number of tokens, at least 1"),
        ("-C 1.5", "got '1.5'"),
        (
            "-C 8k --carryover-size 8k",
            "carryover_size must be at least 0 and less than context_size",
        ),
        (
            "-C 8k --carryover-size 50 --head-size 60",
            "head_size must be at most carryover_size=50, got 60",
        ),
        ("--gpu h10", "unknown GPU 'h10'. Did you mean 'h100'?"),
        ("--gpus 0", "gpus must be at least 1, got 0"),
        ("--parallel 9", "parallel must be from 1 to 8 GPUs, got 9"),
        ("--seed -1", "--seed must be at least 0, got -1"),
        ("-m 4096", "write --carryover-size 4096 for the carryover size"),
        ("--carryover 4k", "got the size '4k': write --carryover-size 4k"),
        ("--carryover tial", "unknown carryover 'tial'. Did you mean 'tail'?"),
        ("--carryover sink_window:num_sink=8", "Did you mean 'num_sinks'"),
        ("--carryover full", "the length of 'full' varies"),
        ("--carryover none --head-size 9", "head_size and head_outside belong to"),
        ("--price nan", "--price must be a number of at least 0"),
        ("--model hidden_size=64", "num_hidden_layers is missing"),
        (f"--model hidden_size=64,{'x' * 300}=1", "num_hidden_layers is missing"),
        (f"--model {'x' * 300}", "is neither a file nor a known model"),
        ("--model deepseek-ai/DeepSeek-V3", "does not fit: its weights take 1342 GB"),
        ("--model google/gemma-3-1b-pt --accounting paper", "plain softmax attention only"),
        ("--lengths nowhere.csv", "cannot read nowhere.csv"),
        ("--efficiency nowhere.json", "cannot read nowhere.json"),
        ("--calibrate nowhere", "nowhere is not a run directory"),
        ("--plot nowhere/out.png", "cannot write the plot to nowhere/out.png"),
        (
            "--head-outside -C 8k --carryover-size 8100",
            "at most context_size=8192 tokens: 'head_tail' carries 8200",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in ("matplotlib",) if "--plot" in words else ():
        pytest.importorskip(module)
    assert says in error_text(capsys, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("5000,3\nmany\n", "line 2: expected a length of at least 1, or length,count; got 'many'"),
        ("5000,-1\n", "line 1"),
        ("0\n", "line 1"),
        ("", "holds no lengths"),
    ],
)
def test_a_broken_histogram(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, says: str
) -> None:
    (tmp_path / "h.csv").write_text(text)
    assert says in error_text(capsys, f"--lengths {tmp_path / 'h.csv'}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"bandwith": 0.5}', "unknown figure 'bandwith'. Did you mean 'bandwidth'?"),
        ('{"bandwidth": 0}', "bandwidth must be a positive number, got 0"),
        ('{"training": "fast"}', "training must be a positive number"),
        ("[]", "expected a JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_a_broken_efficiency_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, says: str
) -> None:
    (tmp_path / "e.json").write_text(text)
    assert says in error_text(capsys, f"--efficiency {tmp_path / 'e.json'}")


def test_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cost_text(capsys, f"{QWEN} --plot {tmp_path / 'out.png'}")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


# -- calibration ------------------------------------------------------------------------------

TRUTH = Efficiency(decode=0.3, training=0.2, step_seconds=0.002, pass_seconds=0.0005)


def write_run(path: Path, context: int, carry: int, chunks: int, length: int) -> Path:
    """Write a run directory with the times that ``TRUTH`` predicts."""
    pytest.importorskip("yaml")
    (path / "traces").mkdir(parents=True)
    config = {
        "model": "toy",
        "name": "calibration",
        "task": {"name": "automaton", "args": {"min_steps": 2, "max_steps": 4}},
        "engine": {"name": "transformers"},
        "thinking": {
            "context_size": context,
            "carryover_size": carry,
            "max_chunks": chunks,
            "head_size": 0,
        },
        "training": {
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "forward_tokens": 100_000,
            "max_steps": 3,
        },
    }
    (path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    metrics = []
    for step in (1, 2, 3):
        lengths = [length * step - i for i in range(8)]
        record = {"query_ids": [1] * 15, "chunks": [{"prompt_ids": [1] * 15, "output_ids": [2]}]}
        lines = [json.dumps({**record, "length": n}) + "\n" for n in lengths]
        (path / "traces" / f"step_{step:06d}.jsonl").write_text("".join(lines))
        cut = LONGCOT if chunks == 1 else Cut(context, carry)
        workload = Workload(15, 4, 2, 1, 1, extra_passes=0.0, prefix_cache=False)
        cost = estimate(
            model_shape("toy"),
            Lengths.empirical(np.array(lengths), 8),
            cut,
            accelerator("cpu"),
            TRUTH,
            workload,
        )
        slow = 100.0 if step == 1 else 1.0  # the first step includes one-time costs
        metrics.append(
            {
                "step": step,
                "seconds_sampling": slow * float(cost.sampling_seconds),
                "seconds_training": slow * float(cost.training_seconds),
            }
        )
    lines = [json.dumps(row) + "\n" for row in metrics]
    (path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "seco')  # an unfinished line
    return path


def test_calibrating_on_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "delethink", 90, 45, 60, 400),
        write_run(tmp_path / "longcot", 3000, 0, 1, 400),
    ]
    saved = tmp_path / "efficiency.json"
    words = f"--calibrate {runs[0]} {runs[1]} --gpu cpu --save-efficiency {saved}"
    found = cost_json(capsys, words)
    assert len(found["sampling_errors"]) == len(found["training_errors"]) == 4
    assert max(map(abs, found["sampling_errors"] + found["training_errors"])) < 0.02
    assert {"step_seconds", "training"} <= set(found["fitted"])
    assert read_efficiency(saved).spread < 0.02
    text = cost_text(capsys, words)
    assert "error of the predicted time" in text
    assert "over 4 steps" in text
    assert "4 steps of delethink, longcot" in cost_text(
        capsys,
        f"--model toy --gpu cpu --gpus 1 --efficiency {saved} -C 90 --carryover-size 45 "
        "--thinking 450 --query 15",
    )


def test_lengths_from_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 90, 45, 60, 400)
    words = f"--model toy --gpu cpu --gpus 1 --lengths {run} -C 90 --carryover-size 45 --query 15"
    answer = cost_json(capsys, words)
    assert answer["thinking"][0]["longcot"]["thinking"] == pytest.approx(796.5)


def test_a_run_without_timed_steps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 90, 45, 60, 400)
    (run / "metrics.jsonl").write_text("")
    assert "no step to calibrate on" in error_text(capsys, f"--calibrate {run} --gpu cpu")
