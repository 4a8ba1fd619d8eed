"""Batches of groups: their problems, replaced groups, and prefetching."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from delethink.chunking import ChunkSpec
from delethink.policy import Completion, Sampling
from delethink.scoring.reward import Reward
from delethink.scoring.scorer import Scorer
from delethink.training.rollouts import Batch, BatchSampler, Group, Prefetch, PromptCursor
from delethink.types import Problem, Score, StopReason, TokenIds

EOS, GROUP = 1, 3


class Letters:
    chat_template = None

    def __call__(self, text: str) -> Any:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, token_ids: Any, **options: Any) -> str:
        return "".join(chr(i) for i in token_ids if i != EOS)


class Answers:
    """An engine that answers A and B in turn to a lower-case prompt, and A to an upper-case one."""

    max_model_tokens = 100

    def __init__(self) -> None:
        self.calls: Counter[TokenIds] = Counter()
        self.seeds: list[int | None] = []

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        await asyncio.sleep(0)
        letter = ord("A") + self.calls[prompt_ids] % 2 * chr(prompt_ids[0]).islower()
        self.calls[prompt_ids] += 1
        self.seeds.append(sampling.seed)
        return Completion((letter, EOS), (-1.0, -1.0), StopReason.EOS)


@pytest.fixture
def scorer() -> Iterator[Scorer]:
    def reward(text: str, answer: str) -> float:
        return float(text == answer)

    with Scorer([Reward("reward", reward)]) as made:
        yield made


def make(scorer: Scorer, prompts: str, rounds: int) -> BatchSampler:
    return BatchSampler(
        Answers(),  # type: ignore[arg-type]  # has no weights
        ChunkSpec(4, 2, 3, 0),
        [Problem(prompt, "A") for prompt in prompts],
        PromptCursor(),
        scorer,
        Letters(),
        1.0,
        GROUP,
        seed=0,
        max_rounds=rounds,
    )


def test_a_batch_takes_the_next_problems_and_its_seeds_from_the_step(scorer: Scorer) -> None:
    sampler = make(scorer, "abcd", 1)
    first, second = (asyncio.run(sampler.start(step, 2)) for step in (0, 1))
    assert first.problems == [0] * GROUP + [1] * GROUP
    assert second.problems == [2] * GROUP + [3] * GROUP
    assert [score.total for score in first.scores] == [1.0, 0.0, 1.0] * 2
    seeds = sampler.engine.seeds  # type: ignore[attr-defined]
    assert len(set(seeds)) == len(seeds)
    again = make(scorer, "xxcd", 1)
    asyncio.run(again.start(1, 2))
    assert again.engine.seeds == seeds[2 * GROUP :]  # type: ignore[attr-defined]


def test_groups_without_signal_are_replaced_and_kept(scorer: Scorer) -> None:
    sampler = make(scorer, "aBCDefg", 3)
    batch = asyncio.run(sampler.start(0, 3))  # B and C first, then D and e, then f in D's place
    assert [group.problem for group in batch.groups] == [0, 5, 4]
    assert [group.problem for group in batch.replaced] == [1, 2, 3]
    assert batch.rounds == 3
    assert all(group.has_signal for group in batch.groups)
    assert sampler.prompts.next == 6


def test_replacing_ends_after_the_last_round(scorer: Scorer) -> None:
    batch = asyncio.run(make(scorer, "ABCDEFG", 3).start(0, 2))
    assert batch.rounds == 3
    assert len(batch.replaced) == 4
    assert not any(group.has_signal for group in batch.groups)


def test_one_round_replaces_no_group(scorer: Scorer) -> None:
    batch = asyncio.run(make(scorer, "ABCD", 1).start(0, 2))
    assert (batch.rounds, batch.replaced) == (1, [])


class Slow:
    """Batches that are done when their gate opens."""

    def __init__(self) -> None:
        self.cursor = PromptCursor()
        self.started: list[int] = []
        self.gates: dict[int, threading.Event] = {}

    def start(self, step: int) -> Any:
        self.started.append(step)
        self.cursor.take(2)
        self.gates[step] = threading.Event()
        return self._make(step)

    async def _make(self, step: int) -> Batch:
        await asyncio.to_thread(self.gates[step].wait, 30)
        if step == 4:
            raise ValueError("the engine is gone")
        return Batch([Group(step, [], [Score(0.0, {})])])


def test_the_next_batch_starts_before_the_trainer_has_this_one() -> None:
    before = set(threading.enumerate())  # other tests leave threads behind
    slow = Slow()
    prefetch = Prefetch(slow.start, slow.cursor.state_dict, 2, 1, last_step=4)
    try:
        threading.Timer(0.05, lambda: slow.gates[0].set()).start()
        assert prefetch.next(0).groups[0].problem == 0
        assert slow.started == [0, 1, 2]
        # The state before the next batch, not after the pending ones.
        assert prefetch.state_dict() == {"next": 2}
        for step in (1, 2):
            slow.gates[step].set()
        assert prefetch.next(1).groups[0].problem == 1
        assert slow.started == [0, 1, 2, 3]
        prefetch.next(2)
        assert slow.started == [0, 1, 2, 3]  # no batch beyond the last step
        assert prefetch.state_dict() == {"next": 6}
    finally:
        for gate in slow.gates.values():
            gate.set()
        prefetch.close()
    assert len(set(threading.enumerate()) - before) < 10


def test_an_error_in_a_prefetched_batch_is_raised_by_next() -> None:
    slow = Slow()
    prefetch = Prefetch(slow.start, slow.cursor.state_dict, 1, 2, last_step=10)
    try:
        threading.Timer(0.05, lambda: [g.set() for g in list(slow.gates.values())]).start()
        prefetch.next(2)
        slow.gates[4].set()
        prefetch.wait()
        with pytest.raises(ValueError, match="the engine is gone"):
            prefetch.next(4)
    finally:
        prefetch.close()
        prefetch.close()


def test_without_prefetching_a_batch_is_sampled_on_demand() -> None:
    slow = Slow()
    prefetch = Prefetch(slow.start, slow.cursor.state_dict, 0, 1, last_step=10)
    threading.Timer(0.05, lambda: slow.gates[0].set()).start()
    prefetch.next(0)
    assert slow.started == [0]
    assert prefetch.state_dict() == {"next": 2}
    prefetch.close()
