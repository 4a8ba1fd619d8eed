"""The in-process engine against a plain forward pass of the same weights."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
import torch
from tiny_models import EOS, make_qwen2
from transformers import PreTrainedModel

from delethink.chunking import ChunkSpec
from delethink.engines.transformers import TransformersEngine, draw_tokens
from delethink.errors import WeightSyncError
from delethink.policy import Completion, Sampling
from delethink.rollout import run_rollouts
from delethink.types import StopReason, TokenIds

pytestmark = pytest.mark.integration

VOCABULARY = 16
PROMPTS: list[TokenIds] = [(5, 6, 7), (3,), (4, 8, 9, 10, 11, 12, 13), (2, 2)]
LIMITS = [9, 4, 12, 1]


def make_model(seed: int = 0) -> PreTrainedModel:
    return make_qwen2(seed, vocab_size=VOCABULARY, max_position_embeddings=128)


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model()


def engine_of(model: Any, **options: Any) -> TransformersEngine:
    return TransformersEngine(model, [EOS], pad_id=0, **options)


def ask(
    engine: TransformersEngine,
    samplings: list[Sampling],
    prompts: list[TokenIds] = PROMPTS,
    limits: list[int] = LIMITS,
) -> list[Completion]:
    async def all_at_once() -> list[Completion]:
        calls = zip(prompts, limits, samplings, strict=True)
        return list(await asyncio.gather(*(engine.generate(p, n, s) for p, n, s in calls)))

    return asyncio.run(all_at_once())


@torch.no_grad()
def forward(model: Any, prompt: TokenIds, output: TokenIds, temperature: float) -> torch.Tensor:
    """Log-probs [T, V] of a plain forward pass at the places of ``output``."""
    logits = model(input_ids=torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_tokens_and_log_probs_are_those_of_a_forward_pass(model: Any, temperature: float) -> None:
    completions = ask(engine_of(model), [Sampling(temperature, seed=i) for i in range(4)])
    for prompt, limit, done in zip(PROMPTS, LIMITS, completions, strict=True):
        expected = forward(model, prompt, done.token_ids, temperature or 1.0)
        chosen = expected[range(len(done.token_ids)), list(done.token_ids)]
        torch.testing.assert_close(torch.tensor(done.logprobs), chosen, atol=1e-4, rtol=0)
        if temperature == 0:
            assert done.token_ids == tuple(expected.argmax(-1).tolist())
        ended = done.token_ids[-1] == EOS
        assert done.stop is (StopReason.EOS if ended else StopReason.LENGTH)
        assert EOS not in done.token_ids[:-1]
        assert len(done.token_ids) == limit or ended


def test_the_checkpoints_own_generation_settings_change_nothing(model: Any) -> None:
    samplings = [Sampling(0.7, seed=i) for i in range(4)]
    plain = ask(engine_of(model), samplings)
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.suppress_tokens = [5, 6]
    model.generation_config.num_beams = 2
    assert ask(engine_of(model), samplings) == plain
    assert model.generation_config.num_beams == 2


def test_a_seed_decides_the_tokens_whatever_the_batch(model: Any) -> None:
    samplings = [Sampling(1.0, seed=i) for i in range(4)]
    together = ask(engine_of(model), samplings)
    alone = [
        ask(engine_of(model, seed=9), [s], [p], [n])[0]
        for p, n, s in zip(PROMPTS, LIMITS, samplings, strict=True)
    ]
    in_twos = ask(engine_of(model, max_batch_size=2), samplings)
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.token_ids for c in together] == [c.token_ids for c in in_twos]


def test_a_seed_decides_a_long_output_whatever_its_limit(model: Any) -> None:
    """More tokens than random numbers drawn at once, and a prefix that a smaller budget gives."""
    engine = TransformersEngine(model, [], pad_id=0)
    seeds = [Sampling(1.0, seed=i) for i in range(4)]
    long = ask(engine, seeds, limits=[100, 97, 80, 100])
    short = ask(engine, seeds, limits=[70, 9, 66, 1])
    for whole, start in zip(long, short, strict=True):
        assert whole.token_ids[: len(start.token_ids)] == start.token_ids
        assert len(set(whole.token_ids)) > 3


@pytest.mark.parametrize("token", [0, 1, 100_000, 262_142, 262_143])
def test_every_token_of_a_large_vocabulary_has_its_own_draw(token: int) -> None:
    """In float32 a sum near 1 has room for 2^24 heights: rare tokens would share one."""
    probs = torch.full((2, 262_144), 2.0**-26)
    probs[:, 200_000] += 1 - probs[0].sum()
    heights = probs[0].double().cumsum(-1)
    middle = (heights[token] - 2.0**-27) / heights[-1]
    assert draw_tokens(probs, middle.repeat(2)).tolist() == [token] * 2


def test_a_token_without_probability_is_never_drawn() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]] * 4)
    draws = torch.tensor([0.0, 0.5, 0.5 - 1e-12, 1 - 2.0**-53], dtype=torch.float64)
    assert draw_tokens(probs, draws).tolist() == [1, 3, 1, 3]


def test_without_seeds_the_engines_own_decides(model: Any) -> None:
    def draw(seed: int) -> list[TokenIds]:
        engine = engine_of(model, seed=seed)
        return [c.token_ids for _ in range(3) for c in ask(engine, [Sampling()] * 4)]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_draws_follow_the_distribution(model: Any) -> None:
    n = 4000
    samplings = [Sampling(0.7, seed=i) for i in range(n)]
    done = ask(engine_of(model, max_batch_size=n), samplings, [(5, 6, 7)] * n, [1] * n)
    counts = Counter(c.token_ids[0] for c in done)
    expected = forward(model, (5, 6, 7), (0,), 0.7)[0].exp()
    for token, p in enumerate(expected.tolist()):
        deviation = (p * (1 - p) / n) ** 0.5
        assert abs(counts[token] / n - p) < 5 * deviation + 1e-3


def test_traces_follow_the_rule(model: Any) -> None:
    spec = ChunkSpec(8, 4, 5, head_size=2)
    samplings = [Sampling(1.0, seed=i) for i in range(4)]
    traces = asyncio.run(run_rollouts(engine_of(model), spec, PROMPTS, samplings, 128))
    assert any(len(trace.chunks) > 2 for trace in traces)
    for query, trace in zip(PROMPTS, traces, strict=True):
        said = trace.output_ids
        for i, chunk in enumerate(trace.chunks):
            before = said[: sum(len(c.output_ids) for c in trace.chunks[:i])]
            carried = before[:2] + before[-2:] if i else ()
            assert chunk.prompt_ids == query + carried
            expected = forward(model, chunk.prompt_ids, chunk.output_ids, 1.0)
            chosen = expected[range(len(chunk.output_ids)), list(chunk.output_ids)]
            torch.testing.assert_close(torch.tensor(chunk.logprobs), chosen, atol=1e-4, rtol=0)


def test_new_weights_are_taken_up_and_counted(model: Any) -> None:
    engine, other = engine_of(model), make_model(seed=1)
    old = ask(engine, [Sampling(0)] * 4)
    engine.update_weights(other.state_dict(), version=3)
    new = ask(engine, [Sampling(0)] * 4)
    assert [c.token_ids for c in new] != [c.token_ids for c in old]
    assert [c.token_ids for c in new] == [
        c.token_ids for c in ask(engine_of(other), [Sampling(0)] * 4)
    ]
    assert {c.policy_version for c in old} == {0}
    assert {c.policy_version for c in new} == {3}


def test_shared_weights_are_in_force_at_once(model: Any) -> None:
    engine = engine_of(model)
    with torch.no_grad():
        for mine, new in zip(model.parameters(), make_model(1).parameters(), strict=True):
            mine.copy_(new)
    engine.update_weights(model.state_dict(), version=1)
    expected = ask(engine_of(make_model(1)), [Sampling(0)] * 4)
    assert [c.token_ids for c in ask(engine, [Sampling(0)] * 4)] == [c.token_ids for c in expected]


def test_weights_that_do_not_fit_are_refused(model: Any) -> None:
    with pytest.raises(WeightSyncError, match="refused the new weights"):
        engine_of(model).update_weights({"nonsense": torch.zeros(1)}, version=1)


def test_the_model_is_left_in_the_mode_it_was_in(model: Any) -> None:
    model.train()
    ask(engine_of(model), [Sampling()] * 4)
    assert model.training


def test_a_broken_model_fails_the_requests_and_not_the_loop(model: Any) -> None:
    engine = engine_of(model)
    traces = asyncio.run(
        run_rollouts(engine, ChunkSpec(8, 4, 2, 0), [(99,), (98,)], [Sampling()] * 2)
    )
    assert all("IndexError" in (trace.error or "") for trace in traces)


def test_metrics_count_what_was_decoded_since_they_were_taken(model: Any) -> None:
    engine = engine_of(model, max_batch_size=2)
    assert engine.take_metrics() == {"engine/chunks": 0}
    completions = ask(engine, [Sampling(seed=i) for i in range(4)])
    metrics = engine.take_metrics()
    assert (metrics["engine/chunks"], metrics["engine/batch_occupancy"]) == (4, 2)
    assert metrics["engine/tokens_per_second"] > 0
    assert sum(len(completion.token_ids) for completion in completions) > 0
    assert engine.take_metrics() == {"engine/chunks": 0}


def test_streamed_tokens_are_those_of_the_completion(model: Any) -> None:
    samplings = [Sampling(0.7, seed=i) for i in range(4)]
    expected = ask(engine_of(model), samplings)
    engine, heard = engine_of(model), [list[tuple[int, float]]() for _ in PROMPTS]

    async def all_at_once() -> list[Completion]:
        def listener(row: int) -> Any:
            return lambda ids, logprobs: heard[row].extend(zip(ids, logprobs, strict=True))

        calls = enumerate(zip(PROMPTS, LIMITS, samplings, strict=True))
        return list(
            await asyncio.gather(*(engine.stream(*call, listener(row)) for row, call in calls))
        )

    completions = asyncio.run(all_at_once())
    assert [done.token_ids for done in completions] == [done.token_ids for done in expected]
    for said, done in zip(heard, completions, strict=True):
        assert said == list(zip(done.token_ids, done.logprobs, strict=True))


def test_a_listener_that_leaves_stops_its_row_alone(model: Any) -> None:
    engine, heard = engine_of(model), list[int]()

    def leave(ids: TokenIds, logprobs: Any) -> None:
        if len(heard) == 3:
            raise asyncio.CancelledError
        heard.extend(ids)

    async def both() -> list[Any]:
        calls = (
            engine.stream((5, 6), 40, Sampling(1.0, seed=11), leave),
            engine.generate((5, 6, 7), 9, Sampling(0.0)),
        )
        return list(await asyncio.gather(*calls, return_exceptions=True))

    left, other = asyncio.run(both())
    assert isinstance(left, asyncio.CancelledError)
    assert len(heard) == 3
    (alone,) = ask(engine_of(model), [Sampling(0.0)], [(5, 6, 7)], [9])
    assert other.token_ids == alone.token_ids
    assert engine.take_metrics()["engine/tokens_per_second"] > 0
