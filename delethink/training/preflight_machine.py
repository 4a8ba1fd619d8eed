"""Checks of this machine for a recipe with GPUs: their number, driver and users, shared memory.

They come before Ray, torch's CUDA context and engines. GPUs are those of ``nvidia-smi``, which also
sees GPUs that torch cannot use.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from delethink.config import Recipe
from delethink.engines.factory import choose_engine
from delethink.errors import ConfigError
from delethink.training.preflight_check import BYTES_PER_GIB, Check, gib

_TIMEOUT_S = 20
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_PLANNED = "delethink doctor RECIPE --gpu h100 --gpus 8 checks a recipe for GPUs that are not here"
# Oldest driver series by major version of CUDA, from NVIDIA's CUDA compatibility guide.
_DRIVERS = {11: 450, 12: 525, 13: 580}
_COLLECTIVE_BYTES = BYTES_PER_GIB  # NVIDIA's advice for the shared memory of NCCL in a container
_USED_BYTES = BYTES_PER_GIB  # a GPU with more in use has another user
_SHARED_MEMORY = Path("/dev/shm")


class LocalGpu(NamedTuple):
    """A GPU of this machine."""

    number: str
    name: str
    total: int  # bytes
    used: int  # bytes
    driver: str


def local_gpus() -> list[LocalGpu]:
    """Return the GPUs that a run on this machine may use; none without an NVIDIA driver."""
    fields = "index,uuid,name,memory.total,memory.used,driver_version"
    gpus = []
    for line in _ask(f"--query-gpu={fields}"):
        index, uuid, name, total, used, driver = line
        if _is_visible(index, uuid):
            gpus.append(LocalGpu(index, name, _mib(total), _mib(used), driver))
    return gpus


def needs_gpus(recipe: Recipe) -> tuple[int, str]:
    """Return the number of GPUs that a recipe takes, and a description with its keys."""
    engine, trainer = recipe.engine, recipe.trainer
    ranks = trainer.num_ranks * trainer.gpus_per_rank
    if choose_engine(engine.name) == "transformers":
        return ranks, f"trainer.num_ranks={trainer.num_ranks}"
    if engine.placement == "colocated":
        return ranks, f"trainer.num_ranks={trainer.num_ranks}, each with an engine beside it"
    engines = engine.num_engines * engine.gpus_per_engine
    number = ranks + int(-(-engines // 1))
    return number, (
        f"{ranks} for trainer.num_ranks={trainer.num_ranks} and {engines:g} for "
        f"engine.num_engines={engine.num_engines}"
    )


def check_machine(recipe: Recipe) -> None:
    """Refuse a recipe whose GPUs are not here, cannot be used or are used by others.

    Nothing is checked in a rank, or if a Ray cluster elsewhere is named: its GPUs are not here.

    Raises:
        ConfigError: the GPUs are too few, their driver is too old, or they have another user.
    """
    number, takes = needs_gpus(recipe)
    if not number or "WORLD_SIZE" in os.environ or os.environ.get("RAY_ADDRESS", "").strip():
        return
    gpus = local_gpus()
    if not gpus:
        cpus = "trainer.gpus_per_rank=0"
        if recipe.engine.placement == "separate":
            cpus = f"{cpus} and engine.gpus_per_engine=0"
        hidden = f" ({_VISIBLE}={os.environ[_VISIBLE]})" if _VISIBLE in os.environ else ""
        raise ConfigError(
            f"the recipe takes {number} GPUs ({takes}), and this machine shows none{hidden}: set "
            f"{cpus} to use its CPUs, or name a Ray cluster with RAY_ADDRESS; {_PLANNED}"
        )
    if number > len(gpus):
        raise ConfigError(
            f"the recipe takes {number} GPUs ({takes}), and this machine has {len(gpus)} x "
            f"{gpus[0].name}: {_fewer(recipe, len(gpus))}, or join a larger cluster with "
            "RAY_ADDRESS"
        )
    if (reason := driver_fault(gpus[0].driver)) is not None:
        raise ConfigError(reason)
    if recipe.preflight == "refuse" and (reason := _users_of(gpus, number)) is not None:
        raise ConfigError(f"{reason}; preflight=warn starts the run anyway")


def _fewer(recipe: Recipe, gpus: int) -> str:
    if recipe.engine.placement == "colocated" or gpus == 1:
        placement = "" if recipe.engine.placement == "colocated" else " and placement=colocated"
        return f"set trainer.num_ranks={gpus}{placement}"
    ranks = min(recipe.trainer.num_ranks, gpus - 1)
    size = max(1, int(recipe.engine.gpus_per_engine))
    return f"set trainer.num_ranks={ranks} and engine.num_engines={max(1, (gpus - ranks) // size)}"


def driver_fault(driver: str) -> str | None:
    """Return a sentence about a driver that is too old for torch's CUDA, or ``None``."""
    import torch

    version = torch.version.cuda
    if version is None:
        return (
            f"this torch {torch.__version__} is a build for CPUs, and the recipe takes GPUs: "
            "install the build for CUDA"
        )
    least = _DRIVERS.get(int(version.partition(".")[0]), max(_DRIVERS.values()))
    series = driver.partition(".")[0]
    if series.isdecimal() and int(series) < least:
        return (
            f"the NVIDIA driver {driver} is older than the {least} series that CUDA {version} of "
            f"torch {torch.__version__} needs: install a driver of {least} or later, or a torch "
            "for an older CUDA"
        )
    return None


def check_shared_memory(recipe: Recipe, update_bytes: float) -> Check | None:
    """Compare what NCCL and new weights put into shared memory with its room.

    Args:
        recipe: the recipe.
        update_bytes: bytes of an update of weights of one engine.

    Returns:
        A problem, or ``None``.
    """
    number, _ = needs_gpus(recipe)
    needed = _shared_bytes(recipe, update_bytes, number)
    if not needed or not _SHARED_MEMORY.exists():
        return None
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed <= free:
        return None
    found = f"/dev/shm has {gib(free)} free, and NCCL and Ray's object store need {gib(needed)}"
    advice = f"start the container with --shm-size={int(needed / BYTES_PER_GIB) + 1}g"
    if recipe.engine.weight_transfer == "store" and number > 1:
        advice = f"{advice}, or set engine.weight_transfer=nccl"
    return Check("shared memory", "problem", found, advice)


def _shared_bytes(recipe: Recipe, update_bytes: float, gpus: int) -> float:
    """Return the bytes that Ray's object store and NCCL put into shared memory."""
    several = recipe.trainer.num_ranks > 1 or recipe.engine.tensor_parallel_size > 1
    needed = float(_COLLECTIVE_BYTES) if gpus and several else 0.0
    workers = choose_engine(recipe.engine.name) != "transformers"
    if workers and recipe.engine.weight_transfer == "store":
        needed += 2 * update_bytes  # new weights are stored before the old ones go
    return needed


def _users_of(gpus: list[LocalGpu], number: int) -> str | None:
    """Return a sentence about other users of the GPUs, or ``None``."""
    taken = [gpu for gpu in gpus if gpu.used > _USED_BYTES]
    if not taken:
        return None
    users = [f"{pid} ({gib(_mib(used))})" for pid, used in _users()]
    by = f" by process {', '.join(users[:4])}" if users else ""
    free = [gpu.number for gpu in gpus if gpu not in taken]
    choice = f"={','.join(free[:number])}" if len(free) >= number else ""
    listed = ", ".join(f"{gpu.number} ({gib(gpu.used)} of {gib(gpu.total)})" for gpu in taken[:8])
    return (
        f"other programs use GPU {listed}{by}: end them, or choose other GPUs with "
        f"{_VISIBLE}{choice}"
    )


def _users() -> list[list[str]]:
    own = str(os.getpid())
    found = _ask("--query-compute-apps=pid,used_memory")
    return [line for line in found if len(line) == 2 and line[0] != own]


def _is_visible(index: str, uuid: str) -> bool:
    chosen = os.environ.get(_VISIBLE)
    if chosen is None:
        return True
    return any(
        part.strip() == index or (part.strip() and uuid.startswith(part.strip()))
        for part in chosen.split(",")
    )


def _mib(text: str) -> int:
    try:
        return int(float(text) * 2**20)
    except ValueError:  # "[N/A]", for example on GPUs without memory of their own
        return 0


def _ask(query: str) -> list[list[str]]:
    """Return the lines of ``nvidia-smi``; none if it is missing or fails."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    return [line for line in lines if line != [""]]
