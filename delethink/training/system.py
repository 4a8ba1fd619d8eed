"""Hardware of this machine: processors, memory of processes and devices, and free disk space."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import NamedTuple


def processor() -> str:
    """Return the number of cores and the name of the processor.

    Virtual machines give several generations of processors one name although one can be twice as
    fast as another, so family and model are added where Linux reports them.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    pairs = [line.partition(":") for line in lines]
    cores = sum(key.strip() == "model name" for key, _, _ in pairs)
    values = {key.strip(): value.strip() for key, _, value in pairs}
    if not cores:
        return platform.processor()
    name = f"{cores} x {values['model name']}"
    if "cpu family" not in values or "model" not in values:
        return name
    return f"{name} (family {values['cpu family']}, model {values['model']})"


class Memory(NamedTuple):
    """Memory of one kind, in bytes."""

    name: str
    total: int
    free: int


def process_memory() -> Memory:
    """Return the memory of the machine, or the limit of the container."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # Other systems than Linux do not report the free memory here.
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Memory("RAM", total, total)
    values = {}
    for line in meminfo.read_text(encoding="ascii").splitlines():
        key, _, rest = line.partition(":")
        values[key] = int(rest.split()[0]) * 1024
    total, free = values["MemTotal"], values["MemAvailable"]
    for limit_file, used_file in (  # control groups, versions 2 and 1
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = _cgroup_number(limit_file), _cgroup_number(used_file)
        if limit is not None and limit < total:  # groups without a limit report a larger number
            return Memory("RAM", limit, max(0, min(free, limit - (used or 0))))
    return Memory("RAM", total, free)


def device_memory() -> Memory | None:
    """Return the memory of the trainer's GPU; ``None`` without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(0)
    return Memory(torch.cuda.get_device_name(0), total, free)


def free_disk(path: Path) -> int:
    """Return the free bytes at a folder, which need not exist yet."""
    path = path.absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def _cgroup_number(name: str) -> int | None:
    try:
        return int((Path("/sys/fs/cgroup") / name).read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such group, or "max"
        return None
