"""Probe: measures how much a model loses at a boundary, where the context is reset.

Each trace is scored twice with teacher forcing: given the whole history, and given only the query
and the carryover. Per token, the probe reports two numbers in nats. The gap in log-likelihood is
log p(y | history) - log p(y | carried). The divergence is that of the next-token distributions,
KL(history || carried).

Two controls leave the carryover out, or replace it with another trace's. A model without use for
the carryover loses no more in the controls.

    traces = sample_traces("toy", problems, budget=450)
    findings = probe_model("toy", traces, [ChunkSpec(90, 45, max_chunks=10**6, head_size=0)])
    write_findings(findings, Path("out"))
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from delethink.carryover import name_of
from delethink.chunking import ChunkSpec, ThinkingState, start
from delethink.config import EngineConfig
from delethink.engines.loading import (
    engine_window,
    load_model,
    load_shell,
    longest_sequence,
)
from delethink.errors import ConfigError, RunDirectoryError
from delethink.evaluation.metrics import clustered_mean
from delethink.evaluation.models import (
    ModelOpener,
    local_models,
    longest_query,
    open_tokenizer,
)
from delethink.evaluation.stored import longcot_traces
from delethink.output import safe_text
from delethink.policy import Policy, Sampling
from delethink.redaction import json_text
from delethink.rollout import derive_seed, run_rollouts
from delethink.scoring.answer import vote
from delethink.thinking_marks import AUTO, marks_of
from delethink.tokenization import check_thinking_is_open, query_ids, reward_text
from delethink.trace_io import read_traces
from delethink.types import Problem, StopReason, TokenIds, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Condition = Literal["carried", "none", "other"]
CONDITIONS: dict[Condition, str] = {
    "carried": "query and carryover",
    "none": "query alone",
    "other": "query and another trace's carryover",
}


class ScoredBoundary(NamedTuple):
    """The chunk after a boundary, scored under one condition."""

    trace: int  # index of the trace
    chunk: int  # index of the chunk, from 1
    carryover_size: int
    condition: Condition
    gap: npt.NDArray[np.float64]  # log p(y | history) - log p(y | context), in nats [T]
    divergence: npt.NDArray[np.float64]  # KL(history || context) of the next token, in nats [T]


@dataclass(frozen=True)
class TraceMean:
    """Mean over traces with its 95 % interval, in nats."""

    mean: float
    low: float
    high: float
    traces: int


@dataclass(frozen=True)
class ResetCost:
    """Cost of a reset over a range of distances from the boundary, under one condition."""

    carryover_size: int
    condition: Condition
    begin: int  # first distance in tokens
    end: int  # distance after the last one
    gap: TraceMean
    divergence: TraceMean


@dataclass(frozen=True)
class Findings:
    """Results of a probe."""

    model: str
    context_size: int
    traces: int  # traces within the model's window
    passed_over: int  # longer traces, which have no whole history to compare with
    without_boundary: int  # fitting traces of a single context
    lines: Sequence[ResetCost]  # by carryover size, condition and distance
    repeats: Sequence[int]  # by trace, the longest run of tokens recurring a context later
    answers: int  # traces with an answer
    answers_lost: int  # traces whose last context holds another answer, or none

    @property
    def totals(self) -> list[ResetCost]:
        """Costs over all distances."""
        longest = max((line.end for line in self.lines), default=0)
        return [
            line for line in self.lines if (line.begin, line.end) == (0, longest) and longest > 1
        ]


def load_traces(path: Path) -> list[Trace]:
    """Load traces from a file, a run directory or an evaluation, without failed ones.

    Of an evaluation, these are the LongCoT traces.

    Raises:
        ConfigError: no trace.
        RunDirectoryError: an evaluation without LongCoT traces or their tokens.
        TraceFileError: a file that cannot be read.
    """
    if (path / "settings.json").is_file():
        return longcot_traces(path)
    files = sorted((path / "traces").glob("step_*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path} holds no traces: there is no traces/step_*.jsonl")
    records = chain.from_iterable(read_traces(file) for file in files)
    traces = [record.trace for record in records if not record.trace.stop.is_failure]
    if not traces:
        raise ConfigError(f"{path} holds no traces other than failed ones")
    return traces


def sample_traces(
    model: str,
    problems: Sequence[Problem],
    budget: int,
    *,
    engine: EngineConfig | None = None,
    temperature: float = 0.6,
    seed: int = 0,
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    end_of_thinking: str | None = AUTO,
    opener: ModelOpener | None = None,
) -> list[Trace]:
    """Sample one LongCoT trace per problem, by default with transformers in this process.

    ``budget`` is the maximum length of a trace in tokens; the model's window may lower it.
    ``opener`` loads the model instead of ``engine``.
    """
    tokenizer = open_tokenizer(model, trust_remote_code, chat_template_kwargs, end_of_thinking)
    check_thinking_is_open(tokenizer, problems[0])  # before the weights load
    longest = longest_query(tokenizer, problems)
    config = engine or EngineConfig(name="transformers")
    window = engine_window(load_shell(model, trust_remote_code), config.max_model_tokens)
    budget = min(budget, window - longest)
    opener = opener or local_models(
        config,
        trust_remote_code=trust_remote_code,
        chat_template_kwargs=chat_template_kwargs,
        end_of_thinking=end_of_thinking,
        seed=seed,
        longest=lambda *_: longest + budget,
    )
    with opener(model) as loaded:
        budget = min(budget, (loaded.max_model_tokens or window) - longest)
        queries = [query_ids(loaded.tokenizer, problem) for problem in problems]
        samplings = [
            Sampling(temperature, derive_seed("probe", seed, i)) for i in range(len(queries))
        ]
        spec = ChunkSpec.longcot(budget)
        return asyncio.run(_sample_all(loaded.policy, spec, queries, samplings))


async def _sample_all(
    policy: Policy, spec: ChunkSpec, queries: Sequence[TokenIds], samplings: Sequence[Sampling]
) -> list[Trace]:
    try:
        return await run_rollouts(policy, spec, queries, samplings)
    finally:
        disconnect = getattr(policy, "disconnect", None)
        if disconnect is not None:  # connections belong to this event loop
            await disconnect()


def probe_model(
    model: str,
    traces: Sequence[Trace],
    specs: Sequence[ChunkSpec],
    *,
    trust_remote_code: bool = False,
    end_of_thinking: str | None = AUTO,
) -> Findings:
    """Load a model and measure the cost of resets on traces.

    Args:
        model: folder, Hugging Face id, or ``"toy"``.
        traces: traces of the model's tokenizer.
        specs: chunk sizes with one C, several m, and enough chunks for every trace. Controls and
            lost answers use the last one.
        trust_remote_code: run code from the model's repository.
        end_of_thinking: mark of the end of thinking, ``"auto"``, or ``None`` for no mark.

    Raises:
        ConfigError: traces of another tokenizer, or a carryover written by the model.
    """
    tokenizer = open_tokenizer(model, trust_remote_code, end_of_thinking=end_of_thinking)
    end = marks_of(tokenizer).end
    specs = [spec.bind(tokenizer) for spec in specs]
    for spec in specs:
        if spec.ask is not None:
            raise ConfigError(
                "a probe cannot use a carryover written by the model, got "
                f"{name_of(spec.effective_carryover)!r}: the traces do not hold it"
            )
    loaded = load_model(model, "float32", trust_remote_code).eval()
    largest = max(max((*trace.query_ids, *trace.output_ids)) for trace in traces)
    if largest >= loaded.config.vocab_size:
        raise ConfigError(
            f"the traces hold the token id {largest}, and {model} has {loaded.config.vocab_size} "
            "token ids: the traces are of another model"
        )
    probe = Probe(loaded, longest_sequence(loaded))
    fitting = [trace for trace in traces if probe.fits(trace)]
    context = specs[-1].context_size
    answers = lost = 0
    for trace in traces:
        answer = vote(reward_text(tokenizer, trace.output_ids), end)
        answers += answer is not None
        last = vote(reward_text(tokenizer, last_window(trace, specs[-1])), end)
        lost += answer is not None and answer != last
    return Findings(
        model=model,
        context_size=context,
        traces=len(fitting),
        passed_over=len(traces) - len(fitting),
        without_boundary=sum(len(trace.output_ids) <= context for trace in fitting),
        lines=reset_costs(list(probe.boundaries(fitting, specs, specs[-1]))),
        repeats=[longest_repeat(tuple(trace.output_ids), context) for trace in traces],
        answers=answers,
        answers_lost=lost,
    )


@dataclass(frozen=True)
class Probe:
    """Scores traces with one model."""

    model: PreTrainedModel  # in evaluation mode, on any device
    max_model_tokens: int

    def fits(self, trace: Trace) -> bool:
        """Return whether the whole history fits in one context."""
        return len(trace.query_ids) + len(trace.output_ids) <= self.max_model_tokens

    def boundaries(
        self, traces: Sequence[Trace], specs: Sequence[ChunkSpec], controls: ChunkSpec
    ) -> Iterator[ScoredBoundary]:
        """Score the chunk after each boundary of each trace, under each spec.

        Traces longer than the window are skipped. The controls are scored under ``controls`` only.
        """
        for index, trace in enumerate(traces):
            if not self.fits(trace):
                continue
            for spec in specs:
                other = None
                if spec == controls and len(traces) > 1:  # the last trace is the first one's other
                    other = first_carryover(traces[index - 1], spec)
                yield from self._score(index, trace, spec, spec == controls, other)

    @torch.no_grad()
    def _score(
        self, index: int, trace: Trace, spec: ChunkSpec, with_controls: bool, other: TokenIds | None
    ) -> Iterator[ScoredBoundary]:
        chunks = list(rechunk(trace.query_ids, trace.output_ids, spec))
        if len(chunks) < 2:
            return
        history = self._history(trace.query_ids, [output for _, output in chunks])
        for number, ((state, output), expected) in enumerate(zip(chunks, history, strict=True)):
            if number == 0:
                continue
            contexts: dict[Condition, TokenIds] = {"carried": state.prompt_ids}
            if with_controls:
                contexts["none"] = state.query_ids
                if other is not None:
                    contexts["other"] = (*state.query_ids, *other)
            for condition, context in contexts.items():
                gap, divergence = _compare(expected, self._logprobs(context, output), output)
                yield ScoredBoundary(index, number, spec.carryover_size, condition, gap, divergence)

    def _history(self, query_ids: TokenIds, outputs: Sequence[TokenIds]) -> Iterator[torch.Tensor]:
        """Yield log-probs [T, V] of each chunk's tokens given the whole history before them."""
        seen = self.model(input_ids=self._ids(query_ids), use_cache=True, logits_to_keep=1)
        last = seen.logits[0]
        for output in outputs:
            seen = self.model(
                input_ids=self._ids(output), past_key_values=seen.past_key_values, use_cache=True
            )
            yield torch.cat([last, seen.logits[0, :-1]]).float().log_softmax(-1)
            last = seen.logits[0, -1:]

    def _logprobs(self, context: TokenIds, output: TokenIds) -> torch.Tensor:
        """Return log-probs [T, V] of the tokens of ``output`` given ``context``."""
        ids = self._ids((*context, *output))
        logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=len(output) + 1).logits
        logprobs: torch.Tensor = logits[0, :-1].float().log_softmax(-1)
        return logprobs

    def _ids(self, ids: TokenIds) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self.model.device)


def rechunk(
    query_ids: TokenIds, output_ids: TokenIds, spec: ChunkSpec
) -> Iterator[tuple[ThinkingState, TokenIds]]:
    """Yield each chunk of ``output_ids`` under ``spec``, with the state before the chunk.

    The boundaries follow from ``spec`` alone, not from the way the tokens were sampled.
    """
    state, begin = start(spec, query_ids), 0
    while begin < len(output_ids) and state.stop is None:
        output = tuple(output_ids[begin : begin + state.max_new_tokens])
        yield state, output
        begin += len(output)
        state = state.advance(output, StopReason.LENGTH)


def first_carryover(trace: Trace, spec: ChunkSpec) -> TokenIds | None:
    """Return the tokens carried over a trace's first boundary; ``None`` without a boundary."""
    chunks = list(rechunk(trace.query_ids, trace.output_ids, spec))
    return tuple(chunks[1][0].carried) if len(chunks) > 1 else None


def _compare(
    expected: torch.Tensor, found: torch.Tensor, output: TokenIds
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return gap and divergence [T] of two sets of log-probs [T, V]."""
    index = torch.tensor(list(output), device=expected.device)[:, None]
    gap = (expected.gather(1, index) - found.gather(1, index))[:, 0]
    divergence = (expected.exp() * (expected - found)).nan_to_num(0.0).sum(-1)
    return gap.double().cpu().numpy(), divergence.clamp_min(0.0).double().cpu().numpy()


def longest_repeat(output_ids: TokenIds, context_size: int) -> int:
    """Return the length of the longest run of tokens recurring at least a context later.

    With bounded states a chain may loop unnoticed, whereas the whole history would show the loop.
    Binary search applies because every part of a recurring run recurs.
    """

    def is_absent(length: int) -> bool:
        first: dict[TokenIds, int] = {}
        for begin in range(len(output_ids) - length + 1):
            run = tuple(output_ids[begin : begin + length])
            if begin - first.setdefault(run, begin) >= context_size:
                return False
        return True

    longest = max(0, len(output_ids) - context_size)
    return bisect_left(range(1, longest + 1), True, key=is_absent)


def last_window(trace: Trace, spec: ChunkSpec) -> TokenIds:
    """Return the carried tokens and the output of the last chunk.

    An answer thrown away at a boundary is missing here.
    """
    chunks = list(rechunk(trace.query_ids, trace.output_ids, spec))
    if not chunks:
        return ()
    state, output = chunks[-1]
    return (*state.carried, *output)


def reset_costs(boundaries: Sequence[ScoredBoundary]) -> list[ResetCost]:
    """Return the costs by carryover size, condition and distance, and over all distances."""
    if not boundaries:
        return []
    edges = distance_edges(max(len(boundary.gap) for boundary in boundaries))
    groups: dict[tuple[int, Condition], list[ScoredBoundary]] = {}
    for boundary in boundaries:
        groups.setdefault((boundary.carryover_size, boundary.condition), []).append(boundary)
    order = list(CONDITIONS)
    costs = []
    for size, condition in sorted(groups, key=lambda group: (group[0], order.index(group[1]))):
        for begin, end in [*pairwise(edges), (0, edges[-1])]:
            own = [b for b in groups[size, condition] if begin < len(b.gap)]
            if own:
                traces = [b.trace for b in own]
                gap = _trace_mean(traces, [b.gap[begin:end] for b in own])
                divergence = _trace_mean(traces, [b.divergence[begin:end] for b in own])
                costs.append(ResetCost(size, condition, begin, end, gap, divergence))
    return costs


def _trace_mean(traces: Sequence[int], values: Sequence[npt.NDArray[np.float64]]) -> TraceMean:
    """Average arrays of tokens over their traces, since tokens of one trace are correlated."""
    by_trace: dict[int, list[float]] = {}
    for trace, tokens in zip(traces, values, strict=True):
        by_trace.setdefault(trace, []).extend(tokens.tolist())
    mean = clustered_mean(list(by_trace.values()))
    if len(by_trace) == 1:
        return TraceMean(mean.value, float("-inf"), float("inf"), 1)
    return TraceMean(mean.value, mean.low, mean.high, len(by_trace))


def distance_edges(longest: int) -> list[int]:
    """Return doubling bin edges 0, 1, 2, 4, 8 up to the longest distance."""
    edges = [0, 1]
    while edges[-1] < longest:
        edges.append(min(2 * edges[-1], longest))
    return edges


def write_findings(findings: Findings, folder: Path) -> None:
    """Write ``probe.md``, ``probe.json`` and, if there are boundaries, ``probe.png``.

    Raises:
        RunDirectoryError: a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "probe.md").write_text(findings_page(findings), encoding="utf-8")
        text = json_text(asdict(findings), indent=2) + "\n"
        (folder / "probe.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunDirectoryError(f"cannot write to {folder}: {error.strerror}") from None
    if findings.lines:
        plot_findings(findings, folder / "probe.png")


def findings_page(findings: Findings) -> str:
    """Return the findings as a page in Markdown."""
    repeats, totals = sorted(findings.repeats), findings.totals
    looping = sum(repeat >= findings.context_size // 4 for repeat in repeats)
    median = repeats[len(repeats) // 2] if repeats else 0
    rows = [
        f"| {line.carryover_size:,} | {CONDITIONS[line.condition]} | {_cell(line.gap)} | "
        f"{_cell(line.divergence)} | {line.gap.traces} |"
        for line in totals
    ]
    near = [
        f"| {line.carryover_size:,} | {line.begin}-{line.end - 1} | {_cell(line.gap)} | "
        f"{_cell(line.divergence)} |"
        for line in findings.lines
        if line.condition == "carried" and line not in totals
    ]
    return "\n".join(
        [
            f"# How Markovian is {safe_text(findings.model, lines=False)}?",
            "",
            f"C = {findings.context_size:,}. {findings.traces:,} traces fit in the model's window; "
            f"{findings.passed_over:,} longer ones were skipped. Of the fitting ones, "
            f"{findings.without_boundary:,} have a single context and no boundary, and "
            f"{findings.traces - findings.without_boundary:,} are scored. Values are means over "
            "traces with 95 % intervals, in nats per token.",
            "",
            "| m | context after the boundary | loss of log-likelihood | KL | traces |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            "The loss is log p(token | whole history) - log p(token | context). Below 0, the token "
            "is more likely without the history.",
            "",
            "By distance from the boundary in tokens, with the carryover:",
            "",
            "| m | distance | loss of log-likelihood | KL |",
            "| --- | --- | --- | --- |",
            *near,
            "",
            f"**Loops.** In {looping:,} of {len(repeats):,} traces, a run of at least C / 4 = "
            f"{findings.context_size // 4:,} tokens recurs at least a context later. The longest "
            f"recurring run of a trace has {median:,} tokens in the median and "
            f"{max(repeats, default=0):,} at most.",
            "",
            f"**Answers.** {findings.answers:,} traces hold an answer. In "
            f"{findings.answers_lost:,} of them, the last context holds another answer or none.",
            "",
        ]
    )


def _cell(mean: TraceMean) -> str:
    if mean.traces < 2:
        return f"{mean.mean:.4f}"
    return f"{mean.mean:.4f} ({mean.low:.4f} to {mean.high:.4f})"


def plot_findings(findings: Findings, path: Path) -> None:
    """Plot loss and divergence against the distance from the boundary.

    Raises:
        ConfigError: the image cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    model = safe_text(findings.model, lines=False)
    figure.suptitle(f"Cost of a reset for {model}, C = {findings.context_size:,}")
    binned = [line for line in findings.lines if line not in findings.totals]
    curves = {(line.carryover_size, line.condition) for line in binned}
    panels = (("gap", "loss of log-likelihood, nats"), ("divergence", "KL, nats"))
    for axes, (name, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for size, condition in sorted(curves, key=str):
            own = [b for b in binned if (b.carryover_size, b.condition) == (size, condition)]
            is_main = condition == "carried"
            axes.plot(
                [line.begin + 1 for line in own],
                [getattr(line, name).mean for line in own],
                "-" if is_main else ":",
                marker=".",
                label=f"m = {size:,}" + ("" if is_main else f", {condition}"),
            )
        axes.set_xscale("log")
        axes.set_xlabel("tokens after the boundary")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the image {path}: {error}") from None
