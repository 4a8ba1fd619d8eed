"""Settings of an evaluation: models, modes, budgets and samples, as plain values."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

from delethink.carryover import Boundary, Carryover, name_of
from delethink.chunking import ChunkSpec, start
from delethink.errors import ConfigError, RolloutError
from delethink.json_io import get_count, get_flag, get_ids, get_text, optional
from delethink.policy import Sampling
from delethink.registry import make
from delethink.types import Chunk, Problem, StopReason, Trace

Mode = Literal["delethink", "longcot"]

DEFAULT_BUDGETS = 5  # points of a scaling curve


def cut_to_budget(trace: Trace, spec: ChunkSpec) -> Trace:
    """Return the trace under ``spec``, which has the same chunk rule and a smaller budget.

    The chunk rule runs again over the sampled chunks and cuts each one at its limit. With one seed
    per chunk, the result equals a trace sampled with the smaller budget.

    Raises:
        RolloutError: the trace was sampled under another rule.
    """
    if trace.stop.is_failure:
        return trace
    state = start(spec, trace.query_ids)
    chunks: list[Chunk] = []
    for chunk in trace.chunks:
        if chunk.prompt_ids != state.prompt_ids:
            raise RolloutError(
                f"a trace cannot be cut to {spec}: chunk {len(chunks)} starts from another prompt "
                "than under this rule"
            )
        limit = state.max_new_tokens
        if len(chunk.output_ids) > limit:
            output_ids, logprobs = chunk.output_ids[:limit], chunk.logprobs[:limit]
            chunk = replace(chunk, output_ids=output_ids, logprobs=logprobs, stop=StopReason.LENGTH)
        chunks.append(chunk)
        state = state.advance(chunk.output_ids, chunk.stop)
        if state.stop is not None:
            return Trace(trace.query_ids, tuple(chunks), state.stop)
    raise RolloutError(
        f"a trace cannot be cut to {spec}: its {trace.length} tokens end before the budget of "
        f"{spec.budget}"
    )


def with_budget(spec: ChunkSpec, budget: int) -> ChunkSpec:
    """Return ``spec`` with a smaller budget: fewer chunks, or a shorter LongCoT chunk.

    Raises:
        ConfigError: no number of chunks gives this budget, or the budget of ``spec`` is lower.
    """
    if spec.is_longcot:
        smaller = ChunkSpec.longcot(budget)
    else:
        step = spec.context_size - spec.carryover_size + spec.max_written
        smaller = replace(spec, max_chunks=max(1, 1 + -(-(budget - spec.context_size) // step)))
    if smaller.budget != budget or budget > spec.budget:
        raise ConfigError(
            f"a budget must be C + (I - 1)(C - m) for some I, up to {spec.budget}: got {budget} "
            f"for {spec}"
        )
    return smaller


def spread_chunks(max_chunks: int, number: int = DEFAULT_BUDGETS) -> tuple[int, ...]:
    """Return at most ``number`` chunk counts, evenly spread from 1 to ``max_chunks``.

    >>> spread_chunks(9)
    (1, 3, 5, 7, 9)
    """
    if max_chunks <= number:
        return tuple(range(1, max_chunks + 1))
    steps = number - 1
    return tuple(1 + (i * (max_chunks - 1) + steps // 2) // steps for i in range(number))


@dataclass(frozen=True)
class SamplingPlan:
    """Number of samples and the way they are drawn."""

    samples: int = 4  # per problem
    temperature: float = 0.6  # 0 is greedy
    seed: int = 0
    forced_answer_tokens: int = 0  # length of an answer sampled when the budget is spent; 0: none
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def sampling(self, seed: int) -> Sampling:
        """Return the parameters of a sample with a seed."""
        cut = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        return Sampling(self.temperature, seed, **cut)  # type: ignore[arg-type]  # of mixed types

    def __post_init__(self) -> None:
        for name, value, fits, allowed in (
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top-k", self.top_k, self.top_k >= 0, "0 for all tokens, or more"),
            ("min-p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
        ):
            if not fits:
                raise ConfigError(f"--{name} must be {allowed}, got {value}")
        if not self.temperature and (self.top_p, self.top_k, self.min_p) != (1.0, 0, 0.0):
            raise ConfigError(
                "--temperature 0 takes the most probable token, so --top-p, --top-k and --min-p "
                "have no effect: leave them out"
            )
        if self.samples < 1:
            raise ConfigError(f"samples must be at least 1, got {self.samples}")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be at least 0, got {self.temperature}")


@dataclass(frozen=True)
class Setting:
    """A model and a mode, sampled at the largest budget only.

    Example: ``Setting("toy", "delethink", ChunkSpec(90, 45, 9, 0), (90, 180, 270, 360, 450))``.
    """

    model: str
    mode: Mode
    spec: ChunkSpec  # chunk sizes at the largest budget
    budgets: tuple[int, ...]  # in tokens, rising; the last one is the budget of the spec
    label: str | None = None  # name of the model in tables, if not the model itself

    @property
    def name(self) -> str:
        """Name of the model in records and tables."""
        return self.label or self.model

    @cached_property
    def specs(self) -> tuple[ChunkSpec, ...]:
        """Chunk sizes at each budget."""
        return tuple(with_budget(self.spec, budget) for budget in self.budgets)

    @property
    def way(self) -> str:
        """Mode and sizes without the model: ``"delethink C=90 m=45 head=0"``."""
        if self.mode == "longcot":
            return "longcot"
        sizes = f"delethink C={self.spec.context_size} m={self.spec.carryover_size}"
        boundary = "" if self.spec.boundary is None else f" boundary={_policy(self.spec.boundary)}"
        if self.spec.carryover is not None:
            return f"{sizes} carryover={_policy(self.spec.carryover)}{boundary}"
        outside = "+" if self.spec.head_outside else ""
        return f"{sizes} head={self.spec.head_size}{outside}{boundary}"

    @property
    def key(self) -> str:
        """Name in records and tables."""
        return f"{self.name} | {self.way}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for ``settings.json``."""
        return {
            "model": self.model,
            "mode": self.mode,
            "context_size": self.spec.context_size,
            "carryover_size": self.spec.carryover_size,
            "max_chunks": self.spec.max_chunks,
            "head_size": self.spec.head_size,
            "head_outside": self.spec.head_outside,
            "carryover": self.spec.carryover and _policy(self.spec.carryover),
            "boundary": self.spec.boundary and _policy(self.spec.boundary),
            "budgets": list(self.budgets),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], label: str | None = None) -> Setting:
        """Return the setting of ``as_dict``; policies that read text are not bound.

        Raises:
            KeyError, ValueError: a value is missing, or has another type.
            UserError: a policy or a size is unknown here.
        """
        model, mode = get_text(values, "model"), get_text(values, "mode")
        sizes = ("context_size", "carryover_size", "max_chunks")
        given: dict[str, Any] = {name: get_count(values, name) for name in sizes}
        for name in ("carryover", "boundary"):
            text = optional(get_text, {name: None, **values}, name)
            given[name] = None if text is None else _read_policy(name, text)
        if given["carryover"] is None:
            given |= {
                "head_size": get_count(values, "head_size"),
                "head_outside": get_flag(values, "head_outside"),
            }
        budgets = tuple(get_ids(values, "budgets"))
        return cls(model, cast(Mode, mode), ChunkSpec(**given), budgets, label)


def _policy(policy: Any) -> str:
    """Return the name of a carryover or boundary policy with its own arguments."""
    # The repr of a dataclass holds the arguments, without the tokenizer.
    call, class_name = repr(policy), type(policy).__name__
    arguments = call.removeprefix(class_name) if call.startswith(f"{class_name}(") else ""
    return name_of(policy) + arguments.removesuffix("()")


def _read_policy(kind: str, text: str) -> Any:
    """Return the policy of ``_policy``: a name, or a name with arguments."""
    name, arguments = text, {}
    if found := re.fullmatch(r"(.+?)\((.*)\)", text, re.DOTALL):
        name = found[1]
        call = cast(ast.Call, ast.parse(f"_({found[2]})", mode="eval").body)
        arguments = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    group = {"carryover": "delethink.carryovers", "boundary": "delethink.boundaries"}[kind]
    return make(group, {"name": name, "args": arguments})


def _chunk_counts(max_chunks: Sequence[int], boundary: Boundary | None) -> Sequence[int]:
    """Return the values of I to report; a single one is the largest of several."""
    if not max_chunks or min(max_chunks) < 1:
        raise ConfigError(f"max_chunks must be at least 1, got {list(max_chunks)}")
    chunks = sorted(set(max_chunks))
    if boundary is None:
        return chunks if len(max_chunks) > 1 else spread_chunks(chunks[0])
    if len(chunks) > 1:
        raise ConfigError(
            "a trace with early boundaries cannot be cut to a smaller budget, as its last chunk "
            f"has no early boundary: give one max_chunks, got {', '.join(map(str, chunks))}"
        )
    return chunks


def make_settings(
    models: Sequence[str],
    modes: Sequence[str],
    context_sizes: Sequence[int],
    carryover_sizes: Sequence[int] = (),
    max_chunks: Sequence[int] = (5,),
    head_size: int | None = None,
    head_outside: bool = False,
    carryover: Carryover | None = None,
    boundary: Boundary | None = None,
    longcot_cap: int | None = None,
) -> list[Setting]:
    """Return every combination of models, modes and sizes.

    Args:
        models: names or folders.
        modes: ``"delethink"`` and ``"longcot"``. LongCoT gets the budgets of the Delethink
            settings, also if these are not sampled.
        context_sizes: values of C.
        carryover_sizes: values of m; by default half of each C.
        max_chunks: values of I; a single value is the largest, and smaller ones are spread below.
        head_size: size of the head; ``None`` for min(100, m // 4).
        head_outside: carry the head on top of m.
        carryover: policy instead of the head and tail, bound to a tokenizer if necessary.
        boundary: policy that ends chunks early, bound likewise; there is one budget then.
        longcot_cap: upper limit of LongCoT's budgets.

    Raises:
        ConfigError: impossible sizes, or the same setting twice.
    """
    if not models or not modes or not context_sizes:
        raise ConfigError("an evaluation needs a model, a mode and a context size")
    chunks = _chunk_counts(max_chunks, boundary)
    head: dict[str, Any] = {"head_size": head_size, "head_outside": head_outside}
    specs = [
        ChunkSpec(c, m, chunks[-1], **head, carryover=carryover, boundary=boundary)
        for c in context_sizes
        for m in (carryover_sizes or [c // 2])
    ]
    budgets_of = [tuple(replace(spec, max_chunks=i).budget for i in chunks) for spec in specs]
    all_budgets = {budget for budgets in budgets_of for budget in budgets}
    longcot = tuple(sorted({min(b, longcot_cap or b) for b in all_budgets}))
    settings: list[Setting] = []
    for model in models:
        for mode in modes:
            if mode == "delethink":
                pairs = zip(specs, budgets_of, strict=True)
                settings += [Setting(model, "delethink", spec, budgets) for spec, budgets in pairs]
            else:
                spec = ChunkSpec.longcot(longcot[-1])
                settings.append(Setting(model, "longcot", spec, longcot))
    keys = [setting.key for setting in settings]
    if repeated := next((key for key in keys if keys.count(key) > 1), None):
        raise ConfigError(f"the setting {repeated!r} occurs twice; remove the repeated value")
    return settings


def fingerprint(problems: Sequence[Problem]) -> str:
    """Return a digest of prompts and gold answers, in order."""
    text = json.dumps([[problem.prompt, problem.answer] for problem in problems])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
