"""What a pool is asked for must be possible, and every setting of a recipe reach it."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from delethink.config import RolloutConfig
from delethink.engines.factory import pool_options
from delethink.engines.pool_settings import PoolSettings, check_resources
from delethink.errors import ConfigError


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((1.5, 1, False, None), "a fraction of one GPU or a whole number, got 1.5"),
        ((1.0, 0, False, None), "tensor_parallel_size must be at least 1, got 0"),
        ((1.0, 2, False, None), "needs as many GPUs for each worker, got gpus_per_worker=1"),
        ((1.0, 1, False, None, "email"), "must be 'store', 'nccl' or 'ipc', got 'email'"),
        (
            (0.5, 1, False, None, "nccl"),
            "gpus_per_worker=0.5 shares one: set weight_transfer='ipc'",
        ),
        ((2.0, 2, False, None, "ipc"), "gpus_per_worker=2 are several: set weight_transfer='nccl'"),
        ((0.5, 1, False, None, "ipc", 2), "and 2 processes train: set weight_transfer='nccl'"),
        ((0.0, 1, False, None, "nccl"), "goes from GPU to GPU, and the workers have none"),
        ((0.0, 1, True, None), "the workers have none: set gpus_per_worker"),
        ((0.0, 1, False, "near"), "placement must be 'pack' or 'spread', got 'near'"),
    ],
)
def test_what_no_machine_can_give_is_refused(asked: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_resources(*asked)


def test_what_machines_can_give_is_not() -> None:
    check_resources(0.5, 1, True, "pack")
    check_resources(4.0, 4, False, "spread")
    check_resources(0.0, 1, False, None)
    check_resources(0.0, 2, False, None, "store")
    check_resources(0.5, 1, False, None, "ipc")


def test_every_setting_of_a_recipe_reaches_the_pool() -> None:
    pytest.importorskip("torch")
    from delethink.engines.ray import RayPool

    section = RolloutConfig(hang_timeout=7, max_attempts=9, sleep=True, startup_timeout=11)
    options = pool_options(section.model_dump())
    inspect.signature(RayPool).bind("model", eos_ids=(1,), **options)
    assert options["settings"] == PoolSettings(hang_timeout=7, max_attempts=9)
    assert (options["can_sleep"], options["startup_timeout_s"]) == (True, 11)
    assert pool_options({}) == {"settings": PoolSettings()}


def test_a_recipe_and_a_pool_have_the_same_defaults() -> None:
    section = RolloutConfig()
    for field in dataclasses.fields(PoolSettings):
        if field.name != "weight_sync_timeout":  # stands beside the section
            assert getattr(section, field.name) == field.default, field.name
