"""What the paper reports (arXiv 2510.06557), and what comes out here for the same question."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from delethink.cost.calibrate import Measurement
from delethink.cost.compare import Curve, crossing
from delethink.cost.estimate import Job, Lengths, estimate
from delethink.cost.flops import LONGCOT, Cut, cut_traces, paper_training_flops, training_flops
from delethink.cost.hardware import Efficiency, accelerator
from delethink.cost.models import model_shape
from delethink.cost.shape import ModelShape

MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
DELETHINK = Cut(8192, 4096, 0, 100)
JOB = Job(query=150, group=8, prompts=128, steps=1000, gpus=8)
CUTS = {"LongCoT": LONGCOT, "Delethink": DELETHINK}

# H100-hours of 1000 steps, rollout and total, read off the bars of figure 2(c), to about 1 % of the
# axis; mean thinking in units of 1024 tokens.
FIGURE_2C = {
    "LongCoT": {
        16: (640, 955),
        24: (1270, 1815),
        48: (4460, 6310),
        72: (9780, 13280),
        96: (16850, 22100),
    },
    "Delethink": {
        16: (570, 955),
        24: (860, 1465),
        48: (1720, 3090),
        72: (2640, 4620),
        96: (3500, 6150),
    },
}

# Section 6.3: the runs with a budget of 24,576 tokens. Tokens a second and GPU while sampling, and
# seconds of sampling: their product over 1024 traces is the mean length.
MEASURED_24K = {"LongCoT": (6000, 170), "Delethink": (8500, 130)}
BUDGET_24K = 24_576


def shape() -> ModelShape:
    """The paper's model."""
    return model_shape(MODEL)


class FlopsRow(NamedTuple):
    """A way of counting: where the curves cross, and LongCoT / Delethink at three lengths."""

    accounting: str
    crossing: int | None
    ratios: tuple[float, float, float]


RATIO_LENGTHS = (24_576, 98_304, 1_000_000)


def flops_rows() -> list[FlopsRow]:
    """Training FLOPs by every way of counting (section 4.3 and figure 3; no query, no head)."""
    model, cut = shape(), Cut(8192, 4096)

    def row(name: str, longcot: Curve, delethink: Curve) -> FlopsRow:
        lengths = np.array(RATIO_LENGTHS, float)
        ratios = longcot(lengths) / delethink(lengths)
        found = crossing(longcot, delethink, 8192)
        return FlopsRow(name, found, (float(ratios[0]), float(ratios[1]), float(ratios[2])))

    def counted(name: str, masked: bool, embedding: bool) -> FlopsRow:
        def curve(way: Cut) -> Curve:
            return lambda n: paper_training_flops(
                model, n, way, masked_pairs=masked, embedding=embedding
            )

        return row(name, curve(LONGCOT), curve(cut))

    def exact(way: Cut) -> Curve:
        return lambda n: training_flops(model, cut_traces(n, 1, way))

    return [
        counted("paper: masked pairs and the embedding counted", True, True),
        counted("masked pairs counted", True, False),
        counted("the embedding counted", False, True),
        counted("neither, logits at every position", False, False),
        row("true: logits of sampled tokens only, whole chunks", exact(LONGCOT), exact(cut)),
    ]


class Bar(NamedTuple):
    """A bar of figure 2(c): H100-hours as read off and as predicted."""

    method: str
    thinking: int
    part: str
    paper: float
    ours: float

    @property
    def error(self) -> float:
        """Predicted over read off, less one."""
        return self.ours / self.paper - 1


def figure_2c(efficiency: Efficiency | None = None) -> list[Bar]:
    """Every bar of figure 2(c); every trace is as long as the mean says."""
    bars = []
    for method, heights in FIGURE_2C.items():
        for units, (rollout, total) in heights.items():
            lengths = Lengths.constant(units * 1024)
            cost = estimate(shape(), lengths, CUTS[method], accelerator("h100"), efficiency, JOB)
            sampling = float(cost.sampling_seconds) * JOB.steps * JOB.gpus / 3600
            bars.append(Bar(method, units * 1024, "rollout", rollout, sampling))
            bars.append(Bar(method, units * 1024, "total", total, float(cost.gpu_hours)))
    return bars


def measurements() -> list[Measurement]:
    """Figure 2(c) and the measured runs as timed steps, for fitting the default efficiencies."""
    hours = 3600 / JOB.steps / JOB.gpus  # seconds of a step for an H100-hour of the run
    timed = [
        Measurement(
            Lengths.constant(units * 1024),
            CUTS[method],
            JOB,
            rollout * hours,
            (total - rollout) * hours,
        )
        for method, heights in FIGURE_2C.items()
        for units, (rollout, total) in heights.items()
    ]
    return timed + [
        Measurement(lengths_24k(method), CUTS[method], JOB, float(seconds), None)
        for method, (_, seconds) in MEASURED_24K.items()
    ]


def lengths_24k(method: str) -> Lengths:
    """Lengths of the 24K runs: their mean is known, their distribution is assumed.

    Exponential, cut at the budget: the paper gives no histogram. An eighth of a step's traces goes
    to each of eight engines.
    """
    rate, seconds = MEASURED_24K[method]
    return capped_exponential(rate * seconds * JOB.gpus / JOB.traces, BUDGET_24K, 128)


def capped_exponential(mean: float, cap: int, batch: int) -> Lengths:
    """Lengths with that mean whose excess over the cap is cut off: E[min(X, cap)] = mean."""
    low, high = mean / 2, 1e3 * cap
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        if middle * -math.expm1(-cap / middle) < mean:
            low = middle
        else:
            high = middle
    quantiles = (np.arange(2048) + 0.5) / 2048
    seen = np.minimum(np.ceil(-low * np.log1p(-quantiles)), cap)
    return Lengths.empirical(seen, batch)


class Throughput(NamedTuple):
    """Sampled tokens a second and GPU in the 24K runs, measured by the authors and predicted."""

    method: str
    mean: float
    paper: float
    ours: float


def throughput_24k(efficiency: Efficiency | None = None) -> list[Throughput]:
    """The measured 8,500 against 6,000 tokens a second and GPU."""
    rows = []
    for method, (rate, _) in MEASURED_24K.items():
        lengths = lengths_24k(method)
        cost = estimate(shape(), lengths, CUTS[method], accelerator("h100"), efficiency, JOB)
        rows.append(Throughput(method, float(lengths.mean), rate, float(cost.tokens_per_second)))
    return rows


class Months(NamedTuple):
    """H100-months of the run at a mean length, by how long a month is taken to be."""

    method: str
    tokens: int
    days: float
    bars: float | None  # from the bars of figure 2(c), where there is one at this length
    ours: float


def months(efficiency: Efficiency | None = None) -> list[Months]:
    """H100-months at 96K (the abstract) and at 94K tokens (the introduction)."""
    rows = []
    for method, cut in CUTS.items():
        for tokens, days in ((98_304, 730 / 24), (94_000, 31.0)):
            cost = estimate(
                shape(), Lengths.constant(tokens), cut, accelerator("h100"), efficiency, JOB
            )
            bar = FIGURE_2C[method][96][1] / (24 * days) if tokens == 98_304 else None
            rows.append(Months(method, tokens, days, bar, float(cost.gpu_hours) / (24 * days)))
    return rows
