"""Top-p, top-k and min-p: every engine applies them or refuses them, and training has none."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from tiny_models import make_qwen2

from delethink.chunking import ChunkSpec
from delethink.config import load_recipe
from delethink.engines.transformers import TransformersEngine, cut
from delethink.errors import ConfigError
from delethink.evaluation.settings import SamplingPlan
from delethink.policy import Completion, Sampling
from delethink.rollout import run_rollout
from delethink.types import StopReason

PROBS = [0.05, 0.5, 0.25, 0.15, 0.05]  # ids 1, 2, 3 hold 0.9


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.5}, {1}),
        ({"top_p": 0.51}, {1, 2}),
        ({"top_p": 0.9}, {1, 2, 3}),
        ({"top_p": 1e-9}, {1}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 2, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"min_p": 0.3}, {1, 2, 3}),
        ({"min_p": 0.4}, {1, 2}),
        ({"min_p": 1.0}, {1}),
        # Top-p counts the mass of what top-k and min-p leave.
        ({"top_k": 2, "top_p": 0.7}, {1, 2}),
        ({"top_k": 2, "top_p": 0.6}, {1}),
        ({"min_p": 0.4, "top_p": 0.6}, {1}),
        ({"top_p": 0.5, "temperature": 0.0}, {0, 1, 2, 3, 4}),
    ],
)
def test_the_tokens_left_are_those_of_the_definition(
    options: dict[str, Any], kept: set[int]
) -> None:
    others = [Sampling(), Sampling(top_k=1)]  # rows do not affect each other
    logits = torch.tensor([PROBS] * 3).log()
    left = cut(logits, [others[0], Sampling(**options), others[1]])
    assert {i for i, value in enumerate(left[1].tolist()) if value > -math.inf} == kept
    assert left[0].isfinite().all()
    assert left[2].isfinite().sum() == 1


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.5}])
def test_the_engine_in_process_samples_from_the_cut_distribution(options: dict[str, Any]) -> None:
    model = make_qwen2(0, scale=1.5, vocab_size=16)
    engine = TransformersEngine(model, (1,), 0, seed=0)
    prompt = (3, 4, 5)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[:, -1].float()
    expected = torch.log_softmax(cut(logits, [Sampling(**options)]), dim=-1)[0]

    async def sample(sampling: Sampling) -> list[Completion]:
        seeds = range(64)
        calls = [
            engine.generate(
                prompt,
                1,
                Sampling(
                    1.0, seed, top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p
                ),
            )
            for seed in seeds
        ]
        return list(await asyncio.gather(*calls))

    for done in asyncio.run(sample(Sampling(**options))):
        (token,), (logprob,) = done.token_ids, done.logprobs
        assert logprob == pytest.approx(float(expected[token]), abs=1e-5)
    whole = {done.token_ids[0] for done in asyncio.run(sample(Sampling()))}
    assert not whole <= {i for i, value in enumerate(expected.tolist()) if value > -math.inf}


def test_a_server_gets_it_or_the_option_is_refused() -> None:
    pytest.importorskip("openai")
    from evaluation_fakes import LetterTokenizer

    from delethink.engines.openai_dialect import Dialect, make_request

    def request(dialect: Dialect, **options: Any) -> dict[str, Any]:
        sampling = Sampling(0.6, 1, **options)
        return make_request(dialect, "m", LetterTokenizer(), [1], (5,), 3, sampling).body

    for dialect in (Dialect(), Dialect(asks="text", answers="text")):
        body = request(dialect, top_p=0.9, top_k=20, min_p=0.1)
        assert (body["top_p"], body["top_k"], body["min_p"]) == (0.9, 20, 0.1)
    plain = Dialect(answers="text", extends=False)
    assert request(plain, top_p=0.9)["top_p"] == 0.9
    for options in ({"top_k": 20}, {"min_p": 0.1}):
        with pytest.raises(ConfigError, match="leave out --top-k and --min-p"):
            request(plain, **options)


def test_every_chunk_of_a_trace_is_sampled_with_it() -> None:
    seen = []

    class Policy:
        async def generate(self, prompt_ids: Any, limit: int, sampling: Sampling) -> Completion:
            seen.append((sampling.top_p, sampling.top_k, sampling.min_p))
            return Completion((5,) * limit, (0.0,) * limit, StopReason.LENGTH)

    plan = SamplingPlan(top_p=0.9, top_k=20, min_p=0.1)
    spec = ChunkSpec(8, 4, 3, head_size=0)
    asyncio.run(run_rollout(Policy(), spec, (7,), plan.sampling(3), 100))
    assert seen == [(0.9, 20, 0.1)] * 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"top_p": 0}, "--top-p must be above 0 and at most 1, got 0"),
        ({"top_p": 1.5}, "--top-p must be above 0"),
        ({"top_p": math.nan}, "--top-p must be above 0"),
        ({"top_k": -1}, "--top-k must be 0 for all tokens, or more, got -1"),
        ({"min_p": -0.1}, "--min-p must be from 0 to 1"),
        ({"temperature": 0, "top_p": 0.9}, "--temperature 0 takes the most probable token"),
    ],
)
def test_impossible_values_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingPlan(**options)
    assert text in str(caught.value)


@pytest.mark.parametrize("key", ["top_p", "top_k", "min_p"])
def test_training_says_why_it_has_none(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is not a key of training, which samples from"):
        load_recipe("recipes/quickstart/recipe.yaml", [f"training.{key}=0.9"])
