"""Recipes for GPUs: their READMEs state what ``doctor --gpu`` predicts, without the hub."""

from __future__ import annotations

import json
import re
import shlex
import socket
from pathlib import Path
from typing import Any

import pytest

from delethink.cli.main import main
from delethink.config import Recipe, load_recipe
from delethink.cost.batch_time import BatchTime, batch_interval, predict_batch
from delethink.cost.gpu_memory import gpu_uses, resting_parts, trainer_parts
from delethink.cost.hardware import accelerator
from delethink.cost.models import model_shape
from delethink.cost.recipe_terms import RecipeTerms, terms_of

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(
    path.parent.name
    for path in ROOT.glob("recipes/*/recipe.yaml")
    if load_recipe(path).engine.gpus_per_engine
)
PAPER = ROOT / "recipes" / "delethink_24k" / "recipe.yaml"
# The settings of the release before placement: four ranks, four engines, the object store.
SEPARATE = [
    "engine.placement=separate",
    "trainer.num_ranks=4",
    "engine.num_engines=4",
    "engine.gpus_per_engine=1",
    "engine.gpu_memory_utilization=0.9",
]
OVERLAPPED = [*SEPARATE, "engine.weight_transfer=nccl", "training.max_staleness=2"]


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the JSON of ``delethink doctor``."""
    code = main(["doctor", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def terms(*overrides: str) -> RecipeTerms:
    recipe: Recipe = load_recipe(PAPER, list(overrides))
    return terms_of(recipe, model_shape(recipe.model), 2048)


def predicted(*overrides: str) -> BatchTime:
    return predict_batch(terms(*overrides), accelerator("h100"))


def test_the_papers_runs_a_newer_base_a_small_gpu_and_two_machines_have_recipes() -> None:
    paper = {"delethink_24k", "delethink_96k", "longcot_24k", "longcot_8k"}
    assert paper | {"qwen3_1_7b", "one_24gb_gpu", "two_nodes"} <= set(FOLDERS)


def marked(folder: str) -> Any:
    """Mark the recipe whose adapters are counted on a model of transformers."""
    marks = [pytest.mark.integration] if folder == "one_24gb_gpu" else []
    return pytest.param(folder, marks=marks)


@pytest.mark.parametrize("folder", map(marked, FOLDERS))
def test_a_readme_states_what_doctor_predicts(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("doctor --gpu asks nobody")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(ROOT)
    text = (ROOT / "recipes" / folder / "README.md").read_text("utf-8")
    command = re.search(r"^delethink doctor (recipes/\S+ --gpu .*)$", text, re.MULTILINE)
    assert command is not None
    code, report = doctor(capsys, *shlex.split(command[1]))
    assert code == 0, report["checks"]
    batch, gib = report["prediction"]["batch"], 2**30
    low, high = batch["interval_5_95"]
    assert f"{batch['total']:,.0f} s ({low:,.0f} to {high:,.0f})" in text
    fullest = max(use["needed"] for use in report["prediction"]["memory"].values())
    assert f"| {fullest / gib:.0f} of " in text
    disk = sum(report["prediction"]["disk"].values()) / gib
    assert f"| {disk:.0f} GiB |" in text or f"| {disk:.1f} GiB |" in text
    assert "not measured here" in text


def test_the_settings_of_the_last_release_take_what_the_review_of_it_estimated() -> None:
    assert predicted(*SEPARATE).total == pytest.approx(455, rel=0.02)


def test_colocated_engines_take_at_most_250_seconds() -> None:
    found = predicted()
    assert found.total <= 250
    assert found.sampling + found.training > 0.8 * found.total


def test_sampling_beside_training_takes_at_most_270_seconds() -> None:
    found = predicted(*OVERLAPPED)
    assert found.overlaps
    assert found.total <= 270
    assert found.sampling + found.training + found.recording > 270  # in turn it would not


def test_a_colocated_batch_takes_the_papers_measured_phases() -> None:
    found = predicted()
    assert found.sampling == pytest.approx(130, rel=0.06)  # section 6.3
    assert found.sampling + found.training == pytest.approx(215, rel=0.06)


def test_the_interval_surrounds_the_prediction() -> None:
    device = accelerator("h100")
    low, high = batch_interval(terms(), device)
    assert low < predicted().total < high
    assert batch_interval(terms(), device) == (low, high)


def test_phases_that_overlap_are_not_added() -> None:
    time = BatchTime(100.0, 1.0, 80.0, 10.0, 7.0, 3.0, 5.0, overlaps=True)
    assert time.total == 108.0
    assert time._replace(training=120.0).total == 133.0
    assert time._replace(overlaps=False).total == 100 + 1 + 80 + 10 + 7 + 5


def test_bytes_of_a_rank_for_each_parameter() -> None:
    size = model_shape("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B").parameters
    whole = trainer_parts(terms())
    states = ("weights", "gradients", "Adam", "DDP buckets")
    assert [whole[name] / size for name in states] == [4, 4, 8, 4]
    sharded = trainer_parts(terms("trainer.strategy=fsdp2"))
    assert "DDP buckets" not in sharded
    assert [sharded[name] * 8 / size for name in states[:3]] == [4, 4, 8]
    alone = trainer_parts(terms("trainer.num_ranks=1"))
    assert "DDP buckets" not in alone
    assert alone["Adam"] == whole["Adam"]


def test_a_sleeping_engine_and_a_resting_rank_leave_room_for_each_other() -> None:
    device = accelerator("h100")
    asleep, sampling = gpu_uses(terms(), device)
    awake, _ = gpu_uses(terms("engine.sleep=false"), device)
    share = 0.5 * device.memory
    assert awake.needed - asleep.needed > share - 3 * 2**30  # all but graphs and context
    of_rank = resting_parts(terms())
    engine = sum(size for name, size in sampling.parts.items() if name not in of_rank)
    assert "gradients" not in sampling.parts
    assert "activations" not in sampling.parts
    assert engine == pytest.approx(share)


def problem(report: dict[str, Any], name: str) -> dict[str, str]:
    (found,) = [c for c in report["checks"] if c["status"] == "problem" and c["name"] == name]
    return found


@pytest.mark.parametrize(
    ("overrides", "name", "says", "advice"),
    [
        (
            ["trainer.num_ranks=16"],
            "devices",
            "takes 16 GPUs, 16 for ranks and their engines alike; there are 8 x H100",
            "trainer.num_ranks=8",
        ),
        (
            [*SEPARATE, "engine.num_engines=12"],
            "devices",
            "takes 16 GPUs, 4 for ranks and 12 for engines; there are 8 x H100",
            "trainer.num_ranks=2 and engine.num_engines=6",
        ),
        (
            ["training.gradient_checkpointing=false"],
            "memory",
            "of 74.5 GiB (training)",
            "training.gradient_checkpointing=true",
        ),
        (
            ["engine.gpu_memory_utilization=0.9"],
            "memory",
            "of 74.5 GiB (sampling)",
            "engine.gpu_memory_utilization=0.5",
        ),
        (
            ["engine.gpu_memory_utilization=0.05"],
            "engine",
            "engine.gpu_memory_utilization=0.05 of a GPU is 3.7 GiB",
            "engine.gpu_memory_utilization=0.09",
        ),
    ],
)
def test_a_recipe_that_cannot_fit_is_refused_with_the_key_that_helps(
    overrides: list[str],
    name: str,
    says: str,
    advice: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, report = doctor(capsys, str(PAPER), *overrides, "--gpu", "h100", "--gpus", "8")
    assert code == 1
    found = problem(report, name)
    assert says in found["found"]
    assert advice in found["advice"]


def test_the_advice_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = doctor(
        capsys, str(PAPER), "training.gradient_checkpointing=false", "--gpu", "h100"
    )
    assert code == 1
    advice = problem(report, "memory")["advice"]
    setting = re.search(r"set (\S+=\S+):", advice)
    assert setting is not None
    code, _ = doctor(capsys, str(PAPER), setting[1], "--gpu", "h100")
    assert code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([str(PAPER), "--gpus", "8"], "--gpus needs --gpu NAME"),
        ([str(PAPER), "--thinking", "8k"], "--thinking needs --gpu NAME"),
        (["--gpu", "h100"], "--gpu needs a recipe"),
        ([str(PAPER), "--gpu", "h100", "--gpus", "0"], "--gpus must be at least 1, got 0"),
        ([str(PAPER), "--gpu", "h10"], "Did you mean 'h100'?"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_mean_beyond_the_budget_leaves_the_time_open(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpu", "h100", "--thinking", "30000"]
    assert main(["doctor", str(PAPER), *options]) in (1, 2)
    out = capsys.readouterr()
    assert "from 1 to the budget of 24576, got 30000" in out.out + out.err
