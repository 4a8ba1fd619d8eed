"""The server in front of another one: the same traces, fields passed on, faults survived."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("transformers")

import openai
from fake_upstream import FakeUpstream, fake_upstream
from made_up_reasoner import EOS, MARK_IDS, TOKENIZER, MadeUpReasoner
from openai_servers import ModelServer, fail, listening
from served import serving

from delethink import ChunkSpec, Sampling, run_rollout
from delethink.cli.main import main
from delethink.engines.loading import load_tokenizer
from delethink.serve.service import ThinkingService
from delethink.serve.settings import ServeSettings
from delethink.serve.start import ModelSource, open_service
from delethink.serve.thinking import ThinkingModel
from delethink.serve.upstream import UpstreamServer
from delethink.tokenization import message_ids

pytestmark = pytest.mark.integration

SPEC = ChunkSpec(30, 10, 5)
MESSAGES: list[Any] = [{"role": "user", "content": "Say something."}]
QUERY = message_ids(TOKENIZER, MESSAGES)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


@contextlib.contextmanager
def in_front_of(upstream: FakeUpstream, **settings: Any) -> Iterator[str]:
    server = UpstreamServer(
        upstream.url, None, TOKENIZER, eos_ids=(EOS,), retries=2, checks_options=False
    )

    async def negotiate() -> None:
        await server.negotiate(QUERY)
        await server.disconnect()

    asyncio.run(negotiate())
    upstream.asked.clear()
    model = ThinkingModel(server, TOKENIZER, server.max_model_tokens, eos_ids=(EOS,))
    own = ServeSettings("made-up", SPEC, 40, Sampling(0.0), **settings)
    with serving(ThinkingService(own, model, server)) as url:
        yield url


def ask(url: str, **options: Any) -> Any:
    given = {"model": "made-up", "messages": MESSAGES, "temperature": 0, **options}
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as asking:
        reply = asking.chat.completions.create(**given)
        return list(reply) if options.get("stream") else reply


def wait_for(done: Any) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("seed", range(3))
def test_a_trace_is_that_of_the_library(seed: int) -> None:
    policy = MadeUpReasoner(seed, 2, 3)
    trace = asyncio.run(run_rollout(policy, SPEC, QUERY, Sampling(0.0)))
    with fake_upstream(policy=policy) as upstream, in_front_of(upstream) as url:
        choice = ask(url, extra_body={"return_token_ids": True}).choices[0]
        pieces = ask(url, stream=True)
    shared = min(len(choice.token_ids), len(trace.output_ids))
    assert shared >= 20
    assert choice.token_ids[:shared] == list(trace.output_ids)[:shared]
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert streamed == choice.message.content
    assert all(body["model"] == "real" for body in upstream.asked)
    assert all(body["prompt"][: len(QUERY)] == list(QUERY) for body in upstream.asked)


def test_fields_are_passed_on_and_exactness_is_kept() -> None:
    form = {"type": "json_object"}
    policy = MadeUpReasoner(1, 0, 6)
    with fake_upstream(policy=policy) as upstream, in_front_of(upstream) as url:
        extra = {"repetition_penalty": 1.5, "bad_words": ["x"], "stop_token_ids": [3]}
        ask(url, extra_body=extra, response_format=form)
    *thinking, answer = upstream.asked
    assert thinking
    assert all(body["bad_words"] == ["x"] for body in upstream.asked)
    assert all(body["stop_token_ids"] == [EOS] for body in upstream.asked)
    assert not any("response_format" in body for body in thinking)
    assert answer["response_format"] == form
    assert tuple(answer["prompt"][-len(MARK_IDS) :]) == MARK_IDS


def test_log_probs_are_those_of_the_server_behind() -> None:
    with fake_upstream() as upstream, in_front_of(upstream) as url:
        choice = ask(url, logprobs=True, extra_body={"return_token_ids": True}).choices[0]
        upstream.has_logprobs = False
        with pytest.raises(openai.BadRequestError, match="gives no log-probs"):
            ask(url, logprobs=True)
        assert ask(url).choices[0].message == choice.message
    given = [entry.logprob for entry in choice.logprobs.content]
    assert given == [-float(token) for token in choice.token_ids]


def test_requests_without_thinking_pass_untouched() -> None:
    with fake_upstream() as upstream, in_front_of(upstream) as url:
        off = {"chat_template_kwargs": {"enable_thinking": False}, "anything": [1]}
        reply = ask(url, extra_body=off, tools=[{"type": "function", "function": {"name": "f"}}])
        ask(url, extra_body=off, stream=True)
        with pytest.raises(openai.NotFoundError, match="this server has 'made-up'"):
            ask(url, extra_body=off, model="other")
    assert reply.choices[0].message.content == "untouched"
    first, second = upstream.chats
    assert (first["model"], first["anything"]) == ("real", [1])
    assert first["tools"]
    assert second["stream"]
    assert not upstream.asked


def test_a_client_that_leaves_cancels_the_stream_upstream() -> None:
    with fake_upstream() as upstream, in_front_of(upstream) as url:
        upstream.faults = ["hang"]
        with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as asking:
            stream = asking.chat.completions.create(model="made-up", messages=MESSAGES, stream=True)
            next(iter(stream))
            wait_for(lambda: upstream.asked)
            stream.close()
        wait_for(lambda: upstream.cancelled)
        assert ask(url).choices[0].message.content


@pytest.mark.parametrize(
    ("fault", "is_survived"),
    [
        *((429, True), (500, True), (503, True), ("half", True)),
        *((400, False), ("garbage", False), ("nothing", False)),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_is_survived_or_told(fault: Any, is_survived: bool, stream: bool) -> None:
    with fake_upstream() as upstream, in_front_of(upstream) as url:
        before = ask(url).choices[0].message
        upstream.faults = [fault]
        if is_survived:
            reply = ask(url, stream=stream)
            assert stream or reply.choices[0].message == before
        else:
            with pytest.raises(openai.APIError, match=r"\w+ \w+ \w+"):
                ask(url, stream=stream)
        assert ask(url).choices[0].message == before


def test_health_is_that_of_the_server_behind() -> None:
    with contextlib.ExitStack() as stack:
        inner = stack.enter_context(contextlib.ExitStack())
        upstream = inner.enter_context(fake_upstream())
        url = stack.enter_context(in_front_of(upstream))
        with openai.OpenAI(
            base_url=url.removesuffix("/v1"), api_key="any", max_retries=0
        ) as asking:
            assert asking.get("/health", cast_to=object) == {"status": "ok"}
            inner.close()
            with pytest.raises(openai.InternalServerError) as caught:
                asking.get("/health", cast_to=object)
        assert caught.value.status_code == 503
        with pytest.raises(openai.APIStatusError) as caught:
            ask(url)
        assert caught.value.status_code == 502


@pytest.mark.parametrize("kind", ["chat alone", "small window", "unknown model", "no tokenizer"])
def test_a_server_that_cannot_be_used_is_a_sentence(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = ["-m", "toy", "-C", "90", "--answer-tokens", "16", "--retries", "0"]
    text = {
        "chat alone": "completions",
        "small window": "the model takes 100 tokens, and a context needs 107 besides the query",
        "unknown model": "lists real, not 'other'",
        "no tokenizer": "name its folder or Hugging Face id with -m",
    }[kind]
    with fake_upstream(window=100 if kind == "small window" else 1000) as upstream:
        if kind == "chat alone":
            upstream.faults = [404] * 100
        if kind == "unknown model":
            options += ["--served-model", "other"]
        if kind == "no tokenizer":
            options = options[2:]
        assert main(["serve", "--port", "0", "--base-url", upstream.url, *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert text in lines[-1], lines
    assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize(
    ("habits", "said"),
    [
        ({}, None),
        ({"heeds": ("temperature", "top_p", "seed")}, "it ignores top_k and min_p"),
        ({"heeds": ("temperature", "top_p", "top_k", "min_p")}, "the same seed gives other"),
        ({"takes_fields": False, "strips": False}, "it has no top-k and min-p"),
        ({"refuses_heat": True}, "whether it heeds temperature and seed is not known"),
    ],
    ids=["all heeded", "cuts", "seed", "no fields", "no heat"],
)
def test_options_without_effect_are_said_at_the_start_and_refuse_nothing(
    habits: dict[str, Any], said: str | None
) -> None:
    given = dict(habits)
    refuses_heat = given.pop("refuses_heat", False)
    served = ModelServer(tokenizer=load_tokenizer("toy"), script="10:01</think>1<eos>", **given)
    served.hot, served.adds_bos, served.returns = (6, 14), 0, "token_ids"
    sound, lines = served.handle, list[str]()

    def handle(handler: Any, asked: dict[str, Any]) -> None:
        if refuses_heat and asked["temperature"] > 1:
            fail(400, b"temperature is at most 1")(handler)
        else:
            sound(handler, asked)

    served.handle = handle  # type: ignore[method-assign]
    settings = ServeSettings("toy", ChunkSpec(60, 30, 2), 16)
    listed = {"data": [{"id": "m", "max_model_len": 400}]}
    with listening(served, listed, key=None) as model:
        source = ModelSource("toy", base_url=model.url, retries=0)
        with open_service(source, settings, lines.append):
            pass
    about_options = [line for line in lines if "ignore" in line or "top" in line or "seed" in line]
    assert len(about_options) == (said is not None), lines
    assert said is None or said in about_options[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("debug", [False, True])
def test_a_failed_request_is_one_line_of_the_log(
    stream: bool, debug: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG" if debug else "WARNING", "delethink")
    with fake_upstream() as upstream, in_front_of(upstream) as url:
        upstream.faults = [500] * 3
        with pytest.raises(openai.APIError):
            ask(url, stream=stream)
        address = upstream.url
    records = [record for record in caplog.records if record.name.startswith("delethink.")]
    (record,) = [record for record in records if record.levelname == "WARNING"]
    trace, _, rest = record.getMessage().partition(" failed: ")
    assert re.fullmatch(rf"chatcmpl-[0-9a-f]{{32}}\.0 at {re.escape(address)}", trace)
    assert "HTTP 500" in rest
    assert ("Traceback" in (record.exc_text or "")) is debug


def test_a_stream_that_goes_on_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with fake_upstream() as upstream, in_front_of(upstream) as url:
        upstream.faults = ["half"]
        ask(url, stream=True)
        address = upstream.url
    (text,) = [r.getMessage() for r in caplog.records if r.name.startswith("delethink.")]
    assert re.match(rf"chatcmpl-\w+\.0 at {re.escape(address)} goes on after \d+ tokens", text), (
        text
    )


def test_alternatives_of_tokens_are_refused_and_never_asked_for() -> None:
    with fake_upstream() as upstream, in_front_of(upstream) as url:
        with pytest.raises(openai.BadRequestError, match="'top_logprobs' is not supported"):
            ask(url, logprobs=True, top_logprobs=2)
        assert ask(url, logprobs=True, top_logprobs=0).choices[0].logprobs.content
    assert all("top_logprobs" not in body for body in upstream.asked)
