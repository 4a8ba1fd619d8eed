"""The official client against the server: what it sends is understood, and what it reads is whole.

The reasoner is made up, as its every token can be predicted; ``test_serve_command`` has a model.
"""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.request
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("transformers")

import openai
from chat_tokenizers import make_chat_tokenizer
from made_up_reasoner import EOS, MARK, MARK_IDS, TOKENIZER, MadeUpReasoner
from served import service_of, serving

from delethink import ChunkSpec, Completion, Sampling, ScriptedPolicy, StopReason, run_rollout
from delethink.tokenization import message_ids, reward_text

pytestmark = pytest.mark.integration

SPEC = ChunkSpec(30, 10, 5)
MESSAGES: list[Any] = [{"role": "user", "content": "Say something."}]
QUERY = message_ids(TOKENIZER, MESSAGES)


def client(url: str, **options: Any) -> Any:
    return openai.OpenAI(base_url=url, api_key="any", max_retries=0, **options)


def ask(url: str, **options: Any) -> Any:
    given = {"model": "made-up", "messages": MESSAGES, "temperature": 0, **options}
    return client(url).chat.completions.create(**given)


def letters(text: str, *, ends: bool = True) -> tuple[int, ...]:
    return tuple(TOKENIZER(text)["input_ids"]) + ((EOS,) if ends else ())


@pytest.mark.parametrize("seed", range(6))
def test_chat_is_the_rollout_of_the_library(seed: int) -> None:
    policy = MadeUpReasoner(seed, 3, 4, pieces=[3])
    trace = asyncio.run(run_rollout(policy, SPEC, QUERY, Sampling(0.0)))
    with serving(service_of(policy, SPEC)) as url:
        reply = ask(url, extra_body={"return_token_ids": True})
        pieces = list(
            ask(url, stream=True, stream_options={"include_usage": True}, extra_body={"seed": 1})
        )
    (choice,) = reply.choices
    message = choice.message
    assert choice.prompt_token_ids == list(QUERY)
    length = min(len(trace.output_ids), len(choice.token_ids))
    thinking = reply.usage.completion_tokens_details.reasoning_tokens
    assert choice.token_ids[: min(thinking, length)] == list(trace.output_ids[:thinking])[:length]
    assert message.reasoning == message.reasoning_content
    assert isinstance(message.content, str)
    answer = reward_text(TOKENIZER, choice.token_ids[thinking:])
    assert message.content.rstrip("\ufffd") == answer.rstrip("\ufffd")
    assert reply.usage.completion_tokens == len(choice.token_ids)
    # The stream says the same.
    deltas = [piece.choices[0].delta for piece in pieces if piece.choices]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == message.content
    assert "".join(getattr(d, "reasoning", "") or "" for d in deltas) == message.reasoning
    assert pieces[-1].choices == []
    assert pieces[-1].usage == reply.usage
    ends = [piece.choices[0] for piece in pieces[:-1] if piece.choices[0].finish_reason]
    assert [end.finish_reason for end in ends] == [choice.finish_reason]
    assert ends[0].delethink == choice.delethink == reply.delethink


def test_the_asynchronous_client_reads_many_streams_at_once() -> None:
    async def read(asking: Any, number: int) -> tuple[str, str]:
        stream = await asking.chat.completions.create(
            model="made-up",
            messages=[{"role": "user", "content": f"Number {number}."}],
            temperature=0,
            stream=True,
        )
        thinking, content = "", ""
        async for piece in stream:
            delta = piece.choices[0].delta
            thinking += getattr(delta, "reasoning_content", None) or ""
            content += delta.content or ""
        return thinking, content

    async def all_of_them(url: str) -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as asking:
            together = await asyncio.gather(*(read(asking, i) for i in range(60)))
            alone = [await read(asking, i) for i in range(0, 60, 20)]
        assert together[::20] == alone
        return list(together)

    with serving(service_of(MadeUpReasoner(0, 2, 3, pieces=[1, 4]), SPEC)) as url:
        texts = asyncio.run(all_of_them(url))
    assert len({thinking for thinking, _ in texts}) == 60


def test_a_spent_budget_is_answered() -> None:
    policy = MadeUpReasoner(1, 0, 0)  # ends neither thinking nor answer
    with serving(service_of(policy, SPEC)) as url:
        reply = ask(url)
        short = ask(url, extra_body={"thinking_token_budget": 7})
        total = ask(url, max_completion_tokens=50)
        tiny = ask(url, max_tokens=1)
        low = ask(url, reasoning_effort="low")
        sized = ask(
            url,
            extra_body={"delethink": {"context_size": 20, "carryover_size": 5, "max_chunks": 2}},
        )
        tail = ask(url, extra_body={"delethink": {"carryover": {"name": "tail"}}})
        loop = ask(
            url, extra_body={"repetition_detection": {"max_pattern_size": 1, "min_count": 2}}
        )
    assert tail.choices[0].message.reasoning != reply.choices[0].message.reasoning
    assert loop.delethink["stop_reason"] == "loop"
    block = {"stop_reason": "budget", "forced_end": True, "chunks": 5, "boundaries": 4}
    assert reply.delethink.items() >= block.items()
    assert reply.delethink["carried_tokens"] == 40
    assert reply.choices[0].finish_reason == "length"  # of the answer
    assert reply.usage.completion_tokens == 110 + 40
    assert reply.usage.completion_tokens_details.reasoning_tokens == SPEC.budget == 110
    assert short.usage.completion_tokens_details.reasoning_tokens == 7
    assert (total.usage.completion_tokens, tiny.usage.completion_tokens) == (50, 1)
    assert total.usage.completion_tokens_details.reasoning_tokens == 25
    assert low.usage.completion_tokens_details.reasoning_tokens == round(110 / 4)
    assert sized.delethink["chunks"] == 2
    assert sized.usage.completion_tokens_details.reasoning_tokens == 35
    for each in (reply, short, total, tiny, low, sized):
        assert each.choices[0].message.content


def test_choices_seeds_logprobs_and_stop_strings() -> None:
    class Seeded(MadeUpReasoner):
        async def generate(self, prompt_ids: Any, max_new_tokens: int, sampling: Any) -> Completion:
            self._seed = sampling.seed or 0
            return await super().generate(prompt_ids, max_new_tokens, sampling)

    with serving(service_of(Seeded(0, 0, 6), SPEC)) as url:
        three = ask(url, n=3, seed=5, temperature=1)
        again = ask(url, n=3, seed=5, temperature=1)
        pieces = list(ask(url, n=3, seed=5, temperature=1, stream=True))
        one = ask(url, seed=5, temperature=1, logprobs=True, extra_body={"return_token_ids": True})
        cut = ask(url, seed=5, temperature=1, stop=[one.choices[0].message.content[3:6]])
    texts = [(c.message.reasoning, c.message.content) for c in three.choices]
    assert texts == [(c.message.reasoning, c.message.content) for c in again.choices]
    assert len(set(texts)) == 3
    for index, (_, content) in enumerate(texts):
        own = [piece.choices[0] for piece in pieces if piece.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == content
    assert (one.choices[0].message.reasoning, one.choices[0].message.content) == texts[0]
    entries = one.choices[0].logprobs.content
    assert [e.logprob for e in entries] == [-float(t) for t in one.choices[0].token_ids]
    assert cut.choices[0].message.content == one.choices[0].message.content[:3]
    assert cut.choices[0].finish_reason == "stop"


def test_plain_completions_are_one_text() -> None:
    script = [letters(f"ab{MARK}cd")] * 9
    with serving(service_of(ScriptedPolicy(script, EOS))) as url:
        asking = client(url)
        reply = asking.completions.create(model="made-up", prompt="x", logprobs=0)
        two = asking.completions.create(model="made-up", prompt=["x", "y"])
        ids = asking.completions.create(model="made-up", prompt=[5, 6], stop=["b</"])
        pieces = list(asking.completions.create(model="made-up", prompt="x", stream=True))
    assert reply.choices[0].text == f"ab{MARK}cd"
    assert len(reply.choices[0].logprobs.token_logprobs) == len(script[0])
    assert [choice.text for choice in two.choices] == [reply.choices[0].text] * 2
    assert (two.usage.prompt_tokens, ids.usage.prompt_tokens) == (2, 2)
    assert (ids.choices[0].text, ids.choices[0].finish_reason) == ("a", "stop")
    assert ids.choices[0].stop_reason == "b</"
    assert "".join(piece.choices[0].text for piece in pieces) == reply.choices[0].text


def test_an_opening_mark_and_empty_lines_are_no_text() -> None:
    script = [letters(f"<think>\nab{MARK}\n\nc\n")] * 2
    with serving(service_of(ScriptedPolicy(script, EOS), ChunkSpec(60, 0, 1))) as url:
        message = ask(url).choices[0].message
        pieces = list(ask(url, stream=True, stream_options={"continuous_usage_stats": True}))
    assert (message.reasoning, message.content) == ("ab", "c\n")
    deltas = [piece.choices[0].delta for piece in pieces]
    assert "".join(getattr(d, "reasoning", None) or "" for d in deltas) == "ab"
    assert pieces[-1].usage.completion_tokens == len(script[0])


def test_thinking_can_be_hidden_or_shown_in_one_field() -> None:
    policy = ScriptedPolicy(lambda *_: letters(f"ab{MARK}c"), EOS)
    with serving(service_of(policy, reasoning_fields=("reasoning_content",))) as url:
        hidden = ask(url, extra_body={"include_reasoning": False}).choices[0].message
        one = ask(url).choices[0].message
    assert not hasattr(hidden, "reasoning_content")
    assert hidden.content == "c"
    assert one.reasoning_content == "ab"
    assert not hasattr(one, "reasoning")


def test_without_thinking_there_is_one_context_and_no_boundary() -> None:
    template = "{{ messages[-1]['content'] }}"
    template += "{% if enable_thinking is false %}<think></think>{% else %}<think>{% endif %}"
    tokenizer = make_chat_tokenizer(template, marks=["<think>"])
    off = {"chat_template_kwargs": {"enable_thinking": False}, "return_token_ids": True}
    policy = MadeUpReasoner(1, 0, 9, pieces=[2])
    with serving(service_of(policy, SPEC, tokenizer=tokenizer)) as url:
        plain = ask(url, extra_body=off, max_tokens=60)
        none = ask(url, reasoning_effort="none", max_tokens=60)
        on = ask(url, extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    (choice,) = plain.choices
    assert tokenizer.decode(choice.prompt_token_ids).endswith("<think></think>")
    assert choice.token_ids == list(policy.complete(tuple(choice.prompt_token_ids), 60))
    assert (choice.message.reasoning, plain.delethink["chunks"]) == ("", 0)
    assert plain.delethink["stop_reason"] == "none"
    assert not plain.delethink["forced_end"]
    assert none.choices[0].message.content == choice.message.content
    assert on.delethink["chunks"] > 0


def test_models_health_tokens_and_metrics() -> None:
    policy = MadeUpReasoner(1, 0, 0)
    with serving(service_of(policy, SPEC)) as url:
        (card,) = client(url).models.list().data
        assert client(url).models.retrieve("made-up").id == "made-up"
        ask(url)
        base = url.removesuffix("/v1")
        health = get(f"{base}/health")
        tokens = post(f"{base}/tokenize", {"messages": MESSAGES})
        text = post(f"{base}/detokenize", {"tokens": tokens["tokens"]})
        with urllib.request.urlopen(f"{base}/metrics") as response:
            metrics = response.read().decode()
    context = 30 + len(MARK_IDS) + 40
    assert card.max_model_len == 1000 - context + 110 + len(MARK_IDS) + 40
    assert card.delethink["real_window"] == 1000
    assert health == {"status": "ok"}
    assert tokens["tokens"] == list(QUERY)
    assert text["prompt"] == TOKENIZER.decode(QUERY)
    for line in (
        'vllm:generation_tokens_total{model_name="made-up"} 150.0',
        'vllm:request_success_total{finished_reason="length",model_name="made-up"} 1.0',
        'delethink_boundaries_total{model_name="made-up"} 4.0',
        'delethink_carried_tokens_total{model_name="made-up"} 40.0',
        'delethink_forced_ends_total{model_name="made-up"} 1.0',
        'vllm:num_requests_running{model_name="made-up"} 0.0',
    ):
        assert line in metrics


def get(url: str) -> Any:
    with urllib.request.urlopen(url) as response:
        return json.load(response)


def post(url: str, body: Any, **headers: str) -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(url, raw, given, method="POST")
    try:
        with urllib.request.urlopen(request) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"], dict(error.headers)


BAD = {
    "no json": (b"{", 400, "not JSON"),
    "no object": (b"[1]", 400, "must be a JSON object"),
    "deep": (b"[" * 100_000, 400, "levels"),
    "nan": (b'{"temperature": NaN}', 400, "NaN"),
    "no messages": ({}, 400, "the field 'messages' is missing"),
    "empty": ({"messages": []}, 400, "messages"),
    "text": ({"messages": "hi"}, 400, "messages"),
    "role": ({"messages": [{"content": "x"}]}, 400, r"messages.0.role"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "must be a part of the type 'text'",
    ),
    "temperature": ({"messages": MESSAGES, "temperature": "hot"}, 400, "temperature"),
    "limit": ({"messages": MESSAGES, "max_tokens": 0}, 400, "max_tokens"),
    "effort": ({"messages": MESSAGES, "reasoning_effort": "hgih"}, 400, "Did you mean 'high'"),
    "model": ({"messages": MESSAGES, "model": "gpt"}, 404, "this server has 'made-up'"),
    "unknown": ({"messages": MESSAGES, "temprature": 1}, 400, "Did you mean 'temperature'"),
    "tools": ({"messages": MESSAGES, "tools": [{"type": "function"}]}, 400, "'tools' is not supp"),
    "format": (
        {"messages": MESSAGES, "response_format": {"type": "json_object"}},
        400,
        "'response_format' is not supported",
    ),
    "penalty": ({"messages": MESSAGES, "presence_penalty": 1}, 400, "'presence_penalty'"),
    "many": ({"messages": MESSAGES, "n": 17}, 400, "at most 16 traces"),
    "long": (
        {"messages": [{"role": "user", "content": "x" * 2000}]},
        400,
        "may have at most 922: the model takes 1000",
    ),
    "large context": ({"messages": MESSAGES, "delethink": {"context_size": 31}}, 400, "at most 30"),
    "carryover": (
        {"messages": MESSAGES, "delethink": {"carryover_size": 30}},
        400,
        "carryover_size=30",
    ),
    "policy": (
        {"messages": MESSAGES, "delethink": {"carryover": "os:system"}},
        400,
        "unknown carry",
    ),
    "full": ({"messages": MESSAGES, "delethink": {"carryover": "full"}}, 400, "this server allows"),
    "inner": ({"messages": MESSAGES, "delethink": {"chunks": 3}}, 400, "'max_chunks'"),
    "template": (
        {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": False}},
        400,
        "enable_thinking",
    ),
    "stop": ({"messages": MESSAGES, "stop": [""]}, 400, "stop"),
}


@pytest.fixture(scope="module")
def url() -> Any:
    with serving(service_of(MadeUpReasoner(0, 9, 9), SPEC, max_body_bytes=200_000)) as address:
        yield address


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_a_sentence(url: str, name: str) -> None:
    body, status, text = BAD[name]
    answered, error, _ = post(f"{url}/chat/completions", body)
    assert (answered, text in error["message"]) == (status, True), error
    assert set(error) == {"message", "type", "param", "code"}
    assert post(f"{url}/chat/completions", {"messages": MESSAGES})["choices"]


def test_other_bad_requests(url: str) -> None:
    chat = f"{url}/chat/completions"
    assert post(chat, b"x" * 300_000)[0] == 413
    assert post(chat, {"messages": MESSAGES}, **{"Content-Type": "text/plain"})[0] == 415
    assert post(f"{url}/nothing", {})[0] == 404
    assert post(f"{url}/completions", {"prompt": []})[0] == 400
    assert post(f"{url}/completions", {"prompt": [10**9]})[0] == 400
    assert post(f"{url}/completions", {"prompt": "x", "echo": True})[1]["param"] == "echo"
    with pytest.raises(openai.BadRequestError, match="may have at most 922") as caught:
        ask(url, messages=[{"role": "user", "content": "x" * 2000}])
    assert caught.value.code == "context_length_exceeded"
    # What asks for nothing is accepted.
    nothing = {"tools": None, "frequency_penalty": 0, "logit_bias": {}, "user": "me", "n": 1}
    assert post(chat, {"messages": MESSAGES, "tool_choice": "auto", **nothing})["choices"]


def test_keys_are_asked_for() -> None:
    keys = ("a-key-of-this-test", "another-key-of-it")
    with serving(service_of(MadeUpReasoner(0, 9, 9), api_keys=keys)) as url:
        for key in keys:
            asking = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
            assert asking.models.list().data
        with pytest.raises(openai.AuthenticationError, match="needs a key"):
            ask(url)
        assert get(f"{url.removesuffix('/v1')}/health") == {"status": "ok"}


class Gated:
    """Streams a token, waits until it is let go, and counts what was cancelled."""

    def __init__(self) -> None:
        self.started, self.cancelled = threading.Semaphore(0), threading.Semaphore(0)
        self.go = threading.Event()
        self.calls = 0

    async def generate(self, prompt_ids: Any, max_new_tokens: int, sampling: Any) -> Completion:
        raise AssertionError("it streams")

    async def stream(
        self, prompt_ids: Any, limit: int, sampling: Any, on_tokens: Any
    ) -> Completion:
        self.calls += 1
        ids = letters(f"ab{MARK}c")
        on_tokens(ids[:1], (0.0,))
        self.started.release()
        try:
            while not self.go.is_set():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled.release()
            raise
        on_tokens(ids[1:], (0.0,) * (len(ids) - 1))
        return Completion(ids, (0.0,) * len(ids), StopReason.EOS)


def test_a_client_that_leaves_cancels_the_chunk() -> None:
    policy = Gated()
    with serving(service_of(policy)) as url:
        stream = ask(url, stream=True)
        next(iter(stream))
        assert policy.started.acquire(timeout=60)
        stream.close()
        assert policy.cancelled.acquire(timeout=60)
        # One that waits for a whole response, too.
        with pytest.raises(openai.APITimeoutError):
            client(url, timeout=openai.Timeout(60, read=0.3)).chat.completions.create(
                model="made-up",
                messages=MESSAGES,
                extra_headers={"x-stainless-read-timeout": openai.Omit()},
            )
        assert policy.started.acquire(timeout=60)
        assert policy.cancelled.acquire(timeout=60)
        policy.go.set()
        assert ask(url).choices[0].message.content == "c"


def test_the_retry_of_the_client_finds_its_trace() -> None:
    policy = Gated()
    with serving(service_of(policy)) as url:
        patient = openai.OpenAI(
            base_url=url, api_key="any", max_retries=9, timeout=openai.Timeout(60, read=2)
        )
        threading.Timer(3.5, policy.go.set).start()
        reply = patient.chat.completions.create(model="made-up", messages=MESSAGES)
    assert reply.choices[0].message.content == "c"
    assert policy.calls == 1
    assert not policy.cancelled.acquire(blocking=False)


def test_an_idempotency_key_asks_for_the_same_result() -> None:
    policy = Gated()
    policy.go.set()
    with serving(service_of(policy)) as url:
        first = ask(url, extra_headers={"Idempotency-Key": "k1"})
        second = ask(url, extra_headers={"Idempotency-Key": "k1"})
        assert second.choices[0].message == first.choices[0].message
        assert policy.calls == 1
        with pytest.raises(openai.ConflictError, match="another request"):
            ask(url, seed=3, extra_headers={"Idempotency-Key": "k1"})
        ask(url, extra_headers={"Idempotency-Key": "k2"})
        assert policy.calls == 2


def test_a_full_queue_says_when_to_come_back() -> None:
    policy = Gated()
    with serving(service_of(policy, max_traces=1, max_queue=1)) as url:
        streams = [ask(url, stream=True) for _ in range(2)]
        assert policy.started.acquire(timeout=60)
        status, error, headers = post(f"{url}/chat/completions", {"messages": MESSAGES})
        assert (status, error["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        policy.go.set()
        for stream in streams:
            assert "c" in "".join(piece.choices[0].delta.content or "" for piece in stream)


def test_silence_is_filled_with_comments() -> None:
    policy = Gated()
    with serving(service_of(policy, keepalive_s=0.05)) as url:
        body = json.dumps({"messages": MESSAGES, "stream": True}).encode()
        request = urllib.request.Request(
            f"{url}/chat/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            lines = []
            while b": keepalive\n" not in lines:
                lines.append(response.readline())
            policy.go.set()
            rest = response.read()
    assert rest.endswith(b"data: [DONE]\n\n")


def test_a_failed_engine_is_an_error_to_its_client_alone() -> None:
    def line(prompt: Any, limit: int) -> Any:
        if TOKENIZER.decode(prompt).count("bad"):
            return ValueError("broken")
        return letters(f"ab{MARK}c")

    bad: Any = [{"role": "user", "content": "bad"}]
    with serving(service_of(ScriptedPolicy(line, EOS))) as url:
        with pytest.raises(openai.APIStatusError, match="broken") as caught:
            ask(url, messages=bad)
        assert caught.value.status_code == 502
        with pytest.raises(openai.APIError, match="broken"):
            list(ask(url, messages=bad, stream=True))
        assert ask(url).choices[0].message.content == "c"


def test_time_ends_thinking() -> None:
    policy = Gated()

    class Answering(Gated):
        async def stream(self, prompt_ids: Any, limit: int, sampling: Any, on_tokens: Any) -> Any:
            if prompt_ids[-len(MARK_IDS) :] == MARK_IDS:
                on_tokens(letters("yes"), (0.0,) * 4)
                return Completion(letters("yes"), (0.0,) * 4, StopReason.EOS)
            return await super().stream(prompt_ids, limit, sampling, on_tokens)

    policy = Answering()
    with serving(service_of(policy, thinking_time_s=0.2)) as url:
        reply = ask(url)
    assert reply.choices[0].message.content == "yes"
    assert reply.delethink["stop_reason"] == "time"


_TURNS = [
    {"role": "user", "content": "Say something."},
    {"role": "assistant", "content": "ab", "reasoning_content": "cd"},
    {"role": "user", "content": [{"type": "text", "text": "Go on."}]},
]
_QUIET = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "seed": 3, "stop": ["zzz"]}
RECORDED: dict[str, dict[str, Any]] = {  # bodies as the clients send them
    "ai sdk": {
        **_QUIET,
        "messages": [{"role": "system", "content": ""}, *_TURNS],
        "max_tokens": 300,
        "top_p": 0.9,
        "reasoning_effort": "low",
    },
    "ai sdk stream": {
        "messages": _TURNS,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "langchain": {
        **_QUIET,
        "messages": [{"content": "", "role": "system"}, *_TURNS],
        "stream": False,
        "logprobs": True,
        "max_completion_tokens": 60,
        "n": 2,
        "service_tier": "auto",
        "store": False,
    },
    "inspect": {
        **_QUIET,
        "messages": _TURNS,
        "logprobs": True,
        "max_tokens": 600,
        "n": 2,
        "reasoning_effort": "low",
    },
}


@pytest.mark.parametrize("body", RECORDED.values(), ids=RECORDED)
def test_bodies_of_other_clients_are_understood(body: dict[str, Any]) -> None:
    with serving(service_of(MadeUpReasoner(1, 3, 4), SPEC)) as url:
        asked = urllib.request.Request(
            f"{url}/chat/completions",
            json.dumps({"model": "made-up", "temperature": 0, **body}).encode(),
            {"Content-Type": "application/json", "Authorization": "Bearer any"},
        )
        with urllib.request.urlopen(asked, timeout=60) as response:
            said = response.read().decode()
    if body.get("stream"):
        pieces = [json.loads(line[6:]) for line in said.splitlines() if line[:7] == "data: {"]
        assert said.endswith("data: [DONE]\n\n")
        assert pieces[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
        return
    reply = json.loads(said)
    assert [choice["index"] for choice in reply["choices"]] == list(range(body.get("n", 1)))
    for choice in reply["choices"]:
        assert choice["message"]["content"]
        assert choice["message"]["reasoning"]
        assert bool(choice["logprobs"]) == bool(body.get("logprobs"))
