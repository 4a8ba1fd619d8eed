"""GPUs of this machine against a recipe: each fault is one sentence with numbers and a key.

No GPU is here, so ``nvidia-smi`` and the CUDA version of torch are made up.
"""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from delethink.config import Recipe, load_recipe
from delethink.errors import ConfigError
from delethink.training import preflight_machine
from delethink.training.preflight_machine import (
    check_machine,
    check_shared_memory,
    driver_fault,
    local_gpus,
    needs_gpus,
)

RECIPES = Path(__file__).parents[2] / "recipes"
GIB = 2**30
Usage = namedtuple("Usage", "total used free")


def recipe(*overrides: str, name: str = "delethink_24k") -> Recipe:
    return load_recipe(RECIPES / name / "recipe.yaml", list(overrides))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RAY_ADDRESS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that gives the machine GPUs, by the MiB in use on each."""

    def make(*used: int, driver: str = "580.65.06", users: str = "") -> None:
        lines = [
            f"{i}, GPU-{i}abc, NVIDIA H100 80GB HBM3, 81559, {mib}, {driver}"
            for i, mib in enumerate(used)
        ]
        script = tmp_path / "nvidia-smi"
        script.write_text(
            "#!/bin/sh\ncase $1 in\n--query-gpu*) cat <<'END'\n"
            + "".join(line + "\n" for line in lines)
            + "END\n;;\n*) cat <<'END'\n"
            + users
            + "END\n;;\nesac\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    return make


def fault(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_machine(recipe(*overrides))
    return str(caught.value)


SEPARATE = ["engine.placement=separate", "engine.gpus_per_engine=1"]


@pytest.mark.parametrize(
    ("overrides", "number", "words"),
    [
        ([], 8, "trainer.num_ranks=8, each with an engine beside it"),
        (
            [*SEPARATE, "trainer.num_ranks=4", "engine.num_engines=3"],
            7,
            "4 for trainer.num_ranks=4 and 3 for engine.num_engines=3",
        ),
        (
            [*SEPARATE, "trainer.num_ranks=4", "engine.num_engines=2", "engine.gpus_per_engine=2"],
            8,
            "4 for engine.num_engines=2",
        ),
    ],
)
def test_gpus_of_a_recipe(overrides: list[str], number: int, words: str) -> None:
    found, description = needs_gpus(recipe(*overrides))
    assert found == number
    assert words in description


def test_a_machine_with_the_gpus_passes(machine: Any) -> None:
    machine(*[4] * 8)
    check_machine(recipe())


def test_a_machine_without_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # without nvidia-smi
    text = fault()
    assert "takes 8 GPUs" in text
    assert "this machine shows none" in text
    assert "trainer.gpus_per_rank=0" in text
    assert "--gpu h100 --gpus 8" in text
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # the GPUs are elsewhere
    check_machine(recipe())
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("WORLD_SIZE", "8")  # the command has checked, and a rank sees its own
    check_machine(recipe())


def test_hidden_gpus(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(*[4] * 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-3abc")
    assert [gpu.number for gpu in local_gpus()] == ["1", "3"]
    assert "this machine has 2 x NVIDIA H100 80GB HBM3: set trainer.num_ranks=2" in fault()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "shows none (CUDA_VISIBLE_DEVICES=)" in fault()


def test_too_few_gpus_name_numbers_that_fit(machine: Any) -> None:
    machine(*[4] * 4)
    assert "takes 8 GPUs" in fault()
    assert "set trainer.num_ranks=4" in fault()
    text = fault(*SEPARATE, "trainer.num_ranks=2", "engine.num_engines=6")
    assert "set trainer.num_ranks=2 and engine.num_engines=2" in text


@pytest.mark.parametrize(
    ("driver", "cuda", "least"),
    [("570.86.10", "13.0", "580"), ("515.43", "12.8", "525"), ("580.65", "13.0", None)],
)
def test_a_driver_too_old(
    driver: str, cuda: str, least: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = driver_fault(driver)
    if least is None:
        assert found is None
    else:
        assert found is not None
        assert f"driver {driver} is older than the {least} series that CUDA {cuda}" in found


def test_an_old_driver_refuses_the_run(machine: Any) -> None:
    machine(*[4] * 8, driver="535.104.05")
    assert "535.104.05 is older than the 580 series" in fault()


def test_a_torch_for_cpus_beside_gpus(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(*[4] * 8)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build for CPUs, and the recipe takes GPUs" in fault()


def test_two_runs_on_one_gpu(machine: Any) -> None:
    machine(70_000, users="4711, 69000\n")
    one = ["trainer.num_ranks=1"]
    text = fault(*one)
    assert "other programs use GPU 0 (68.4 GiB of 79.6 GiB) by process 4711 (67.4 GiB)" in text
    assert "CUDA_VISIBLE_DEVICES" in text
    check_machine(recipe(*one, "preflight=warn"))
    machine(70_000, 4)
    assert "CUDA_VISIBLE_DEVICES=1;" in fault(*one)


def test_shared_memory_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Usage(64 * 2**20, 0, 64 * 2**20)
    monkeypatch.setattr(preflight_machine.shutil, "disk_usage", lambda path: small)
    found = check_shared_memory(recipe(), 7 * GIB)
    assert found is not None
    assert "/dev/shm has 0.062 GiB free" in found.found
    assert "need 1.0 GiB" in found.found  # of NCCL: colocated weights go from GPU to GPU
    assert "--shm-size=2g" in found.advice
    separate = recipe(*SEPARATE, "trainer.num_ranks=4", "engine.num_engines=4")
    found = check_shared_memory(separate, 7 * GIB)
    assert found is not None
    assert "need 15.0 GiB" in found.found
    assert "engine.weight_transfer=nccl" in found.advice
    large = Usage(64 * GIB, 0, 64 * GIB)
    monkeypatch.setattr(preflight_machine.shutil, "disk_usage", lambda path: large)
    assert check_shared_memory(separate, 7 * GIB) is None
