"""Hardware of this machine: processors, memory of processes and devices, and free disk space."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import NamedTuple

_UNLIMITED_BYTES = 2**60  # control groups without a limit report a larger number


def processor() -> str:
    """Return the number of cores and the name of the processor.

    Virtual machines give several generations of processors one name although one can be twice as
    fast as another, so family and model are added where Linux reports them.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    values: dict[str, list[str]] = {}
    for line in lines:
        key, _, value = line.partition(":")
        values.setdefault(key.strip(), []).append(value.strip())
    names = values.get("model name")
    if not names:
        return platform.processor()
    if "cpu family" not in values or "model" not in values:
        return f"{len(names)} x {names[0]}"
    family, model = values["cpu family"][0], values["model"][0]
    return f"{len(names)} x {names[0]} (family {family}, model {model})"


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
    memory = Memory("RAM", values["MemTotal"], values["MemAvailable"])
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        limit, used = _read_number(Path(limit_file)), _read_number(Path(used_file))
        if limit is not None and limit < min(memory.total, _UNLIMITED_BYTES):
            return Memory("RAM", limit, max(0, min(memory.free, limit - (used or 0))))
    return memory


def num_devices() -> int:
    """Return the number of visible GPUs."""
    import torch

    return torch.cuda.device_count()


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


def folder_size(folder: Path) -> int:
    """Return the bytes of all files under a folder; 0 if there is no such folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such group, or "max"
        return None
