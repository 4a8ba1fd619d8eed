"""``/v1/responses`` with the official client: whole, streamed, and by its stream helper."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("transformers")

import openai
from fake_upstream import FakeUpstream
from made_up_reasoner import EOS, MARK, TOKENIZER, MadeUpReasoner
from served import listening_app, service_of, serving

from delethink import ChunkSpec, Sampling, ScriptedPolicy
from delethink.errors import PolicyError
from delethink.serve.service import ThinkingService
from delethink.serve.settings import ServeSettings
from delethink.serve.thinking import ThinkingModel
from delethink.serve.upstream import UpstreamServer

pytestmark = pytest.mark.integration

SPEC = ChunkSpec(30, 10, 5)


def client(url: str) -> Any:
    return openai.OpenAI(base_url=url, api_key="any", max_retries=0)


def respond(url: str, **options: Any) -> Any:
    given = {"model": "made-up", "input": "Say something.", "temperature": 0, **options}
    return client(url).responses.create(**given)


def thinking_of(response: Any) -> str:
    (item,) = [item for item in response.output if item.type == "reasoning"]
    (part,) = item.content
    assert part.type == "reasoning_text"
    return str(part.text)


@pytest.mark.parametrize("seed", range(2))
def test_a_response_says_the_same_as_a_chat_in_every_way(seed: int) -> None:
    async def by_the_asynchronous_client(url: str) -> tuple[Any, Any]:
        asking = openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0)
        given: dict[str, Any] = {
            "model": "made-up",
            "input": [{"role": "user", "content": "Say something."}],
            "temperature": 0,
        }
        async with asking:
            whole = await asking.responses.create(**given)
            async with asking.responses.stream(**given) as stream:
                return whole, await stream.get_final_response()

    # The stream helper of the client knows responses alone that were not cut.
    with serving(
        service_of(MadeUpReasoner(seed, 3, 4, pieces=[3]), SPEC, answer_tokens=300)
    ) as url:
        chat = client(url).chat.completions.create(
            model="made-up",
            messages=[{"role": "user", "content": "Say something."}],
            temperature=0,
        )
        message = chat.choices[0].message
        first = respond(url)
        whole, helped = asyncio.run(by_the_asynchronous_client(url))
        with client(url).responses.stream(
            model="made-up", input="Say something.", temperature=0
        ) as stream:
            events = list(stream)
            helped_too = stream.get_final_response()
    for each in (first, whole, helped, helped_too):
        assert (thinking_of(each), each.output_text) == (message.reasoning, message.content)
        assert each.status == "completed"
        assert each.usage.output_tokens == chat.usage.completion_tokens
        assert each.usage.input_tokens == chat.usage.prompt_tokens
        details = chat.usage.completion_tokens_details
        assert each.usage.output_tokens_details.reasoning_tokens == details.reasoning_tokens
        assert each.delethink == chat.delethink
    texts = dict.fromkeys(("response.reasoning_text.delta", "response.output_text.delta"), "")
    for event in events:
        if event.type in texts:
            texts[event.type] += event.delta
    assert list(texts.values()) == [message.reasoning, message.content]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event.type.removeprefix("response.") for event in events))
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_text.delta", "output_text.done", "completed"),
    ]


def test_a_cut_answer_is_incomplete_and_hidden_thinking_is_no_item() -> None:
    with serving(service_of(MadeUpReasoner(1, 0, 0), SPEC)) as url:
        cut = respond(url, max_output_tokens=50)
        low = respond(url, reasoning={"effort": "low"})
        hidden = respond(url, extra_body={"include_reasoning": False})
        events = list(respond(url, max_output_tokens=50, stream=True))
        logged = respond(url, max_output_tokens=50, include=["message.output_text.logprobs"])
        none = respond(url, extra_body={"thinking_token_budget": 0}, stream=True)
        (last,) = [event for event in none if event.type == "response.incomplete"]
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert cut.usage.output_tokens == 50
    assert low.usage.output_tokens_details.reasoning_tokens == round(110 / 4)
    assert [item.type for item in hidden.output] == ["message"]
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == cut.output_text
    entries = logged.output[1].content[0].logprobs
    assert len(entries) == 25
    assert "".join(entry.token for entry in entries)[:5] == logged.output_text[:5]
    assert [item.type for item in last.response.output] == ["message"]


def test_a_conversation_goes_on_with_the_items_of_a_response() -> None:
    seen = list[str]()

    def reason(prompt_ids: Any, limit: int) -> Any:
        seen.append(str(TOKENIZER.decode(list(prompt_ids))))
        return (*TOKENIZER(f"ab{MARK}c")["input_ids"], EOS)

    with serving(service_of(ScriptedPolicy(reason, EOS), ChunkSpec(60, 0, 1))) as url:
        first = respond(url, instructions="Be short.")
        call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
        items = [
            {"role": "user", "content": [{"type": "input_text", "text": "Say something."}]},
            *[item.model_dump(exclude_none=True) for item in first.output],
            call,
            {"type": "function_call_output", "call_id": "1", "output": "done"},
            {"role": "developer", "content": "And now?"},
        ]
        second = respond(url, instructions="Be short.", input=items, store=True)
    assert (thinking_of(first), first.output_text, second.store) == ("ab", "c", False)
    assert "Be short." in seen[0]
    for text in ("Be short.", "Say something.", "c", "done", "And now?"):
        assert text in seen[1]
    assert "ab" not in seen[1]  # thinking of earlier turns is no part of a conversation


REFUSED = [
    ({"previous_response_id": "resp_1"}, "previous_response_id", "stores none"),
    ({"conversation": "c"}, "conversation", "stores none"),
    ({"background": True}, "background", "stores none"),
    ({"include": ["file_search_call.results"]}, "include", "message.output_text.logprobs"),
    ({"input": []}, "input", "no message"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type", "item_reference"),
    ({"input": [{"content": "x"}]}, "input.0.role", "role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0", ""),
    ({"tools": [{"type": "web_search"}]}, "tools", "'tools'"),
    ({"text": {"format": {"type": "json_object"}}}, "text.format", "'text.format'"),
    ({"reasoning": {"effort": "much"}}, "reasoning.effort", "much"),
    ({"max_output_tokens": 0}, "max_output_tokens", "0"),
    ({"input": "x" * 2000}, "input", "may have at most"),
    ({"extra_body": {"n": 2}}, "n", "one trace"),
    ({"extra_body": {"temprature": 1}}, "temprature", "temperature"),
]


def test_what_needs_state_or_tools_is_refused_by_name() -> None:
    with serving(service_of(MadeUpReasoner(1, 3, 3), SPEC)) as url:
        for options, param, word in REFUSED:
            with pytest.raises(openai.BadRequestError) as raised:
                respond(url, **options)
            assert raised.value.body["param"] == param, options  # type: ignore[index,call-overload]
            assert word in str(raised.value), options
        assert respond(url).output_text


def test_a_stream_that_fails_says_so_in_its_own_form() -> None:
    with serving(service_of(ScriptedPolicy([PolicyError("out of order")]), SPEC)) as url:
        events = list(respond(url, stream=True))
        body = json.dumps({"input": "x", "stream": True}).encode()
        request = urllib.request.Request(
            f"{url}/responses", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answered:
            lines = answered.read().decode().splitlines()
    kinds = [event.type for event in events]
    assert kinds == ["response.created", "response.in_progress", "error", "response.failed"]
    assert "out of order" in events[2].message
    assert events[3].response.error.message == events[2].message
    assert [line for line in lines if line.startswith("event: ")] == [f"event: {k}" for k in kinds]


def test_a_schema_goes_to_the_server_behind_with_the_answer() -> None:
    upstream = FakeUpstream(MadeUpReasoner(1, 3, 4))
    with listening_app(upstream.app()) as behind:
        server = UpstreamServer(f"{behind}/v1", None, TOKENIZER, eos_ids=(EOS,))
        model = ThinkingModel(server, TOKENIZER, server.max_model_tokens, eos_ids=(EOS,))
        own = ServeSettings("made-up", SPEC, 40, Sampling(0.0))
        with serving(ThinkingService(own, model, server)) as url:
            schema = {"type": "object", "properties": {"a": {"type": "string"}}}
            wanted = {"type": "json_schema", "name": "thing", "schema": schema, "strict": True}
            reply = respond(url, text={"format": wanted})
    asked = [body["response_format"] for body in upstream.asked if "response_format" in body]
    assert asked
    named = {"name": "thing", "schema": schema, "strict": True}
    assert asked[-1] == {"type": "json_schema", "json_schema": named}
    assert reply.text.format.type == "json_schema"
