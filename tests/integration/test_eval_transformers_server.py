"""``delethink eval`` against the server of transformers, which speaks text alone.

It refuses prompts of token ids and unknown fields, has no list of models here, and ignores
temperature and seed.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from installed import need
from server_process import started

from delethink import ChunkSpec, Sampling, TraceStop, run_rollouts
from delethink.cli.main import main
from delethink.engines.loading import eos_ids, load_model, load_tokenizer, locate
from delethink.tokenization import query_ids

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the toy reasoner."""
    need("fastapi", "uvicorn")
    pytest.importorskip("openai")
    pytest.importorskip("transformers.cli.serving.completion")
    command = [str(Path(sys.executable).with_name("transformers")), "serve", locate("toy")]
    command += ["--device", "cpu", "--dtype", "float32"]
    with started(command, {}, tmp_path_factory.mktemp("server")) as address:
        yield address


def test_text_gives_the_tokens_of_the_model_in_this_process(server: str) -> None:
    from delethink.engines.openai import OpenAIServer
    from delethink.engines.transformers import TransformersEngine
    from delethink.envs.automaton import AutomatonTask

    tokenizer, model = load_tokenizer("toy"), load_model("toy", "float32")
    ends, spec = eos_ids(model, tokenizer), ChunkSpec(60, 30, 6, 0)
    problems = [AutomatonTask(3, 10).problem("heldout", i) for i in range(6)]
    queries = [query_ids(tokenizer, problem) for problem in problems]
    samplings = [Sampling(0.0)] * len(queries)
    lines: list[str] = []
    served = OpenAIServer(server, locate("toy"), tokenizer, eos_ids=ends, announce=lines.append)
    own = TransformersEngine(model, ends, int(tokenizer.pad_token_id))

    async def over_http() -> list[tuple[int, ...]]:
        traces = await run_rollouts(served, spec, queries, samplings)
        await served.disconnect()
        assert all(trace.stop is TraceStop.COMPLETED for trace in traces), traces[0].chunks
        assert max(len(trace.chunks) for trace in traces) > 1
        return [trace.output_ids for trace in traces]

    expected = [t.output_ids for t in asyncio.run(run_rollouts(own, spec, queries, samplings))]
    assert asyncio.run(over_http()) == expected
    assert len(lines) == 1
    assert "asks in text, gets text back" in lines[0]
    assert served.base_url == f"{server}/v1"


def test_what_it_ignores_is_said_or_refused(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "-m", "toy", "--task", "automaton", "--task-arg", "min_steps=3"]
    command += ["--task-arg", "max_steps=5", "--num-problems", "2", "-n", "1", "-C", "90"]
    command += ["--mode", "delethink", "--max-chunks", "2", "--no-curves", "--json"]
    command += ["--base-url", server, "--served-model", locate("toy")]
    assert main([*command, "-o", str(tmp_path / "a")]) == 0
    said = capsys.readouterr()
    assert said.err.count("whether it heeds sampling options is not known") == 1
    assert json.loads(said.out)["rows"][-1]["errors"] == 0
    assert main([*command, "-o", str(tmp_path / "b"), "--top-k", "5"]) == 2
    assert "the server has no top-k and min-p" in capsys.readouterr().err
