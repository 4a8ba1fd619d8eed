"""What an evaluation is asked: models, settings, problems and samples, as plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from delethink.chunking import ChunkSpec, start
from delethink.errors import ConfigError, RolloutError
from delethink.types import Chunk, Problem, StopReason, Trace

DEFAULT_BUDGETS = 5  # points of a curve, where only its end is asked for


def cut(trace: Trace, spec: ChunkSpec) -> Trace:
    """What the trace would have been under ``spec``, a smaller budget of the same rule.

    The rule itself is played again over the sampled chunks, each cut at the limit that the rule
    gives it. That equals a run of its own wherever a sampler that may go on for longer draws the
    same tokens first, as one with a seed for each chunk does.

    Raises:
        RolloutError: the trace was played under another rule, so that a prompt differs.
    """
    if trace.stop.is_failure:
        return trace
    state = start(spec, trace.query_ids)
    chunks: list[Chunk] = []
    for chunk in trace.chunks:
        if chunk.prompt_ids != state.prompt_ids:
            raise RolloutError(
                f"a trace cannot be cut to {spec}: chunk {len(chunks)} starts from another prompt "
                "than this rule gives it"
            )
        kept = _cut_chunk(chunk, state.max_new_tokens)
        chunks.append(kept)
        state = state.advance(kept.output_ids, kept.stop)
        if state.stop is not None:
            return Trace(trace.query_ids, tuple(chunks), state.stop)
    raise RolloutError(f"a trace of {trace.length} tokens ends before the budget of {spec.budget}")


def _cut_chunk(chunk: Chunk, limit: int) -> Chunk:
    if len(chunk.output_ids) <= limit:
        return chunk
    return replace(
        chunk,
        output_ids=chunk.output_ids[:limit],
        logprobs=chunk.logprobs[:limit],
        stop=StopReason.LENGTH,
    )


def smaller(spec: ChunkSpec, budget: int, max_chunks: int | None = None) -> ChunkSpec:
    """The rule of ``spec`` with a smaller end: fewer chunks, or a shorter only one.

    Raises:
        ConfigError: no number of chunks has this budget, or it is larger than the spec's own.
    """
    if spec.is_longcot:
        found = ChunkSpec.longcot(budget)
    else:
        step = spec.context_size - spec.carryover_size
        chunks = max_chunks or 1 + -(-(budget - spec.context_size) // step)
        found = replace(spec, max_chunks=max(1, chunks))
    if found.budget != budget or budget > spec.budget:
        raise ConfigError(
            f"a budget of {budget} tokens is none of {spec}: C + (I - 1)(C - m) up to {spec.budget}"
        )
    return found


def spread_chunks(max_chunks: int, number: int = DEFAULT_BUDGETS) -> tuple[int, ...]:
    """At most ``number`` chunk counts from 1 to ``max_chunks``, evenly spread, both ends included.

    >>> spread_chunks(9)
    (1, 3, 5, 7, 9)
    """
    if max_chunks <= number:
        return tuple(range(1, max_chunks + 1))
    steps = number - 1
    return tuple(1 + (i * (max_chunks - 1) + steps // 2) // steps for i in range(number))


Mode = Literal["delethink", "longcot"]


@dataclass(frozen=True)
class Setting:
    """A model thinking in one way, sampled once at its largest budget.

    Example: ``Setting("toy", "delethink", ChunkSpec(90, 45, 9, 0), (90, 180, 270, 360, 450))``.
    """

    model: str
    mode: Mode
    spec: ChunkSpec  # of the largest budget
    budgets: tuple[int, ...]  # tokens, rising; the last one is the spec's own

    @cached_property
    def specs(self) -> tuple[ChunkSpec, ...]:
        """The rule at each budget."""
        return tuple(smaller(self.spec, budget) for budget in self.budgets)

    @property
    def way(self) -> str:
        """How it thinks, without the model: ``"delethink C=90 m=45"``."""
        if self.mode == "longcot":
            return "longcot"
        head = f" head={self.spec.head_size}" + ("+" if self.spec.head_outside else "")
        return f"delethink C={self.spec.context_size} m={self.spec.carryover_size}{head}"

    @property
    def key(self) -> str:
        """The name in records and tables."""
        return f"{self.model} | {self.way}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values; what decides the tokens that are sampled."""
        return {"model": self.model, "mode": self.mode, **asdict(self.spec)}


@dataclass(frozen=True)
class Asked:
    """How often and how each problem is asked."""

    samples: int = 4  # of a problem
    temperature: float = 0.6
    seed: int = 0
    forced_answer_tokens: int = 0  # to answer in when a budget is spent; 0: not asked


def make_settings(
    models: Sequence[str],
    modes: Sequence[str],
    context_sizes: Sequence[int],
    carryover_sizes: Sequence[int],
    max_chunks: Sequence[int],
    head_size: int | None = None,
    head_outside: bool = False,
    longcot_cap: int | None = None,
) -> list[Setting]:
    """Every combination of models and ways of thinking.

    Args:
        models: names or folders.
        modes: of ``"delethink"`` and ``"longcot"``. LongCoT is given the budgets of the Delethink
            settings, so that both are compared at the same ones, whether or not those are played.
        context_sizes: C.
        carryover_sizes: m; empty for half of each C.
        max_chunks: I; one alone is the largest, and smaller ones are spread below it.
        head_size: of what is carried; ``None`` for the paper's 100, or m where that is less.
        head_outside: whether the head comes on top of m.
        longcot_cap: budgets of LongCoT above this are cut to it.

    Raises:
        ConfigError: sizes that make no sense, or the same setting twice.
    """
    if not models or not modes or not context_sizes or not max_chunks:
        raise ConfigError("an evaluation needs a model, a mode, a context size and max_chunks")
    chunks = sorted(set(max_chunks)) if len(max_chunks) > 1 else spread_chunks(_most(max_chunks))
    ways = [
        ChunkSpec(c, m, chunks[-1], min(100, m) if head_size is None else head_size, head_outside)
        for c in context_sizes
        for m in (carryover_sizes or [c // 2])
    ]
    of_way = {
        way: tuple(ChunkSpec(way.context_size, way.carryover_size, i, 0).budget for i in chunks)
        for way in ways
    }
    all_budgets = {budget for budgets in of_way.values() for budget in budgets}
    longcot = tuple(sorted({min(b, longcot_cap or b) for b in all_budgets}))
    settings = []
    for model in models:
        for mode in modes:
            if mode == "delethink":
                settings += [Setting(model, "delethink", way, of_way[way]) for way in ways]
            else:
                spec = ChunkSpec.longcot(longcot[-1])
                settings.append(Setting(model, "longcot", spec, longcot))
    keys = [setting.key for setting in settings]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ConfigError(f"the setting {twice!r} is asked for twice")
    return settings


def _most(max_chunks: Sequence[int]) -> int:
    if max_chunks[0] < 1:
        raise ConfigError(f"max_chunks must be at least 1, got {max_chunks[0]}")
    return max_chunks[0]


def fingerprint(problems: Sequence[Problem]) -> str:
    """A digest of what is asked and what counts as right, in order."""
    text = json.dumps([[problem.prompt, problem.answer] for problem in problems])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
