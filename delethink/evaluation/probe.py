"""How Markovian a model is already: what it loses where the context is thrown away.

The tokens of a trace are scored twice with teacher forcing: after the whole history, and after what
a reset leaves (query and carryover). What a reset costs is the difference, token by token: the gap
in log-likelihood, log p(y | history) - log p(y | carried), and the Kullback-Leibler divergence of
the two distributions over the next token, KL(history || carried), both in nats.

As controls, the carryover is left out altogether, and replaced by another trace's: a model that
does not use what is carried would lose no more by either.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from delethink.chunking import ChunkSpec, ThinkingState, start
from delethink.errors import ConfigError, MissingExtraError
from delethink.evaluation.metrics import t_quantile
from delethink.types import StopReason, TokenIds, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Condition = Literal["carried", "none", "other"]
CONDITIONS: tuple[Condition, ...] = ("carried", "none", "other")

Floats = npt.NDArray[np.float64]


class Boundary(NamedTuple):
    """A chunk after a boundary, scored under one condition.

    Args:
        trace: index of the trace.
        chunk: index of the chunk, from 1.
        carryover_size: m.
        condition: what the context held in the carryover's place.
        gap: log p(y | history) - log p(y | context), in nats [T].
        divergence: KL(history || context) of the next token, in nats [T].
    """

    trace: int
    chunk: int
    carryover_size: int
    condition: Condition
    gap: Floats
    divergence: Floats


@dataclass(frozen=True)
class Probe:
    """Scores traces of one model.

    Args:
        model: in evaluation mode; on any device.
        max_model_tokens: the longest sequence that it takes.
    """

    model: PreTrainedModel
    max_model_tokens: int

    def fits(self, trace: Trace) -> bool:
        """Whether the whole history fits in one context."""
        return len(trace.query_ids) + len(trace.output_ids) <= self.max_model_tokens

    def boundaries(
        self, traces: Sequence[Trace], specs: Sequence[ChunkSpec], controls: ChunkSpec
    ) -> Iterator[Boundary]:
        """Scores what follows each boundary of each trace, under each rule.

        Args:
            traces: those that do not fit are passed over.
            specs: rules that differ in their carryover size.
            controls: the one under which the carryover is also left out and replaced.
        """
        for index, trace in enumerate(traces):
            if not self.fits(trace):
                continue
            other = traces[index - 1] if len(traces) > 1 else None  # of the first one: the last
            for spec in specs:
                conditions = CONDITIONS if spec == controls else CONDITIONS[:1]
                yield from self._of_trace(index, trace, other, spec, conditions)

    @torch.no_grad()
    def _of_trace(
        self,
        index: int,
        trace: Trace,
        other: Trace | None,
        spec: ChunkSpec,
        conditions: Sequence[Condition],
    ) -> Iterator[Boundary]:
        cuts = list(cut(trace.query_ids, trace.output_ids, spec))
        if len(cuts) < 2:
            return
        history = self._history(trace.query_ids, [output for _, output in cuts])
        borrowed = None if other is None else carried_at(other, spec)
        for chunk, ((state, output), expected) in enumerate(zip(cuts, history, strict=True)):
            if chunk == 0:
                continue
            for condition in conditions:
                context = _context(state, condition, borrowed)
                if context is None:
                    continue
                found = self._logprobs(context, output)
                yield Boundary(
                    index,
                    chunk,
                    spec.carryover_size,
                    condition,
                    *_compare(expected, found, output),
                )

    def _history(self, query_ids: TokenIds, outputs: Sequence[TokenIds]) -> Iterator[torch.Tensor]:
        """Log-probs [T, V] of each chunk's tokens after all that went before, chunk by chunk."""
        seen = self.model(input_ids=self._ids(query_ids), use_cache=True, logits_to_keep=1)
        last = seen.logits[0]
        for output in outputs:
            seen = self.model(
                input_ids=self._ids(output), past_key_values=seen.past_key_values, use_cache=True
            )
            yield torch.cat([last, seen.logits[0, :-1]]).float().log_softmax(-1)
            last = seen.logits[0, -1:]

    def _logprobs(self, context: TokenIds, output: TokenIds) -> torch.Tensor:
        """Log-probs [T, V] of the tokens of ``output`` after ``context``."""
        ids = self._ids((*context, *output))
        logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=len(output) + 1).logits
        logprobs: torch.Tensor = logits[0, :-1].float().log_softmax(-1)
        return logprobs

    def _ids(self, ids: TokenIds) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self.model.device)


def cut(
    query_ids: TokenIds, output_ids: TokenIds, spec: ChunkSpec
) -> Iterator[tuple[ThinkingState, TokenIds]]:
    """A trace's tokens as the chunks that ``spec`` makes of them, and the state before each.

    However they were sampled: boundaries fall where this rule puts them.
    """
    state, begin = start(spec, query_ids), 0
    while begin < len(output_ids) and state.stop is None:
        output = tuple(output_ids[begin : begin + state.max_new_tokens])
        yield state, output
        begin += len(output)
        state = state.advance(output, StopReason.LENGTH)


def carried_at(trace: Trace, spec: ChunkSpec) -> TokenIds | None:
    """What a trace carries over its first boundary; ``None`` where it has none."""
    cuts = list(cut(trace.query_ids, trace.output_ids, spec))
    return tuple(cuts[1][0].carried) if len(cuts) > 1 else None


def _context(
    state: ThinkingState, condition: Condition, borrowed: TokenIds | None
) -> TokenIds | None:
    if condition == "carried":
        return tuple(state.prompt_ids)
    if condition == "none":
        return tuple(state.query_ids)
    return None if borrowed is None else (*state.query_ids, *borrowed)


def _compare(
    expected: torch.Tensor, found: torch.Tensor, output: TokenIds
) -> tuple[Floats, Floats]:
    index = torch.tensor(list(output), device=expected.device)[:, None]
    gap = (expected.gather(1, index) - found.gather(1, index))[:, 0]
    divergence = (expected.exp() * (expected - found)).nan_to_num(0.0).sum(-1)
    return gap.double().cpu().numpy(), divergence.clamp_min(0.0).double().cpu().numpy()


# -- what needs no model ------------------------------------------------------------------------


def longest_repeat(output_ids: TokenIds, context_size: int) -> int:
    """The longest run of tokens that occurs again, starting at least a context later.

    A chain of bounded states can run in circles without knowing it; one that sees its whole history
    could notice. Found by binary search over lengths: a run that repeats has shorter ones that do.
    """
    low, high = 0, len(output_ids) - context_size
    while low < high:
        middle = (low + high + 1) // 2
        if _repeats(output_ids, middle, context_size):
            low = middle
        else:
            high = middle - 1
    return max(low, 0)


def _repeats(output_ids: TokenIds, length: int, apart: int) -> bool:
    first: dict[TokenIds, int] = {}
    for begin in range(len(output_ids) - length + 1):
        run = tuple(output_ids[begin : begin + length])
        if begin - first.setdefault(run, begin) >= apart:
            return True
    return False


def last_window(trace: Trace, spec: ChunkSpec) -> TokenIds:
    """What the last context held: carried tokens and the last chunk.

    A reward that reads no more than this misses answers that were thrown away at a boundary.
    """
    cuts = list(cut(trace.query_ids, trace.output_ids, spec))
    if not cuts:
        return ()
    state, output = cuts[-1]
    return (*state.carried, *output)


class Point(NamedTuple):
    """A mean over traces with its 95 % interval, in nats."""

    mean: float
    low: float
    high: float
    traces: int


def over_traces(values: dict[int, list[float]]) -> Point:
    """The mean over traces of each trace's mean: traces are independent, their tokens are not.

    Args:
        values: by trace.

    Raises:
        ValueError: no trace.
    """
    means = np.array([float(np.mean(v)) for v in values.values()])
    if not means.size:
        raise ValueError("a mean over no trace")
    mean, n = float(means.mean()), len(means)
    if n == 1:
        return Point(mean, float("-inf"), float("inf"), 1)
    half = float(t_quantile(0.975, n - 1) * means.std(ddof=1) / np.sqrt(n))
    return Point(mean, mean - half, mean + half, n)


def by_distance(
    boundaries: Sequence[Boundary],
    carryover_size: int,
    condition: Condition,
    what: Literal["gap", "divergence"],
    edges: Sequence[int],
) -> list[Point | None]:
    """Means over the tokens at a distance from the boundary in ``edges[i]..edges[i+1]-1``."""
    bins: list[dict[int, list[float]]] = [{} for _ in edges[1:]]
    for boundary in boundaries:
        if boundary.carryover_size != carryover_size or boundary.condition != condition:
            continue
        values: Any = getattr(boundary, what)
        for i, (begin, end) in enumerate(pairwise(edges)):
            if begin < len(values):
                bins[i].setdefault(boundary.trace, []).extend(values[begin:end].tolist())
    return [over_traces(found) if found else None for found in bins]


def distance_edges(longest: int) -> list[int]:
    """Bins that double: 0, 1, 2, 4, 8 and so on, to the longest distance."""
    edges = [0, 1]
    while edges[-1] < longest:
        edges.append(min(2 * edges[-1], longest))
    return edges


_NAMES: dict[Condition, str] = {
    "carried": "query and carryover",
    "none": "query alone",
    "other": "query and another trace's carryover",
}


@dataclass(frozen=True)
class Line:
    """What a reset costs at one distance from the boundary, under one condition."""

    carryover_size: int
    condition: Condition
    begin: int  # tokens from the boundary, the first one
    end: int  # and the last one but one
    gap: Point
    divergence: Point


@dataclass(frozen=True)
class Findings:
    """Everything that a probe found.

    Args:
        model: its name.
        context_size: C.
        traces: how many were scored.
        passed_over: how many are longer than the model's window.
        without_boundary: how many fit in one context.
        lines: the cost of a reset, by carryover, condition and distance.
        repeats: of each trace, the longest run of tokens that comes again a context later.
        answers: traces whose reward found an answer in the whole trace.
        answers_lost: of them, those in which it finds another one, or none, in the last context.
    """

    model: str
    context_size: int
    traces: int
    passed_over: int
    without_boundary: int
    lines: Sequence[Line]
    repeats: Sequence[int]
    answers: int
    answers_lost: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = asdict(self)
        plain["lines"] = [
            {**asdict(line), "gap": line.gap._asdict(), "divergence": line.divergence._asdict()}
            for line in self.lines
        ]
        return plain


def lines_of(boundaries: Sequence[Boundary]) -> list[Line]:
    """The cost of a reset by carryover, condition and distance, and over all distances."""
    if not boundaries:
        return []
    edges = distance_edges(max(len(boundary.gap) for boundary in boundaries))
    found = []
    for size in sorted({boundary.carryover_size for boundary in boundaries}):
        for condition in CONDITIONS:
            own = [b for b in boundaries if (b.carryover_size, b.condition) == (size, condition)]
            if not own:
                continue
            gaps = by_distance(own, size, condition, "gap", edges)
            divergences = by_distance(own, size, condition, "divergence", edges)
            for i, (gap, divergence) in enumerate(zip(gaps, divergences, strict=True)):
                if gap is not None and divergence is not None:
                    found.append(Line(size, condition, edges[i], edges[i + 1], gap, divergence))
            found.append(Line(size, condition, 0, edges[-1], *_overall(own)))
    return found


def _overall(boundaries: Sequence[Boundary]) -> tuple[Point, Point]:
    gaps: dict[int, list[float]] = {}
    divergences: dict[int, list[float]] = {}
    for boundary in boundaries:
        gaps.setdefault(boundary.trace, []).extend(boundary.gap.tolist())
        divergences.setdefault(boundary.trace, []).extend(boundary.divergence.tolist())
    return over_traces(gaps), over_traces(divergences)


def overall(findings: Findings) -> list[Line]:
    """The lines over all distances."""
    longest = max((line.end for line in findings.lines), default=0)
    return [
        line for line in findings.lines if line.begin == 0 and line.end == longest and longest > 1
    ]


def as_page(findings: Findings) -> str:
    """One page in Markdown."""
    repeats = sorted(findings.repeats)
    long = sum(r >= findings.context_size // 4 for r in repeats)
    rows = [
        f"| {line.carryover_size:,} | {_NAMES[line.condition]} | {_cell(line.gap)} | "
        f"{_cell(line.divergence)} | {line.gap.traces} |"
        for line in overall(findings)
    ]
    near = [
        f"| {line.carryover_size:,} | {line.begin}-{line.end - 1} | {_cell(line.gap)} | "
        f"{_cell(line.divergence)} |"
        for line in findings.lines
        if line.condition == "carried" and line not in overall(findings)
    ]
    scored = findings.traces - findings.without_boundary
    return "\n".join(
        [
            f"# How Markovian is {findings.model}?",
            "",
            f"C = {findings.context_size:,}. {findings.traces:,} traces were read; "
            f"{findings.passed_over:,} more are longer than the model's window and were passed "
            f"over, {findings.without_boundary:,} fit in one context and have no boundary: "
            f"{scored:,} are scored. Means over traces with 95 % intervals, in nats a token.",
            "",
            "| m | after the boundary it sees | loss of log-likelihood | KL | traces |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            "The loss is log p(token | whole history) - log p(token | what it sees); below 0 the "
            "token is more likely without the history.",
            "",
            "By distance from the boundary, in tokens, with the carryover:",
            "",
            "| m | distance | loss of log-likelihood | KL |",
            "| --- | --- | --- | --- |",
            *near,
            "",
            f"**Loops.** In {long:,} of {len(repeats):,} traces a run of at least C / 4 = "
            f"{findings.context_size // 4:,} tokens comes again a context later or more; the "
            f"longest such run of a trace has {_middle(repeats):,} tokens in the median and "
            f"{max(repeats, default=0):,} at most.",
            "",
            f"**Answers.** In {findings.answers:,} traces an answer is found; in "
            f"{findings.answers_lost:,} of them it is another one, or none, for whoever reads no "
            "more than the last context.",
            "",
        ]
    )


def _middle(values: Sequence[int]) -> int:
    return values[len(values) // 2] if values else 0


def _cell(point: Point) -> str:
    if point.traces < 2:
        return f"{point.mean:.4f}"
    return f"{point.mean:.4f} ({point.low:.4f} to {point.high:.4f})"


def plot(findings: Findings, path: Path) -> None:
    """Draws loss and divergence against the distance from the boundary.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: the picture cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "eval")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    figure.suptitle(f"What a reset costs {findings.model}, C = {findings.context_size:,}")
    whole = overall(findings)
    curves = {(line.carryover_size, line.condition) for line in findings.lines}
    panels = (("gap", "loss of log-likelihood, nats"), ("divergence", "KL, nats"))
    for axes, (what, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for size, condition in sorted(curves, key=str):
            own = [
                line
                for line in findings.lines
                if (line.carryover_size, line.condition) == (size, condition) and line not in whole
            ]
            points = [getattr(line, what) for line in own]
            name = f"m = {size:,}" if condition == "carried" else f"m = {size:,}, {condition}"
            style = "-" if condition == "carried" else ":"
            xs = [line.begin + 1 for line in own]
            axes.plot(xs, [p.mean for p in points], style, marker=".", label=name)
        axes.set_xscale("log")
        axes.set_xlabel("tokens after the boundary")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the picture to {path}: {error}") from None
