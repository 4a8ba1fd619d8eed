"""The package for OpenEnv: its files, its server, and the ids and rewards of a client's traces."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import random
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from guide_page import blocks
from peer_environment import ROOT, peer_python
from server_process import stop
from toy_episodes import library_rollouts, toy_engine
from toy_server import toy_server

from delethink.chunking import ChunkSpec
from delethink.config import Recipe, load_recipe
from delethink.engines.transformers import TransformersEngine
from delethink.envs.automaton import AutomatonTask
from delethink.integrations.episodes import EpisodeSource
from delethink.policy import Sampling
from delethink.types import Score, Trace, TraceStop

pytestmark = pytest.mark.integration

PACKAGE = ROOT / "integrations" / "openenv"
TOY = ROOT / "delethink" / "assets" / "toy_reasoner"
PEER = Path(__file__).parents[1] / "helpers" / "openenv_peer.py"
OVERRIDES = ["task.args.min_steps=6", "task.args.max_steps=12", "thinking.max_chunks=2"]
TIMEOUT_S = 900


@pytest.fixture(scope="module")
def python() -> Path:
    return peer_python("openenv-server", "openenv==0.10.0", editable=(ROOT, PACKAGE))


@contextmanager
def serving(python: Path, *arguments: str, code: str = "") -> Iterator[str]:
    """Serve the package with a port of the system; ``code`` runs before its start."""
    program = f"{code}\nimport sys\nfrom delethink_openenv.server.app import main\nsys.exit(main())"
    command = [str(python), "-c", program, "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        stop(process)  # type: ignore[arg-type]
        process.stdout.close()


@pytest.fixture(scope="module")
def server(python: Path) -> Iterator[str]:
    with serving(python, *OVERRIDES) as url:
        yield url


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(PACKAGE / "recipe.yaml", OVERRIDES)


@pytest.fixture(scope="module")
def source(recipe: Recipe) -> Iterator[EpisodeSource]:
    made = EpisodeSource.from_recipe(recipe)
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(source: EpisodeSource) -> TransformersEngine:
    return toy_engine(source)


def ask(python: Path, url: str, *calls: tuple[str, Any]) -> list[Any]:
    """Run calls of the peer in one process, as its start takes longest."""
    ended = subprocess.run(
        [python, PEER, url],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert ended.returncode == 0, ended.stderr
    found: list[Any] = json.loads(ended.stdout)
    return found


# -- without an installation -------------------------------------------------------------------


def test_the_files_of_the_package_are_whole() -> None:
    for file in PACKAGE.rglob("*.py"):
        ast.parse(file.read_text("utf-8"))
    manifest = yaml.safe_load((PACKAGE / "openenv.yaml").read_text("utf-8"))
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text("utf-8"))["project"]
    assert manifest["version"] == project["version"]
    assert project["scripts"]["server"] == "delethink_openenv.server.app:main"
    _, front, _ = (PACKAGE / "README.md").read_text("utf-8").split("---\n", 2)
    assert yaml.safe_load(front)["app_port"] == manifest["port"]
    assert (PACKAGE / "server" / "Dockerfile").is_file()


def test_a_client_that_samples_greedily_has_the_ids_of_the_library(
    source: EpisodeSource, engine: TransformersEngine
) -> None:
    task, spec = AutomatonTask(min_steps=3, max_steps=3), ChunkSpec(30, 15, 4, head_size=0)
    source = replace(source, task=task, spec=spec)  # a trace of 60 tokens
    place, greedy = ("train", 0), Sampling(temperature=0.0)
    (trace,), (score,), _ = library_rollouts(source, engine, [place], temperature=0.0)
    episode = source.begin(source.problem(*place))
    while episode.stop is None:
        sampled = engine.generate(tuple(episode.prompt_ids), episode.max_new_tokens, greedy)
        episode.add(list(asyncio.run(sampled).token_ids))
    assert len(trace.chunks) > 1
    assert [c.output_ids for c in episode.chunks] == [c.output_ids for c in trace.chunks]
    assert [c.prompt_ids for c in episode.chunks] == [c.prompt_ids for c in trace.chunks]
    assert asyncio.run(episode.score()) == score


# -- with OpenEnv ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_package_passes_the_static_validation(python: Path) -> None:
    command = [python.with_name("openenv"), "validate", PACKAGE, "--level", "static"]
    ended = subprocess.run([*command, "--skip-build"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Verdict: PASS" in ended.stdout


@pytest.mark.slow
def test_the_server_passes_all_six_criteria(python: Path, server: str) -> None:
    command = [python.with_name("openenv"), "validate", "--url", server, "--json"]
    ended = subprocess.run([*command, "--timeout", "120"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(ended.stdout)
    assert report["summary"]["passed_count"] == report["summary"]["total_count"] == 6


RESET, EMPTY = ["reset", {"index": 0}], {"chunk": []}
MISTAKES = {
    "a step before reset": ([["step", {"chunk": [5]}]], "no trace has begun in this session"),
    "a step after the end": (
        [RESET, ["step", {"chunk": [1]}], ["step", {"chunk": [5]}]],
        "the trace has ended (completed) and takes no chunk",
    ),
    "no tokens": ([RESET, ["step", EMPTY]], "this chunk must have 1 to 90 tokens, got 0"),
    "too many tokens": ([RESET, ["step", {"chunk": [5] * 91}]], "1 to 90 tokens, got 91"),
    "unknown token": ([RESET, ["step", {"chunk": [99]}]], "from 0 to 15, got 99"),
    "half a token": ([RESET, ["step", {"chunk": [1.5]}]], "from 0 to 15, got 1.5"),
    "number": ([RESET, ["step", {"chunk": 7}]], "a text or a list of token ids, got 7"),
    "nothing": ([RESET, ["step", {"chunk": None}]], "a list of token ids, got None"),
    "another field": ([RESET, ["step", {"message": "5"}]], "(code: VALIDATION_ERROR)"),
    "split": ([["reset", {"split": "held_out"}]], "Did you mean 'heldout'?"),
    "index": ([["reset", {"index": -1}]], "index must be a whole number from 0 to"),
    "index of another type": ([["reset", {"index": "0"}]], "got '0'"),
    "option": ([["reset", {"splt": "train"}]], "no option 'splt'. Did you mean 'split'?"),
    "seed": ([["reset", {"seed": "x"}]], "seed must be a whole number from 0, got 'x'"),
    "problem": ([["reset", {"problem": "01:01"}]], "problem must be a delethink.Problem"),
    "problem without answer": (
        [["reset", {"problem": {"prompt": "01:01"}}]],
        "problem needs a prompt and an answer",
    ),
    "both": (
        [["reset", {"index": 1, "problem": {"prompt": "1", "answer": "1"}}]],
        "give index or problem, not both",
    ),
    "a step after a failed reset": (
        [RESET, ["reset", {"index": -1}], ["step", {"chunk": [5]}]],
        "no trace has begun in this session",
    ),
}

SECOND = {"split": "heldout", "index": 2}
HTTP_CALLS = [
    ["GET", "/list_environments", None],
    ["GET", "/delethink/splits", None],
    ["POST", "/delethink/num_tasks", {"split": "train"}],
    ["POST", "/delethink/task", SECOND],
    ["POST", "/delethink/task_range", {"split": "heldout", "start": 2, "stop": 5}],
    ["POST", "/delethink/task", {**SECOND, "index": -1}],
    ["POST", "/delethink/tasks", {"split": "test"}],
    ["POST", "/step", {"action": {"chunk": [5]}}],
    ["POST", "/reset", SECOND],
]


class Session(NamedTuple):
    """All that a client saw, and what the library has for the same problems."""

    places: list[tuple[str, int]]
    traces: list[Trace]
    scores: list[Score]
    played: list[Any]
    by_text: list[Any]
    mistakes: list[str]
    answers: list[Any]


@pytest.fixture(scope="module")
def session(
    python: Path, server: str, source: EpisodeSource, engine: TransformersEngine
) -> Session:
    stream = random.Random(0)
    places = [(split, stream.randrange(10**6)) for split in ("train", "heldout") for _ in range(4)]
    greedy = library_rollouts(source, engine, places, temperature=0.0)
    warm = library_rollouts(
        source, engine, places, temperature=1.5
    )  # slips, and traces out of budget
    traces = greedy.traces + warm.traces
    by_ids = [
        {
            "reset": {"split": split, "index": index},
            "actions": [{"chunk": list(chunk.output_ids)} for chunk in trace.chunks],
        }
        for (split, index), trace in zip(places * 2, traces, strict=True)
    ]
    split, index = places[0]
    texts = [source.tokenizer.decode(list(chunk.output_ids)) for chunk in traces[0].chunks]
    *hidden, last = [text.removesuffix(source.tokenizer.eos_token) for text in texts]
    ends = [*({"chunk": text} for text in hidden), {"chunk": last, "ended": True}]
    problem = source.task.problem(split, index)
    given = {"prompt": problem.prompt, "answer": problem.answer}
    by_text = [
        {"reset": {"split": split, "index": index}, "actions": [{"chunk": t} for t in texts]},
        {"reset": {"problem": given, "seed": 3}, "actions": ends},
    ]
    cases = [{"calls": calls} for calls, _ in MISTAKES.values()]
    calls = [("play", by_ids), ("play", by_text), ("mistakes", cases), ("http", HTTP_CALLS)]
    return Session(places * 2, traces, greedy.scores + warm.scores, *ask(python, server, *calls))


@pytest.mark.slow
def test_traces_over_the_wire_have_the_ids_and_rewards_of_the_library(session: Session) -> None:
    for found, trace, score, (split, index) in zip(
        session.played, session.traces, session.scores, session.places, strict=True
    ):
        *before, last = found["steps"]
        after = found["steps"][1:]
        assert [step["prompt_ids"] for step in before] == [list(c.prompt_ids) for c in trace.chunks]
        assert [step["chunk_ids"] for step in after] == [list(c.output_ids) for c in trace.chunks]
        assert [step["chunk_stop"] for step in after] == [c.stop.value for c in trace.chunks]
        assert not any(step["done"] for step in before)
        assert last["done"]
        assert last["stop"] == trace.stop.value
        assert last["reward"] == score.total
        assert last["rewards"] == dict(score.parts)
        assert last["num_sampled"] == trace.length
        assert last["max_new_tokens"] == 0
        assert found["state"]["index"] == index
        assert found["state"]["split"] == split
    assert {trace.stop for trace in session.traces} == {TraceStop.COMPLETED, TraceStop.BUDGET}
    assert {score.total for score in session.scores} == {0.0, 1.0}


@pytest.mark.slow
def test_chunks_of_text_give_the_same_trace(session: Session) -> None:
    for found in session.by_text:
        assert [step["chunk_ids"] for step in found["steps"][1:]] == [
            list(chunk.output_ids) for chunk in session.traces[0].chunks
        ]
        assert found["steps"][-1]["reward"] == session.scores[0].total == 1.0
        assert {step["retokenized_at"] for step in found["steps"]} == {-1}


@pytest.mark.slow
def test_mistakes_are_sentences_in_error_frames(session: Session) -> None:
    for (name, (_, expected)), error in zip(MISTAKES.items(), session.mistakes, strict=True):
        assert expected in error, f"{name}: {error}"
        assert "(code: EXECUTION_ERROR)" in error or "VALIDATION_ERROR" in error, name


@pytest.mark.slow
def test_tasks_are_listed_without_their_answers(session: Session, source: EpisodeSource) -> None:
    listed, splits, number, task, several, none, unknown, step, reset = session.answers
    assert listed == [200, ["delethink"]]
    assert splits[1] == [{"name": "train", "type": "train"}, {"name": "heldout", "type": "test"}]
    assert number == [200, {"num_tasks": 2**31}]
    prompt = source.task.problem("heldout", 2).prompt
    assert task[1]["task"] == {"id": "heldout-2", **SECOND, "prompt": prompt, "before": []}
    assert [found["index"] for found in several[1]["tasks"]] == [2, 3, 4]
    assert none == [400, {"detail": "Invalid task index"}]
    assert unknown[0] == 400
    assert "unknown split 'test'" in unknown[1]["detail"]
    assert step[0] == 400
    assert "POST /reset and POST /step keep nothing" in step[1]["detail"]
    assert reset[1]["observation"]["prompt"] == prompt + "<think>"


@pytest.mark.slow
def test_the_snippet_of_the_guide_runs(python: Path, server: str, tmp_path: Path) -> None:
    (code,) = blocks("integrations_openenv.md", "python")
    with toy_server(TOY) as engine_url:
        code = code.replace("http://127.0.0.1:8000", server)
        code = code.replace("http://127.0.0.1:9000/v1", engine_url).replace('"toy"', f'"{TOY}"')
        ended = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, cwd=tmp_path
        )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[0] in ("1.0", "0.0")
    assert "{'exact': " in ended.stdout


@pytest.mark.slow
def test_a_wrong_start_is_a_sentence(python: Path, tmp_path: Path) -> None:
    def start(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
        program = f"{code}\nfrom delethink_openenv.server.app import main\nraise SystemExit(main())"
        command = [str(python), "-c", program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)

    missing = start("--recipe", str(tmp_path / "none.yaml"))
    assert missing.returncode == 2
    assert "none.yaml" in missing.stderr
    assert "Traceback" not in missing.stderr
    older = start(code="from delethink.integrations import releases\n" + OTHER_RELEASE)
    assert older.returncode == 2
    assert "openenv 0.4.1 is installed, and this adapter was tried with 0.10 to" in older.stderr


# A session learns it too, for servers that uvicorn starts. The release itself cannot be installed
# beside the package, whose range refuses it.
OTHER_RELEASE = "releases.version = lambda name: '0.4.1'\n"


@pytest.mark.slow
def test_a_session_is_told_what_is_wrong_with_its_server(python: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in TOY.iterdir():
        if file.name not in ("chat_template.jinja", "model.safetensors"):
            (bare / file.name).write_bytes(file.read_bytes())
    program = """
import sys, uvicorn
from delethink.integrations import releases
from delethink_openenv.server import app
exec(sys.argv[1])
config = uvicorn.Config(app.app, "127.0.0.1", 0)
with config.bind_socket() as socket:
    print(f"http://127.0.0.1:{socket.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[socket])
"""
    wrong = {
        "the tokenizer has no chat template": ({"DELETHINK_OVERRIDES": f"model={bare}"}, ""),
        "openenv 0.4.1 is installed": ({}, OTHER_RELEASE),
    }
    for expected, (settings, code) in wrong.items():
        command = [str(python), "-c", program, code]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, **settings}
        )
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            ((error,),) = ask(python, url, ("mistakes", [{"calls": [RESET]}]))
        finally:
            stop(process)  # type: ignore[arg-type]
            process.stdout.close()
        assert expected in error
        assert "(code: EXECUTION_ERROR)" in error
