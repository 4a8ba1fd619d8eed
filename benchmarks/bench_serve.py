"""Measures ``delethink serve``: chaos, engine steps, memory over the chunks, cost of a token.

    python benchmarks/bench_serve.py --parts chaos,steps,memory,tokens,first

"chaos" counts what becomes of requests when the server behind fails and clients misbehave. "steps"
compares the forward passes of traces through the server with those through the library. "memory" is
the resident memory of server and engine after traces of 2 and of 60 chunks. "tokens" is processor
time of the server for a token, with the socket left out, and the delay of the first token. "first"
asks vLLM's own server, and this one with vLLM in a Ray worker, for the same streams.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from delethink.cli.process import set_up_process

set_up_process()
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import openai  # noqa: E402
import psutil  # noqa: E402
import serve_chaos  # noqa: E402
import torch  # noqa: E402
from made_up_reasoner import EOS, LETTERS, MARK_IDS  # noqa: E402
from serve_chaos import ANSWERED, BAD_KINDS, GOOD_KINDS, LEFT, LOST, TOLD, WRONG  # noqa: E402
from serve_command import serve_command  # noqa: E402
from served import service_of, serving  # noqa: E402
from tiny_models import make_qwen2  # noqa: E402
from vllm_server import KEY, vllm_server  # noqa: E402

from delethink import ChunkSpec, Completion, Sampling, StopReason, run_rollouts  # noqa: E402
from delethink.engines.loading import load_tokenizer  # noqa: E402
from delethink.engines.transformers import TransformersEngine  # noqa: E402
from delethink.serve.app import make_app  # noqa: E402
from delethink.serve.local_engine import EngineThread  # noqa: E402
from delethink.serve.service import ThinkingService  # noqa: E402
from delethink.serve.settings import ServeSettings  # noqa: E402
from delethink.serve.thinking import ThinkingModel  # noqa: E402
from delethink.tokenization import encode, message_ids  # noqa: E402

MESSAGES: Any = [{"role": "user", "content": "99:010101010101"}]
TRACES, ANSWER_TOKENS = 8, 16
CHUNKED = ChunkSpec(512, 256, 4, 0)


# -- chaos -------------------------------------------------------------------------------------


def print_chaos(requests: int) -> None:
    """Print what became of the requests of each scenario."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    openai._base_client.INITIAL_RETRY_DELAY = 0.01  # faults are short
    logging.disable(logging.CRITICAL)  # every fault would be told
    columns = ["scenario", "requests", ANSWERED, TOLD, LEFT, LOST, WRONG, "left over", "next"]
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    good, bad = list(GOOD_KINDS), list(BAD_KINDS)
    with serve_chaos.scene() as made:
        chaos = ("429", "500", "503", "400", "garbage", "half", "nothing")
        for fault in chaos:
            made.upstream.faults = [int(fault) if fault.isdigit() else fault] * 10
            _print_row(made, f"upstream: {fault}", good * 10)
        made.upstream.faults = serve_chaos.shuffled_faults(0, 1000, 0.4)
        _print_row(made, "upstream: all of these", good * 30)
        with serve_chaos.restarting(made):
            counted = asyncio.run(serve_chaos.crowd(made, good * 20))
        _print_row(made, f"upstream restarts {made.restarts} times", [], counted)
        for kind in bad:
            _print_row(made, f"clients: {kind}", [kind] * 50)
        _print_row(made, "clients: 100 MB", ["100 MB", "100 MB in chunks"] * 2)
        _print_row(made, "clients: all of these, and good ones", (good + bad) * 10)
    with serve_chaos.scene(max_traces=8, max_queue=100) as made:
        _print_row(made, f"{requests} at once, queue of 100", ["whole", "stream"] * (requests // 2))
    with serve_chaos.scene(max_traces=requests, max_queue=0) as made:
        _print_row(made, f"{requests} streams at once", ["stream"] * requests)


def _print_row(
    made: serve_chaos.Scene,
    name: str,
    kinds: list[str],
    counted: Counter[tuple[str, str]] | None = None,
) -> None:
    if counted is None:
        counted = asyncio.run(serve_chaos.crowd(made, kinds))
    made.upstream.faults.clear()
    left = sum(made.settle().values())
    outcomes = Counter[str]()
    for (_, outcome), number in counted.items():
        outcomes[outcome] += number
    after = asyncio.run(serve_chaos.ask(made, serve_chaos.PROMPTS[0], stream=True))[0]
    made.settle()
    columns = [sum(outcomes.values()), *(outcomes[o] for o in (ANSWERED, TOLD, LEFT, LOST, WRONG))]
    print("| " + " | ".join(map(str, [name, *columns, left, after])) + " |", flush=True)


# -- engine steps ------------------------------------------------------------------------------


def print_steps() -> None:
    """Print the forward passes of greedy traces through the library and through the server."""
    tokenizer, model, ends = _endless_model()
    engine = TransformersEngine(model, ends, int(tokenizer.pad_token_id))
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    model.register_forward_pre_hook(count)
    queries = [
        message_ids(tokenizer, [{"role": "user", "content": f"{i:02d}:0101"}])
        for i in range(TRACES)
    ]
    mark = encode(tokenizer, "</think>")

    async def by_library() -> int:
        traces = await run_rollouts(engine, CHUNKED, queries, [Sampling(0.0)] * TRACES)
        last = [trace.chunks[-1] for trace in traces]
        prompts = [chunk.prompt_ids + chunk.output_ids + mark for chunk in last]
        answers = await asyncio.gather(
            *(engine.generate(p, ANSWER_TOKENS, Sampling(0.0)) for p in prompts)
        )
        outputs = [
            len(t.output_ids) + len(a.token_ids) for t, a in zip(traces, answers, strict=True)
        ]
        return sum(outputs)

    async def by_server(url: str, stream: bool) -> int:
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as asking:

            async def ask(number: int) -> int:
                reply = await asking.chat.completions.create(
                    model="endless",
                    messages=[{"role": "user", "content": f"{number:02d}:0101"}],
                    temperature=0,
                    stream=stream,
                    **({"stream_options": {"include_usage": True}} if stream else {}),
                )
                if not stream:
                    return int(reply.usage.completion_tokens)
                return [piece async for piece in reply][-1].usage.completion_tokens

            return sum(await asyncio.gather(*(ask(i) for i in range(TRACES))))

    tokens = asyncio.run(by_library())
    expected, steps = steps, 0
    print(f"library: {tokens} tokens in {expected} steps")
    thread = EngineThread(engine, ends)
    settings = ServeSettings("endless", CHUNKED, ANSWER_TOKENS, Sampling(0.0))
    served = ThinkingModel(thread, tokenizer, 2048, eos_ids=ends)
    for stream in (False, True):
        with serving(ThinkingService(settings, served)) as url:
            got = asyncio.run(by_server(url, stream))
        kind = "streamed" if stream else "whole"
        print(f"server, {kind}: {got} tokens in {steps} steps, ratio {expected / steps:.3f}")
        steps = 0
    thread.close()


def _endless_model() -> tuple[Any, Any, tuple[int, ...]]:
    """Return tokenizer, random model that ends nothing by itself, and end tokens."""
    tokenizer: Any = load_tokenizer("toy")
    model = make_qwen2(0, vocab_size=len(tokenizer), max_position_embeddings=2048)
    with torch.no_grad():
        model.lm_head.weight[[tokenizer.eos_token_id, *encode(tokenizer, "</think>")]] = 0
    model.config.eos_token_id = tokenizer.eos_token_id
    return tokenizer, model, (int(tokenizer.eos_token_id),)


# -- memory ------------------------------------------------------------------------------------


def print_memory() -> None:
    """Print the resident memory of ``delethink serve`` after traces of more and more chunks."""
    tokenizer, model, _ = _endless_model()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "endless")
        tokenizer.save_pretrained(folder / "endless")
        sizes = ["-C", "64", "--carryover-size", "32", "--head-size", "0", "--max-chunks", "60"]
        options = ["-m", str(folder / "endless"), *sizes, "--answer-tokens", "8"]
        with serve_command(folder, *options, "--name", "endless", "engine=transformers") as (
            url,
            _,
        ):
            asking = openai.OpenAI(base_url=url, api_key="any", max_retries=0)
            (server,) = (p for p in psutil.Process().children() if "serve" in p.cmdline())
            first = 0
            for chunks in (2, 2, 5, 15, 30, 60):
                for _ in range(3):
                    asking.chat.completions.create(
                        model="endless",
                        messages=MESSAGES,
                        extra_body={"delethink": {"max_chunks": chunks}},
                    )
                used = server.memory_info().rss
                print(f"{chunks} chunks: {used / 2**20:.1f} MiB, {used / (first or used) - 1:+.2%}")
                first = used if first == 0 else first


# -- tokens ------------------------------------------------------------------------------------


class Steady:
    """Streams tokens one by one, and remembers when the first one came."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.first_at = tokens, 0.0

    async def generate(self, prompt_ids: Any, max_new_tokens: int, sampling: Any) -> Completion:
        raise AssertionError("it streams")

    async def stream(self, prompt_ids: Any, limit: int, sampling: Any, on_tokens: Any) -> Any:
        self.first_at = time.monotonic()
        ids = (*(LETTERS * self.tokens)[: self.tokens], *MARK_IDS, LETTERS[0], EOS)
        for token in ids:
            on_tokens((token,), (0.0,))
            await asyncio.sleep(0)
        return Completion(ids, (0.0,) * len(ids), StopReason.EOS)


def print_tokens(tokens: int = 4000) -> None:
    """Print processor time of a token, whole and streamed, and the delay of the first one."""
    policy = Steady(tokens)
    service = service_of(policy, ChunkSpec(2 * tokens, 0, 1), window=4 * tokens)
    bare = _cpu_s(lambda: asyncio.run(policy.stream((), 0, None, lambda *_: None)))
    for stream in (False, True):
        used = _cpu_s(lambda stream=stream: asyncio.run(_call(service, stream)))
        print(f"{'streamed' if stream else 'whole'}: {(used - bare) / tokens * 1e6:.0f} µs a token")
    short = Steady(20)
    delays = []
    with serving(service_of(short)) as url, openai.OpenAI(base_url=url, api_key="x") as asking:
        for _ in range(50):
            stream = asking.chat.completions.create(model="made-up", messages=MESSAGES, stream=True)
            for piece in stream:
                if getattr(piece.choices[0].delta, "reasoning", None):
                    delays.append(time.monotonic() - short.first_at)
                    break
            stream.close()
    typical, most = statistics.median(delays) * 1000, max(delays) * 1000
    print(f"first token after the engine's: median {typical:.1f} ms, at most {most:.1f} ms of 50")


# -- first token of vLLM ------------------------------------------------------------------------


def print_first(streams: int = 8, rounds: int = 12) -> None:
    """Print when the first token comes, alone and among others, and the pace of whole streams."""
    options = ["-C", "90", "--carryover-size", "45", "--head-size", "0", "--max-chunks", "1"]
    options += ["--answer-tokens", "20", "engine=vllm", "engine.dtype=float32"]
    options += ["engine.kv_cache_gib=0.25"]
    with tempfile.TemporaryDirectory() as folder:
        with vllm_server(Path(folder)) as url:
            own = asyncio.run(_first_tokens(url, streams, rounds))
        with serve_command(Path(folder), "-m", "toy", *options) as (url, _):
            ours = asyncio.run(_first_tokens(url, streams, rounds))
    print("| server | first token alone | among others | tokens a second of all | longest gap |")
    print("| --- | --- | --- | --- | --- |")
    for name, (alone, among, pace, gap) in (("vLLM's own", own), ("with chunks", ours)):
        print(f"| {name} | {alone:.1f} ms | {among:.1f} ms | {pace:.0f} | {gap:.0f} ms |")


async def _first_tokens(url: str, streams: int, rounds: int) -> tuple[float, float, float, float]:
    """Return medians of the first token in ms, alone and among others, their pace and gap."""
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as asking:

        async def ask(number: int) -> tuple[float, float, int]:
            began, first, last, gap, count = time.monotonic(), 0.0, 0.0, 0.0, 0
            stream = await asking.chat.completions.create(
                model="toy",
                messages=[{"role": "user", "content": f"{number % 90 + 10}:010101010101"}],
                temperature=0,
                max_tokens=80,
                stream=True,
                extra_body={"return_token_ids": True},
            )
            async for piece in stream:
                choice = piece.choices[0] if piece.choices else None
                ids = getattr(choice, "token_ids", None) or []
                if ids:
                    now = time.monotonic()
                    first, gap, last = first or now - began, max(gap, now - (last or now)), now
                    count += len(ids)
            return first * 1000, gap * 1000, count

        for number in range(3):
            await ask(number)
        alone = [(await ask(number))[0] for number in range(3, 3 + rounds)]
        among, gaps, tokens, spent = list[float](), list[float](), 0, 0.0
        for number in range(rounds):
            began = time.monotonic()
            done = await asyncio.gather(*(ask(40 + number * streams + i) for i in range(streams)))
            spent += time.monotonic() - began
            among += [first for first, _, _ in done]
            gaps += [gap for _, gap, _ in done]
            tokens += sum(count for _, _, count in done)
    middle = statistics.median
    return middle(alone), middle(among), tokens / spent, middle(gaps)


def _cpu_s(work: Callable[[], object]) -> float:
    """Return the least processor time of three runs."""
    times = []
    for _ in range(3):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


async def _call(service: ThinkingService, stream: bool) -> None:
    """Call the application without a socket."""
    body = json.dumps({"messages": MESSAGES, "stream": stream}).encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"host", b"here"), (b"content-type", b"application/json")],
        "server": ("here", 80),
        "scheme": "http",
    }
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        assert message.get("status", 200) == 200

    await make_app(service)(scope, receive, send)


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", default="chaos,steps,memory,tokens,first")
    parser.add_argument("--requests", type=int, default=1000, help="at once, in the chaos")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = {
        "chaos": lambda: print_chaos(arguments.requests),
        "steps": print_steps,
        "memory": print_memory,
        "tokens": print_tokens,
        "first": print_first,
    }
    for part in arguments.parts.split(","):
        if part not in parts:
            parser.error(f"unknown part {part!r}; there are {', '.join(parts)}")
        parts[part]()


if __name__ == "__main__":
    main()
