"""Predicted time of a batch of a recipe by phase, with its uncertainty.

Sampling and training are those of ``delethink.cost.estimate``, with its efficiencies. Beside them
are the new weights of the engines, engines that sleep and wake, and the work of rank 0.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from delethink.cost.estimate import Lengths, Workload, estimate
from delethink.cost.flops import FloatArray
from delethink.cost.gpu_memory import cache_share
from delethink.cost.hardware import Accelerator, Efficiency
from delethink.cost.paper import BUDGET_24K, lengths_24k
from delethink.cost.recipe_terms import RecipeTerms
from delethink.cost.timing import decode_steps
from delethink.errors import ConfigError

_USUAL_QUERY = 150  # tokens: the mean query of the paper's data
_TRAINING_PASSES = 3.0  # forward passes that ``estimate`` counts without extra ones
_NODE_GPUS = 8  # further GPUs are on further machines
_DRAWS = 100


@dataclass(frozen=True)
class Rates:
    """Rates of the phases beside sampling and training."""

    host_copy: float = 3.0e9  # bytes/s: written to memory of another process, on two cores
    host_copies: int = 4  # from a GPU through the object store to another GPU
    pcie: float = 25e9  # bytes/s between a GPU and pinned host memory; an assumption
    network: float = 50e9  # bytes/s between machines; an assumption
    switch_seconds: float = 3.0  # for engines to sleep or to wake, copies aside; an assumption
    record_seconds: float = 1.7e-6  # a token, on rank 0 (benchmarks/bench_recording.py)
    score_seconds: float = 0.5  # from the last token to the last score; an assumption


class BatchTime(NamedTuple):
    """Seconds of the phases of a batch."""

    sampling: float
    scoring: float  # after the last token
    training: float  # optimizer and the reduction of gradients included
    recording: float  # trace files, written by rank 0
    update: float  # new weights, and the wait of engines for chunks in flight
    handover: float  # part of the update that holds up the trainer too
    switching: float  # engines that sleep and wake
    overlaps: bool  # sampling runs beside training and recording

    @property
    def total(self) -> float:
        """Seconds of the batch: phases in turn, or the longer side of two that overlap."""
        sampling = self.sampling + self.scoring + self.update
        training = self.training + self.recording + self.handover
        if self.overlaps:
            return max(sampling, training)
        return sampling + self.training + self.recording + self.switching

    def as_dict(self) -> dict[str, float | bool]:
        """Return the phases and their total as JSON values."""
        return self._asdict() | {"total": self.total}


def usual_lengths(budget: int, engine_traces: int, mean: float | None = None) -> Lengths:
    """Return the assumed lengths of traces: those of the paper's 24K run, scaled to the budget.

    Its mean is 8,633 tokens, 35 % of the budget. With a ``mean``, lengths are scaled to it and cut
    at the budget.

    Raises:
        ConfigError: the mean is not between 1 and the budget.
    """
    values = lengths_24k("Delethink").values * (budget / BUDGET_24K)
    if mean is not None:
        if not 1 <= mean <= budget:
            raise ConfigError(f"--thinking must be from 1 to the budget of {budget}, got {mean:g}")
        values = _cut_to_mean(values, mean, budget)
    return Lengths.empirical(np.maximum(values, 1.0), engine_traces)


def _cut_to_mean(values: FloatArray, mean: float, budget: int) -> FloatArray:
    """Return the values scaled, and cut at the budget, so that this is their mean."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        if np.minimum(values * middle, budget).mean() < mean:
            low = middle
        else:
            high = middle
    return np.asarray(np.minimum(values * high, budget))


def predict_batch(
    terms: RecipeTerms,
    device: Accelerator,
    mean: float | None = None,
    efficiency: Efficiency | None = None,
    rates: Rates | None = None,
) -> BatchTime:
    """Predict the time of a batch.

    Args:
        terms: terms of the recipe.
        device: kind of all GPUs.
        mean: mean sampled tokens of a trace; ``None``: see ``usual_lengths``.
        efficiency: reached fractions of the device's peaks.
        rates: rates of the other phases.

    Raises:
        ConfigError: the recipe samples on CPUs, or its chunks have varying lengths.
        ModelError: the model does not fit.
    """
    efficiency, rates = efficiency or Efficiency(), rates or Rates()
    efficiency = dataclasses.replace(efficiency, cache_share=cache_share(terms, device))
    if not terms.engine_gpus:
        raise ConfigError(
            "engine.gpus_per_engine=0 samples on CPUs: set engine.gpus_per_engine=1, or "
            "engine.placement=colocated with trainer.gpus_per_rank=1"
        )
    trained = estimate(
        terms.shape, _lengths(terms, mean), terms.cut, device, efficiency, _training_work(terms)
    )
    sampling, waiting, tokens = _sampling_seconds(terms, device, mean, efficiency)
    gathered = terms.gathered_bytes / rates.host_copy
    handover = gathered
    if terms.transfer == "store":  # rank 0 copies to the host, and to the object store
        handover += 2 * terms.update_bytes / rates.host_copy
    parallel = max(1.0, terms.engine_gpus)
    moved = 2 * terms.shape.parameters * terms.engine_bytes / parallel / rates.pcie
    return BatchTime(
        sampling=sampling,
        scoring=rates.score_seconds,
        training=float(trained.training_seconds) + _reduction_seconds(terms, device, rates),
        recording=terms.traces * tokens * rates.record_seconds,
        update=gathered + _transfer_seconds(terms, device, rates) + waiting,
        handover=handover,
        switching=2 * rates.switch_seconds + moved if terms.sleeps else 0.0,
        overlaps=terms.batches_ahead > 0,
    )


def _training_work(terms: RecipeTerms) -> Workload:
    return Workload(
        query=min(terms.query, _USUAL_QUERY),
        group=terms.group,
        prompts=max(1, terms.traces // terms.group),
        steps=1,
        gpus=terms.ranks,
        extra_passes=terms.passes - _TRAINING_PASSES,
        micro_tokens=terms.forward_tokens,
    )


def _lengths(terms: RecipeTerms, mean: float | None) -> Lengths:
    """Return the lengths of traces, with the longest of those that an engine has at once."""
    at_once = max(1, terms.batches_ahead)
    return usual_lengths(terms.spec.budget, max(1, terms.traces * at_once // terms.engines), mean)


def _sampling_seconds(
    terms: RecipeTerms, device: Accelerator, mean: float | None, efficiency: Efficiency
) -> tuple[float, float, float]:
    """Return the seconds of sampling and of the wait for an update, and the tokens of a trace."""
    at_once = max(1, terms.batches_ahead)  # batches in the engines at the same time
    parallel, lengths = max(1, round(terms.engine_gpus)), _lengths(terms, mean)
    work = _training_work(terms)
    work = dataclasses.replace(
        work,
        gpus=max(1, round(terms.sampling_gpus)),
        prompts=work.prompts * at_once,
        parallel=parallel,
        sequences=terms.engine_batch,
    )
    cost = estimate(terms.shape, lengths, terms.cut, device, efficiency, work)
    total, tokens = float(cost.sampling_seconds), float(lengths.mean)
    if not np.isfinite(total):
        raise ConfigError(
            f"the cache of one trace does not fit on {parallel} x {device.name}: lower "
            "thinking.context_size, or set engine.tensor_parallel_size=2"
        )
    waiting = 0.0
    if terms.batches_ahead:
        # An update waits for chunks in flight, which are on average half done.
        share = terms.traces * at_once / terms.engines
        steps = float(decode_steps(tokens, lengths.longest, share, float(cost.concurrent)))
        waiting = total / steps * _chunk_tokens(terms, tokens) / 2
    return total / at_once, waiting, tokens


def _reduction_seconds(terms: RecipeTerms, device: Accelerator, rates: Rates) -> float:
    """Return the seconds of gradients between ranks."""
    if not terms.is_distributed:
        return 0.0
    link = device.link if terms.ranks <= _NODE_GPUS else rates.network
    return terms.optimizer_steps * 2 * 4.0 * terms.trained_parameters / link


def _transfer_seconds(terms: RecipeTerms, device: Accelerator, rates: Rates) -> float:
    """Return the seconds of an update of all engines."""
    if terms.transfer == "ipc":
        return 2 * terms.update_bytes / device.bandwidth  # read and written on the same GPU
    if terms.transfer == "nccl":
        link = device.link if terms.gpus <= _NODE_GPUS else rates.network
        return terms.engines * terms.update_bytes / link  # rank 0 sends to each engine
    return rates.host_copies * terms.update_bytes / rates.host_copy


def _chunk_tokens(terms: RecipeTerms, mean: float) -> float:
    """Return the sampled tokens of a usual chunk in flight."""
    if terms.spec.is_longcot:
        return mean
    return float(terms.spec.context_size - terms.spec.carryover_size)


def batch_interval(
    terms: RecipeTerms, device: Accelerator, mean: float | None = None, seed: int = 0
) -> tuple[float, float]:
    """Return the 5 % and 95 % quantiles of the time of a batch by Monte Carlo.

    Efficiencies and rates are drawn from log-normal distributions with the spread of the former.
    """
    rng, known, totals = np.random.default_rng(seed), Efficiency(), []
    names = ("bandwidth", "decode", "prefill", "training", "token_seconds")
    others = ("host_copy", "pcie", "network", "switch_seconds", "record_seconds")

    def drawn(of: Efficiency | Rates, fields: tuple[str, ...]) -> dict[str, Any]:
        return {n: getattr(of, n) * float(np.exp(known.spread * rng.normal())) for n in fields}

    for _ in range(_DRAWS):
        efficiency = dataclasses.replace(known, **drawn(known, names))
        rates = dataclasses.replace(Rates(), **drawn(Rates(), others))
        totals.append(predict_batch(terms, device, mean, efficiency, rates).total)
    low, high = np.quantile(totals, [0.05, 0.95])
    return float(low), float(high)
