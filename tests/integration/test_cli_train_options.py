"""Options of training, through the command."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from train_command import (
    TOY,
    assert_metrics_are_in_the_table,
    assert_one_sentence,
    command,
    environment,
    run,
)

from delethink.engines.loading import load_model, load_tokenizer

pytestmark = pytest.mark.integration


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two passes over batches of two optimizer steps, with adapters, in bfloat16."""
    folder = tmp_path_factory.mktemp("options")
    done = run(
        "output=run",
        "training.max_steps=6",
        "training.gradient_accumulation_steps=1",
        "training.steps_per_generation=2",
        "training.num_iterations=2",
        "training.learning_rate=0.003",
        "training.max_sampling_rounds=3",
        "training.lora={r: 4, lora_alpha: 8}",
        "training.bf16=true",
        "training.report_to=[tensorboard]",
        "evaluation.every=100",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_several_steps_on_a_batch(folder: Path) -> None:
    metrics = metrics_of(folder)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert ["sampled_tokens" in m for m in metrics] == [True, False, False, False, True, False]
    assert_metrics_are_in_the_table(metrics)
    batch = metrics[:4]
    assert sum(m["trained_tokens"] for m in batch) == 2 * batch[0]["sampled_tokens"]
    assert batch[0]["importance_ratio"] == pytest.approx(1.0, abs=1e-2)
    assert batch[3]["importance_ratio"] != batch[0]["importance_ratio"]
    assert all(0 <= m["padding"] <= 0.02 for m in metrics)


def test_metrics_by_index_of_the_chunk(folder: Path) -> None:
    metrics = metrics_of(folder)
    for m in metrics:
        by_chunk = m["by_chunk"]
        assert sum(by_chunk["trained_tokens"]) == m["trained_tokens"]
        for name in ("entropy", "logprob_difference_max", "logprob_outside_share"):
            assert len(by_chunk[name]) == len(by_chunk["trained_tokens"])
    assert set(metrics[0]["reward_by_chunks"]) <= {"1", "2", "3", "4"}


def test_replaced_groups_are_counted_and_kept(folder: Path) -> None:
    metrics = metrics_of(folder)
    for step in (1, 5):
        m = metrics[step - 1]
        text = (folder / "run" / "traces" / f"step_{step:06d}.jsonl").read_text()
        traces = [json.loads(line) for line in text.splitlines()]
        untrained = [t for t in traces if t["advantage"] is None]
        assert len(traces) - len(untrained) == m["traces"] == 16
        assert len(untrained) == 8 * m["groups_replaced"]
        assert sum(t["length"] for t in untrained) == m["tokens_replaced"]
        assert 1 <= m["sampling_rounds"] <= 3
    assert any(m.get("groups_replaced") for m in metrics)


def test_adapters_are_merged_into_the_final_checkpoint(folder: Path) -> None:
    final = folder / "run" / "checkpoints" / "final"
    trained = load_model(str(final), "float32").state_dict()
    base = load_model("toy", "float32").state_dict()
    assert trained.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], trained[name])}
    assert changed
    assert all("_proj" in name and name.endswith("weight") for name in changed)
    own = load_model(str(final / "adapter"), "float32").state_dict()
    for name, tensor in own.items():  # the base model beneath it, merged as PEFT does
        torch.testing.assert_close(tensor, trained[name], rtol=1e-5, atol=1e-6)


def test_metrics_are_reported_to_tensorboard(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (folder / "run" / "tensorboard").glob("events.out.tfevents.*")
    assert list((folder / "run").rglob("events.out.tfevents.*")) == [events]
    seen = EventAccumulator(str(events)).Reload()
    scalars = seen.Tags()["scalars"]
    assert {"train/delethink/entropy", "train/delethink/by_chunk/entropy/1"} <= set(scalars)
    logged = [event.value for event in seen.Scalars("train/delethink/trained_tokens")]
    assert logged == [m["trained_tokens"] for m in metrics_of(folder)]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.report_to=[wandb]", ["names wandb", "pip install wandb"]),
        ("training.max_staleness=1", ["max_staleness=1", "engine=vllm"]),
        ("training.loss_type=bnpo", ["is not defined for traces", "micro-batch"]),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path: Path, override: str, words: list[str]) -> None:
    assert_one_sentence(run("output=run", override, cwd=tmp_path), *words)
    assert not (tmp_path / "run").exists()


REFUSES = """
import sys
from delethink.cli.main import main
from delethink.errors import WeightSyncError
from delethink.training import trainer


class Refuses:
    max_model_tokens = 10_000

    def update_weights(self, weights, version):
        raise WeightSyncError("worker 0 failed: such a model takes no new weights yet")

    async def generate(self, *request):
        raise AssertionError("a rollout started before the weights were checked")

    def close(self):
        pass


trainer.make_engine = lambda *arguments, **options: Refuses()
sys.exit(main(sys.argv[1:]))
"""


def test_an_engine_that_takes_no_weights_fails_before_the_first_rollout(
    tmp_path: Path,
) -> None:
    _, _, _, *arguments = command("output=run")
    done = subprocess.run(
        [sys.executable, "-c", REFUSES, *arguments],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    told = done.stderr.strip().splitlines()[-1]
    assert told == "delethink: worker 0 failed: such a model takes no new weights yet"


@pytest.mark.slow  # minutes
def test_rollouts_are_prefetched_while_the_trainer_trains(tmp_path: Path) -> None:
    """Batches are sampled one update ahead; new weights enter at boundaries; the loss corrects."""
    done = run(
        "output=run",
        "engine=vllm",
        "training.max_staleness=1",
        "training.max_steps=5",
        "thinking.max_chunks=8",
        "evaluation.every=100",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    metrics = metrics_of(tmp_path)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5]
    assert metrics[0]["staleness_max"] == 0
    assert {m["staleness_max"] for m in metrics[1:]} == {1}
    for step, m in enumerate(metrics, 1):
        assert m["trained_tokens"] == m["sampled_tokens"]
        assert m["policy_version"] == step - 1
        text = (tmp_path / "run" / "traces" / f"step_{step:06d}.jsonl").read_text()
        traces = [json.loads(line) for line in text.splitlines()]
        versions = [[c["policy_version"] for c in t["chunks"]] for t in traces]
        assert all(own == sorted(own) for own in versions)
        assert {v for own in versions for v in own} <= {step - 2, step - 1}
        assert 0 <= m["overlap"] <= 1
        assert m["seconds_training"] > 0  # although sampling began before the step
    assert metrics[0]["overlap"] < max(m["overlap"] for m in metrics[1:])  # nothing ran before it
    # Log-probs of older weights differ, and the loss corrects for it.
    fresh = metrics[0]["logprob_difference"]
    assert fresh < 1e-5
    assert max(m["logprob_difference"] for m in metrics[1:]) > 10 * fresh
    assert any(m["importance_correction"] != 1.0 for m in metrics[1:])
    problems = [
        json.loads(line)["prompt"]
        for step in range(1, 6)
        for line in (tmp_path / "run" / "traces" / f"step_{step:06d}.jsonl").open()
    ]
    assert len(set(problems)) == len(problems) // 8  # each problem has one group of 8


# -- an own reward module, no evaluation, and the trained model ------------------------------------

OWN_RECIPE = """
name: own
model: base
task: {name: automaton, args: {min_steps: 2, max_steps: 4}}
rewards: {right: {reward: "my_rewards:right"}}
thinking: {context_size: 32, carryover_size: 16, max_chunks: 4, head_size: 0}
training: {max_steps: 1, num_generations: 4, per_device_train_batch_size: 8, temperature: 1.0}
evaluation: {num_problems: 0}
engine: transformers
"""
OWN_REWARD = """
def right(text, answer):
    return float(text.endswith(str(answer)))
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a recipe with a module beside it, on a base in bfloat16, from another folder."""
    folder = tmp_path_factory.mktemp("own")
    base = load_model(str(TOY), "bfloat16")
    base.save_pretrained(folder / "base")
    load_tokenizer(str(TOY)).save_pretrained(folder / "base")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "recipe.yaml").write_text(OWN_RECIPE)
    (folder / "recipes" / "my_rewards.py").write_text(OWN_REWARD)
    done = train(folder, "recipes/recipe.yaml", "output=run")
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout)
    return folder


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "delethink.cli.main", "train", *arguments],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_run_without_evaluation_has_no_table(own: Path) -> None:
    assert "training without evaluation" in (own / "said.txt").read_text()
    assert not (own / "run" / "table.json").exists() or not json.loads(
        (own / "run" / "table.json").read_text()
    )


def test_a_run_is_resumed_with_the_modules_beside_its_recipe(own: Path) -> None:
    elsewhere = own / "elsewhere"
    elsewhere.mkdir()
    done = train(elsewhere, str(own / "run"), "training.max_steps=2", f"model={own / 'base'}")
    assert_one_sentence(done, "model")  # the run names its base as it was given
    done = train(own, "run", "training.max_steps=2")
    assert done.returncode == 0, done.stderr
    assert "resuming the run after step 1" in done.stdout


def test_the_trained_model_has_the_data_type_of_its_base_and_a_card(own: Path) -> None:
    trained = own / "run" / "checkpoints" / "final"
    assert {path.name for path in trained.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((trained / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(trained / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert {weights.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    card = (trained / "README.md").read_text()
    assert "| carryover size m | 16 |" in card
    assert "base, trained with reinforcement learning" in card
    assert str(own) not in card
    assert not list((own / "run" / "checkpoints").glob("*.md"))


def test_the_next_command_evaluates_the_trained_model(own: Path) -> None:
    said = (own / "said.txt").read_text()
    command = said.split("measure it: delethink ")[1].splitlines()[0]
    short = ["--num-problems", "2", "-n", "1", "-o", "measured", "--no-curves"]
    short += ["engine=transformers"]  # vLLM would start once for each model and command
    done = subprocess.run(
        [sys.executable, "-m", "delethink.cli.main", *shlex.split(command), *short],
        cwd=own,
        env=environment(own),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "as in run: --context-size 32 --carryover-size 16 --max-chunks 4" in done.stderr
    stored = json.loads((own / "measured" / "settings.json").read_text())
    assert (stored["task"], stored["reward"]) == ("automaton", "my_rewards:right")
    assert {each["context_size"] for each in stored["settings"]} == {32, 80}
    again = [sys.executable, "-m", "delethink.cli.main", "eval", "measured", "-n", "2"]
    done = subprocess.run(again, cwd=own, env=environment(own), capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = (own / "measured" / "traces.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 2 * 2 * 2  # models, modes, problems, samples
