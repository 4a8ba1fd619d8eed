"""The ``engine:`` section: impossible settings are refused, short forms and overrides agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from delethink.config import EngineConfig, load_recipe, parse_engine
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


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["gpus_per_engine=1.5"], "a fraction of one GPU or a whole number, got 1.5"),
        (["tensor_parallel_size=0"], "'engine.tensor_parallel_size' is 0"),
        (["gpus_per_engine=1", "tensor_parallel_size=2"], "as many GPUs per engine, got"),
        (["weight_transfer=email"], "'engine.weight_transfer' is 'email'"),
        (["gpus_per_engine=0.5", "weight_transfer=nccl"], "use weight_transfer=ipc"),
        (
            ["gpus_per_engine=2", "tensor_parallel_size=2", "weight_transfer=ipc"],
            "use weight_transfer=nccl",
        ),
        (["weight_transfer=nccl"], "on CPUs use weight_transfer=store"),
        (["sleep=true"], "needs gpus_per_engine above 0"),
        (["node_placement=near"], "'engine.node_placement' is 'near'"),
        (["num_engine=2"], "unknown key 'engine.num_engine'. Did you mean 'num_engines'?"),
        (["num_engines=0"], "'engine.num_engines' is 0"),
        (["heartbeat_timeout=0"], "'engine.heartbeat_timeout' is 0"),
        (["name=vlm"], "unknown engine 'vlm'. Did you mean 'vllm'?"),
    ],
)
def test_impossible_settings_are_refused(
    recipe_path: Path, overrides: list[str], text: str
) -> None:
    dotted = [f"engine.{override}" for override in overrides]
    for read in (lambda: load_recipe(recipe_path, dotted), lambda: parse_engine(dotted)):
        with pytest.raises(ConfigError) as caught:
            read()
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["gpus_per_engine=0.5", "sleep=true", "node_placement=pack", "weight_transfer=ipc"],
        ["gpus_per_engine=4", "tensor_parallel_size=4", "node_placement=spread"],
        ["tensor_parallel_size=2", "weight_transfer=store"],
    ],
)
def test_possible_settings_are_accepted(overrides: list[str]) -> None:
    parse_engine([f"engine.{override}" for override in overrides])


def test_ipc_needs_a_single_rank(recipe_path: Path) -> None:
    shared = ["engine.gpus_per_engine=0.5", "engine.weight_transfer=ipc"]
    load_recipe(recipe_path, shared)
    with pytest.raises(ConfigError, match=r"a single rank, got trainer\.num_ranks=2"):
        load_recipe(recipe_path, [*shared, "trainer.num_ranks=2"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine=vllm", "engine.num_engines=2"],
        ["engine.num_engines=2", "engine=vllm"],
        ["engine={name: vllm, num_engines: 2}"],
        ["engine.name=vllm", "engine.num_engines=2"],
    ],
)
def test_a_name_alone_is_short_for_the_section(recipe_path: Path, overrides: list[str]) -> None:
    wanted = EngineConfig(name="vllm", num_engines=2)
    assert parse_engine(overrides) == wanted
    assert load_recipe(recipe_path, overrides).engine == wanted
    recipe_path.write_text(MINIMAL + "engine: transformers\n")
    assert load_recipe(recipe_path, overrides).engine == wanted


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("num_workers=2", "engine.num_engines"),
        ("gpus_per_worker=1", "engine.gpus_per_engine"),
        ("dtype=bfloat16", "engine.dtype"),
        ("rollout.hang_timeout=3", "engine.hang_timeout"),
        ("rollout.placement=pack", "engine.node_placement"),
        ("rollout={placement: pack}", "engine.node_placement"),
        ("rollout.silence_timeout=3", "engine.heartbeat_timeout"),
        ("trainer.num_workers=2", "trainer.num_ranks"),
        ("trainer.gpus_per_worker=1", "trainer.gpus_per_rank"),
        ("scoring.num_workers=2", "scoring.num_verifiers"),
        ("thinking.border=line_break", "thinking.boundary"),
    ],
)
def test_an_old_key_is_refused_with_its_new_name(recipe_path: Path, old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f"was renamed: write '{new}'"):
        load_recipe(recipe_path, [old])


def test_other_sections_are_refused_as_engine_settings() -> None:
    assert parse_engine([]) == EngineConfig()
    with pytest.raises(ConfigError, match="unknown setting 'training'"):
        parse_engine(["training.max_steps=3"])
    with pytest.raises(ConfigError, match="'engine' is 3"):
        parse_engine(["engine=3"])


def test_weights_are_bfloat16_on_gpus_unless_told_otherwise() -> None:
    assert EngineConfig().engine_dtype == "float32"
    assert EngineConfig(gpus_per_engine=1).engine_dtype == "bfloat16"
    assert EngineConfig(gpus_per_engine=1, dtype="float32").engine_dtype == "float32"
