"""A thousand open streams on one process: no event lost, repeated or mixed, and nothing left."""

from __future__ import annotations

import asyncio
import json
import re
import resource
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("transformers")

from made_up_reasoner import EOS, MARK, TOKENIZER
from served import service_of, serving

from delethink import ChunkSpec, Completion, StopReason, TokenIds

pytestmark = [pytest.mark.integration, pytest.mark.slow]

STREAMS = 1000


class Counting:
    """Thinks of the number in its prompt, again and again, once all streams are open."""

    def __init__(self) -> None:
        self.open = 0
        self.all_open: asyncio.Event | None = None

    async def generate(self, prompt_ids: Any, max_new_tokens: int, sampling: Any) -> Completion:
        raise AssertionError("it streams")

    async def stream(self, prompt: TokenIds, limit: int, sampling: Any, on_tokens: Any) -> Any:
        text = TOKENIZER.decode(list(prompt))
        number = re.search(r"<(\d+)>", text)
        assert number is not None
        self.all_open = self.all_open or asyncio.Event()
        self.open += 1
        if self.open == STREAMS:
            self.all_open.set()
        await self.all_open.wait()
        said = f"<{number[1]}>" * 20 + f"{MARK}{number[1]}."
        ids = (*TOKENIZER(said)["input_ids"], EOS)[:limit]
        for start in range(0, len(ids), 3):
            piece = ids[start : start + 3]
            on_tokens(piece, (0.0,) * len(piece))
            await asyncio.sleep(0)
        stop = StopReason.EOS if ids[-1] == EOS else StopReason.LENGTH
        return Completion(ids, (0.0,) * len(ids), stop)


async def read_stream(host: str, port: int, number: int) -> tuple[str, str, bool]:
    """Reads a stream over a connection of its own: thinking, content, whether it ended."""
    message = {"role": "user", "content": f"<{number}>"}
    body = json.dumps({"messages": [message], "stream": True}).encode()
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    raw = (await reader.read()).decode()
    writer.close()
    thinking, content = "", ""
    for line in re.findall(r"^data: (\{.*\})", raw, re.MULTILINE):
        delta = json.loads(line)["choices"][0]["delta"]
        thinking += delta.get("reasoning", "")
        content += delta.get("content", "")
    return thinking, content, "data: [DONE]" in raw


def test_a_thousand_streams_are_whole_and_apart() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 3 * STREAMS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 3 * STREAMS), hard))
    service = service_of(
        Counting(), ChunkSpec(1000, 0, 1), window=9000, max_traces=STREAMS, max_queue=0
    )

    async def everything(host: str, port: int) -> list[tuple[str, str, bool]]:
        return list(await asyncio.gather(*(read_stream(host, port, i) for i in range(STREAMS))))

    with serving(service) as url:
        host, _, port = url.removeprefix("http://").removesuffix("/v1").partition(":")
        said = asyncio.run(everything(host, int(port)))
        for number, (thinking, content, ended) in enumerate(said):
            assert (thinking, content) == (f"<{number}>" * 20, f"{number}.")
            assert ended
        assert (service.admission.running, service.admission.waiting) == (0, 0)
        assert not service.board._tasks
