"""Seeded model without weights for tests of evaluations."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from typing import Any

from delethink import Completion, Problem, Sampling, StopReason, TokenIds
from delethink.evaluation.models import LoadedModel
from delethink.evaluation.run import ProblemSet
from delethink.types import Attempt

EOS = 1


class LetterTokenizer:
    """One token per letter; EOS is a special token."""

    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, conversation: Any, **_: Any) -> Any:
        raise NotImplementedError

    def decode(self, token_ids: Any, **_: Any) -> str:
        return "".join(chr(token) for token in token_ids if token != EOS)


class GuessingPolicy:
    """Samples dots, then the answer 0 or 1, from a generator seeded with seed and prompt."""

    def __init__(self, delay_s: float = 0.0, fails: float = 0.0) -> None:
        self.delay_s = delay_s
        self.fails = fails
        self.in_flight = self.most_in_flight = 0

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.delay_s)
        finally:
            self.in_flight -= 1
        rng = random.Random(f"{sampling.seed} {prompt_ids}")
        if rng.random() < self.fails:
            raise ConnectionError("the engine is gone")
        ids = [ord(".")] * rng.randrange(1, 40) + [ord(c) for c in "</think>" + rng.choice("01")]
        ids = [*ids, EOS][:max_new_tokens]
        stop = StopReason.EOS if ids[-1] == EOS else StopReason.LENGTH
        return Completion(tuple(ids), (0.0,) * len(ids), stop)


def guessing_problems(number: int) -> ProblemSet:
    async def grade(attempt: Attempt) -> float | None:
        return float(attempt.text.partition("</think>")[2] == attempt.problem.answer)

    problems = tuple(Problem(f"question {i}", "1") for i in range(number))
    return ProblemSet("guess", problems, "exact", grade)


def opener(policy: Any) -> Any:
    @contextlib.contextmanager
    def open_model(model: str) -> Iterator[LoadedModel]:
        yield LoadedModel(policy, LetterTokenizer(), None)

    return open_model
