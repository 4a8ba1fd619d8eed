"""Recipes: what is refused, and that the sentence says how to mend it."""

import math
from pathlib import Path
from typing import Any

import pytest

from delethink.carryover import LineBreak, SinkWindow, Tail
from delethink.chunking import ChunkSpec
from delethink.cli.arguments import parse_pairs, size
from delethink.config import (
    LoraConfig,
    Recipe,
    dump_recipe,
    load_recipe,
    parse_values,
    with_rewards,
)
from delethink.errors import ConfigError

MINIMAL = """
name: test
model: toy
task: {name: automaton}
rewards: {exact: 1.0}
thinking: {context_size: 96, carryover_size: 48, max_chunks: 8, head_size: 0}
training: {max_steps: 2, num_generations: 4}
"""


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def test_overrides_win_over_the_file(recipe_path: Path) -> None:
    recipe = load_recipe(
        recipe_path, ["seed=3", "thinking.max_chunks=5", "task.args.max_steps=9", "output=a/b=c"]
    )
    assert (recipe.seed, recipe.thinking.max_chunks) == (3, 5)
    assert recipe.task.args == {"max_steps": 9}
    assert recipe.output == Path("a/b=c")


def test_a_number_written_like_1e_4_is_a_number(recipe_path: Path) -> None:
    assert load_recipe(recipe_path, ["training.learning_rate=1e-4"]).training.learning_rate == 1e-4


NUMBERS: list[tuple[str, Any]] = [
    ("1e-3", 0.001),
    ("1e5", 100000.0),
    ("+2E-4", 0.0002),
    ("1.e5", 100000.0),
    ("5e-07", 5e-07),
    (".5", 0.5),
    ("-3", -3),
    ("010", 10),
    ("09", 9),
    ("1_000", 1000),
    ("0x1F", 31),
    ("0o17", 15),
    (".inf", math.inf),
    ("1:30", "1:30"),
    ("1e-3x", "1e-3x"),
    ("1e", "1e"),
    ("0x", "0x"),
    ("1.5.2", "1.5.2"),
]


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_numbers_are_numbers_everywhere(
    text: str, value: Any, recipe_path: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_path, [f"task.args.x={text}", f"task.args.y=[{text}, a]"])
    for found in (recipe.task.args["x"], recipe.task.args["y"][0]):
        assert (found, type(found)) == (value, type(value))
    file = tmp_path / "written.yaml"
    file.write_text(dump_recipe(recipe).replace("  args:", f"  args:\n    z: {text}", 1))
    assert load_recipe(file).task.args == {**recipe.task.args, "z": value}
    assert parse_values([f"x={text}"]) == {"x": value}
    assert parse_pairs([f"x={text}"], "--task-arg") == {"x": value}


@pytest.mark.parametrize("text", [text for text, _ in NUMBERS] + ["2024-08-01", "null", "yes", ""])
def test_a_text_that_looks_like_a_number_is_written_as_a_text(
    text: str, recipe_path: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_path, [f"task.args.x='{text}'"])
    assert recipe.task.args["x"] == text
    file = tmp_path / "written.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe


def test_arguments_of_a_task_are_flags_and_texts_too() -> None:
    given = ["a=true", "b=False", "c=null", "d=None", "e=", "f=yes", "g={problem}", "h=2024-08-01"]
    assert parse_pairs(given, "--task-arg") == {
        "a": True,
        "b": False,
        "c": None,
        "d": None,
        "e": "",
        "f": "yes",
        "g": "{problem}",
        "h": "2024-08-01",
    }
    assert [size(text, "-C") for text in ("8k", "1e5", "1.5e3", "1M")] == [8192, 10**5, 1500, 2**20]
    for text in ("1e-3", "1e400", "1.5", "1:30"):
        with pytest.raises(ConfigError, match="-C: a whole number of tokens"):
            size(text, "-C")


def test_a_resolved_recipe_reads_back_the_same(recipe_path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_path, ["output=x"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("sede=1", "unknown key 'sede'. Did you mean 'seed'?"),
        ("training.learning_rat=1", "'training.learning_rat'. Did you mean 'learning_rate'?"),
        ("thinking.carryover=1", "Did you mean 'carryover_size'?"),
        ("thinking.carryover_size=96", "carryover_size=96 and context_size=96"),
        ("thinking.head_size=49", "at most carryover_size=48, got 49"),
        ("thinking.context_size=0", "'thinking.context_size' is 0"),
        ("training.num_generations=3", "8 traces are not divisible by num_generations=3"),
        ("training.temperature=0", "'training.temperature' is 0"),
        ("training.temperature=.nan", "training.temperature"),
        ("training.loss_type=grop", "'training.loss_type' is 'grop'"),
        ("training.loss_type=bnpo", "'bnpo' is not defined for traces: it divides by the tokens"),
        ("training.loss_type=vespo", "'vespo' is not defined for traces: it weighs a trace"),
        ("training.loss_type=luspo", "importance_sampling_level=sequence"),
        ("training.delta=0.5", "'training.delta' is 0.5"),
        ("training.vllm_importance_sampling_mode=sequence_mask", "'sequence_mask'"),
        (
            "training={max_steps: 1, gradient_accumulation_steps: 2, steps_per_generation: 3}",
            "3 is not divisible by gradient_accumulation_steps=2",
        ),
        ("training.lora={rank: 3}", "unknown key 'training.lora.rank'"),
        ("training.lora={r: 0}", "'training.lora.r' is 0"),
        ("training.report_to=[wandbb]", "'wandbb'"),
        ("training.report_to=wandbb", "'wandbb'"),
        ("evaluation.num_problems=1", "one problem has no interval: take 0 (no evaluation)"),
        ("training.mask_truncated_completions=true", "unknown key"),
        ("scoring.out_of_budget=maks", "'scoring.out_of_budget' is 'maks'"),
        ("training=3", "'training' is 3"),
        ("engine=vlm", "unknown engine 'vlm'"),
        ("rewards={}", "'rewards' is {}"),
        ("rewards={exact: high}", "rewards.exact: a reward is a weight, or a section with weight"),
        ("rewards={exact: {wieght: 1}}", "'rewards.exact.wieght'. Did you mean 'weight'?"),
        ("evaluation.reward=exat", "Did you mean 'exact'?"),
        ("scoring.timout=1", "Did you mean 'timeout'?"),
        ("scoring.memory_mb=1", "'scoring.memory_mb' is 1"),
        ("seed", "dotted.key=value, got 'seed'"),
        ("thinking.carryover=tale", "unknown carryover 'tale'. Did you mean 'tail'?"),
        ("thinking.carryover={nam: tail}", "Did you mean 'name'?"),
        ("thinking.carryover={name: tail, args: {m: 3}}", "'tail' has no parameter 'm'"),
        (
            "thinking.boundary=line_brake",
            "unknown boundary 'line_brake'. Did you mean 'line_break'?",
        ),
        ("thinking.carryover={name: sink_window, args: {num_sinks: 99}}", "carryover_size=48"),
        ("model.path=x", "model is a value, not a section"),
    ],
)
def test_mistakes_are_explained(recipe_path: Path, override: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_path, [override])
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("training.lora=true", LoraConfig()),
        ("training.lora=false", None),
        ("training.lora={}", LoraConfig()),
        ("training.report_to=tensorboard", ["tensorboard"]),
        ("training.report_to=none", []),
        ("training.report_to=null", []),
    ],
)
def test_settings_are_accepted_as_plainly_meant(
    recipe_path: Path, override: str, found: object
) -> None:
    training = load_recipe(recipe_path, [override]).training
    assert getattr(training, override.split(".")[1].split("=")[0]) == found


def test_a_carryover_and_a_boundary_are_named_with_or_without_parameters(recipe_path: Path) -> None:
    recipe_path.write_text(MINIMAL.replace(", head_size: 0", ""))
    named = load_recipe(recipe_path, ["thinking.carryover=tail", "thinking.boundary=line_break"])
    assert (named.thinking.spec().carryover, named.thinking.spec().boundary) == (
        Tail(),
        LineBreak(),
    )
    resolved = recipe_path.with_name("resolved.yaml")
    resolved.write_text(dump_recipe(named))
    assert load_recipe(resolved).thinking.spec() == named.thinking.spec()
    sinks = "thinking.carryover={name: sink_window, args: {num_sinks: 7}}"
    assert load_recipe(recipe_path, [sinks]).thinking.spec().carryover == SinkWindow(7)
    head = "thinking.carryover={name: head_tail, args: {head_size: 9}}"
    assert load_recipe(recipe_path, [head]).thinking.spec() == ChunkSpec(96, 48, 8, 9)


def test_a_reward_is_a_weight_or_a_section(recipe_path: Path) -> None:
    given = "rewards={exact: 2, long: {reward: overlong, weight: 0.5, args: {cache: 9}}}"
    rewards = load_recipe(recipe_path, [given]).rewards
    assert (rewards["exact"].weight, rewards["exact"].args) == (2.0, {})
    assert (rewards["long"].reward, rewards["long"].args) == ("overlong", {"cache": 9})
    assert load_recipe(recipe_path).accuracy_reward == "exact"


def test_rewards_may_be_left_to_the_task(recipe_path: Path, tmp_path: Path) -> None:
    recipe_path.write_text(MINIMAL.replace("rewards: {exact: 1.0}\n", ""))
    recipe = load_recipe(recipe_path)
    assert recipe.rewards == {}
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe
    assert with_rewards(recipe, {"math": 0.5}).rewards["math"].weight == 0.5
    other = load_recipe(recipe_path, ["evaluation.reward=exact"])
    with pytest.raises(ConfigError, match="not one of the recipe's rewards"):
        with_rewards(other, {"math": 0.5})


def test_a_missing_key_is_named(recipe_path: Path) -> None:
    recipe_path.write_text(MINIMAL.replace("model: toy\n", ""))
    with pytest.raises(ConfigError, match="'model' is missing"):
        load_recipe(recipe_path)


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "\x00"])
def test_what_is_not_a_recipe_is_refused(recipe_path: Path, text: str) -> None:
    recipe_path.write_text(text)
    with pytest.raises(ConfigError, match="recipe"):
        load_recipe(recipe_path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_every_key_is_documented() -> None:
    def sections(model: type) -> list[type]:
        inner = [f.annotation for f in model.model_fields.values()]  # type: ignore[attr-defined]
        found = [i for i in inner if isinstance(i, type) and hasattr(i, "model_fields")]
        return [model, *(s for i in found for s in sections(i))]

    for section in sections(Recipe):
        for name, field in section.model_fields.items():  # type: ignore[attr-defined]
            if not hasattr(field.annotation, "model_fields"):
                assert field.description, f"{section.__name__}.{name}"
