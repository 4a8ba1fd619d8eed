"""Adapters under evaluation: both engines sample from the merged weights, and show them."""

from __future__ import annotations

import contextlib
import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from installed import need

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from tiny_adapters import edit_settings, save_adapter  # noqa: E402

from delethink.cli.main import main  # noqa: E402
from delethink.engines.loading import locate  # noqa: E402

pytestmark = pytest.mark.integration

TASK = ["--task", "automaton", "--task-arg", "min_steps=4", "--task-arg", "max_steps=9"]
SMALL = [
    *TASK,
    *("-C", "60", "--carryover-size", "30", "--head-size", "0", "--max-chunks", "2"),
    *("--num-problems", "2", "-n", "1", "--temperature", "0", "--gpu", "cpu", "--no-curves"),
]


def run(command: str, *arguments: str) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it printed."""
    printed = io.StringIO()
    handlers = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = main([command, *arguments])
        finally:
            for sign, handler in handlers.items():
                signal.signal(sign, handler)
    return code, printed.getvalue()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the toy reasoner that changes its answers."""
    folder = tmp_path_factory.mktemp("adapter")
    targets = ["q_proj", "v_proj", "down_proj"]
    save_adapter(folder, Path(locate("toy")), r=3, lora_alpha=6, target_modules=targets)
    return folder


def evaluate(model: str, output: Path, *arguments: str) -> list[tuple[Any, ...]]:
    """Return the sampled tokens of an evaluation."""
    code, printed = run("eval", "-m", model, *SMALL, "-o", str(output), *arguments)
    assert code == 0, printed
    lines = (output / "tokens.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return sorted(
        (record["setting"].partition(" | ")[2], record["problem"], record["output_ids"])
        for record in records
    )


@pytest.fixture(scope="module")
def sampled(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """Tokens of the engine in this process."""
    return evaluate(str(adapter), tmp_path_factory.mktemp("own") / "out", "engine=transformers")


def test_an_adapter_is_evaluated_with_its_own_weights(
    tmp_path: Path, sampled: list[tuple[Any, ...]]
) -> None:
    base = evaluate("toy", tmp_path / "base", "engine=transformers")
    assert len(sampled) == len(base) == 4
    assert sampled != base


def test_both_engines_agree_greedily(
    tmp_path: Path, adapter: Path, sampled: list[tuple[Any, ...]], own_ray: None
) -> None:
    need("vllm")
    vllm = ("engine=vllm", "engine.kv_cache_gib=0.25", "engine.startup_timeout=600")
    assert sampled == evaluate(str(adapter), tmp_path / "vllm", *vllm)


def test_costs_of_an_adapter_are_those_of_its_base(adapter: Path) -> None:
    own, base = (run("cost", "-m", model, "--json") for model in (str(adapter), locate("toy")))
    assert own == base
    assert own[0] == 0


@pytest.mark.parametrize("command", ["eval", "probe", "cost"])
def test_a_missing_base_is_one_sentence_of_each_command(
    tmp_path: Path, adapter: Path, command: str
) -> None:
    folder = save_adapter(tmp_path / "adapter", Path(locate("toy")), target_modules=["q_proj"])
    edit_settings(folder, base_model_name_or_path="/no/such/model")
    more = {
        "eval": [*SMALL, "-o", str(tmp_path / "out")],
        "probe": [*TASK, "-C", "60", "-o", str(tmp_path / "out")],
    }
    code, printed = run(command, "-m", str(folder), *more.get(command, []))
    assert code == 2
    lines = printed.strip().splitlines()
    assert "/no/such/model" in lines[-1]
    assert "Traceback" not in printed


def test_doctor_checks_a_recipe_with_an_adapter(tmp_path: Path, adapter: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: adapter\nmodel: {adapter}\nrewards: {{exact: 1.0}}\n"
        "task: {name: automaton, args: {min_steps: 4, max_steps: 9}}\n"
        "thinking: {context_size: 96, carryover_size: 48, max_chunks: 4, head_size: 0}\n"
        "training: {max_steps: 1, num_generations: 4}\nengine: transformers\n"
    )
    code, printed = run("doctor", str(recipe))
    assert "all names and settings are known" in printed
    assert "adapter" in printed
    edit_settings(adapter, base_model_name_or_path="/no/such/model")
    try:
        code, printed = run("doctor", str(recipe))
    finally:
        edit_settings(adapter, base_model_name_or_path=locate("toy"))
    assert code == 1
    assert "the base model of the adapter" in printed
