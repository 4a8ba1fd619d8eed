"""Settings that may change when a run is resumed, and the next problem of a resumed run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from delethink.config import Recipe, dump_recipe, load_recipe
from delethink.engines.loading import digest
from delethink.errors import ConfigError, RunDirectoryError
from delethink.training.checkpointing import changed_settings, load_run
from delethink.training.rollouts import PromptCursor
from delethink.training.run_directory import RunDirectory

RECIPE = {
    "name": "test",
    "model": "toy",
    "task": {"name": "automaton", "args": {"min_steps": 2}},
    "rewards": {"exact": 1.0},
    "thinking": {"context_size": 96, "carryover_size": 48, "max_chunks": 8, "head_size": 0},
    "training": {"max_steps": 20, "num_generations": 4},
}


def recipe(tmp_path: Path, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return load_recipe(path, list(overrides))


def start(tmp_path: Path, *overrides: str, steps: int = 0) -> Path:
    run = RunDirectory.create(tmp_path / "run", dump_recipe(recipe(tmp_path, *overrides)))
    for i in range(1, steps + 1):
        run.add_metrics({"step": i})
    return run.path


def test_the_output_path_may_change(tmp_path: Path) -> None:
    path = start(tmp_path)
    assert changed_settings(path, recipe(tmp_path, f"output={path}")) == {}


def test_settings_without_effect_on_the_result_may_change(tmp_path: Path) -> None:
    path = start(tmp_path)
    other = recipe(tmp_path, "training.save_steps=3", "training.on_nonfinite=skip")
    assert changed_settings(path, other) == {
        "training.on_nonfinite": ["stop", "skip"],
        "training.save_steps": [10, 3],
    }


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=1", "seed (0 there, 1 here)"),
        ("training.learning_rate=1e-3", "training.learning_rate (1e-06 there, 0.001 here)"),
        ("task.args.min_steps=3", "task.args.min_steps (2 there, 3 here)"),
        ("task.args.max_steps=9", "task.args.max_steps (None there, 9 here)"),
        ("rewards={exact: 2.0}", "rewards.exact.weight (1.0 there, 2.0 here)"),
        ("evaluation.every=3", "evaluation.every (10 there, 3 here)"),
    ],
)
def test_other_settings_must_match(tmp_path: Path, override: str, words: str) -> None:
    path = start(tmp_path)
    with pytest.raises(RunDirectoryError) as refused:
        changed_settings(path, recipe(tmp_path, override))
    assert "holds a run of another recipe: " + words in str(refused.value)
    assert "output=PATH" in str(refused.value)


@pytest.mark.parametrize("scheduler", ["constant", "constant_with_warmup"])
def test_steps_may_be_added_to_a_constant_schedule(tmp_path: Path, scheduler: str) -> None:
    option = f"training.lr_scheduler_type={scheduler}"
    path = start(tmp_path, option, steps=9)
    assert changed_settings(path, recipe(tmp_path, option, "training.max_steps=40")) == {
        "training.max_steps": [20, 40]
    }
    assert changed_settings(path, recipe(tmp_path, option, "training.max_steps=9"))
    with pytest.raises(RunDirectoryError, match="has done 9 steps, more than training.max_steps=8"):
        changed_settings(path, recipe(tmp_path, option, "training.max_steps=8"))


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_steps_may_not_be_added_to_other_schedules(tmp_path: Path, scheduler: str) -> None:
    option = f"training.lr_scheduler_type={scheduler}"
    path = start(tmp_path, option)
    with pytest.raises(RunDirectoryError, match=r"the learning rate of every step depends on it"):
        changed_settings(path, recipe(tmp_path, option, "training.max_steps=40"))


def test_a_run_with_an_unreadable_recipe_is_refused(tmp_path: Path) -> None:
    path = start(tmp_path)
    (path / "config.yaml").write_text("name: test\nmodell: toy\n")
    with pytest.raises(RunDirectoryError, match=r"cannot resume the run.*unknown key 'modell'"):
        changed_settings(path, recipe(tmp_path))


def test_other_initial_weights_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"one")
    option = f"model={model}"
    text = dump_recipe(recipe(tmp_path, option))
    RunDirectory.create(tmp_path / "run", text, digest(str(model))).release()
    assert changed_settings(tmp_path / "run", recipe(tmp_path, option)) == {}
    (model / "model.safetensors").write_bytes(b"two")
    with pytest.raises(RunDirectoryError, match="a run of other initial weights than those of"):
        changed_settings(tmp_path / "run", recipe(tmp_path, option))


def test_a_run_directory_is_accepted_as_a_recipe(tmp_path: Path) -> None:
    path = start(tmp_path)
    again = load_run(path, ["training.save_steps=3"])
    assert again.output == path
    assert again.training.save_steps == 3
    assert changed_settings(path, again) == {"training.save_steps": [10, 3]}
    with pytest.raises(ConfigError, match="a directory without a run"):
        load_run(tmp_path)


@given(st.lists(st.integers(1, 5), max_size=8), st.integers(0, 8))
def test_every_problem_is_taken_once_also_after_a_resume(numbers: list[int], resume: int) -> None:
    cursor, taken = PromptCursor(), list[int]()
    for i, number in enumerate(numbers):
        if i == resume:
            state, cursor = cursor.state_dict(), PromptCursor()
            cursor.load_state_dict(state)
        taken += cursor.take(number)
    assert taken == list(range(sum(numbers)))
