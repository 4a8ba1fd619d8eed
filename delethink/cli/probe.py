"""The ``delethink probe`` command."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from delethink.chunking import ChunkSpec
from delethink.cli.arguments import (
    check_model_name,
    parse_carryover,
    parse_head_size,
    parse_pairs,
    size,
    sizes,
)
from delethink.cli.effects import SERVER_OPTIONS, refuse_given
from delethink.cli.process import require_packages, set_up_process
from delethink.config import EngineConfig, parse_engine, parse_values
from delethink.engines.engine_settings import check_base_url, check_engine_settings
from delethink.engines.loading import find_adapter
from delethink.errors import ConfigError, RunDirectoryError, TraceFileError
from delethink.evaluation.run import load_problems
from delethink.output import echo, echo_json, output_path
from delethink.redaction import register_secret, register_url
from delethink.thinking_marks import check_mark_setting

if TYPE_CHECKING:
    from delethink.evaluation.models import ModelOpener
    from delethink.types import Trace

_DEFAULT_PROBLEMS = 64
_SAMPLING = ("task_arg", "num_problems", "budget", "temperature", "seed")
_MAX_CHUNKS = 10**6  # more than any trace has


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, then load or sample traces, score them, and write the findings."""
    require_packages("eval", "torch", "transformers", "scipy", "matplotlib")
    if (arguments.traces is None) == (arguments.task is None):
        raise ConfigError("a probe needs traces: pass either --traces PATH or --task NAME")
    register_secret(os.environ.get(arguments.api_key_env))
    register_url(arguments.base_url or "")
    arguments.end_of_thinking = check_mark_setting(arguments.end_of_thinking)
    check_model_name(arguments.model)
    if arguments.base_url is not None:
        check_base_url(arguments.base_url)
    engine = _engine(arguments)
    specs = _specs(arguments)
    _check_traces(arguments, specs[0].context_size)
    name = f"{Path(arguments.model).name}-{datetime.now():%Y%m%d-%H%M%S}"
    output = output_path(arguments.output or Path("probes") / name)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunDirectoryError(f"{output} is not empty; choose another folder with -o PATH")
    set_up_process()
    from delethink.evaluation.probe import load_traces, probe_model, write_findings
    from delethink.evaluation.probe_page import write_probe_report

    traces = load_traces(arguments.traces) if arguments.traces else _sample(arguments, engine)
    findings = probe_model(
        arguments.model,
        traces,
        specs,
        trust_remote_code=arguments.trust_remote_code,
        end_of_thinking=arguments.end_of_thinking,
    )
    write_findings(findings, output)
    write_probe_report(findings, output)
    if arguments.json:
        echo_json(dataclasses.asdict(findings) | {"output": str(output)})
    else:
        echo((output / "probe.md").read_text(encoding="utf-8"))
        echo(f"results: {output}")
    return 0 if findings.lines else 1


def _engine(arguments: argparse.Namespace) -> EngineConfig:
    """Return the engine's settings; by default transformers, as the probe loads the model too."""
    if arguments.base_url is not None and arguments.traces is not None:
        raise ConfigError("--traces samples nothing, so --base-url has no effect: remove it")
    if arguments.base_url is not None and arguments.values:
        raise ConfigError(
            "--base-url samples from a server, so engine settings have no effect: remove "
            f"{' '.join(arguments.values)}"
        )
    if arguments.base_url is None:
        refuse_given(arguments, SERVER_OPTIONS, "needs --base-url")
    if arguments.traces is not None:
        refuse_given(arguments, _SAMPLING, "has no effect: --traces samples nothing")
    engine = parse_engine(["engine=transformers", *arguments.values])
    check_engine_settings(
        engine, trains=False, sends_weights=lambda: find_adapter(arguments.model) is not None
    )
    if arguments.chat_template_kwargs and arguments.traces is not None:
        raise ConfigError("--traces samples nothing, so --chat-template-kwargs has no effect")
    if arguments.values and arguments.traces is not None:
        raise ConfigError(
            "--traces samples nothing, so engine settings have no effect: remove "
            f"{' '.join(arguments.values)}"
        )
    return engine


def _specs(arguments: argparse.Namespace) -> list[ChunkSpec]:
    """Return one spec for each carryover size, the largest last."""
    context, sizes_text = size(arguments.context_size, "-C"), arguments.carryover_size
    default = [m for m in (context // 8, context // 4, context // 2) if m]
    carryover_sizes = sizes(sizes_text, "--carryover-size", 0) if sizes_text else default
    head, policy = parse_head_size(arguments.head_size), parse_carryover(arguments.carryover)
    return [
        ChunkSpec(context, m, _MAX_CHUNKS, head, carryover=policy)
        for m in sorted(set(carryover_sizes))
    ]


def _budget(arguments: argparse.Namespace) -> int:
    """Return the maximum length of a sampled trace."""
    if arguments.budget is None:
        return 2 * size(arguments.context_size, "-C")
    return size(arguments.budget, "--budget")


def _check_traces(arguments: argparse.Namespace, context_size: int) -> None:
    """Refuse traces that are not there, or that would end before the first boundary."""
    if arguments.traces is not None:
        if not arguments.traces.exists():
            raise TraceFileError(
                f"there are no traces at {arguments.traces}: name a file of traces, a run or an "
                "evaluation"
            )
    elif _budget(arguments) <= context_size:
        raise ConfigError(
            f"--budget {arguments.budget} ends within the first context of -C {context_size}, so "
            "there is no boundary to probe: raise --budget or lower -C"
        )


def _sample(arguments: argparse.Namespace, engine: EngineConfig) -> list[Trace]:
    from delethink.evaluation.probe import sample_traces

    budget = _budget(arguments)
    problems = load_problems(
        arguments.task,
        parse_pairs(arguments.task_arg, "--task-arg"),
        arguments.num_problems or _DEFAULT_PROBLEMS,
        "exact" if arguments.task == "automaton" else None,
        seed=arguments.seed,
        allow_unsafe_code=True,  # a probe scores nothing
    )
    with contextlib.closing(problems):
        number = len(problems.problems)
        echo(f"sampling {number} traces of up to {budget:,} tokens", stderr=True)
        return sample_traces(
            arguments.model,
            problems.problems,
            budget,
            engine=engine,
            temperature=arguments.temperature,
            seed=arguments.seed,
            trust_remote_code=arguments.trust_remote_code,
            chat_template_kwargs=parse_values(arguments.chat_template_kwargs),
            end_of_thinking=arguments.end_of_thinking,
            opener=None if arguments.base_url is None else _served(arguments),
        )


def _served(arguments: argparse.Namespace) -> ModelOpener:
    from delethink.evaluation.models import served_model

    return served_model(
        arguments.base_url,
        arguments.served_model,
        trust_remote_code=arguments.trust_remote_code,
        chat_template_kwargs=parse_values(arguments.chat_template_kwargs),
        end_of_thinking=arguments.end_of_thinking,
        api_key=os.environ.get(arguments.api_key_env),
        retries=arguments.retries,
        timeout_s=arguments.timeout,
        announce=lambda line: echo(line, stderr=True),
    )
