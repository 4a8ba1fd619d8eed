"""Folders as arguments of ``delethink eval``: an evaluation to continue, a run as a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from delethink.config import NamedConfig, Recipe
from delethink.errors import ConfigError, RunDirectoryError
from delethink.evaluation.stored import read_evaluation
from delethink.output import echo
from delethink.redaction import json_text
from delethink.training.checkpointing import FINAL_CHECKPOINT, load_run
from delethink.training.run_directory import RunDirectory

_FLAGS = {"--resume", "--force", "--retry-errors", "--json"}  # not part of an evaluation
_WITH_VALUE = {"-o", "--output"}


def stored_command(argv: Sequence[str]) -> list[str]:
    """Return the arguments that an evaluation keeps, to be continued from its folder alone."""
    kept, rest = [], iter(argv)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name in _WITH_VALUE:
            if not equals:
                next(rest, None)
        elif argument not in _FLAGS:
            kept.append(argument)
    return kept


def folder_to_continue(arguments: argparse.Namespace) -> Path | None:
    """Return the folder of an evaluation that the arguments name, but no model and no task.

    Raises:
        ConfigError: an argument is neither a setting nor such a folder.
    """
    names = [value for value in arguments.values if "=" not in value]
    if names:
        if len(names) > 1 or not Path(names[0]).is_dir():
            raise ConfigError(
                f"{names[0]!r} is neither engine.key=value nor the folder of an evaluation to "
                "continue"
            )
        return Path(names[0])
    if arguments.resume and (arguments.model, arguments.task, arguments.preset) == (None,) * 3:
        return None if arguments.output is None else Path(arguments.output)
    return None


def continued_command(folder: Path, argv: Sequence[str]) -> list[str]:
    """Return the arguments of the evaluation in a folder, with those given now after them.

    Raises:
        RunDirectoryError: the folder holds no evaluation, or does not know its arguments.
    """
    command = read_evaluation(folder).values.get("command")
    if not command or not all(isinstance(each, str) for each in command):
        raise RunDirectoryError(
            f"{folder} does not know the command of its evaluation: continue it with --resume -o "
            f"{folder} and its own -m and --task"
        )
    given = [each for each in argv if "=" in each or each.startswith("-") or Path(each) != folder]
    return [*command, *given, "--resume", "-o", str(folder)]


def apply_runs(arguments: argparse.Namespace) -> None:
    """Replace run directories among the models by their trained models.

    Options that were left out are those of the run: the sizes and policies of its thinking, the
    variables of its template, the mark of its end of thinking and, without --task, its held-out
    problems.

    Raises:
        ConfigError: a run has no trained model, or two runs think in different ways.
    """
    if arguments.model is None:
        return
    models = [name for text in arguments.model for name in text.split(",")]
    runs = {name: load_run(Path(name)) for name in models if RunDirectory.holds_run(Path(name))}
    if not runs:
        return
    arguments.model = [_trained(name) if name in runs else name for name in models]
    found = {name: _options_of(recipe) for name, recipe in runs.items()}
    (first, options), *others = found.items()
    if arguments.task is None:
        options |= _task_of(runs[first])
    taken = {
        key: value
        for key, value in options.items()
        if value and getattr(arguments, key) in (None, False, [], "auto")
    }
    for name, other in others:
        for key in taken.keys() & other.keys():
            if taken[key] != other[key]:
                option = f"--{key.replace('_', '-')}"
                raise ConfigError(
                    f"{first} and {name} were trained in different ways ({option} {taken[key]} and "
                    f"{other[key]}): say which one to measure with {option}"
                )
    for key, value in taken.items():
        setattr(arguments, key, value)
    if taken:
        listed = " ".join(
            f"--{key.replace('_', '-')} {' '.join(v) if isinstance(v, list) else v}"
            for key, v in taken.items()
        )
        echo(f"as in {first}: {listed}", stderr=True)


def _trained(name: str) -> str:
    path = Path(name) / "checkpoints" / FINAL_CHECKPOINT
    if not path.is_dir():
        raise ConfigError(
            f"the run {name} has no trained model yet ({path}): finish it with delethink train "
            f"{name}, or name the folder of a checkpoint"
        )
    return str(path)


def _options_of(recipe: Recipe) -> dict[str, Any]:
    """Return the thinking of a recipe as options of ``delethink eval``."""
    thinking = recipe.thinking
    options: dict[str, Any] = {
        "context_size": str(thinking.context_size),
        "carryover_size": str(thinking.carryover_size),
        "max_chunks": str(thinking.max_chunks),
        "carryover": _policy(thinking.carryover),
        "boundary": _policy(thinking.boundary),
        "chat_template_kwargs": _pairs(recipe.chat_template_kwargs),
        "end_of_thinking": recipe.task.end_of_thinking,
    }
    if thinking.carryover is None:
        options |= {
            "head_size": str(thinking.spec().head_size),
            "head_outside": thinking.head_outside,
        }
    return options


def _task_of(recipe: Recipe) -> dict[str, Any]:
    source = recipe.evaluation.task or recipe.task
    options: dict[str, Any] = {"task": source.name, "task_arg": _pairs(source.args)}
    if recipe.evaluation.task is None and (name := recipe.accuracy_reward):
        options["reward"] = recipe.rewards[name].reward or name
        options["reward_arg"] = _pairs(recipe.rewards[name].args)
    return options


def _policy(named: NamedConfig | None) -> str | None:
    if named is None:
        return None
    pairs = ",".join(_pairs(named.args))
    return f"{named.name}:{pairs}" if pairs else named.name


def _pairs(values: Any) -> list[str]:
    return [f"{k}={v if isinstance(v, str) else json_text(v)}" for k, v in values.items()]
