"""Sizes that the preflight checks compare: contexts and prompts for each kind of carryover."""

from __future__ import annotations

from typing import Any

import pytest

from delethink.chunking import ChunkSpec
from delethink.registry import make
from delethink.training.preflight import Inputs

QUERY = 15


class Letters:
    """A tokenizer with one token per character."""

    eos_token_id = 0

    def __call__(self, text: str, **options: Any) -> Any:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, token_ids: Any, **options: Any) -> str:
        return "".join(map(chr, token_ids))


def inputs(carryover: Any = None, **sizes: Any) -> Inputs:
    policy = None if carryover is None else make("delethink.carryovers", carryover)
    spec = ChunkSpec(100, 40, 5, carryover=policy, **sizes).bind(Letters())
    return Inputs(None, None, spec, {}, {"train": QUERY, "heldout": QUERY - 1})


@pytest.mark.parametrize(
    ("carryover", "sizes", "context", "prompts"),
    [
        (None, {"head_size": 0}, 100, 5 * (QUERY + 40)),
        (None, {"head_size": 10, "head_outside": True}, 110, 5 * (QUERY + 50)),
        ("tail", {}, 100, 5 * (QUERY + 40)),
        # All thinking of the trace is carried: 100 + 4 * 60 tokens.
        ("full", {}, 340, 5 * (QUERY + 340)),
    ],
)
def test_contexts_and_prompts_hold_the_whole_carryover(
    carryover: Any, sizes: dict[str, Any], context: int, prompts: int
) -> None:
    found = inputs(carryover, **sizes)
    assert found.longest_context == QUERY + context
    assert found.max_prompt_tokens == prompts
    assert found.max_chunks == 5


def test_a_written_carryover_needs_room_for_the_question_and_its_answer() -> None:
    summary = {"name": "summary", "args": {"instruction": "?" * 7, "before": "", "after": ""}}
    found = inputs(summary)
    spec = found.spec
    assert spec.ask is not None
    question, answer = len(spec.ask.prompt_ids), spec.max_written
    assert found.longest_context == QUERY + 100 + question + answer
    assert found.max_chunks == 5 + 4
    assert spec.max_carried is not None
    thinking = 5 * (QUERY + spec.max_carried)
    assert found.max_prompt_tokens == thinking + 4 * (QUERY + 100 + question)


def test_longcot_has_one_context() -> None:
    found = Inputs(None, None, ChunkSpec.longcot(500), {}, {"train": QUERY, "heldout": QUERY})
    assert found.longest_context == QUERY + 500
    assert found.max_prompt_tokens == QUERY
