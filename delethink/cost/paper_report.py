"""The paper's numbers beside ours, as text or JSON, with what was assumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np

from delethink.cost import paper
from delethink.cost.compare import crossing
from delethink.cost.flops import LONGCOT, Cut, paper_training_flops
from delethink.cost.report import table
from delethink.cost.shape import ModelShape


def flops(as_json: bool) -> str:
    """The crossing and the ratio of FLOPs (section 4.3, figure 3)."""
    rows = paper.flops_rows()
    if as_json:
        return json.dumps([row._asdict() for row in rows], indent=2)
    lines = [
        [
            row.accounting,
            _length(row.crossing),
            *(f"{ratio:.2f}" for ratio in row.ratios),
        ]
        for row in rows
    ]
    heads = ["training FLOPs, LongCoT / Delethink", "cross at", "24K", "96K", "1,000,000"]
    return table(heads, lines) + _notes(
        "The paper says about 30K and 17 times. Both follow from counting every pair of tokens "
        "twice over what a causal mask leaves, and the embedding, which multiplies nothing.",
        "DeepSeek-R1-Distill-Qwen-1.5B, C = 8,192, m = 4,096; queries and heads are left out.",
        "In all but the last row a chunk counts as C tokens and the number of chunks need not be "
        "whole.",
    )


def figure2c(as_json: bool) -> str:
    """The H100-hours of figure 2(c)."""
    bars = paper.figure_2c()
    if as_json:
        return json.dumps([bar._asdict() | {"error": bar.error} for bar in bars], indent=2)
    lines = [
        [
            f"{bar.method}, {bar.thinking // 1024}K, {bar.part}",
            f"{bar.paper:,}",
            f"{bar.ours:,.0f}",
            f"{bar.error:+.1%}",
        ]
        for bar in bars
    ]
    worst = max(abs(bar.error) for bar in bars)
    return table(["H100-hours of 1000 steps", "paper", "ours", "error"], lines) + _notes(
        f"The largest error is {worst:.1%}. Three efficiencies were fitted to these 20 bars and "
        "the two measured throughputs: bandwidth, seconds a token, training.",
        "Assumed: 8 H100, 1000 steps of 1024 traces, all as long as the mean (in units of 1,024 "
        "tokens), a query of 150 tokens, activations computed again and one more pass for old "
        "log-probs.",
        "The bars were read off the figure, to about 1 % of its axis.",
    )


def throughput(as_json: bool) -> str:
    """The measured throughput of section 6.3."""
    rows = paper.throughput_24k()
    if as_json:
        return json.dumps([row._asdict() for row in rows], indent=2)
    lines = [
        [
            r.method,
            f"{r.mean:,.0f}",
            f"{r.paper:,}",
            f"{r.ours:,.0f}",
            f"{r.ours / r.paper - 1:+.1%}",
        ]
        for r in rows
    ]
    heads = ["24K runs, tokens/s and GPU", "mean length", "paper", "ours", "error"]
    return table(heads, lines) + _notes(
        "Measured by the paper's authors. The mean lengths follow from their 130 and 170 seconds "
        "of sampling.",
        "Assumed: lengths are exponential, cut at the budget of 24,576. The paper gives no "
        "distribution, and the answer depends on it: with all lengths equal LongCoT would be the "
        "faster one at these means.",
    )


def months(as_json: bool) -> str:
    """27 against 7 H100-months."""
    rows = paper.months()
    if as_json:
        return json.dumps([row._asdict() for row in rows], indent=2)
    lines = [
        [
            f"{r.method}, {r.tokens:,} tokens, {24 * r.days:.0f} h a month",
            "-" if r.bars is None else f"{r.bars:.1f}",
            f"{r.ours:.1f}",
        ]
        for r in rows
    ]
    return table(["H100-months of 1000 steps", "bars of figure 2(c)", "ours"], lines) + _notes(
        "The abstract says 27 against 7 at 96K. This does not reproduce: the paper's own bars at "
        "96K are 30.3 and 8.4 months of 730 hours.",
        "27 comes out for LongCoT with the introduction's 94,000 tokens and months of 31 days; "
        "7 for Delethink does not, here. It would follow from stretching the measured 24K run: "
        "215 s x 8 GPUs x 1000 steps is 478 hours at 8,630 tokens, so 7.3 months at 96K.",
        "The ratio, 3.6 in the figure against 3.9 in the text, comes out as "
        f"{rows[0].ours / rows[2].ours:.1f} here.",
    )


REPRODUCTIONS: dict[str, Callable[[bool], str]] = {
    "flops": flops,
    "figure2c": figure2c,
    "throughput": throughput,
    "months": months,
}


def accounting_text(shape: ModelShape, cut: Cut, thinking: Sequence[float], as_json: bool) -> str:
    """Training FLOPs of any model as the paper counts them, and where the curves cross."""
    found = crossing(
        lambda n: paper_training_flops(shape, n, LONGCOT),
        lambda n: paper_training_flops(shape, n, cut),
        int(cut.context_size),
    )
    lengths = np.array(thinking, float)
    longcot = paper_training_flops(shape, lengths, LONGCOT)
    delethink = paper_training_flops(shape, lengths, cut)
    rows = list(zip(thinking, longcot.tolist(), delethink.tolist(), strict=True))
    if as_json:
        keys = ("thinking", "longcot", "delethink")
        traces = [dict(zip(keys, row, strict=True)) for row in rows]
        return json.dumps({"crossing": found, "training_flops": traces}, indent=2)
    lines = [[f"{n:,.0f}", f"{a:.3e}", f"{b:.3e}", f"{a / b:.2f}"] for n, a, b in rows]
    at = "never" if found is None else f"beyond {_length(found)} tokens"
    heads = ["training FLOPs of a trace", "LongCoT", "Delethink", "ratio"]
    return table(heads, lines) + _notes(
        f"Delethink takes fewer {at}.",
        "The paper's accounting: 6 N s + 12 L d s^2 for a sequence of s tokens, which counts the "
        "embedding and pairs that the mask hides; --accounting true does not.",
    )


def _length(tokens: int | None) -> str:
    return "never" if tokens is None else f"{tokens:,}"


def _notes(*sentences: str) -> str:
    return "".join(f"\n{sentence}" for sentence in sentences)
