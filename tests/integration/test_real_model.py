"""A pretrained model through every command, as docs/guide/bring_your_own_model.md does it.

No pretrained model can be downloaded by a test, so its folder comes from a variable:

    DELETHINK_REAL_MODEL=FOLDER pytest -m slow tests/integration/test_real_model.py
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

FOLDER = os.environ.get("DELETHINK_REAL_MODEL")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="DELETHINK_REAL_MODEL names no folder with a model"),
    pytest.mark.usefixtures("own_ray"),
]

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "bring_your_own_model.md"
BUDGETS = (16, 24)


def blocks(language: str) -> list[str]:
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    return found


def commands() -> Iterator[list[str]]:
    """Arguments of the commands in the shell blocks of the page, in order."""
    fenced = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", PAGE.read_text(), re.M)
    for code in [code for language, code in fenced if not language]:
        for line in code.replace("\\\n", " ").splitlines():
            name, *arguments = shlex.split(line)
            assert name == "delethink"
            yield arguments


def run(arguments: list[str], cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "delethink.cli.main", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=7200,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert "%|" not in done.stdout + done.stderr, "a bar stands in a log"
    return done.stdout


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader who has run the whole page; ``said.json`` holds the outputs."""
    folder = tmp_path_factory.mktemp("reader")
    assert FOLDER is not None
    (folder / "my-model").symlink_to(Path(FOLDER).resolve(), target_is_directory=True)
    (folder / "problems.jsonl").write_text(blocks("json")[0])
    (folder / "trial.yaml").write_text(blocks("yaml")[0])
    said = [(arguments, run(arguments, folder)) for arguments in commands()]
    (folder / "said.json").write_text(json.dumps(said, indent=2))
    return folder


def said(folder: Path, *words: str) -> str:
    """What the command that begins with these words printed."""
    for arguments, out in json.loads((folder / "said.json").read_text()):
        if arguments[: len(words)] == list(words):
            return str(out)
    raise AssertionError(f"the page has no command {words}")


def greedy_tokens(path: Path) -> dict[tuple[str, int], list[int]]:
    return {
        (line["setting"], line["problem"]): [*chain.from_iterable(line["output_ids"])]
        for line in json_lines(path / "tokens.jsonl")
    }


def test_doctor_finds_no_problem(folder: Path) -> None:
    assert "0 problems" in said(folder, "doctor", "-m")
    checks = said(folder, "doctor", "trial.yaml")
    assert "0 problems" in checks
    for check in ("recipe", "tokenizer", "context", "memory", "disk", "rewards"):
        assert re.search(rf"^(ok|warning) +{check} ", checks, re.M), check


def test_two_steps_train_what_the_engine_sampled(folder: Path) -> None:
    steps = json_lines(folder / "runs" / "trial" / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["logprob_difference"] < 1e-3
        assert math.isfinite(step["loss"])
    traces = sorted((folder / "runs" / "trial" / "traces").glob("step_*.jsonl"))
    assert [len(json_lines(path)) for path in traces] == [4, 4]
    assert (folder / "runs" / "trial" / "checkpoints" / "final" / "model.safetensors").exists()


def test_both_engines_give_the_same_greedy_traces(folder: Path) -> None:
    own, vllm = (greedy_tokens(folder / "out" / name) for name in ("transformers", "vllm"))
    problems = len(blocks("json")[0].splitlines())
    assert own.keys() == vllm.keys()
    assert len(own) == 2 * problems  # Delethink and LongCoT
    same = total = 0
    for key, tokens in own.items():
        same += sum(a == b for a, b in zip(tokens, vllm[key], strict=False))
        total += max(len(tokens), len(vllm[key]))
    assert total > 0
    # After a tie that rounding decides, two greedy traces differ to their end.
    assert same / total > 0.8


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_an_evaluation_reports_every_budget(folder: Path, engine: str) -> None:
    rows = json.loads((folder / "out" / engine / "results.json").read_text())["rows"]
    assert {(row["mode"], row["budget"]) for row in rows} == {
        (mode, budget) for mode in ("delethink", "longcot") for budget in BUDGETS
    }
    assert all(0 <= row["avg"]["value"] <= 1 for row in rows)
    traces = json_lines(folder / "out" / engine / "traces.jsonl")
    assert [line["error"] for line in traces] == [None] * len(traces)


def test_the_probe_measures_finite_losses(folder: Path) -> None:
    text = (folder / "out" / "probe" / "probe.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    found = json.loads(text)
    assert found["traces"] > found["without_boundary"], "no trace is longer than a context"
    assert {line["carryover_size"] for line in found["lines"]} == {4, 8}
    assert all(line["divergence"]["mean"] >= 0 for line in found["lines"])


def test_cost_counts_the_parameters_as_torch_does(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER))
    number = sum(parameter.numel() for parameter in model.parameters())
    (arguments,) = [arguments for arguments in commands() if arguments[0] == "cost"]
    found = json.loads(run([*arguments, "--json"], folder))
    assert found["model"]["parameters"] == number
    assert f"{number / 1e9:.3f} B parameters" in said(folder, "cost")
