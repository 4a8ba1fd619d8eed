"""Log-probs of a server, as training needs them: kept as they are, or refused in a sentence."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest
from openai_servers import KEY, ModelServer, listening

from delethink import ChunkSpec, Completion, ConfigError, Sampling, Trace, TraceStop, run_rollout
from delethink.engines.openai_logprobs import LogprobServer

pytest.importorskip("openai")

Change = Callable[[dict[str, Any], dict[str, Any]], Any]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


def values(number: int) -> list[float]:
    return [-0.25 * (i + 1) for i in range(number)]


def with_logprobs(made: dict[str, Any], asked: dict[str, Any], heat: bool = True) -> Any:
    """Give log-probs where they are asked for; the most probable first token has -0.5/T."""
    if asked.get("logprobs") is not None:
        ids = made["choices"][0]["token_ids"]
        best = -0.5 / ((heat and asked["temperature"]) or 1.0)
        made["choices"][0]["logprobs"] = {
            "token_logprobs": values(len(ids)),
            "top_logprobs": [{"a": best, "b": best - 1}] * len(ids),
        }
    return made


def serve(change: Change = with_logprobs, **habits: Any) -> ModelServer:
    return ModelServer(returns="token_ids", change=change, **habits)


def client(model: ModelServer, **options: Any) -> LogprobServer:
    eos = model.tokenizer.eos_token_id
    given = {"api_key": KEY, "eos_ids": (eos,), "retries": 1, **options}
    return LogprobServer(model.url, None, model.tokenizer, **given)


def query(model: ModelServer) -> tuple[int, ...]:
    return tuple(model.tokenizer("solve: ")["input_ids"])


def ask(model: ModelServer, temperature: float = 1.0, limit: int = 50) -> Completion:
    async def run() -> Completion:
        server = client(model)
        try:
            return await server.generate(query(model), limit, Sampling(temperature, 3))
        finally:
            await server.disconnect()

    with listening(model):
        return asyncio.run(run())


def test_log_probs_are_those_of_the_server() -> None:
    done = ask(serve())
    assert list(done.logprobs) == values(len(done.token_ids))
    assert len(done.token_ids) > 3


def test_a_rollout_keeps_the_log_probs_of_each_chunk() -> None:
    model = serve()

    async def run() -> Trace:
        server = client(model)
        trace = await run_rollout(server, ChunkSpec(6, 2, 9, 0), query(model), Sampling(1.0, 1))
        await server.disconnect()
        return trace

    with listening(model):
        trace = asyncio.run(run())
    assert trace.stop is TraceStop.BUDGET
    assert len(trace.chunks) > 1
    for chunk in trace.chunks:
        assert list(chunk.logprobs) == values(len(chunk.output_ids))


def test_a_stream_has_the_same() -> None:
    model, given = serve(), []

    async def run() -> Completion:
        server = client(model)
        done = await server.stream(
            query(model), 50, Sampling(1.0, 3), lambda ids, logprobs: given.append(list(logprobs))
        )
        await server.disconnect()
        return done

    with listening(model):
        done = asyncio.run(run())
    assert given == [list(done.logprobs)]
    assert any(done.logprobs)


def forgetful(made: dict[str, Any], asked: dict[str, Any]) -> Any:
    made = with_logprobs(made, asked)
    if asked.get("logprobs") is not None:
        made["choices"][0]["logprobs"]["token_logprobs"].pop()
    return made


def broken(made: dict[str, Any], asked: dict[str, Any]) -> Any:
    made = with_logprobs(made, asked)
    if asked.get("logprobs") is not None:
        made["choices"][0]["logprobs"]["token_logprobs"][0] = -math.inf
    return made


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: serve(lambda made, asked: made), "returns no log-probs, which training needs"),
        (lambda: serve(broken), "returns no log-probs, which training needs"),
        (lambda: serve(forgetful), "7 log-probs for 8 tokens"),
        (lambda: ModelServer(), "returns no token ids \\(asks in token ids, gets text back"),
    ],
    ids=["none", "not finite", "one too few", "text"],
)
def test_what_cannot_be_trained_on_is_refused(model: Callable[[], ModelServer], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ask(model())


def raw(made: dict[str, Any], asked: dict[str, Any]) -> Any:
    return with_logprobs(made, asked, heat=False)


def test_log_probs_of_another_temperature_are_refused() -> None:
    with pytest.raises(ConfigError, match="--logprobs-mode processed_logprobs"):
        ask(serve(raw), temperature=0.7)
    assert any(ask(serve(raw), temperature=1.0).logprobs)
    assert any(ask(serve(), temperature=0.7).logprobs)


def test_a_server_without_the_best_log_prob_is_refused_at_a_temperature() -> None:
    def sampled_alone(made: dict[str, Any], asked: dict[str, Any]) -> Any:
        made = with_logprobs(made, asked)
        if asked.get("logprobs") is not None:
            del made["choices"][0]["logprobs"]["top_logprobs"]
        return made

    with pytest.raises(ConfigError, match="returns no log-probs"):
        ask(serve(sampled_alone), temperature=0.7)


def test_the_health_of_a_server_is_known() -> None:
    model = serve()

    async def is_healthy() -> bool:
        healthy = await server.is_healthy()
        await server.disconnect()
        return healthy

    with listening(model):
        server = client(model)
        assert asyncio.run(is_healthy())
    assert not asyncio.run(is_healthy())
