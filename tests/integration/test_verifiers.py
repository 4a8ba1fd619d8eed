"""The package for verifiers: evaluation, training and rewards in an environment of its own.

Everything but the first test is slow: it installs verifiers, and each ``vf-eval`` takes seconds to
load.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, chat_server
from guide_page import blocks
from peer_environment import ROOT, peer_python

from delethink import Sampling
from delethink.config import load_recipe
from delethink.engines.loading import load_tokenizer, locate
from delethink.errors import ConfigError
from delethink.rollout import run_rollout
from delethink.scoring.rollouts import make_attempt
from delethink.scoring.scorer import make_scorer
from delethink.tokenization import query_ids
from delethink.types import Trace

PACKAGE = ROOT / "integrations" / "verifiers"
HELPERS = ROOT / "tests" / "helpers"
# Unlike the toy's own template, it renders every message.
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<think>{% endif %}"
)
# Cannot continue a message: it changes what the assistant has said.
CHANGES = TEMPLATE.replace(
    "message['content']",
    "(message['content'] | replace('0', '1') if message['role'] == 'assistant'"
    " else message['content'])",
)
RECIPE = """
name: chunks
model: {model}
task: {{name: automaton, args: {{min_steps: 6, max_steps: 10}}}}
rewards:
  exact: 1.0
  length: {{reward: chunks, weight: -0.1}}
thinking: {{context_size: 60, carryover_size: 30, max_chunks: 5, head_size: 0}}
training: {{max_steps: 1, num_generations: 2, per_device_train_batch_size: 2}}
"""
NUM_PROBLEMS = 3
TIMEOUT_S = 1200
slow = pytest.mark.slow
pytestmark = pytest.mark.integration


def test_a_missing_peer_is_named_and_carried_text_becomes_a_message() -> None:
    sys.path.insert(0, str(PACKAGE))
    try:
        with pytest.raises(ConfigError, match=r"pip install 'verifiers>=0\.4,<0\.5'"):
            importlib.import_module("delethink_verifiers")
    finally:
        sys.path.remove(str(PACKAGE))
    file = PACKAGE / "delethink_verifiers" / "prompts.py"
    spec = importlib.util.spec_from_file_location("prompts_of_verifiers", file)
    assert spec is not None
    assert spec.loader is not None
    prompts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prompts)
    tokenizer, messages = load_tokenizer("toy"), [{"role": "user", "content": "02:0110"}]
    query = tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    whole = (*query, 6, 8, 5, 7)
    tokenizer.chat_template = CHANGES
    raw = prompts.ChatPrompts(tokenizer, messages, query, False).body(whole)
    assert raw["messages"] == [{"role": "user", "content": "02:0110<think>02:1"}]
    assert raw["chat_template"] == prompts.RAW_TEMPLATE
    tokenizer.chat_template = TEMPLATE
    made = prompts.ChatPrompts(tokenizer, messages, query, False)
    assert made.body(query) == {"messages": messages}
    body = made.body(whole)
    assert body["messages"][1:] == [{"role": "assistant", "content": "<think>02:1"}]
    assert body["continue_final_message"] is True
    trained = prompts.ChatPrompts(tokenizer, messages, query, True).body(whole)
    details = trained["messages"][-1]["reasoning_details"]
    assert details == [{"type": prompts.CARRIED, "token_ids": [6, 8, 5, 7]}]


# -- evaluations -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer() -> Path:
    return peer_python("verifiers", "verifiers==0.4.0", editable=(ROOT, PACKAGE))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys") / "continued"
    shutil.copytree(locate("toy"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def server(toy: Path) -> Iterator[ChatServer]:
    with chat_server(toy) as served:
        yield served


def run(peer: Path, *command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OPENAI_API_KEY": "none", "PYTHONPATH": f"{HELPERS}:{folder}"}
    return subprocess.run(
        [str(peer), *map(str, command)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def evaluate(
    peer: Path, server: ChatServer, folder: Path, *options: str, number: int = NUM_PROBLEMS
) -> subprocess.CompletedProcess[str]:
    """Runs the real ``vf-eval`` with a recipe, greedily."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=server.model))
    return run(
        peer,
        peer.with_name("vf-eval"),
        *("delethink-verifiers", "--env.taskset.recipe", str(recipe)),
        *("--env.agent.harness.id", "delethink-verifiers"),
        *("--env.agent.harness.recipe", str(recipe)),
        *("--model", server.model, "--client.base-url", server.url),
        *("--client.api-key-var", "OPENAI_API_KEY", "--no-push", "--no-rich"),
        *("--env.agent.runtime.type", "subprocess", "--sampling.temperature", "0"),
        *("-n", str(number), "-c", "1", "-o", str(folder), "--run.dir", "out", *options),
        folder=folder,
    )


def traces_in(folder: Path) -> dict[int, dict[str, Any]]:
    """Returns the traces of a run by the index of their problem."""
    lines = (folder / "traces.jsonl").read_text("utf-8").splitlines()
    found = [trace for line in lines for trace in json.loads(line)["traces"]]
    return {trace["task"]["data"]["idx"]: trace for trace in found}


def library_rollouts(server: ChatServer, folder: Path) -> list[tuple[Trace, float]]:
    """Returns the library's own traces of the same problems, with the recipe's rewards."""
    from delethink.registry import make_task

    recipe = load_recipe(folder / "recipe.yaml")
    task, spec = make_task(recipe.task.name, recipe.task.args, recipe.seed), recipe.thinking.spec()
    made = []
    with make_scorer(recipe.rewards, recipe.accuracy_reward, recipe.scoring) as scorer:
        for index in range(NUM_PROBLEMS):
            problem = task.problem("heldout", index)
            query = query_ids(server.tokenizer, problem)
            trace = asyncio.run(run_rollout(server.engine, spec, query, Sampling(0.0)))
            (score,) = scorer.score_now([make_attempt(problem, trace, server.tokenizer, spec)])
            assert score.total is not None
            made.append((trace, score.total))
    return made


def branches_of(trace: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Returns the nodes of each root-to-leaf path."""
    nodes = trace["nodes"]
    parents = {node.get("parent") for node in nodes}
    branches = []
    for leaf in (index for index in range(len(nodes)) if index not in parents):
        path, at = [], leaf
        while at is not None:
            path.append(nodes[at])
            at = nodes[at].get("parent")
        branches.append(path[::-1])
    return branches


def assert_equal(
    trace: dict[str, Any], own: Trace, reward: float, lengths: list[int], has_ids: bool
) -> None:
    """Compares a trace of verifiers with one of the library; ``lengths`` are those before it."""
    assert trace["ok"] is True, trace["errors"]
    branches = branches_of(trace)
    assert len(branches) == len(own.chunks)
    lengths.append(own.length)
    weight = sum(lengths) / len(lengths) / own.length
    stored = trace["info"]["delethink"]
    sampled = [list(map(int, chunk.output_ids)) for chunk in own.chunks]
    assert [chunk["output_ids"] for chunk in stored["chunks"]] == sampled
    assert stored["query_ids"] == list(map(int, own.query_ids))
    for branch, chunk in zip(branches, own.chunks, strict=True):
        ids = [token for node in branch for token in node["token_ids"]]
        mask = [flag for node in branch for flag in node["mask"]]
        weights = [w for node in branch for w in (node.get("loss_weights") or {}).get("rl", ())]
        prompt, output = list(map(int, chunk.prompt_ids)), list(map(int, chunk.output_ids))
        if not has_ids:
            assert not ids
            continue
        assert ids == prompt + output
        assert mask == [False] * len(prompt) + [True] * len(output)
        assert weights[-len(output) :] == pytest.approx([weight] * len(output))
        assert not any(weights[: -len(output)])
    (scored,) = trace["rewards"].values()
    assert scored["score"] * scored["weight"] == pytest.approx(reward)
    assert trace["metrics"]["chunks"] == len(own.chunks)
    assert trace["metrics"]["thinking_tokens"] == own.length
    assert stored["stop"] == own.stop.value


def assert_run_equals(
    server: ChatServer, folder: Path, has_ids: bool = True
) -> dict[int, dict[str, Any]]:
    traces, lengths = traces_in(folder / "out"), list[int]()
    own = library_rollouts(server, folder)
    assert any(len(trace.chunks) > 1 for trace, _ in own)
    assert len(traces) == NUM_PROBLEMS
    for index, (trace, reward) in enumerate(own):
        assert_equal(traces[index], trace, reward, lengths, has_ids)
        assert traces[index]["metrics"]["inexact_chunks"] == 0
    return traces


@slow
def test_an_evaluation_equals_the_librarys_rollouts(
    peer: Path, server: ChatServer, tmp_path: Path
) -> None:
    ended = evaluate(peer, server, tmp_path)
    assert ended.returncode == 0, ended.stderr[-4000:]
    traces = assert_run_equals(server, tmp_path)
    assert all(trace["metrics"]["unchecked_chunks"] == 0 for trace in traces.values())
    assert any(body.get("continue_final_message") for body in server.asked)

    config = tmp_path / "out" / "configs" / "resolved" / "eval.json"
    again = run(peer, peer.with_name("vf-eval"), "@", config, "--resume", folder=tmp_path)
    assert "nothing to resume" in again.stdout, again.stderr[-4000:]

    replay = [peer.with_name("vf-replay"), tmp_path / "out", "-o", tmp_path / "replay", "--no-rich"]
    ended = run(peer, *replay, folder=tmp_path)
    assert ended.returncode == 0, ended.stderr[-4000:]
    replayed = traces_in(tmp_path / "replay")
    for index, trace in traces.items():
        assert replayed[index]["rewards"] == trace["rewards"]


@slow
def test_a_template_that_cannot_continue_is_replaced_where_the_server_allows_it(
    peer: Path, toy: Path, tmp_path: Path
) -> None:
    changing = tmp_path / "changing"
    shutil.copytree(toy, changing)
    (changing / "chat_template.jinja").write_text(CHANGES)
    with chat_server(changing) as served:
        ended = evaluate(peer, served, tmp_path)
        assert ended.returncode == 0, ended.stderr[-4000:]
        assert_run_equals(served, tmp_path)
        assert any(body.get("chat_template") for body in served.asked)
        served.trusts_templates = False
        other = tmp_path / "other"
        other.mkdir()
        ended = evaluate(peer, served, other, number=1)
        trace = traces_in(other / "out")[0]
    assert not trace["ok"]
    assert trace["rewards"] == {}
    assert "not trusted" in trace["errors"][0]["message"]
    assert "--trust-request-chat-template" in trace["info"]["delethink"]["error"]


@slow
def test_traces_for_training_have_exact_ids_and_logprobs(
    peer: Path, server: ChatServer, tmp_path: Path
) -> None:
    renderer = "delethink_verifiers.renderer.OpenPromptRenderer"
    options = ("--client.renderer.name", "custom", "--client.renderer.import-path", renderer)
    ended = evaluate(peer, server, tmp_path, "--client.type", "train", *options)
    assert ended.returncode == 0, ended.stderr[-4000:]
    traces = assert_run_equals(server, tmp_path)
    for index, (own, _) in enumerate(library_rollouts(server, tmp_path)):
        for branch, chunk in zip(branches_of(traces[index]), own.chunks, strict=True):
            assert branch[-1]["logprobs"] == pytest.approx(list(chunk.logprobs), abs=1e-3)


@slow
def test_a_stock_renderer_is_refused_for_training(
    peer: Path, server: ChatServer, tmp_path: Path
) -> None:
    options = ("--client.type", "train", "--client.renderer.name", "default")
    evaluate(peer, server, tmp_path, *options, number=1)
    trace = traces_in(tmp_path / "out")[0]
    assert not trace["ok"]
    assert trace["rewards"] == {}
    assert "OpenPromptRenderer" in trace["errors"][0]["message"]


@slow
def test_a_server_without_token_ids_is_named(peer: Path, toy: Path, tmp_path: Path) -> None:
    with chat_server(toy, returns_ids=False) as served:
        ended = evaluate(peer, served, tmp_path)
        assert ended.returncode == 0, ended.stderr[-4000:]
        assert "returns no token ids" in ended.stdout + ended.stderr
        # The toy's tokens are letters, so nothing is lost; but no node claims to know its ids.
        traces = assert_run_equals(served, tmp_path, has_ids=False)
    assert all(trace["metrics"]["unchecked_chunks"] > 0 for trace in traces.values())


@slow
def test_chunks_that_begin_with_other_ids_are_counted_or_refused(
    peer: Path, toy: Path, tmp_path: Path
) -> None:
    with chat_server(toy, retokenizes=True) as served:
        ended = evaluate(peer, served, tmp_path, number=1)
        assert "encoded to other ids" in ended.stdout + ended.stderr
        trace = traces_in(tmp_path / "out")[0]
        assert trace["ok"], trace["errors"]
        assert trace["metrics"]["inexact_chunks"] == trace["metrics"]["chunks"] - 1 > 0
        strict = tmp_path / "strict"
        strict.mkdir()
        options = ("--env.agent.harness.require-exact", "true")
        evaluate(peer, served, strict, *options, number=1)
        trace = traces_in(strict / "out")[0]
    assert not trace["ok"]
    assert trace["rewards"] == {}
    assert "require_exact does not allow it" in trace["errors"][0]["message"]


@slow
def test_a_server_that_dies_leaves_failed_traces_which_a_resumed_run_completes(
    peer: Path, toy: Path, tmp_path: Path
) -> None:
    with chat_server(toy, lives=1) as served:
        evaluate(peer, served, tmp_path, "--env.agent.harness.retries", "0")
        for trace in traces_in(tmp_path / "out").values():
            assert not trace["ok"]
            assert trace["rewards"] == {}
            assert "the engine died" in trace["errors"][0]["message"]
        served.lives = None
        config = tmp_path / "out" / "configs" / "resolved" / "eval.json"
        ended = run(peer, peer.with_name("vf-eval"), "@", config, "--resume", folder=tmp_path)
        assert ended.returncode == 0, ended.stderr[-4000:]
        traces = traces_in(tmp_path / "out")
        own = library_rollouts(served, tmp_path)
    for index, (trace, reward) in enumerate(own):
        assert traces[index]["ok"], traces[index]["errors"]
        assert len(branches_of(traces[index])) == len(trace.chunks)
        (scored,) = traces[index]["rewards"].values()
        assert scored["score"] == pytest.approx(reward)


@slow
def test_a_rollout_stopped_by_a_limit_has_no_reward(
    peer: Path, server: ChatServer, tmp_path: Path
) -> None:
    evaluate(peer, server, tmp_path, "--env.agent.max-turns", "1", number=1)
    trace = traces_in(tmp_path / "out")[0]
    assert not trace["ok"]
    assert not any(trace["rewards"].values())
    assert "did not end" in trace["errors"][0]["message"]


# -- mistakes --------------------------------------------------------------------------------------

MISTAKES = {
    "a limit of tokens": (("--sampling.max-tokens", "10"), "would cut chunks"),
    "another tokenizer": (("--env.agent.harness.chat-template-kwargs", '{"a": 1}'), "names 'a'"),
}
REFUSED = {
    "a task": (("--env.taskset.source", "automatom"), "Did you mean 'automaton'"),
    "an argument": (("--env.taskset.args", '{"min_step": 1}'), "min_steps"),
    "a split": (("--env.taskset.split", "test"), "split must be 'train' or 'heldout'"),
    "a reward": (("--env.taskset.task.score-by", '{"exakt": 1}'), "Did you mean 'exact'"),
    "sizes": (("--env.agent.harness.carryover-size", "60"), "carryover_size"),
    "a carryover": (("--env.agent.harness.carryover", "tale"), "Did you mean 'tail'"),
}


@slow
@pytest.mark.parametrize("mistake", list(REFUSED))
def test_wrong_settings_are_lines_of_the_peers_own_report(
    peer: Path, server: ChatServer, tmp_path: Path, mistake: str
) -> None:
    options, sentence = REFUSED[mistake]
    ended = evaluate(peer, server, tmp_path, *options, number=1)
    said = " ".join((ended.stdout + ended.stderr).replace("\u2502", " ").split())
    assert ended.returncode == 1
    assert sentence in said
    assert "Traceback" not in said


@slow
@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_what_a_model_cannot_do_is_an_error_of_the_trace(
    peer: Path, server: ChatServer, tmp_path: Path, mistake: str
) -> None:
    options, sentence = MISTAKES[mistake]
    evaluate(peer, server, tmp_path, *options, number=1)
    trace = traces_in(tmp_path / "out")[0]
    assert trace["errors"][0]["type"] == "HarnessError"
    assert sentence in trace["errors"][0]["message"]
    assert trace["rewards"] == {}


@slow
def test_a_model_without_a_chat_template_is_named(
    peer: Path, server: ChatServer, toy: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(toy, bare)
    (bare / "chat_template.jinja").unlink()
    evaluate(peer, server, tmp_path, "--env.agent.harness.tokenizer", str(bare), number=1)
    trace = traces_in(tmp_path / "out")[0]
    assert "has no chat template" in trace["errors"][0]["message"]


@slow
def test_the_name_of_the_library_and_other_releases_are_refused_by_name(
    peer: Path, tmp_path: Path
) -> None:
    ended = run(peer, peer.with_name("vf-eval"), "delethink", "--model", "m", folder=tmp_path)
    assert ended.returncode == 1
    assert "exports no Taskset" in ended.stderr
    code = (
        "from importlib import metadata\n"
        "known = metadata.version\n"
        "metadata.version = lambda name: '0.5.1' if name == 'verifiers' else known(name)\n"
        "from verifiers.v1.cli.eval.main import main\n"
        "main(['delethink-verifiers'])"
    )
    ended = run(peer, "-c", code, folder=tmp_path)
    assert ended.returncode == 1
    assert "verifiers 0.5.1 is installed, and this adapter was tried with 0.4" in ended.stderr
    assert "Traceback" not in ended.stderr


# -- the renderer, and rewards both ways -----------------------------------------------------------


@slow
def test_carried_ids_survive_the_messages_of_verifiers_with_any_tokenizer(
    peer: Path, tmp_path: Path
) -> None:
    ended = run(peer, HELPERS / "verifiers_round_trip.py", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "240 traces" in ended.stdout


@slow
def test_rewards_of_each_side_grade_on_the_other(peer: Path, tmp_path: Path) -> None:
    (snippet,) = blocks("integrations_verifiers.md", "python")
    (tmp_path / "my_tasks.py").write_text(snippet)
    recipe = blocks("integrations_verifiers.md", "yaml")[0]
    (tmp_path / "rewards.yaml").write_text(recipe)
    ended = run(peer, HELPERS / "verifiers_rewards.py", "rewards.yaml", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert json.loads(ended.stdout.splitlines()[-1]) == {
        "ours in theirs": {"exact": [1.0, 0.5], "short": [1.0, 1.0]},
        "ours plugged in": 1.0,
        "theirs in ours": [1.0, 0.0],
        "faults": ["no reward", "is no reward"],
    }


def test_the_overview_runs_as_written(tmp_path: Path) -> None:
    (code,) = blocks("integrations.md", "python")
    names: dict[str, Any] = {}
    exec(code, names)
    assert [reward.__name__ for reward in names["reward_funcs"]] == ["exact_match", "overlong"]
    rewards = blocks("integrations.md", "yaml")
    assert "think_format" in rewards[0]
    assert "delethink_verifiers:task_reward" in rewards[1]
