"""The ``delethink eval`` command."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delethink.cli import compare
from delethink.cli.arguments import (
    check_model_name,
    parse_boundary,
    parse_carryover,
    parse_head_size,
    parse_pairs,
    sizes,
)
from delethink.cli.effects import SERVER_OPTIONS, refuse_given
from delethink.cli.eval_folders import (
    apply_runs,
    continued_command,
    folder_to_continue,
    stored_command,
)
from delethink.cli.main import parse
from delethink.cli.presets import apply_preset, compared, comparison_lines
from delethink.cli.process import require_packages, set_up_process
from delethink.config import EngineConfig, parse_engine, parse_values
from delethink.cost.hardware import accelerator
from delethink.cost.models import model_shape
from delethink.engines.engine_settings import check_base_url, check_engine_settings
from delethink.engines.factory import choose_engine
from delethink.engines.loading import digest, find_adapter
from delethink.errors import ConfigError, did_you_mean
from delethink.evaluation.models import (
    ModelOpener,
    check_local_model,
    local_models,
    marks_of_model,
    needed_context,
    served_model,
    settings_for_model,
)
from delethink.evaluation.results import AnalysisSettings, Results
from delethink.evaluation.run import Evaluation, ProblemSet, evaluate, load_problems
from delethink.evaluation.settings import SamplingPlan, Setting, make_settings
from delethink.output import echo_json, output_path
from delethink.redaction import register_secret, register_url
from delethink.scoring.rollouts import mark_setting
from delethink.thinking_marks import ThinkingMarks, check_mark_setting, unmarked_hint
from delethink.tokenization import Tokenizer

if TYPE_CHECKING:
    from delethink.evaluation.report import EvaluationProgress

_MODES = ("delethink", "longcot")
_MINIMA = {
    **dict.fromkeys(("samples", "in_flight", "bootstrap", "resamples"), 1),
    **dict.fromkeys(("retries", "force_answer", "margin"), 0),
}


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments before heavy imports, then sample and print the results."""
    if arguments.values[:1] == ["compare"]:
        return compare.run(arguments, arguments.values[1:])
    if (folder := folder_to_continue(arguments)) is not None:
        arguments = parse(["eval", *continued_command(folder, arguments.argv)])
    apply_runs(arguments)
    apply_preset(arguments)
    if arguments.in_flight is None:
        # More than an engine samples at once: chunks of unequal lengths keep the engine busy.
        arguments.in_flight = 512 if arguments.base_url is None else 256
    register_secret(os.environ.get(arguments.api_key_env))
    register_url(arguments.base_url or "")
    arguments.end_of_thinking = check_mark_setting(arguments.end_of_thinking)
    _check(arguments)
    engine = _engine(arguments)
    name = f"{Path(arguments.task).stem}-seed{arguments.seed}-{datetime.now():%Y%m%d-%H%M%S}"
    output = output_path(arguments.output or Path("evaluations") / name)
    set_up_process()
    problems = load_problems(
        arguments.task,
        parse_pairs(arguments.task_arg, "--task-arg"),
        arguments.num_problems,
        arguments.reward,
        arguments.split,
        arguments.seed,
        arguments.allow_unsafe_code,
        parse_pairs(arguments.reward_arg, "--reward-arg"),
    )
    with contextlib.closing(problems):
        arguments.end_of_thinking = mark_setting(problems.scorer, arguments.end_of_thinking)
        return _evaluate(arguments, engine, problems, output)


def _evaluate(
    arguments: argparse.Namespace, engine: EngineConfig, problems: ProblemSet, output: Path
) -> int:
    from delethink.evaluation.report import EvaluationProgress, write_curves

    models = _models(arguments)
    plan = _plan(arguments)
    progress = EvaluationProgress(stderr=arguments.json)
    progress.print(_begin_text(arguments, problems))
    settings = [s for model in models for s in _settings(arguments, model, problems, plan)]

    def longest(model: str, tokenizer: Tokenizer) -> int:
        own = [setting for setting in settings if setting.model == model]
        return needed_context(own, problems.problems, plan, tokenizer)

    open_model = _opener(arguments, engine, longest, progress.print)
    found = _check_models(arguments, models)
    evaluation = Evaluation(
        problems,
        settings,
        plan,
        engine="server" if arguments.base_url is not None else choose_engine(engine.name),
        in_flight=arguments.in_flight,
        keep_tokens=not arguments.no_tokens,
        weights={model: digest(model) for model in models},
        chat_template_kwargs=parse_values(arguments.chat_template_kwargs),
        end_of_thinking={model: marks.end for model, marks in found.items()},
        command=stored_command(arguments.argv),
    )
    if problems.left_out:
        listed = ", ".join(f"{number} {reason}" for reason, number in problems.left_out.items())
        progress.print(f"left out of {problems.name}: {listed}")
    results = evaluate(
        evaluation,
        open_model,
        output,
        analysis=AnalysisSettings(
            margin=arguments.margin,
            bootstrap_k=arguments.bootstrap,
            resamples=arguments.resamples,
            seed=arguments.seed,
            device=accelerator(arguments.gpu),
            cost_model=arguments.cost_model,
        ),
        progress=progress,
        resume=arguments.resume,
        force=arguments.force,
        retry_errors=arguments.retry_errors,
    )
    if results.rows and not arguments.no_curves:
        write_curves(results, evaluation.as_dict(), output)
    _report(arguments, evaluation, results, progress, output)
    for hint in _hints(results, found):
        progress.print(hint)
    return 0 if results.rows else 1


def _begin_text(arguments: argparse.Namespace, problems: ProblemSet) -> str:
    """Return the line that stands on the screen while tokenizer and engine load."""
    source = "engine" if arguments.base_url is None else "server"
    return (
        f"{problems.name}: {len(problems.problems)} problems, each sampled {arguments.samples} x; "
        f"loading tokenizer and {source}"
    )


def _report(
    arguments: argparse.Namespace,
    evaluation: Evaluation,
    results: Results,
    progress: EvaluationProgress,
    output: Path,
) -> None:
    """Print the results, and how they compare with published ones."""
    if arguments.json:
        text = evaluation.as_dict() | results.as_dict() | {"timing": results.timing}
        published = [asdict(c) | {"verdict": c.verdict} for c in compared(arguments, results.rows)]
        echo_json(text | {"published": published, "output": str(output)})
    else:
        progress.table(results)
        for line in comparison_lines(arguments, results.rows):
            progress.print(line)
        progress.print(f"results: {output}")


def _plan(arguments: argparse.Namespace) -> SamplingPlan:
    return SamplingPlan(
        arguments.samples,
        arguments.temperature,
        arguments.seed,
        arguments.force_answer,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
    )


def _hints(results: Results, found: Mapping[str, ThinkingMarks]) -> list[str]:
    """Return a sentence for each setting in which no trace ended its thinking by itself."""
    largest = {row.setting: row for row in results.rows}  # rows have rising budgets
    return [
        f"{row.setting}: {unmarked_hint(found[row.model])}"
        for row in largest.values()
        if not row.marked
    ]


def _check(arguments: argparse.Namespace) -> None:
    """Check the arguments without heavy imports."""
    packages = ["transformers", "rich", "scipy"] + ["matplotlib", "bokeh"] * (
        not arguments.no_curves
    )
    require_packages("eval", *packages)
    for name in ("force", "retry_errors"):
        if getattr(arguments, name) and not arguments.resume:
            raise ConfigError(f"--{name.replace('_', '-')} needs --resume")
    if arguments.resume and arguments.output is None:
        raise ConfigError("--resume needs -o PATH, the folder of the evaluation")
    for name, minimum in _MINIMA.items():
        value = getattr(arguments, name)
        if value is not None and not value >= minimum:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} must be at least {minimum}, got {value}")
    if not arguments.timeout > 0:
        raise ConfigError(f"--timeout must be more than 0 seconds, got {arguments.timeout}")
    if arguments.bootstrap is None:
        refuse_given(arguments, ["resamples"], "needs --bootstrap")
    accelerator(arguments.gpu)
    if arguments.cost_model is not None:
        model_shape(arguments.cost_model)
    if arguments.base_url is not None:
        check_base_url(arguments.base_url)
    # Impossible sizes end here; the policies are bound to a tokenizer later.
    make_settings(_models(arguments), _modes(arguments), **_sizes(arguments))


def _engine(arguments: argparse.Namespace) -> EngineConfig:
    engine = parse_engine(arguments.values)
    if arguments.base_url is None:
        refuse_given(arguments, SERVER_OPTIONS, "needs --base-url")
        check_engine_settings(
            engine,
            trains=False,
            sends_weights=lambda: any(find_adapter(model) for model in _models(arguments)),
        )
    elif len(_models(arguments)) > 1:
        raise ConfigError(
            "--base-url takes a single -m, the tokenizer of the served model; evaluate other "
            "models in other folders"
        )
    elif arguments.values:
        raise ConfigError(
            f"--base-url samples from a server, so engine settings have no effect: remove "
            f"{' '.join(arguments.values)}"
        )
    return engine


def _settings(
    arguments: argparse.Namespace, model: str, problems: ProblemSet, plan: SamplingPlan
) -> list[Setting]:
    return settings_for_model(
        model,
        _modes(arguments),
        problems=problems.problems,
        plan=plan,
        cap_longcot=arguments.cap_longcot,
        **_sizes(arguments),
        **_tokenizer_options(arguments),
    )


def _sizes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of ``make_settings`` about sizes and policies."""
    carried = arguments.carryover_size
    return {
        "context_sizes": sizes(arguments.context_size, "-C"),
        "carryover_sizes": sizes(carried, "--carryover-size", 0) if carried else (),
        "max_chunks": sizes(arguments.max_chunks, "--max-chunks"),
        "head_size": parse_head_size(arguments.head_size),
        "head_outside": arguments.head_outside,
        "carryover": parse_carryover(arguments.carryover),
        "boundary": parse_boundary(arguments.boundary),
    }


def _tokenizer_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of everything that loads a tokenizer."""
    return {
        "trust_remote_code": arguments.trust_remote_code,
        "chat_template_kwargs": parse_values(arguments.chat_template_kwargs),
        "end_of_thinking": arguments.end_of_thinking,
    }


def _check_models(arguments: argparse.Namespace, models: list[str]) -> dict[str, ThinkingMarks]:
    """Return the marks of thinking of models, after a check of all before the first is sampled."""
    options = _tokenizer_options(arguments)
    if arguments.base_url is None:
        for model in models[1:]:
            check_local_model(model, **options)
    return {model: marks_of_model(model, **options) for model in models}


def _models(arguments: argparse.Namespace) -> list[str]:
    models = [name for text in arguments.model for name in text.split(",")]
    if "" in models:
        raise ConfigError(f"-m must name models, separated by commas: got {arguments.model}")
    if len(set(models)) < len(models):
        raise ConfigError(f"-m names a model twice: {', '.join(models)}")
    for name in models:
        check_model_name(name)
    return models


def _modes(arguments: argparse.Namespace) -> list[str]:
    modes: list[str] = arguments.mode.split(",")
    for mode in modes:
        if mode not in _MODES:
            raise ConfigError(f"unknown --mode {mode!r}.{did_you_mean(mode, _MODES)}")
    return list(dict.fromkeys(modes))


def _opener(
    arguments: argparse.Namespace,
    engine: EngineConfig,
    longest: Callable[[str, Tokenizer], int],
    announce: Callable[[str], None],
) -> ModelOpener:
    if arguments.base_url is None:
        return local_models(
            engine, seed=arguments.seed, longest=longest, **_tokenizer_options(arguments)
        )
    return served_model(
        arguments.base_url,
        arguments.served_model,
        **_tokenizer_options(arguments),
        api_key=os.environ.get(arguments.api_key_env),
        retries=arguments.retries,
        timeout_s=arguments.timeout,
        announce=announce,
    )
