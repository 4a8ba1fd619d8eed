"""What a recipe may say of several processes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from delethink.config import Recipe, dump_recipe, load_recipe
from delethink.errors import ConfigError, MissingExtraError, RolloutError
from delethink.training.distributed import check_resources, rank_error
from delethink.training.grpo_config import batch_settings, rank_settings
from delethink.training.preflight import prepare

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart" / "recipe.yaml"


def recipe(*overrides: str) -> Recipe:
    return load_recipe(RECIPE, list(overrides))


@pytest.mark.parametrize(
    ("processes", "size", "number", "batch"),
    [(1, 16, 4, 8), (2, 16, 2, 4), (4, 16, 1, 2), (8, 8, 1, 2), (64, 1, 1, 2)],
)
def test_processes_share_the_traces_of_a_step(
    processes: int, size: int, number: int, batch: int
) -> None:
    training = recipe("training.steps_per_generation=8").training
    settings = batch_settings(training, processes)
    assert settings == {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": number,
        "steps_per_generation": batch,
    }
    assert processes * size * number == training.traces_per_step
    assert processes * size * batch == training.traces_per_batch


@pytest.mark.parametrize(("ranks", "rows"), [(3, 72), (5, 80), (6, 72), (64, 64), (63, 504)])
def test_traces_that_do_not_divide_get_rows_without_a_trace(ranks: int, rows: int) -> None:
    training = recipe("training.steps_per_generation=8").training
    settings = batch_settings(training, ranks)
    assert training.rows_per_step(ranks) == rows
    own = settings["per_device_train_batch_size"]
    assert ranks * own * settings["gradient_accumulation_steps"] == rows
    assert ranks * own * settings["steps_per_generation"] == 2 * rows
    assert rows % training.num_generations == 0
    assert own <= training.per_device_train_batch_size


def test_one_process_has_no_settings_of_several() -> None:
    assert rank_settings(recipe().trainer) == {}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.num_ranks=65"], ["64 traces", "num_ranks=65", "16, 32, 64 ranks would fit"]),
        (
            [
                "trainer.num_ranks=3",
                "training.per_device_train_batch_size=5",
                "training.steps_per_generation=8",
            ],
            ["20 traces", "num_ranks=3", "num_generations=8", "1, 2, 4 ranks would fit"],
        ),
        (["trainer.num_ranks=0"], ["'trainer.num_ranks' is 0"]),
        (["trainer.strategy=fsdp2"], ["strategy=fsdp2", "num_ranks=1", "2 or more"]),
        (["trainer.strategy=fsdp3"], ["'trainer.strategy' is 'fsdp3'", "'fsdp2'"]),
        (["trainer.cpus_per_rank=4"], ["cpus_per_rank", "num_ranks=1"]),
        (["trainer.num_rank=2"], ["unknown key 'trainer.num_rank'", "'num_ranks'"]),
        (
            ["trainer.num_ranks=2", "trainer.strategy=fsdp2", "training.lora={}"],
            ["fsdp2", "lora", "trainer.strategy=ddp"],
        ),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        recipe(*overrides)
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["trainer.num_ranks=2", "trainer.strategy=fsdp2"],
        ["trainer.num_ranks=2", "engine=vllm", "engine.placement=colocated"],
        ["trainer.gpus_per_rank=1", "engine=vllm", "engine.placement=colocated"],
    ],
    ids=["plain", "sharded", "colocated", "one GPU"],
)
def test_a_resolved_recipe_reads_back(tmp_path: Path, overrides: list[str]) -> None:
    (tmp_path / "config.yaml").write_text(dump_recipe(recipe(*overrides)))
    assert load_recipe(tmp_path / "config.yaml").trainer == recipe(*overrides).trainer
    assert load_recipe(tmp_path / "config.yaml").engine == recipe(*overrides).engine


def test_a_cluster_that_is_too_small_is_told_in_numbers() -> None:
    two = recipe("trainer.num_ranks=2")
    check_resources(two, {"CPU": 2.0})
    with pytest.raises(ConfigError, match="num_ranks=2 ranks need 2 CPUs, .* has 1:"):
        check_resources(two, {"CPU": 1.0})
    with pytest.raises(ConfigError, match="need 2 GPUs, .* has 0:"):
        check_resources(recipe("trainer.num_ranks=2", "trainer.gpus_per_rank=1"), {"CPU": 8.0})


def test_a_rank_with_a_gpu_leaves_the_other_gpus_to_the_engines() -> None:
    """One command for one trainer and three engines on a machine of four GPUs."""
    three = ["engine=vllm", "engine.num_engines=3", "engine.gpus_per_engine=1"]
    split = recipe("trainer.gpus_per_rank=1", "trainer.cpus_per_rank=4", *three)
    assert split.trainer.uses_ray_train
    assert not recipe().trainer.uses_ray_train
    check_resources(split, {"CPU": 8.0, "GPU": 4.0})
    with pytest.raises(ConfigError, match="1 GPUs and the engines 3, .* has 3:"):
        check_resources(split, {"CPU": 8.0, "GPU": 3.0})
    settings = rank_settings(split.trainer)  # accelerate wraps a lone rank too
    assert settings == rank_settings(recipe("trainer.num_ranks=2").trainer) | {"use_cpu": False}


def test_colocated_engines_take_the_gpus_of_the_ranks() -> None:
    shared = recipe(
        "trainer.num_ranks=4", "trainer.gpus_per_rank=1", "engine=vllm",
        "engine.placement=colocated",
    )  # fmt: skip
    engine = shared.engine
    assert (engine.num_engines, engine.gpus_per_engine, engine.sleep) == (4, 1.0, True)
    assert (engine.weight_transfer, engine.engine_dtype) == ("ipc", "bfloat16")
    check_resources(shared, {"CPU": 8.0, "GPU": 4.0})
    with pytest.raises(ConfigError, match="ranks need 4 GPUs, .* has 3:"):
        check_resources(shared, {"CPU": 8.0, "GPU": 3.0})
    on_cpus = recipe("trainer.num_ranks=2", "engine=vllm", "engine.placement=colocated").engine
    assert (on_cpus.num_engines, on_cpus.gpus_per_engine, on_cpus.sleep) == (2, 0.0, False)
    assert on_cpus.weight_transfer == "ipc"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("engine.num_engines=3", ["num_engines=2", "trainer.num_ranks=2", "got 3"]),
        ("engine.gpus_per_engine=0.5", ["gpus_per_engine=0.0", "gpus_per_rank=0", "got 0.5"]),
        ("engine.weight_transfer=store", ["weight_transfer=ipc", "got store", "leave"]),
        ("engine.tensor_parallel_size=2", ["tensor_parallel_size=2", "placement=separate"]),
        ("engine.node_placement=pack", ["node_placement=pack", "leave it out"]),
        ("engine.sleep=true", ["sleep=true", "trainer.gpus_per_rank=1"]),
        ("training.max_staleness=1", ["max_staleness=1", "engine.placement=separate"]),
    ],
)
def test_what_contradicts_engines_beside_ranks_is_refused(override: str, words: list[str]) -> None:
    beside = ["trainer.num_ranks=2", "engine=vllm", "engine.placement=colocated"]
    with pytest.raises(ConfigError) as refused:
        recipe(*beside, override)
    assert all(word in str(refused.value) for word in words)
    assert "\n" not in str(refused.value)


def test_ray_is_missed_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ray" else found(name)
    )
    with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[ray\]'"):
        prepare(recipe("trainer.num_ranks=2"))


class Failed(Exception):
    def __init__(self, failures: dict[int, Exception]) -> None:
        self.worker_failures = failures


class Wrapped(Exception):
    def __init__(self, base: Exception) -> None:
        self._base_exc = base


def test_what_was_raised_on_purpose_is_what_is_told() -> None:
    lost, broke = RuntimeError("Connection closed by peer"), RolloutError("9 of 8 traces failed")
    assert rank_error(Failed({0: Wrapped(lost), 1: Wrapped(broke)})) is broke
    both = Failed({0: Wrapped(lost)})
    assert rank_error(both) is both
