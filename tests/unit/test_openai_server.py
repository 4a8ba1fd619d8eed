"""The client of OpenAI-compatible servers against servers that misbehave, each in its own way."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from evaluation_fakes import EOS, LetterTokenizer
from openai_servers import KEY, Answer, Served, fail, listening, reply

from delethink import (
    ChunkSpec,
    Completion,
    ConfigError,
    PolicyError,
    Sampling,
    StopReason,
    TraceStop,
    run_rollout,
)
from delethink.engines.openai import OpenAIServer
from delethink.engines.openai_dialect import Dialect
from delethink.output import visible

pytest.importorskip("openai")

TEXT = Dialect(asks="text", answers="text", extends=False)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


def say(text: Any, reason: str = "stop", ids: list[int] | None = None) -> Answer:
    """A sound answer; with token ids where the request asks for them and ``ids`` are given."""

    def answer(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        choice: dict[str, Any] = {"text": text, "finish_reason": reason}
        if ids is not None and asked.get("return_token_ids"):
            choice["token_ids"] = ids[: asked["max_tokens"]]
        reply(handler, 200, json.dumps({"choices": [choice]}).encode())

    return answer


def half(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    reply(handler, 200, b'{"choices": [', Content_Length="500")
    handler.close_connection = True


def nothing(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    handler.close_connection = True


def serving(*answers: Answer, models: Any = None) -> AbstractContextManager[Served]:
    return listening(Served(*answers), models)


def client(served: Served, dialect: Dialect | None = None, **options: Any) -> OpenAIServer:
    """A client that knows the dialect, which is detected elsewhere (``test_openai_dialects``)."""
    given = {"api_key": KEY, "eos_ids": (EOS,), "retries": 2, "checks_options": False, **options}
    server = OpenAIServer(served.url, given.pop("model", None), LetterTokenizer(), **given)
    server.dialect = dialect or Dialect()
    return server


def ask(served: Served, limit: int = 10, **options: Any) -> Completion:
    async def one() -> Completion:
        server = client(served, **options)
        try:
            return await server.generate((5, 6), limit, Sampling(0.6, seed=3))
        finally:
            await server.disconnect()

    return asyncio.run(one())


def test_token_ids_go_in_and_come_out() -> None:
    with serving(say("abc", ids=[97, 98, 99, EOS])) as served:
        done = ask(served)
        assert done.token_ids == (97, 98, 99, EOS)
        assert done.stop is StopReason.EOS
        (asked,) = served.asked
    assert asked["prompt"] == [5, 6]
    assert (asked["seed"], asked["temperature"], asked["top_p"], asked["top_k"]) == (3, 0.6, 1, -1)


def test_text_goes_in_and_comes_out() -> None:
    with serving(say("abcdefghijklmn", "length")) as served:
        done = ask(served, dialect=TEXT)
        assert served.asked[-1]["prompt"] == chr(5) + chr(6)
        assert "top_k" not in served.asked[-1]
    assert done.token_ids == tuple(range(97, 107))  # never more than were asked for
    assert done.stop is StopReason.LENGTH


@pytest.mark.parametrize(
    "bad",
    [
        fail(429, Retry_After="0"),
        fail(500),
        fail(503),
        fail(200, b"<html>garbage"),
        fail(200, b'{"choices": []}'),
        fail(200, b"[1]"),
        half,
        nothing,
        say("", ids=[]),
        say("a", "content_filter", ids=[97]),
    ],
    ids=["429", "500", "503", "garbage", "no choice", "a list", "half", "nothing", "empty", "odd"],
)
def test_what_fails_in_passing_is_tried_again_and_then_an_error_of_the_trace(bad: Answer) -> None:
    sound = say("ab", ids=[97, 98, EOS])
    with serving(bad, bad, sound) as served:
        assert ask(served).token_ids == (97, 98, EOS)
    with serving(bad) as served:
        with pytest.raises(PolicyError, match="after 2 retries"):
            ask(served)
        assert len(served.asked) == 3
    with serving(bad) as served:
        spec, sampling = ChunkSpec(10, 5, 2, 0), Sampling(1.0, 1)
        trace = asyncio.run(run_rollout(client(served), spec, (5,), sampling))
        assert trace.stop is TraceStop.ERROR
        assert "after 2 retries" in str(trace.error)


def test_a_server_that_does_not_answer_in_time_is_given_up() -> None:
    release = threading.Event()

    def hang(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        release.wait(5)
        handler.close_connection = True

    with serving(hang) as served:
        with pytest.raises(PolicyError, match="ReadTimeout"):
            ask(served, timeout_s=0.2, retries=1)
        release.set()


def test_a_refusal_concerns_every_trace_and_is_not_repeated() -> None:
    with serving(fail(400, b"this model's window is 100 tokens")) as served:
        with pytest.raises(ConfigError, match="window is 100 tokens"):
            ask(served)
        assert len(served.asked) == 1
    with serving(fail(401)) as served, pytest.raises(ConfigError, match="key"):
        ask(served)


def test_the_key_shows_nowhere() -> None:
    with serving(fail(500, f"your key is {KEY}".encode())) as served:
        server = client(served)
        with pytest.raises(PolicyError) as caught:
            ask(served)
        with pytest.raises(ConfigError, match="rejects the API key") as refused:
            client(served, api_key=f"{KEY}x")
    assert KEY not in f"{caught.value!r} {refused.value!r} {server!r}"


@pytest.mark.parametrize("status", [400, 401, 500])
@pytest.mark.parametrize("before", [0, 195, 75])
def test_a_server_text_is_cut_after_the_key_is_redacted(status: int, before: int) -> None:
    body = f"{'x' * before} Bearer {KEY} \x1b[2J\u202e".encode()
    with serving(fail(status, body)) as served, pytest.raises((ConfigError, PolicyError)) as caught:
        ask(served)
    assert KEY[:6] not in str(caught.value)
    assert visible(str(caught.value)) == str(caught.value)


@pytest.mark.parametrize("before", ["", "x" * 60])
def test_a_malformed_answer_shows_no_key(before: str) -> None:
    wrong = [json.dumps({"choices": before + KEY}).encode(), json.dumps([before + KEY]).encode()]
    answers = [fail(200, body) for body in wrong]
    answers += [say("a", f"{before} {KEY}\x1b"), say("a", [KEY])]  # type: ignore[arg-type]
    for answer in answers:
        with serving(answer) as served, pytest.raises(PolicyError) as caught:
            ask(served, dialect=TEXT)
        assert KEY[:6] not in str(caught.value)
        assert "malformed response" in str(caught.value)


def test_a_list_of_models_shows_no_key() -> None:
    models = {"data": [{"id": f"{KEY}\x1b[2J"}, {"id": "y"}]}
    with serving(say("a"), models=models) as served, pytest.raises(ConfigError) as caught:
        client(served)
    assert r"lists ***\x1b[2J, y; name one" in str(caught.value)


def test_a_key_in_a_completion_is_redacted_before_its_text_becomes_tokens() -> None:
    with serving(say(f"a {KEY} b")) as served:
        assert ask(served, 100, dialect=TEXT).token_ids == (*map(ord, "a *** b"), EOS)


def test_token_ids_of_a_server_stay_exact() -> None:
    ids = [*map(ord, KEY), EOS]
    with serving(say(KEY, ids=ids)) as served:
        assert ask(served, 100).token_ids == tuple(ids)


def test_each_event_loop_negotiates_while_the_server_fails() -> None:
    with serving(fail(500)) as served:
        server = client(served, retries=0)
        server.dialect = None

        async def both() -> list[BaseException | Completion]:
            calls = [server.generate((5, 6), 3, Sampling(0.6)) for _ in range(2)]
            return await asyncio.gather(*calls, return_exceptions=True)

        for _ in range(2):
            assert [type(outcome) for outcome in asyncio.run(both())] == [PolicyError] * 2


@pytest.mark.parametrize("url", ["http://h\x1b[2J/v1", "http://h:port/v1"])
def test_an_address_that_the_client_refuses_is_a_sentence(url: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a server") as caught:
        OpenAIServer(url, None, LetterTokenizer())
    assert visible(str(caught.value)) == str(caught.value)


def test_the_model_is_found_or_the_ones_there_are_named() -> None:
    with serving(say("a"), models={"data": [{"id": "x"}, {"id": "y"}]}) as served:
        for model in (None, "z"):
            with pytest.raises(ConfigError, match="lists x, y"):
                client(served, model=model)
        assert client(served, model="y").model == "y"
    with serving(say("a")) as served:
        assert (client(served).model, client(served).max_model_tokens) == ("m", 100)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://no.such.host.invalid/v1"])
def test_a_server_that_is_not_there_is_a_sentence(url: str) -> None:
    with pytest.raises(ConfigError, match="cannot be reached"):
        OpenAIServer(url, None, LetterTokenizer(), timeout_s=5)


def test_an_address_that_is_none_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="must start with http"):
        OpenAIServer("localhost:8000", None, LetterTokenizer())


def test_without_a_key_the_one_of_openai_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)  # the server accepts no other key
    with serving(say("a")) as served, pytest.raises(ConfigError, match="rejects the API key"):
        client(served, api_key=None)
