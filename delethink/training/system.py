"""What the machine has: processors, memory of processes and devices, and room on the disk."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import NamedTuple

_UNLIMITED = 2**60  # what control groups without a limit say is larger


def processor() -> str:
    """How many cores of which processor.

    Several generations of processors go by one name on virtual machines, and the same work takes
    one of them half the time of another: so family and model are given where Linux tells them.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    told: dict[str, list[str]] = {}
    for line in lines:
        key, _, value = line.partition(":")
        told.setdefault(key.strip(), []).append(value.strip())
    names = told.get("model name")
    if not names:
        return platform.processor()
    if "cpu family" not in told or "model" not in told:
        return f"{len(names)} x {names[0]}"
    return f"{len(names)} x {names[0]} (family {told['cpu family'][0]}, model {told['model'][0]})"


class Memory(NamedTuple):
    """Bytes of memory of one kind."""

    name: str
    total: int
    free: int  # at this moment


def process_memory() -> Memory:
    """What processes may use: the machine's memory, or the share that a container has."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux: what is free is not known
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Memory("RAM", total, total)
    values = {}
    for line in meminfo.read_text(encoding="ascii").splitlines():
        key, _, rest = line.partition(":")
        values[key] = int(rest.split()[0]) * 1024
    memory = Memory("RAM", values["MemTotal"], values["MemAvailable"])
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        share, taken = _number(Path(limit)), _number(Path(used))
        if share is not None and share < min(memory.total, _UNLIMITED):
            return Memory("RAM", share, max(0, min(memory.free, share - (taken or 0))))
    return memory


def device_memory() -> Memory | None:
    """Of the GPU that the trainer takes; ``None`` on a machine without."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(0)
    return Memory(torch.cuda.get_device_name(0), total, free)


def free_disk(path: Path) -> int:
    """Bytes that are free where a folder is, or is to be."""
    path = path.absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such group, or "max"
        return None
