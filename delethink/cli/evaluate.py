"""``delethink eval``."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from delethink.cli.process import set_up_process
from delethink.cli.sizes import size, sizes
from delethink.cost.hardware import accelerator
from delethink.cost.models import model_shape
from delethink.engines.factory import choose_engine
from delethink.engines.loading import (
    digest,
    eos_ids,
    load_shell,
    load_tokenizer,
    longest_sequence,
)
from delethink.errors import ConfigError, MissingExtraError, did_you_mean
from delethink.evaluation.results import Reading
from delethink.evaluation.run import (
    Evaluation,
    OpenModel,
    Problems,
    answer_room,
    check_window,
    evaluate,
    load_problems,
    longcot_cap,
    longest_query,
)
from delethink.evaluation.settings import Asked, Setting, make_settings
from delethink.output import output_path

_MODES = ("delethink", "longcot")
_AT_LEAST = {
    **dict.fromkeys(("samples", "in_flight", "batch_size", "num_workers"), 1),
    **dict.fromkeys(("bootstrap", "resamples"), 1),
    **dict.fromkeys(("retries", "force_answer", "margin"), 0),
}
_USUAL: dict[str, Any] = {
    "samples": 4,
    "temperature": 0.6,
    "context_size": "8k",
    "max_chunks": "5",
    "bootstrap": None,
}
# Section 5 and appendix D of the paper; its C, m, head and temperature are the usual values.
_PRESETS: dict[str | None, dict[str, Any]] = {
    None: {},
    "paper": {"samples": 256, "bootstrap": 128},
}


def run(arguments: argparse.Namespace) -> int:
    """Checks everything that can be checked, then samples and sums up."""
    _fill_in(arguments)
    _check(arguments)
    arguments.output = output_path(arguments.output or _default_output(arguments))
    set_up_process()
    problems = load_problems(
        arguments.task,
        task_arguments(arguments.task_arg),
        arguments.num_problems,
        arguments.reward,
        arguments.split,
        arguments.seed,
    )
    with contextlib.closing(problems):
        return _measure(arguments, problems)


def _measure(arguments: argparse.Namespace, problems: Problems) -> int:
    from rich.console import Console

    from delethink.evaluation.report import Reporter

    asked = Asked(arguments.samples, arguments.temperature, arguments.seed, arguments.force_answer)
    settings = [
        setting
        for model in _models(arguments)
        for setting in _settings(arguments, model, problems, asked)
    ]
    evaluation = Evaluation(
        problems,
        settings,
        asked,
        engine=_engine_name(arguments),
        in_flight=arguments.in_flight,
        keep_tokens=not arguments.no_tokens,
        weights={model: digest(model) for model in _models(arguments)},
    )
    reading = Reading(
        margin=arguments.margin,
        bootstrap_k=arguments.bootstrap,
        resamples=arguments.resamples,
        seed=arguments.seed,
        device=accelerator(arguments.gpu),
    )
    output: Path = arguments.output
    reporter = Reporter(Console(highlight=False, stderr=arguments.json))
    if problems.left_out:
        listed = ", ".join(f"{number} {why}" for why, number in problems.left_out.items())
        reporter.say(f"left out of {problems.name}: {listed}")
    results = evaluate(
        evaluation,
        lambda model: _open(arguments, model),
        output,
        reading=reading,
        progress=reporter,
        resume=arguments.resume,
        force=arguments.force,
        retry_errors=arguments.retry_errors,
        cost_models={m: arguments.cost_model for m in _models(arguments) if arguments.cost_model},
    )
    if results.rows and not arguments.no_curves:
        _draw(output, problems.name, results.rows)
    if arguments.json:
        text = evaluation.as_dict() | results.as_dict() | {"timing": results.timing}
        print(json.dumps(text | {"output": str(output)}, indent=2))
    else:
        reporter.table(results)
        reporter.say(f"results: {output}")
    return 0 if results.rows else 1


def _fill_in(arguments: argparse.Namespace) -> None:
    for name, value in (_USUAL | _PRESETS[arguments.preset]).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.in_flight is None:
        # Well above what an engine runs side by side, so that unequal chunks keep it full.
        arguments.in_flight = 512 if arguments.base_url is None else 256


def _check(arguments: argparse.Namespace) -> None:
    """What can be known to be wrong before anything is imported or read."""
    for package in ("transformers", "rich"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "eval")
    if not arguments.no_curves and importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "eval")
    for name in ("force", "retry_errors"):
        if getattr(arguments, name) and not arguments.resume:
            raise ConfigError(f"--{name.replace('_', '-')} goes with --resume")
    if arguments.resume and arguments.output is None:
        raise ConfigError("--resume needs -o PATH, the evaluation to go on with")
    if arguments.base_url is None and arguments.served_model is not None:
        raise ConfigError("--served-model goes with --base-url")
    if arguments.base_url is not None and len(_models(arguments)) > 1:
        raise ConfigError(
            "--base-url takes one -m, the tokenizer of what is served; evaluate other models in "
            "folders of their own"
        )
    for name, least in _AT_LEAST.items():
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not arguments.timeout > 0:
        raise ConfigError(f"--timeout must be more than 0 seconds, got {arguments.timeout}")
    accelerator(arguments.gpu)
    if arguments.cost_model is not None:
        model_shape(arguments.cost_model)
    _modes(arguments)
    if arguments.base_url is None:
        choose_engine(arguments.engine)


def _settings(
    arguments: argparse.Namespace, model: str, problems: Problems, asked: Asked
) -> list[Setting]:
    """The settings of a model, held against its window.

    Raises:
        ConfigError: a context that the model cannot hold.
    """
    tokenizer = load_tokenizer(model, arguments.trust_remote_code)
    longest, room = longest_query(tokenizer, problems), answer_room(tokenizer, asked)
    window = longest_sequence(load_shell(model, arguments.trust_remote_code))
    head = arguments.head_size
    settings = make_settings(
        [model],
        _modes(arguments),
        sizes(arguments.context_size, "-C"),
        sizes(arguments.carryover, "--carryover", 0) if arguments.carryover else (),
        sizes(arguments.max_chunks, "--max-chunks"),
        None if head is None else size(head, "--head-size", 0),
        arguments.head_outside,
        longcot_cap(longest, window, room) if arguments.cap_longcot else None,
    )
    for setting in settings:
        check_window(setting, longest, window, room)
    return settings


def _models(arguments: argparse.Namespace) -> list[str]:
    models = [name for text in arguments.model for name in text.split(",")]
    if "" in models:
        raise ConfigError(f"-m names a model, or several with commas: got {arguments.model}")
    if len(set(models)) < len(models):
        raise ConfigError(f"-m names a model twice: {', '.join(models)}")
    return models


def _modes(arguments: argparse.Namespace) -> list[str]:
    modes: list[str] = arguments.mode.split(",")
    for mode in modes:
        if mode not in _MODES:
            raise ConfigError(f"unknown --mode {mode!r}.{did_you_mean(mode, _MODES)}")
    return list(dict.fromkeys(modes))


def task_arguments(pairs: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` with values as Python writes them, or plain text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, mark, value = pair.partition("=")
        if not mark or not key:
            raise ConfigError(f"--task-arg is KEY=VALUE, got {pair!r}")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def _engine_name(arguments: argparse.Namespace) -> str:
    return "server" if arguments.base_url is not None else choose_engine(arguments.engine)


def _default_output(arguments: argparse.Namespace) -> Path:
    name = f"{Path(arguments.task).stem}-seed{arguments.seed}-{datetime.now():%Y%m%d-%H%M%S}"
    return Path("evaluations") / name


@contextlib.contextmanager
def _open(arguments: argparse.Namespace, model: str) -> Iterator[OpenModel]:
    tokenizer = load_tokenizer(model, arguments.trust_remote_code)
    shell = load_shell(model, arguments.trust_remote_code)
    window = longest_sequence(shell)
    engine: Any
    if arguments.base_url is not None:
        from delethink.engines.openai import OpenAIServer

        engine = OpenAIServer(
            arguments.base_url,
            arguments.served_model,
            tokenizer,
            api_key=os.environ.get(arguments.api_key_env),
            eos_ids=eos_ids(shell, tokenizer),
            retries=arguments.retries,
            timeout_s=arguments.timeout,
            max_in_flight=arguments.in_flight,
        )
        window = min(window, engine.max_model_tokens or window)
    else:
        from delethink.config import EngineConfig
        from delethink.engines.factory import make_evaluation_engine

        engine = make_evaluation_engine(
            EngineConfig(
                name=arguments.engine,
                num_engines=arguments.num_workers,
                gpus_per_engine=arguments.gpus_per_worker,
                dtype=arguments.dtype,
            ),
            model,
            tokenizer,
            trust_remote_code=arguments.trust_remote_code,
            max_batch_size=arguments.batch_size,
            seed=arguments.seed,
        )
        window = min(window, engine.max_model_tokens)
    with contextlib.closing(engine):
        yield OpenModel(engine, tokenizer, window)


def _draw(output: Path, task: str, rows: Any) -> None:
    from delethink.evaluation.report import as_csv, as_html, plot, points

    curve, title = points(rows), f"test-time scaling on {Path(task).name}"
    (output / "curves.csv").write_text(as_csv(curve), encoding="utf-8")
    (output / "curves.html").write_text(as_html(curve, title), encoding="utf-8")
    plot(curve, title, output / "curves.png")
