"""Dialects of OpenAI-compatible servers: each is recognised, said in a line, and read rightly.

The habits are those of public reports; the comments name them.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from chat_tokenizers import END, make_chat_tokenizer
from openai_servers import BOS, KEY, MARK, ModelServer, letters, listening, reply
from tokenizers import AddedToken

from delethink import (
    ChunkSpec,
    Completion,
    ConfigError,
    PolicyError,
    Sampling,
    StopReason,
    TokenIds,
    Trace,
    TraceStop,
    run_rollout,
)
from delethink.engines.openai import OpenAIServer
from delethink.engines.openai_dialect import Dialect, read_answer

pytest.importorskip("openai")

TOKENIZER = letters()
EOS = TOKENIZER.eos_token_id
QUERY = (TOKENIZER.bos_token_id, *TOKENIZER("solve: ")["input_ids"])
SCRIPT = tuple(TOKENIZER(f"ab c{MARK}42{END}", add_special_tokens=False)["input_ids"])
GREEDY, WARM = Sampling(0.0), Sampling(0.6, 3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("delethink.engines.openai_probe._CONFIRM_DELAY_S", 0.001)


@pytest.fixture(autouse=True)
def runner() -> Iterator[None]:
    """One event loop for all clients of a test, as a client opens connections for each."""
    with asyncio.Runner() as Client.runner:
        yield
        for client in Client.opened:
            Client.runner.run(client.server.disconnect())
        Client.opened.clear()


class Client:
    """A client of a server, with the lines that it says."""

    runner: asyncio.Runner
    opened: ClassVar[list[Client]] = []

    def __init__(self, model: ModelServer, **options: Any) -> None:
        self.lines: list[str] = []
        self.opened.append(self)
        given = {"api_key": KEY, "eos_ids": (EOS,), "retries": 2, **options}
        self.server = OpenAIServer(
            model.url, None, model.tokenizer, announce=self.lines.append, **given
        )

    def ask(
        self, limit: int = 50, sampling: Sampling = GREEDY, prompt: TokenIds = QUERY
    ) -> Completion:
        return self.runner.run(self.server.generate(prompt, limit, sampling))

    def rollout(self) -> Trace:
        return self.runner.run(run_rollout(self.server, ChunkSpec(10, 5, 2, 0), QUERY, GREEDY))

    @property
    def said(self) -> str:
        return " | ".join(self.lines)


def ask(model: ModelServer, limit: int = 50, sampling: Sampling = GREEDY) -> Completion:
    with listening(model):
        return Client(model).ask(limit, sampling)


# -- token ids ---------------------------------------------------------------------------------


EXACT = "asks in token ids, gets token ids back: chunk boundaries are exact"
HALF = "asks in token ids, gets text back"
TEXT = "asks in text, gets text back"


@pytest.mark.parametrize(
    ("habits", "line", "asks"),
    [
        ({"returns": "token_ids"}, EXACT, list),  # vLLM since 0.10.2, SGLang
        ({"returns": "tokens"}, EXACT, list),  # vLLM before, return_tokens_as_token_ids
        ({"returns": "content"}, EXACT, list),  # llama.cpp since its pull request 15001
        ({}, HALF, list),  # SGLang before, LiteLLM since its pull request 18011
        ({"takes_fields": False}, HALF, list),  # OpenAI: unknown fields are a 400
        ({"takes_ids": 400, "strips": False}, TEXT, str),  # llama.cpp before 15001
        ({"takes_ids": 500}, TEXT, str),  # LiteLLM issue 17118: code 500
        ({"takes_ids": 501}, TEXT, str),
        ({"takes_ids": 422}, TEXT, str),  # TGI, mlx-lm: a validation error
        ({"takes_ids": 404}, TEXT, str),
        ({"takes_ids": "each"}, TEXT, str),  # each id as a prompt of its own
        ({"takes_ids": "text"}, TEXT, str),  # lmdeploy issue 4186: the list as its text
        ({"takes_ids": 400, "takes_fields": False}, TEXT, str),
        ({"takes_ids": 400, "returns": "content"}, "asks in text, gets token ids back", str),
        ({"takes_ids": 400, "returns": "token_ids"}, "asks in text, gets token ids back", str),
    ],
    ids=str,
)
def test_the_dialect_is_found_and_said(habits: dict[str, Any], line: str, asks: type) -> None:
    with listening(ModelServer(**habits)) as model:
        client = Client(model)
        if habits.get("takes_fields") is False:  # special tokens are lost, which is another test
            model.strips = False
        done = client.ask()
        assert done.token_ids == SCRIPT
        assert done.stop is StopReason.EOS
        assert line in client.lines[0]
        assert type(model.asked[-1]["prompt"]) is asks
        assert model.read[-1] == list(QUERY)  # BOS once, in every dialect
        sent = len(model.asked)
        client.ask()
        assert len(model.asked) == sent + 1  # found once


def test_token_ids_of_a_server_that_crashes_in_passing_are_asked_again() -> None:
    model, crashes = ModelServer(returns="token_ids"), [500, 500, 500, 500]
    sound = model.handle

    def crash(handler: Any, asked: dict[str, Any]) -> None:
        if isinstance(asked["prompt"], list) and crashes:
            reply(handler, crashes.pop(), b"out of memory")
        else:
            sound(handler, asked)

    model.handle = crash  # type: ignore[method-assign]
    with listening(model):
        client = Client(model)
        assert client.ask().token_ids == SCRIPT
        assert EXACT in client.said


def test_a_server_that_counts_no_prompt_tokens_is_asked_in_text() -> None:
    """Nothing shows how it read the ids, and a text cannot be mistaken."""
    with listening(ModelServer(usage=lambda usage: None, strips=False)) as model:
        client = Client(model)
        assert client.ask().token_ids == SCRIPT
        assert isinstance(model.asked[-1]["prompt"], str)
        assert "does not count the tokens of a prompt" in client.said


def test_the_tokens_of_another_model_are_refused() -> None:
    other = letters(marks=("<x>", MARK))
    model = ModelServer(returns="token_ids", script=f"{MARK}{MARK}", strips=False, tokenizer=other)
    with listening(model):
        server = OpenAIServer(model.url, None, TOKENIZER, api_key=KEY, eos_ids=(EOS,))
        with pytest.raises(ConfigError, match="name the model that is served"):
            asyncio.run(server.generate(QUERY, 5, GREEDY))


# -- BOS ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("habits", "query", "expected", "note"),
    [
        ({"adds_bos": 1}, QUERY, QUERY, ""),
        ({"adds_bos": 0}, QUERY, QUERY, ""),  # the query's own is spelled
        ({"adds_bos": 2, "obeys_plain": True}, QUERY, QUERY, ""),
        ({"adds_bos": 2}, QUERY, (QUERY[0], *QUERY), "one <s> too many"),
        ({"adds_bos": 0}, QUERY[1:], QUERY[1:], ""),
        ({"adds_bos": 1, "obeys_plain": True}, QUERY[1:], QUERY[1:], ""),
        ({"adds_bos": 1}, QUERY[1:], QUERY, "one <s> too many"),  # llama.cpp, as its model says
    ],
    ids=["added", "not added", "twice", "always twice", "none", "added to none", "always added"],
)
def test_a_prompt_of_text_begins_with_the_bos_tokens_of_the_query(
    habits: dict[str, Any], query: TokenIds, expected: TokenIds, note: str
) -> None:
    with listening(ModelServer(takes_ids=400, strips=False, **habits)) as model:
        client = Client(model)
        client.ask(prompt=query)
        assert tuple(model.read[-1]) == tuple(expected)
        assert (note in client.said) if note else ("too many" not in client.said)


def test_a_server_that_reads_no_bos_says_so() -> None:
    plain = make_chat_tokenizer(marks=(MARK,))  # knows no <s>
    model = ModelServer(takes_ids=400, strips=False, adds_bos=0)
    model.tokenizer = plain
    with listening(model):
        lines: list[str] = []
        server = OpenAIServer(
            model.url, None, TOKENIZER, api_key=KEY, eos_ids=(EOS,), announce=lines.append
        )
        asyncio.run(server.negotiate(QUERY))
    assert "begins no prompt with <s>" in lines[0]


def test_a_chat_template_around_the_prompt_is_refused() -> None:
    """Ollama issues 5544 and 12636: /v1/completions applies the model's template."""
    with pytest.raises(ConfigError, match="puts a chat template around each prompt"):
        ask(ModelServer(takes_ids=400, wraps=9))


# -- text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [True, False])
def test_a_server_that_strips_the_end_of_thinking_is_refused(fields: bool) -> None:
    """llama.cpp without --special, KoboldCpp issue 1745, TGI."""

    def deaf(made: dict[str, Any], asked: dict[str, Any]) -> Any:
        made["choices"][0]["text"] = made["choices"][0]["text"].replace(MARK, "")
        return made

    model = ModelServer(takes_ids=400, takes_fields=fields, change=deaf)
    with pytest.raises(ConfigError, match="strips </think> from its text"):
        ask(model)


def test_whether_special_tokens_survive_may_stay_unknown() -> None:
    with listening(ModelServer(takes_ids=400, heeds=("temperature",))) as model:
        client = Client(model)
        assert client.ask().token_ids == SCRIPT
        assert "whether it strips </think> is not known" in client.said


def test_a_leading_space_that_is_stripped_is_said() -> None:
    """Issue 1743 of lmdeploy, mistral.rs pull request 2326."""
    spaced = AddedToken(" b", normalized=False)  # the letters have no word of their own
    words = letters()
    words.add_tokens([spaced])
    for skips in (True, False):
        model = ModelServer(takes_ids=400, skips_space=skips, tokenizer=words)
        with listening(model):
            client = Client(model)
            client.ask()
            assert ("strips the space" in client.said) is skips


@pytest.mark.parametrize(
    ("marks", "heeds_fields", "is_lost"),
    [
        ((MARK, BOS), True, False),  # skip_special_tokens=false is heeded, as by vLLM and SGLang
        ((MARK, BOS), False, True),
        (("[/THINK]", BOS), False, True),  # Magistral: KoboldCpp issue 1745
        (("<|END_THINKING|>", BOS), False, True),  # Command A
        (("</seed:think>", BOS), False, True),
        (("</seed:think>", BOS), True, False),
    ],
    ids=str,
)
def test_the_mark_of_the_model_has_to_survive(
    marks: tuple[str, ...], heeds_fields: bool, is_lost: bool
) -> None:
    tokenizer = letters(marks=marks)
    model = ModelServer(takes_ids=400, tokenizer=tokenizer, script=f"ab c{marks[0]}42{END}")

    def strip(made: dict[str, Any], asked: dict[str, Any]) -> Any:
        if not heeds_fields:
            made["choices"][0]["text"] = made["choices"][0]["text"].replace(marks[0], "")
        return made

    model.change = strip
    with listening(model):
        client = Client(model)
        if is_lost:
            with pytest.raises(ConfigError, match=re.escape(f"strips {marks[0]} from its text")):
                client.ask()
        else:
            text = tokenizer.decode(list(client.ask().token_ids))
            assert text == f"ab c{marks[0]}42{END}"


def test_a_mark_of_ordinary_tokens_needs_no_special_ones() -> None:
    """Qwen3 and the distilled R1 models: no server takes </think> for a special token."""
    plain = make_chat_tokenizer(marks=(BOS,), bos_token=BOS)
    with listening(ModelServer(takes_ids=400, tokenizer=plain, adds_bos=1)) as model:
        client = Client(model)
        done = client.ask(prompt=(plain.bos_token_id, *plain("solve: ")["input_ids"]))
        assert plain.decode(list(done.token_ids)) == f"ab c{MARK}42{END}"


def test_the_end_of_an_answer_in_its_text_is_no_second_one() -> None:
    def spell(made: dict[str, Any], asked: dict[str, Any]) -> Any:
        choice = made["choices"][0]
        choice["text"] += END if choice["finish_reason"] == "stop" else ""
        return made

    assert ask(ModelServer(takes_ids=400, change=spell)).token_ids == SCRIPT


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_thinking_in_a_field_of_its_own_is_put_back(key: str) -> None:
    """Since 0.19 vLLM names it reasoning; SGLang, DeepSeek, LiteLLM reasoning_content."""

    def split(made: dict[str, Any], asked: dict[str, Any]) -> Any:
        choice = made["choices"][0]
        thinking, _, answer = choice["text"].partition(MARK)
        choice |= {"text": answer, key: thinking}
        return made

    with listening(ModelServer(takes_ids=400, change=split)) as model:
        client = Client(model)
        assert client.ask().token_ids == SCRIPT
        assert client.ask(3).token_ids == SCRIPT[:3]  # no mark before the answer has begun


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": "ab", "reasoning": None}, "ab"),
        ({"text": "ab", "reasoning": ""}, "ab"),
        ({"text": "ab", "reasoning_content": None}, "ab"),
        ({"text": "a</think>b", "reasoning": "a"}, "a</think>b"),  # the text has both
        ({"text": "", "reasoning": "ab"}, "ab"),
        ({"text": None, "reasoning": "ab"}, "ab"),  # vllm issue 34827: content null
        ({"text": "b", "reasoning": None, "reasoning_content": "a"}, "a</think>b"),
        ({"text": "b", "reasoning": {"a": 1}}, "b"),
        ({"text": "b", "reasoning_details": [{"text": "a"}]}, "b"),  # no known form of it
        ({"text": None, "message": {"content": "b", "reasoning": "a"}}, "a</think>b"),
    ],
    ids=str,
)
def test_fields_of_thinking_are_read_as_far_as_they_are_texts(
    fields: dict[str, Any], expected: str
) -> None:
    response = {"choices": [{"finish_reason": "stop", **fields}]}
    assert read_answer(response).text == expected


@pytest.mark.parametrize(
    "fields",
    [{"text": None}, {}, {"text": 7}, {"text": ["a"]}, {"message": None}, {"message": "a"}],
    ids=str,
)
def test_a_completion_without_a_text_is_malformed(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the text of a completion must be a string"):
        read_answer({"choices": [{"finish_reason": "stop", **fields}]})


def test_the_text_of_a_message_is_read() -> None:
    def chat(made: dict[str, Any], asked: dict[str, Any]) -> Any:
        choice = made["choices"][0]
        choice["message"] = {"content": choice.pop("text"), "role": "assistant"}
        return made

    assert ask(ModelServer(takes_ids=400, change=chat)).token_ids == SCRIPT


def test_a_repeated_prompt_is_removed() -> None:
    """Pipelines of transformers return the full text; echo is the option of the API."""

    def echo(made: dict[str, Any], asked: dict[str, Any]) -> Any:
        made["choices"][0]["text"] = asked["prompt"].removeprefix(BOS) + made["choices"][0]["text"]
        return made

    with listening(ModelServer(takes_ids=400, change=echo)) as model:
        client = Client(model)
        assert client.ask().token_ids == SCRIPT
        assert "repeats the prompt" in client.said
        model.change = lambda made, asked: made
        with pytest.raises(PolicyError, match="does not repeat the prompt any more"):
            client.ask()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab\ufffd", (97, 98)),  # half a character at a boundary
        ("ab\ufffd\ufffd", (97, 98)),
        ("a\ud83db", None),  # half a surrogate pair in JSON
    ],
    ids=["half", "two halves", "surrogate"],
)
def test_half_a_character_becomes_no_wrong_token(text: str, expected: Any) -> None:
    model = ModelServer(takes_ids=400, usage=lambda usage: {**usage, "completion_tokens": 0})
    with listening(model):
        client = Client(model)
        client.ask()

        def cut(made: dict[str, Any], asked: dict[str, Any]) -> Any:
            made["choices"][0] |= {"text": text, "finish_reason": "length"}
            return made

        model.change = cut
        done = client.ask(9)
    own = TOKENIZER.decode(list(done.token_ids))
    assert own == ("ab" if expected else "a\ufffdb")
    assert done.stop is StopReason.LENGTH


@pytest.mark.parametrize(
    ("fields", "stop"),
    [
        ({"text": ""}, StopReason.EOS),
        ({"text": None}, StopReason.EOS),  # token ids alone
        ({"text": "", "finish_reason": "length"}, StopReason.EOS),  # the EOS token is seen
        ({"text": "", "token_ids": [97], "finish_reason": "length"}, None),  # clipped
        ({"text": "", "token_ids": []}, StopReason.EOS),  # EOS, which is counted and not returned
        ({"text": "", "token_ids": [], "finish_reason": "abort"}, StopReason.ABORT),
    ],
    ids=str,
)
def test_token_ids_need_no_text(fields: dict[str, Any], stop: StopReason | None) -> None:
    def empty(made: dict[str, Any], asked: dict[str, Any]) -> Any:
        made["choices"][0] |= fields
        return made

    with listening(ModelServer(returns="token_ids", script=f"ab{END}")) as model:
        client = Client(model)
        client.ask()
        model.change = empty
        if stop is None:
            with pytest.raises(PolicyError, match="after 1 of 50 tokens"):
                client.ask()
        else:
            done = client.ask()
            assert done.stop is stop
            assert done.token_ids[-1:] == (() if stop is StopReason.ABORT else (EOS,))


def test_an_empty_text_is_an_answer_only_if_it_ended() -> None:
    model = ModelServer(takes_ids=400)

    def empty(made: dict[str, Any], asked: dict[str, Any]) -> Any:
        made["choices"][0]["text"] = ""
        return made

    with listening(model):
        client = Client(model)
        client.ask()
        model.change, model.script = empty, END
        done = client.ask()
        assert (tuple(done.token_ids), done.stop) == ((EOS,), StopReason.EOS)
        model.script = f"{MARK}{MARK}{MARK}{END}"
        with pytest.raises(PolicyError, match="special tokens, which the server strips"):
            client.ask(2)


# -- the end of an answer ----------------------------------------------------------------------


def reasons(**names: Any) -> Callable[[str], Any]:
    return lambda reason: names.get(reason, reason)


FINISHES = {
    "eos_token": reasons(stop="eos_token"),  # TGI before its pull request 2344
    "stop_sequence": reasons(stop="stop_sequence"),  # TGI
    "eos": reasons(stop="eos"),  # Together
    "upper": reasons(stop="EOS_TOKEN", length="MAX_TOKENS"),  # TGIS adapters
    "dict": lambda reason: {"type": reason, "matched": 2},  # SGLang's own API
    "enum": lambda reason: f"FinishReason.{reason.upper()}",
    "null": lambda reason: None,  # Azure, KoboldCpp: AIShell issue 350
    "text null": lambda reason: "null",  # KoboldCpp, ai00_server issue 90
    "empty": lambda reason: "",  # ollama issue 4357, SGLang issue 3912
    "missing": lambda reason: "absent",  # SGLang before its pull request 446
    "stop": lambda reason: "stop",  # mlx-vlm before its pull request 1215: always stop
}


@pytest.mark.parametrize("finish", FINISHES.values(), ids=FINISHES)
@pytest.mark.parametrize("returns", ["token_ids", "none"])
def test_every_spelling_of_the_end_is_read(finish: Callable[[str], Any], returns: str) -> None:
    with listening(ModelServer(finish=finish, returns=returns)) as model:
        client = Client(model)
        whole, part = client.ask(), client.ask(3)
    assert (tuple(whole.token_ids), whole.stop) == (SCRIPT, StopReason.EOS)
    assert (tuple(part.token_ids), part.stop) == (SCRIPT[:3], StopReason.LENGTH)


@pytest.mark.parametrize("returns", ["token_ids", "none"])
def test_a_reason_that_goes_missing_fails_the_trace(returns: str) -> None:
    """An lmdeploy server drops it for an aborted request (xtuner pull request 1755)."""
    with listening(ModelServer(returns=returns, script="abcdefgh")) as model:
        client = Client(model)
        client.ask(3)
        model.finish = lambda reason: None
        with pytest.raises(PolicyError, match="no finish_reason"):
            client.ask(20)


def test_a_server_without_reasons_and_counts_is_refused() -> None:
    model = ModelServer(takes_ids=400, finish=lambda reason: None, usage=lambda usage: "absent")
    with pytest.raises(ConfigError, match="neither why an answer ended"):
        ask(model)


@pytest.mark.parametrize("returns", ["token_ids", "none"])
def test_a_chunk_clipped_to_the_window_fails_the_trace(returns: str) -> None:
    """A vLLM server clamps max_tokens to its window; Ollama has 4,096 tokens by default."""
    with listening(ModelServer(returns=returns, script="abcdefgh")) as model:
        client = Client(model)
        with pytest.raises(PolicyError, match="after 8 of 20 tokens: its context is smaller"):
            client.ask(20)


@pytest.mark.parametrize("name", ["abort", "aborted", "cancelled"])
@pytest.mark.parametrize("returns", ["token_ids", "none"])
def test_an_aborted_chunk_aborts_its_trace(name: str, returns: str) -> None:
    """Issue 57082 of vLLM: an abort has status 200."""
    with listening(ModelServer(returns=returns)) as model:
        client = Client(model)
        client.ask()
        model.finish = lambda reason: name
        assert client.rollout().stop is TraceStop.ABORTED


def test_an_eos_token_that_is_not_returned_is_added() -> None:
    def trim(made: dict[str, Any], asked: dict[str, Any]) -> Any:
        choice = made["choices"][0]
        choice["token_ids"] = [i for i in choice["token_ids"] if i != EOS]
        return made

    with listening(ModelServer(returns="token_ids", change=trim)) as model:
        assert Client(model).ask().token_ids == SCRIPT


def test_a_stop_token_of_the_server_itself_ends_the_answer() -> None:
    """The stop_reason of vLLM names it; it need not be one of the tokenizer's."""

    def stop(made: dict[str, Any], asked: dict[str, Any]) -> Any:
        made["choices"][0] |= {"token_ids": [97, 98], "finish_reason": "stop", "stop_reason": 98}
        return made

    model = ModelServer(returns="token_ids", script="ab")
    with listening(model):
        client = Client(model)
        client.ask(2)
        model.change = stop
        done = client.ask(2)
        assert (tuple(done.token_ids), done.stop) == ((97, 98), StopReason.EOS)
        assert client.ask(9).token_ids == (97, 98)


# -- prompts that are cut, and servers that change ------------------------------------------------


@pytest.mark.parametrize("habits", [{"returns": "token_ids"}, {"takes_ids": 400}], ids=str)
def test_a_prompt_that_is_cut_fails_the_trace(habits: dict[str, Any]) -> None:
    """Ollama issue 4967: a long prompt is cut without a word."""
    with listening(ModelServer(**habits)) as model:
        client = Client(model)
        client.ask()
        model.window = 20
        with pytest.raises(PolicyError, match=r"read another prompt|read 20 tokens of a prompt of"):
            client.ask(prompt=QUERY * 5)


def test_a_text_prompt_may_be_tokenized_a_little_differently() -> None:
    with listening(ModelServer(takes_ids=400)) as model:
        client = Client(model)
        client.ask()
        model.wraps = 2
        assert client.ask().token_ids == SCRIPT


def test_a_server_that_is_replaced_in_a_run_fails_the_trace() -> None:
    with listening(ModelServer(returns="token_ids")) as model:
        client = Client(model)
        client.ask()
        model.returns = "none"
        trace = client.rollout()
    assert trace.stop is TraceStop.ERROR
    assert "returns no token ids any more" in str(trace.chunks[-1].error)


@pytest.mark.parametrize("ids", [[1.5], ["7"], [True], "97"], ids=str)
def test_token_ids_that_are_none_are_malformed(ids: Any) -> None:
    def odd(made: dict[str, Any], asked: dict[str, Any]) -> Any:
        made["choices"][0]["token_ids"] = ids
        return made

    with listening(ModelServer(returns="token_ids")) as model:
        client = Client(model)
        client.ask()
        model.change = odd
        with pytest.raises(PolicyError, match="token ids must be a list of whole numbers"):
            client.ask()


def test_more_tokens_than_asked_fail_the_trace() -> None:
    def more(made: dict[str, Any], asked: dict[str, Any]) -> Any:
        made["choices"][0]["token_ids"] = list(SCRIPT)
        return made

    with listening(ModelServer(returns="token_ids")) as model:
        client = Client(model)
        client.ask()
        model.change = more
        with pytest.raises(PolicyError, match="returns 8 tokens, 3 were asked"):
            client.ask(3)


@pytest.mark.parametrize("usage", ["right", "absent"])
@pytest.mark.parametrize("script", ["abcdefghijklmnopqrstuvwxyz", f"abcdefghij{MARK}4{END}"])
def test_a_server_that_ignores_the_limit_fails_the_trace(usage: str, script: str) -> None:
    """A cut answer would be scored as a whole one."""
    model = ModelServer(takes_ids=400, usage=lambda counts: counts if usage == "right" else None)
    model.script = script
    sample = model._sample
    with listening(model):
        client = Client(model)
        client.ask(3)
        model._sample = lambda asked, prompt: sample(  # type: ignore[method-assign]
            {**asked, "max_tokens": 99}, prompt
        )
        with pytest.raises(PolicyError, match=r"returns a text of \d+ tokens, 7 were asked"):
            client.ask(7)


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "model not found", "code": 404}},  # OpenRouter, LiteLLM
        {"object": "error", "message": "model not found", "code": 404},  # runpod issue 57
        {"error": {"message": "model not found", "code": "400"}},
    ],
    ids=["error", "object", "text code"],
)
def test_a_refusal_with_status_200_is_a_refusal(body: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="rejects the request: model not found"):
        ask(ModelServer(change=lambda made, asked: body))


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "overloaded", "code": 429}},
        {"error": "overloaded"},
        {"error": {"message": "overloaded", "type": "api_error", "code": None}},
        {"choices": None, "note": "overloaded"},  # langchain pull request 35236
        {"choices": [], "note": "overloaded"},
        {"choices": [{"text": "a"}, {"text": "b"}], "note": "overloaded"},
    ],
    ids=["429", "text", "no code", "null choices", "no choice", "two choices"],
)
def test_a_failure_with_status_200_is_tried_again(body: dict[str, Any]) -> None:
    with listening(ModelServer(returns="token_ids")) as model:
        client = Client(model)
        client.ask()
        bad = [body, body]
        model.change = lambda made, asked: bad.pop() if bad else made
        assert client.ask().token_ids == SCRIPT
        model.change = lambda made, asked: body
        with pytest.raises(PolicyError, match=r"after 2 retries.*overloaded"):
            client.ask()


def test_a_page_of_a_proxy_is_shown_as_text() -> None:
    page = b"<html><style>b {}</style><h1>413</h1> <b>Request Entity Too Large</b></html>"
    model = ModelServer()
    model.handle = lambda handler, asked: reply(handler, 413, page)  # type: ignore[method-assign]
    with listening(model), pytest.raises(ConfigError, match="413: 413 Request Entity Too Large$"):
        Client(model).ask()


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_not_taken_for_another_dialect(status: int) -> None:
    """llama.cpp answers 503 while it loads the model."""
    model, busy = ModelServer(returns="token_ids"), [status, status]
    sound = model.handle

    def load(handler: Any, asked: dict[str, Any]) -> None:
        if busy:
            reply(handler, busy.pop(), b"Loading model", Retry_After="0")
        else:
            sound(handler, asked)

    model.handle = load  # type: ignore[method-assign]
    with listening(model):
        client = Client(model)
        assert client.ask().token_ids == SCRIPT
        assert EXACT in client.said


def test_calls_that_wait_for_the_dialect_share_its_failure() -> None:
    model, busy = ModelServer(returns="token_ids"), [True]
    sound = model.handle

    def load(handler: Any, asked: dict[str, Any]) -> None:
        if busy:
            model.asked.append(asked)
            reply(handler, 503, b"Loading model")
        else:
            sound(handler, asked)

    model.handle = load  # type: ignore[method-assign]
    with listening(model):
        client = Client(model, retries=0)

        async def all_of(number: int) -> list[Any]:
            calls = [client.server.generate(QUERY, 50, GREEDY) for _ in range(number)]
            return await asyncio.gather(*calls, return_exceptions=True)

        assert {type(each) for each in client.runner.run(all_of(50))} == {PolicyError}
        assert len(model.asked) < 5
        busy.clear()
        assert {each.token_ids for each in client.runner.run(all_of(3))} == {SCRIPT}


def test_a_server_with_chat_alone_is_named() -> None:
    model = ModelServer(takes_ids=404, takes_text=404)
    with pytest.raises(ConfigError, match="One with chat alone cannot be used"):
        ask(model)


# -- options -----------------------------------------------------------------------------------


ALL = ("temperature", "top_p", "top_k", "min_p", "seed", "logit_bias")
DIALECTS = [{"returns": "token_ids"}, {"takes_ids": 400}, {"returns": "content"}]


@pytest.mark.parametrize("habits", DIALECTS, ids=str)
@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p"])
def test_a_cut_that_the_server_ignores_is_refused(habits: dict[str, Any], name: str) -> None:
    """Ollama issue 11325: top_k and min_p have no effect on /v1."""
    cut = replace(WARM, **{name: 20 if name == "top_k" else 0.5})
    heeding = ModelServer(**habits)
    assert ask(heeding, sampling=cut).token_ids == SCRIPT
    assert heeding.asked[-1][name] == getattr(cut, name)
    deaf = ModelServer(**habits, heeds=tuple(each for each in ALL if each != name))
    option = name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"the server ignores --{option}: .*Leave out --{option}"):
        ask(deaf, sampling=cut)


@pytest.mark.parametrize("habits", DIALECTS, ids=str)
@pytest.mark.parametrize(
    ("ignored", "note"),
    [
        ((), ""),
        (("temperature",), "at temperature 0 and 100 are the same"),
        (("seed",), "the same seed gives other answers"),  # LM Studio, omlx issue 640
    ],
    ids=["none", "temperature", "seed"],
)
def test_temperature_and_seed_without_effect_are_said(
    habits: dict[str, Any], ignored: tuple[str, ...], note: str
) -> None:
    with listening(ModelServer(**habits, heeds=tuple(set(ALL) - set(ignored)))) as model:
        client = Client(model)
        client.ask(sampling=WARM)
        assert note in client.said if note else len(client.lines) == 1
        said = len(client.lines)
        client.ask(sampling=Sampling(0.7, 9))
        assert len(client.lines) == said  # once


def test_cached_answers_are_said() -> None:
    """A cache of LiteLLM gives every sample of a problem the same answer."""
    model, known = ModelServer(returns="token_ids"), {}  # type: ignore[var-annotated]

    def cache(made: dict[str, Any], asked: dict[str, Any]) -> Any:
        return known.setdefault((asked["temperature"], asked["max_tokens"]), made)

    model.change = cache
    with listening(model):
        client = Client(model)
        client.ask(sampling=WARM)
        assert "do not depend on the seed, or they are cached" in client.said


def test_a_temperature_above_2_need_not_be_allowed() -> None:
    model = ModelServer(returns="token_ids", heeds=("temperature", "top_k", "seed"))
    sound = model.handle

    def strict(handler: Any, asked: dict[str, Any]) -> None:
        if asked["temperature"] > 2:
            reply(handler, 400, b"temperature is at most 2")
        else:
            sound(handler, asked)

    model.handle = strict  # type: ignore[method-assign]
    with listening(model):
        client = Client(model)
        client.ask(sampling=replace(WARM, top_k=5))
        with pytest.raises(ConfigError, match="ignores --min-p"):
            client.ask(sampling=replace(WARM, min_p=0.1))


def test_a_server_without_the_fields_is_refused_them() -> None:
    model = ModelServer(takes_fields=False, strips=False)
    with pytest.raises(ConfigError, match="leave out --top-k and --min-p"):
        ask(model, sampling=replace(WARM, top_k=5))


# -- cancellation and streams ------------------------------------------------------------------


def test_a_cancelled_call_closes_its_request() -> None:
    model, gone = ModelServer(returns="token_ids"), threading.Event()
    waiting = threading.Event()
    sound = model.handle

    def hold(handler: Any, asked: dict[str, Any]) -> None:
        if asked["max_tokens"] != 77:
            return sound(handler, asked)
        waiting.set()
        handler.connection.settimeout(60)
        if handler.connection.recv(1) == b"":  # the client has closed the connection
            gone.set()
        handler.close_connection = True
        return None

    model.handle = hold  # type: ignore[method-assign]

    async def cancel(server: OpenAIServer) -> None:
        call = asyncio.ensure_future(server.generate(QUERY, 77, GREEDY))
        assert await asyncio.to_thread(waiting.wait, 60)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert call.cancelled()
        assert await asyncio.to_thread(gone.wait, 60)

    with listening(model):
        Client.runner.run(cancel(Client(model).server))


def stream(client: Client, limit: int = 50) -> tuple[Completion, list[tuple[int, ...]]]:
    pieces: list[tuple[int, ...]] = []

    def listen(ids: TokenIds, _: Any) -> None:
        pieces.append(tuple(ids))

    return client.runner.run(client.server.stream(QUERY, limit, GREEDY, listen)), pieces


@pytest.mark.parametrize("habits", [*DIALECTS, {"returns": "tokens"}], ids=str)
def test_a_stream_gives_the_tokens_of_the_completion_in_order(habits: dict[str, Any]) -> None:
    with listening(ModelServer(**habits)) as model:
        client = Client(model)
        for limit in (50, 3):
            done, pieces = stream(client, limit)
            assert done.token_ids == SCRIPT[:limit] == sum(pieces, ())
            assert done.stop is (StopReason.EOS if limit == 50 else StopReason.LENGTH)
            whole = habits.get("returns") == "token_ids"
            assert len(pieces) == (len(SCRIPT[:limit]) if whole else 1)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        ({"error": {"message": "out of memory", "code": 500}}, "out of memory"),  # llama.cpp 14566
        ({"object": "error", "message": "gone"}, "no finish_reason"),
        ([1], "no piece of a completion"),
    ],
    ids=["error", "object", "list"],
)
def test_an_error_inside_a_stream_fails_the_trace(event: Any, text: str) -> None:
    def broken(made: dict[str, Any], asked: dict[str, Any]) -> Any:
        if asked.get("stream"):
            made["choices"][0] |= {"token_ids": [97, 98], "finish_reason": None}
            made["events"] = [event]
        return made

    with listening(ModelServer(returns="token_ids", change=broken)) as model:
        client = Client(model)
        with pytest.raises(PolicyError, match=text):
            stream(client)


def test_the_line_of_a_dialect_names_what_is_lost() -> None:
    assert str(Dialect()) == EXACT
    noted = Dialect(asks="text", answers="text", notes=("it repeats the prompt",))
    assert str(noted).endswith("as exact as text; it repeats the prompt")
    assert json.dumps(str(noted))
