"""HTTP servers on the loopback that speak dialects of OpenAI's completions API.

``Served`` gives prepared answers. ``ModelServer`` is a model of letters behind a real HTTP server:
a script instead of weights, and the habits of one public server or another. It stands in for
servers that cannot be installed here; the habits are those of public bug reports.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from chat_tokenizers import END, make_chat_tokenizer

Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]
KEY = "sk-a-key-that-must-not-show"
BOS, MARK = "<s>", "</think>"


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def fail(status: int, body: bytes = b"no", **headers: str) -> Answer:
    return lambda handler, asked: reply(handler, status, body, **headers)


class Served:
    """A server that gives its answers in turn, the last one for ever."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, Any]] = []
        self.url = ""

    def handle(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        self.asked.append(body)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        answer(handler, body)


@contextmanager
def listening(
    served: Any, models: Any = None, base: str = "/v1", key: str | None = KEY
) -> Iterator[Any]:
    """Run an HTTP server with ``served.handle`` for completions under an address."""
    listed = {"data": [{"id": "m", "max_model_len": 100}]} if models is None else models

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if key is not None and self.headers.get("Authorization") != f"Bearer {key}":
                reply(self, 401, b"no key")
            elif self.path != f"{base}/models" or isinstance(listed, int):
                reply(self, listed if isinstance(listed, int) else 404, b"<html>not found</html>")
            elif isinstance(listed, bytes):
                reply(self, 200, listed)
            else:
                reply(self, 200, json.dumps(listed).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == f"{base}/completions":
                served.handle(self, body)
            else:
                reply(self, 404, b"no such route")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}{base}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def letters(marks: tuple[str, ...] = (MARK, BOS), **options: Any) -> Any:
    """Return a tokenizer of bytes, with special tokens for BOS, EOS and the end of thinking."""
    return make_chat_tokenizer(marks=marks, bos_token=BOS, **options)


@dataclass
class ModelServer:
    """A model of letters with the habits of one server.

    Greedy, it continues every prompt with ``script``; hot and without a cut, with random letters.
    """

    script: str | Callable[[str], str] = f"ab c{MARK}42{END}"  # or made from a prompt
    hot: tuple[int, int] = (40, 90)  # range of the random letters
    tokenizer: Any = field(default_factory=letters)
    takes_ids: int | str = 200  # or a status, "each" (n choices), "text" (reads "[1, 2]")
    takes_text: int = 200
    takes_fields: bool = True  # beyond those of OpenAI
    returns: str = "none"  # sampled ids: "token_ids", "content" or "tokens" of log-probs
    adds_bos: int = 1  # BOS tokens before a text prompt, if it is not told to add none
    obeys_plain: bool = False  # add_special_tokens=false
    wraps: int = 0  # tokens of a chat template around a text prompt
    strips: bool = True  # special tokens in the text
    skips_space: bool = False
    heeds: tuple[str, ...] = ("temperature", "top_p", "top_k", "min_p", "seed", "logit_bias")
    finish: Callable[[str], Any] = lambda reason: reason
    usage: Callable[[dict[str, int]], Any] = lambda usage: usage
    change: Callable[[dict[str, Any], dict[str, Any]], Any] = lambda made, asked: made
    window: int = 10**6
    asked: list[dict[str, Any]] = field(default_factory=list)
    read: list[list[int]] = field(default_factory=list)  # prompts as the model got them
    url: str = ""

    _OWN = ("model", "prompt", "max_tokens", "temperature", "top_p", "seed", "logprobs")
    _STREAM = ("stream", "stream_options", "logit_bias", "echo")

    def handle(self, handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        self.asked.append(asked)
        is_ids = isinstance(asked["prompt"], list)
        status = self.takes_ids if is_ids else self.takes_text
        foreign = set(asked) - {*self._OWN, *self._STREAM}
        if isinstance(status, int) and status != 200:
            return reply(handler, status, b'{"error": {"message": "prompt must be a string"}}')
        if foreign and not self.takes_fields:
            return reply(handler, 400, f"unknown fields {sorted(foreign)}".encode())
        prompt = self._prompt(asked)
        self.read.append(prompt)
        ids = self._sample(asked, prompt)
        made = self._response(asked, prompt, ids)
        if is_ids and self.takes_ids == "each":
            made["choices"] = made["choices"] * len(asked["prompt"])
        made = self.change(made, asked)
        if asked.get("stream"):
            return self._stream(handler, made)
        return reply(handler, 200, json.dumps(made).encode(), Content_Type="application/json")

    def _prompt(self, asked: dict[str, Any]) -> list[int]:
        prompt = asked["prompt"]
        if isinstance(prompt, list) and self.takes_ids != "text":
            return prompt[-self.window :]
        text = str(prompt)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        plain = self.obeys_plain and asked.get("add_special_tokens") is False
        added = 0 if plain else self.adds_bos
        bos = self.tokenizer.bos_token_id
        return [*[bos] * added, *[65] * self.wraps, *ids][-self.window :]

    def _sample(self, asked: dict[str, Any], prompt: list[int]) -> list[int]:
        limit = asked["max_tokens"]
        forced = asked.get("logit_bias") if "logit_bias" in self.heeds else None
        if forced:
            return [int(next(iter(forced)))] * limit
        script = self.script
        if not isinstance(script, str):
            script = script(self.tokenizer.decode(prompt))
        ids: list[int] = self.tokenizer(script, add_special_tokens=False)["input_ids"]
        heat = asked.get("temperature", 1) if "temperature" in self.heeds else 0
        cuts = {"top_k": (1, -1), "top_p": (1e-6, 1), "min_p": (1, 0)}
        is_cut = any(
            name in self.heeds and asked.get(name, off) == strict
            for name, (strict, off) in cuts.items()
        )
        if heat < 2 or is_cut:
            return ids[:limit]
        seed = asked.get("seed") if "seed" in self.heeds else None
        rng = random.Random(seed)
        return [rng.randrange(*self.hot) for _ in range(limit)]

    def _response(self, asked: dict[str, Any], prompt: list[int], ids: list[int]) -> dict[str, Any]:
        eos = self.tokenizer.eos_token_id
        ended = ids[-1:] == [eos]
        shown = ids[:-1] if ended else ids
        strips = self.strips and asked.get("skip_special_tokens") is not False
        text = self.tokenizer.decode(shown, skip_special_tokens=self.strips if strips else False)
        if self.skips_space:
            text = text.lstrip(" ")
        choice: dict[str, Any] = {"index": 0, "text": text, "logprobs": None}
        if (reason := self.finish("stop" if ended else "length")) != "absent":
            choice["finish_reason"] = reason
        if self.returns == "token_ids" and asked.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        if self.returns == "content" and asked.get("logprobs"):
            choice["logprobs"] = {"content": [{"id": i, "token": "", "logprob": 0} for i in ids]}
        if self.returns == "tokens" and asked.get("return_tokens_as_token_ids"):
            names = [f"token_id:{i}" for i in ids]
            choice["logprobs"] = {"tokens": names, "token_logprobs": [0.0] * len(ids)}
        counts = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        made = {"object": "text_completion", "choices": [choice]}
        usage = self.usage(counts)
        return made if usage == "absent" else {**made, "usage": usage}

    @staticmethod
    def _stream(handler: BaseHTTPRequestHandler, made: dict[str, Any]) -> None:
        """Send a response as events, a token at a time."""
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        choice, usage = made["choices"][0], made.get("usage")
        ids = choice.get("token_ids", [])
        events: list[Any] = [
            {"choices": [{"text": "", "token_ids": [i], "finish_reason": None}]} for i in ids
        ]
        events[-1]["choices"][0]["finish_reason"] = choice.get("finish_reason")
        events[0]["choices"][0]["prompt_token_ids"] = choice.get("prompt_token_ids")
        events += made.get("events", [{"choices": [], "usage": usage}])
        for event in [*map(json.dumps, events), "[DONE]"]:
            handler.wfile.write(f"data: {event}\n\n".encode())
        handler.close_connection = True
