"""``delethink eval`` against a real vLLM server on the loopback."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from installed import need
from vllm_server import KEY, vllm_server

from delethink import ChunkSpec, Sampling, TraceStop, run_rollouts
from delethink.cli.main import main
from delethink.engines.loading import eos_ids, load_model, load_tokenizer
from delethink.tokenization import query_ids

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the toy reasoner."""
    need("vllm")
    pytest.importorskip("openai")
    with vllm_server(tmp_path_factory.mktemp("server")) as address:
        yield address


def test_an_evaluation_over_http(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "-m", "toy", "--task", "automaton", "--task-arg", "min_steps=3"]
    arguments += ["--task-arg", "max_steps=8", "--num-problems", "8", "-n", "2", "-C", "60"]
    arguments += ["--carryover-size", "30", "--head-size", "0", "--max-chunks", "4", "--no-curves"]
    arguments += ["--base-url", server, "--api-key-env", "KEY_OF_TEST", "--json"]
    monkeypatch.setenv("KEY_OF_TEST", "wrong")
    assert main([*arguments, "-o", str(tmp_path / "refused")]) == 2
    assert "rejects the API key" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()

    monkeypatch.setenv("KEY_OF_TEST", KEY)
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.err.count("asks in token ids, gets token ids back") == 1
    rows = json.loads(said.out)["rows"]
    assert [row["budget"] for row in rows] == [60, 90, 120, 150] * 2
    for last in (rows[3], rows[7]):
        assert last["errors"] == 0
        assert last["samples"] == 16
        assert last["avg"]["value"] > 0.8
        assert last["out_of_budget"] < 0.2
    written = "".join(file.read_text() for file in (tmp_path / "out").iterdir())
    assert KEY not in written + said.out + said.err


@pytest.mark.parametrize("dialect", ["token ids", "log-probs", "text"])
def test_what_it_says_is_what_the_model_says_in_this_process(server: str, dialect: str) -> None:
    """Greedy, over boundaries: the same tokens as ``transformers``, with ids or text."""
    from delethink.engines.openai import OpenAIServer
    from delethink.engines.openai_dialect import Dialect
    from delethink.engines.transformers import TransformersEngine
    from delethink.envs.automaton import AutomatonTask

    tokenizer, model = load_tokenizer("toy"), load_model("toy", "float32")
    ends, spec = eos_ids(model, tokenizer), ChunkSpec(60, 30, 6, 0)
    problems = [AutomatonTask(3, 10).problem("heldout", i) for i in range(6)]
    queries = [query_ids(tokenizer, problem) for problem in problems]
    samplings = [Sampling(0.0)] * len(queries)
    lines: list[str] = []
    served = OpenAIServer(server, None, tokenizer, api_key=KEY, eos_ids=ends, announce=lines.append)
    assert served.max_model_tokens
    own = TransformersEngine(model, ends, int(tokenizer.pad_token_id))

    async def over_http() -> list[tuple[int, ...]]:
        if dialect == "text":
            served.dialect = Dialect(asks="text", answers="text")
        elif dialect == "log-probs":
            served.dialect = Dialect(answers="logprobs")
        traces = await run_rollouts(served, spec, queries, samplings)
        await served.disconnect()
        assert all(trace.stop is TraceStop.COMPLETED for trace in traces), traces[0].error
        assert max(len(trace.chunks) for trace in traces) > 1
        return [trace.output_ids for trace in traces]

    expected = [t.output_ids for t in asyncio.run(run_rollouts(own, spec, queries, samplings))]
    assert asyncio.run(over_http()) == expected
    if dialect == "token ids":
        assert served.dialect == Dialect(counts_prompt=True)
        assert lines[0].endswith("gets token ids back: chunk boundaries are exact")


def test_a_stream_gives_the_tokens_of_a_completion_and_its_options_are_checked(server: str) -> None:
    """A hot request with a cut is greedy on vLLM, and the address needs no version."""
    from delethink.engines.openai import OpenAIServer
    from delethink.envs.automaton import AutomatonTask

    tokenizer, model = load_tokenizer("toy"), load_model("toy", "float32")
    query = query_ids(tokenizer, AutomatonTask(3, 10).problem("heldout", 0))
    lines: list[str] = []
    served = OpenAIServer(
        server.removesuffix("/v1"),
        None,
        tokenizer,
        api_key=KEY,
        eos_ids=eos_ids(model, tokenizer),
        announce=lines.append,
    )
    sampling = Sampling(0.6, 1, top_p=0.9, top_k=5, min_p=0.05)
    pieces: list[int] = []

    async def both() -> list[tuple[int, ...]]:
        streamed = await served.stream(query, 30, sampling, lambda ids, _: pieces.extend(ids))
        whole = await served.generate(query, 30, sampling)
        await served.disconnect()
        return [tuple(streamed.token_ids), tuple(whole.token_ids)]

    streamed, whole = asyncio.run(both())
    assert tuple(pieces) == streamed == whole
    assert len(lines) == 1  # no option is ignored
