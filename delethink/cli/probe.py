"""``delethink probe``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import sys
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delethink.chunking import ChunkSpec
from delethink.cli.evaluate import task_arguments
from delethink.cli.process import set_up_process
from delethink.cli.sizes import size, sizes
from delethink.engines.loading import eos_ids, load_model, load_tokenizer, longest_sequence
from delethink.errors import ConfigError, MissingExtraError
from delethink.evaluation.run import load_problems
from delethink.output import output_path
from delethink.policy import Sampling
from delethink.rollout import derive_seed, run_rollouts
from delethink.tokenization import query_ids, reward_text
from delethink.trace_io import read_traces
from delethink.types import Trace

if TYPE_CHECKING:
    from delethink.evaluation.probe import Findings


def run(arguments: argparse.Namespace) -> int:
    """Scores traces twice and writes what a reset costs."""
    for package, extra in (("torch", "eval"), ("transformers", "eval"), ("matplotlib", "eval")):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, extra)
    if (arguments.traces is None) == (arguments.task is None):
        raise ConfigError("say whose traces: either --traces PATH or --task NAME")
    specs = _specs(arguments)
    output = _output(arguments)
    set_up_process()
    findings = _probe(arguments, specs)
    _write(findings, output)
    if arguments.json:
        print(json.dumps(findings.as_dict() | {"output": str(output)}, indent=2))
    else:
        print((output / "probe.md").read_text(encoding="utf-8"))
        print(f"results: {output}")
    return 0 if findings.lines else 1


def _specs(arguments: argparse.Namespace) -> list[ChunkSpec]:
    """The rules that differ in m, the largest last."""
    context = size(arguments.context_size, "-C")
    default = [c for c in (context // 8, context // 4, context // 2) if c]
    carries = sizes(arguments.carryover, "--carryover", 0) if arguments.carryover else default
    specs = []
    for carry in sorted(set(carries)):
        head = min(100, carry)
        if arguments.head_size is not None:
            head = size(arguments.head_size, "--head-size", 0)
        specs.append(ChunkSpec(context, carry, 10**6, head))
    return specs


def _output(arguments: argparse.Namespace) -> Path:
    name = f"{Path(arguments.model).name}-{datetime.now():%Y%m%d-%H%M%S}"
    output = output_path(arguments.output or Path("probes") / name)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is not empty; choose another folder with -o")
    return output


def _probe(arguments: argparse.Namespace, specs: list[ChunkSpec]) -> Findings:
    from delethink.evaluation.probe import Findings, Probe, last_window, lines_of, longest_repeat
    from delethink.scoring.answer import vote

    tokenizer = load_tokenizer(arguments.model, arguments.trust_remote_code)
    model = load_model(arguments.model, "float32", arguments.trust_remote_code).eval()
    probe = Probe(model, longest_sequence(model))
    traces = _read(arguments.traces) if arguments.traces else _sample(arguments, model, tokenizer)
    _check_vocabulary(traces, model.config.vocab_size, arguments)
    fitting = [trace for trace in traces if probe.fits(trace)]
    context = specs[-1].context_size
    pairs = [
        (vote(reward_text(tokenizer, t.output_ids)), vote(reward_text(tokenizer, w)))
        for t in traces
        for w in [last_window(t, specs[-1])]
    ]
    return Findings(
        model=arguments.model,
        context_size=context,
        traces=len(fitting),
        passed_over=len(traces) - len(fitting),
        without_boundary=sum(len(trace.output_ids) <= context for trace in fitting),
        lines=lines_of(list(probe.boundaries(fitting, specs, specs[-1]))),
        repeats=[longest_repeat(tuple(trace.output_ids), context) for trace in traces],
        answers=sum(whole is not None for whole, _ in pairs),
        answers_lost=sum(whole is not None and whole != seen for whole, seen in pairs),
    )


def _read(path: Path) -> list[Trace]:
    files = sorted((path / "traces").glob("step_*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path} holds no traces: it has no traces/step_*.jsonl")
    records = chain.from_iterable(read_traces(file) for file in files)
    traces = [record.trace for record in records if not record.trace.stop.is_failure]
    if not traces:
        raise ConfigError(f"{path} holds no trace that did not fail")
    return traces


def _check_vocabulary(traces: list[Trace], vocabulary: int, arguments: argparse.Namespace) -> None:
    largest = max(max((*trace.query_ids, *trace.output_ids)) for trace in traces)
    if largest >= vocabulary:
        raise ConfigError(
            f"{arguments.traces} has the token {largest}, and {arguments.model} knows "
            f"{vocabulary}: the traces are another model's"
        )


def _sample(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> list[Trace]:
    from delethink.engines.transformers import TransformersEngine

    problems = load_problems(
        arguments.task,
        task_arguments(arguments.task_arg),
        arguments.num_problems or 64,
        "exact" if arguments.task == "automaton" else None,
        seed=arguments.seed,
    )
    with contextlib.closing(problems):
        queries = [query_ids(tokenizer, problem) for problem in problems.problems]
    ends = eos_ids(model, tokenizer)
    engine = TransformersEngine(model, ends, int(tokenizer.pad_token_id))
    longest = engine.max_model_tokens - max(map(len, queries))
    budget = min(size(arguments.budget, "--budget"), longest)
    samplings = [
        Sampling(arguments.temperature, derive_seed("probe", arguments.seed, i))
        for i in range(len(queries))
    ]
    print(f"sampling {len(queries)} traces of up to {budget:,} tokens", file=sys.stderr)
    return asyncio.run(run_rollouts(engine, ChunkSpec.longcot(budget), queries, samplings))


def _write(findings: Findings, output: Path) -> None:
    from delethink.evaluation.probe import as_page, plot

    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "probe.md").write_text(as_page(findings), encoding="utf-8")
        (output / "probe.json").write_text(
            json.dumps(findings.as_dict(), indent=2) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise ConfigError(f"cannot write to {output}: {error.strerror}") from None
    if findings.lines:
        plot(findings, output / "probe.png")
