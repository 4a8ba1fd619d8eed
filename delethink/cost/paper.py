"""Figures reported in The Markovian Thinker (arXiv 2510.06557), next to this estimate's.

``delethink cost --reproduce`` prints them. ``--accounting paper`` applies the paper's FLOP count to
any model with full softmax attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from delethink.cost.calibrate import Measurement
from delethink.cost.estimate import Cost, Curve, Lengths, Workload, crossing, estimate
from delethink.cost.flops import LONGCOT, Cut, FloatArray, Numbers, cut_traces, training_flops
from delethink.cost.hardware import accelerator
from delethink.cost.models import model_shape
from delethink.cost.report import table
from delethink.cost.shape import ModelShape
from delethink.errors import UserError
from delethink.redaction import json_text

MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
DELETHINK = Cut(8192, 4096, 0, 100)
WORKLOAD = Workload(query=150, group=8, prompts=128, steps=1000, gpus=8)
CUTS = {"LongCoT": LONGCOT, "Delethink": DELETHINK}

# H100-hours of 1000 steps, rollout and total, read off the bars of figure 2(c) to about 1 % of the
# axis; mean thinking in units of 1024 tokens.
_MEAN_LENGTHS = (16, 24, 48, 72, 96)
_LONGCOT_BARS = ((640, 955), (1270, 1815), (4460, 6310), (9780, 13280), (16850, 22100))
_DELETHINK_BARS = ((570, 955), (860, 1465), (1720, 3090), (2640, 4620), (3500, 6150))
FIGURE_2C = {
    "LongCoT": dict(zip(_MEAN_LENGTHS, _LONGCOT_BARS, strict=True)),
    "Delethink": dict(zip(_MEAN_LENGTHS, _DELETHINK_BARS, strict=True)),
}

# Section 6.3, runs with a budget of 24,576 tokens: tokens per second and GPU in sampling, and
# seconds of sampling. Their product over 1024 traces is the mean length.
MEASURED_24K = {"LongCoT": (6000, 170), "Delethink": (8500, 130)}
BUDGET_24K = 24_576


def shape() -> ModelShape:
    """Return the shape of the paper's model."""
    return model_shape(MODEL)


def _estimate(lengths: Lengths, cut: Cut) -> Cost:
    return estimate(shape(), lengths, cut, accelerator("h100"), workload=WORKLOAD)


# -- FLOPs: section 4.3 and figure 3 -----------------------------------------------------------


def paper_training_flops(
    model: ModelShape, thinking: Numbers, cut: Cut, masked: bool = True, embedding: bool = True
) -> FloatArray:
    """Return the training FLOPs of a trace as the paper counts them (verl's counter, section 4.3).

    A sequence of s tokens takes 6 N s + 12 L d s^2, with the embedding in N and twice the pairs
    under a causal mask; d is the width of the query heads. LongCoT is one sequence. Delethink is
    1 + (n - C)/(C - m) sequences of C tokens, a number that may be fractional. Queries are left
    out, and every position has logits. Without ``masked``, pairs hidden by the causal mask are not
    counted; without ``embedding``, the embedding is not, since it multiplies nothing.

    Raises:
        UserError: the formula does not cover the model, or a length is below C.
    """
    if any(
        mixer.window is not None
        or mixer.state_numbers
        or mixer.pair_flops != mixer.decode_pair_flops
        for mixer, _ in model.mixers
    ):
        raise UserError(
            f"{model.name}: the paper's accounting covers plain softmax attention only; use "
            "--accounting true"
        )
    weights = model.token_weights + (2 if embedding else 1) * model.head_weights
    squares = sum(3.0 * count * mixer.pair_flops for mixer, count in model.mixers)
    squares = squares if masked else squares / 2
    thinking, context, carry = (
        np.asarray(x, float)
        for x in np.broadcast_arrays(thinking, cut.context_size, cut.carryover_size)
    )
    if np.any(np.isfinite(context) & (thinking < context)):
        raise UserError(
            f"the paper's accounting covers thinking of at least C = {np.max(context):,.0f} tokens"
        )
    longcot = np.isinf(context)
    size = np.where(longcot, thinking, context)
    count = np.where(longcot, 1.0, 1 + (thinking - size) / np.where(longcot, 1.0, size - carry))
    return np.asarray(count * (6.0 * weights * size + squares * np.square(size)), float)


class FlopsRow(NamedTuple):
    """Crossing, and LongCoT / Delethink at three lengths, under one way of counting."""

    accounting: str
    crossing: int | None
    ratios: tuple[float, float, float]


def flops_rows() -> list[FlopsRow]:
    """Return the training FLOPs under each way of counting, without query and head."""
    model, cut = shape(), Cut(8192, 4096)

    def row(name: str, curve: Callable[[Cut], Curve]) -> FlopsRow:
        longcot, delethink = curve(LONGCOT), curve(cut)
        a, b, c = (longcot(lengths) / delethink(lengths)).tolist()
        return FlopsRow(name, crossing(longcot, delethink, 8192), (a, b, c))

    def paper(masked: bool, embedding: bool) -> Callable[[Cut], Curve]:
        return lambda method: lambda n: paper_training_flops(model, n, method, masked, embedding)

    def exact(method: Cut) -> Curve:
        return lambda n: training_flops(model, cut_traces(n, 1, method))

    lengths = np.array([24_576, 98_304, 1_000_000], float)
    return [
        row("paper: masked pairs and the embedding counted", paper(True, True)),
        row("masked pairs counted", paper(True, False)),
        row("the embedding counted", paper(False, True)),
        row("neither, logits at every position", paper(False, False)),
        row("true: logits of sampled tokens only, whole chunks", exact),
    ]


def _flops_text(rows: list[FlopsRow]) -> str:
    lines = []
    for row in rows:
        cross = f"{row.crossing:,}" if row.crossing else "never"
        lines.append([row.accounting, cross, *(f"{ratio:.2f}" for ratio in row.ratios)])
    heads = ["training FLOPs, LongCoT / Delethink", "crossing", "24K", "96K", "1,000,000"]
    return _annotated(
        table(heads, lines),
        "The paper reports about 30K and 17 times. Both follow from counting the pairs hidden by "
        "the causal mask, which doubles attention, and the embedding, which multiplies nothing.",
        "DeepSeek-R1-Distill-Qwen-1.5B, C = 8,192, m = 4,096; queries and heads are left out.",
        "In all rows but the last a chunk counts as C tokens, and the number of chunks may be "
        "fractional.",
    )


def accounting_text(model: ModelShape, cut: Cut, thinking: Sequence[float], as_json: bool) -> str:
    """Return the training FLOPs of any model in the paper's accounting, and the crossing."""
    found = crossing(
        lambda n: paper_training_flops(model, n, LONGCOT),
        lambda n: paper_training_flops(model, n, cut),
        int(cut.context_size),
    )
    costs = (paper_training_flops(model, np.array(thinking), method) for method in (LONGCOT, cut))
    rows = list(zip(thinking, *(cost.tolist() for cost in costs), strict=True))
    if as_json:
        traces = [{"thinking": n, "longcot": a, "delethink": b} for n, a, b in rows]
        return json_text({"crossing": found, "training_flops": traces}, indent=2)
    lines = [[f"{n:,.0f}", f"{a:.3e}", f"{b:.3e}", f"{a / b:.2f}"] for n, a, b in rows]
    return _annotated(
        table(["training FLOPs of a trace", "LongCoT", "Delethink", "ratio"], lines),
        "Delethink is never cheaper."
        if found is None
        else f"Delethink is always cheaper beyond {found:,} tokens.",
        "The paper's accounting: 6 N s + 12 L d s^2 for a sequence of s tokens, which counts the "
        "embedding and the pairs hidden by the mask; --accounting true counts neither.",
    )


# -- time: figure 2(c), section 6.3, the abstract ----------------------------------------------


class Bar(NamedTuple):
    """A bar of figure 2(c): H100-hours in the paper and in this estimate; relative error."""

    method: str
    thinking: int
    part: str
    paper: float
    ours: float
    error: float


def figure_2c() -> list[Bar]:
    """Return every bar of figure 2(c), with all traces as long as the mean."""
    bars = []
    for method, heights in FIGURE_2C.items():
        for units, (rollout, total) in heights.items():
            cost = _estimate(Lengths.constant(units * 1024), CUTS[method])
            sampling = float(cost.sampling_seconds) * WORKLOAD.steps * WORKLOAD.gpus / 3600
            pairs = (("rollout", rollout, sampling), ("total", total, float(cost.gpu_hours)))
            for part, paper, ours in pairs:
                bars.append(Bar(method, units * 1024, part, paper, ours, ours / paper - 1))
    return bars


def _figure_2c_text(bars: list[Bar]) -> str:
    lines = []
    for bar in bars:
        name = f"{bar.method}, {bar.thinking // 1024}K, {bar.part}"
        lines.append([name, f"{bar.paper:,}", f"{bar.ours:,.0f}", f"{bar.error:+.1%}"])
    worst = max(abs(bar.error) for bar in bars)
    return _annotated(
        table(["H100-hours of 1000 steps", "paper", "ours", "error"], lines),
        f"The largest error is {worst:.1%}. Three efficiencies are fitted to these 20 bars and "
        "the two measured throughputs: bandwidth, seconds per token, training.",
        "Assumptions: 8 H100; 1000 steps of 1024 traces, all as long as the mean (in units of "
        "1,024 tokens); a query of 150 tokens; recomputed activations and one more pass for old "
        "log-probs.",
        "The bars are read off the figure, to about 1 % of its axis.",
    )


def measurements() -> list[Measurement]:
    """Return figure 2(c) and section 6.3 as timed steps, to fit the default efficiencies."""
    step_seconds = 3600 / WORKLOAD.steps / WORKLOAD.gpus  # step seconds per H100-hour of the run
    timed = []
    for method, heights in FIGURE_2C.items():
        for units, (rollout, total) in heights.items():
            lengths = Lengths.constant(units * 1024)
            seconds = rollout * step_seconds, (total - rollout) * step_seconds
            timed.append(Measurement(lengths, CUTS[method], WORKLOAD, *seconds))
    for method, (_, sampling) in MEASURED_24K.items():
        lengths = lengths_24k(method)
        timed.append(Measurement(lengths, CUTS[method], WORKLOAD, float(sampling), None))
    return timed


def lengths_24k(method: str) -> Lengths:
    """Return the lengths of a 24K run: a known mean with an assumed distribution.

    The paper gives no histogram; the lengths are exponential, capped at the budget, with a scale at
    which E[min(X, cap)] is the mean. Each of the eight engines samples an eighth of the traces.
    """
    rate, seconds = MEASURED_24K[method]
    mean = rate * seconds * WORKLOAD.gpus / WORKLOAD.traces
    low, high = mean / 2, 1e3 * BUDGET_24K
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        if middle * -math.expm1(-BUDGET_24K / middle) < mean:
            low = middle
        else:
            high = middle
    quantiles = (np.arange(2048) + 0.5) / 2048
    seen = np.minimum(np.ceil(-low * np.log1p(-quantiles)), BUDGET_24K)
    return Lengths.empirical(seen, WORKLOAD.traces // WORKLOAD.gpus)


class Throughput(NamedTuple):
    """Sampled tokens per second and GPU of a 24K run, in the paper and in this estimate."""

    method: str
    mean: float
    paper: float
    ours: float


def throughput_24k() -> list[Throughput]:
    """Return the throughputs of section 6.3: 8,500 against 6,000 tokens per second and GPU."""
    rows = []
    for method, (rate, _) in MEASURED_24K.items():
        lengths = lengths_24k(method)
        cost = _estimate(lengths, CUTS[method])
        rows.append(Throughput(method, float(lengths.mean), rate, float(cost.tokens_per_second)))
    return rows


def _throughput_text(rows: list[Throughput]) -> str:
    lines = []
    for r in rows:
        error = f"{r.ours / r.paper - 1:+.1%}"
        lines.append([r.method, f"{r.mean:,.0f}", f"{r.paper:,}", f"{r.ours:,.0f}", error])
    return _annotated(
        table(["24K runs, tokens/s per GPU", "mean length", "paper", "ours", "error"], lines),
        "Measured by the paper's authors. The mean lengths follow from their 130 and 170 seconds "
        "of sampling.",
        "Assumption: lengths are exponential, capped at the budget of 24,576. The paper gives no "
        "distribution, and the result depends on it: with equal lengths LongCoT would be faster "
        "at these means.",
    )


class GpuMonths(NamedTuple):
    """H100-months of the run at a mean length, for months of ``days`` days.

    ``bars`` follows from figure 2(c), or is ``None`` if the figure has no bar at this length.
    """

    method: str
    tokens: int
    days: float
    bars: float | None
    ours: float


def gpu_months() -> list[GpuMonths]:
    """Return the H100-months at 96K (the abstract) and at 94K tokens (the introduction)."""
    rows = []
    for method, cut in CUTS.items():
        for tokens, days in ((98_304, 730 / 24), (94_000, 31.0)):
            cost = _estimate(Lengths.constant(tokens), cut)
            bar = FIGURE_2C[method][96][1] / (24 * days) if tokens == 98_304 else None
            rows.append(GpuMonths(method, tokens, days, bar, float(cost.gpu_hours) / (24 * days)))
    return rows


def _gpu_months_text(rows: list[GpuMonths]) -> str:
    lines = []
    for r in rows:
        name = f"{r.method}, {r.tokens:,} tokens, {24 * r.days:.0f} h per month"
        lines.append([name, "-" if r.bars is None else f"{r.bars:.1f}", f"{r.ours:.1f}"])
    return _annotated(
        table(["H100-months of 1000 steps", "bars of figure 2(c)", "ours"], lines),
        "The abstract reports 27 against 7 at 96K. This does not reproduce: the paper's own bars "
        "at 96K are 30.3 and 8.4 months of 730 hours.",
        "27 follows for LongCoT from the introduction's 94,000 tokens and months of 31 days; 7 "
        "for Delethink does not. It would follow from scaling the measured 24K run: 215 s x 8 "
        "GPUs x 1000 steps is 478 hours at 8,630 tokens, so 7.3 months at 96K.",
        "The ratio is 3.6 in the figure, 3.9 in the text and "
        f"{rows[0].ours / rows[2].ours:.1f} in this estimate.",
    )


# The rows of each reproduction, and their text.
_REPRODUCTIONS: dict[str, tuple[Callable[[], list[Any]], Callable[[list[Any]], str]]] = {
    "flops": (flops_rows, _flops_text),
    "figure2c": (figure_2c, _figure_2c_text),
    "throughput": (throughput_24k, _throughput_text),
    "months": (gpu_months, _gpu_months_text),
}


def reproduction(name: str, as_json: bool) -> str:
    """Return figures of the paper (flops, figure2c, throughput or months) next to this estimate's.

    The text is a table with notes, or JSON with ``as_json``.
    """
    make_rows, text_of = _REPRODUCTIONS[name]
    rows = make_rows()
    return json_text([row._asdict() for row in rows], indent=2) if as_json else text_of(rows)


def _annotated(text: str, *notes: str) -> str:
    return "\n".join([text, *notes])
