"""Commands that ask a served model, with the toy's tokenizer and small servers of many habits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai_servers import KEY, ModelServer, listening

from delethink.cli.main import main
from delethink.engines.loading import load_tokenizer
from delethink.envs.automaton import AutomatonTask

pytest.importorskip("openai")

PROBLEMS = [AutomatonTask(3, 5).problem("heldout", i) for i in range(4)]
MODELS = {"data": [{"id": "m", "max_model_len": 400}]}
EXACT = {"returns": "token_ids"}
TEXT = {"takes_ids": 500, "strips": False}


def answer(prompt: str) -> str:
    """The right answer to a problem, in any query."""
    for problem in PROBLEMS:
        if problem.prompt in prompt:
            return f"0:1</think>{problem.answer}<eos>"
    return "10:01</think>1<eos>"


def toy(**habits: Any) -> ModelServer:
    given = {"script": answer, "hot": (6, 14), "adds_bos": 0, **habits}
    return ModelServer(tokenizer=load_tokenizer("toy"), **given)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("delethink.engines.openai_probe._CONFIRM_DELAY_S", 0.001)


def evaluate(model: ModelServer, output: Path, *options: str) -> int:
    with listening(model, MODELS):
        command = ["eval", "-m", "toy", "--task", "automaton", "--task-arg", "min_steps=3"]
        command += ["--task-arg", "max_steps=5", "--num-problems", "4", "-n", "2", "-C", "60"]
        command += ["--mode", "delethink", "--max-chunks", "2", "--no-curves", "--retries", "1"]
        command += ["--base-url", model.url.removesuffix("/v1"), "-o", str(output), "--json"]
        return main([*command, *options])


def split(made: dict[str, Any], asked: dict[str, Any]) -> Any:
    choice = made["choices"][0]
    thinking, _, text = choice["text"].partition("</think>")
    choice |= {"text": text, "reasoning_content": thinking}
    return made


def echo(made: dict[str, Any], asked: dict[str, Any]) -> Any:
    made["choices"][0]["text"] = asked["prompt"] + made["choices"][0]["text"]
    return made


HABITS: dict[str, tuple[dict[str, Any], str]] = {
    "token ids": (EXACT, "asks in token ids, gets token ids back"),
    "log-probs": ({"returns": "content"}, "asks in token ids, gets token ids back"),
    "no token ids": ({"strips": False}, "asks in token ids, gets text back"),
    "text": (TEXT, "asks in text, gets text back"),
    "no reason": ({**TEXT, "finish": lambda reason: None}, "does not say why an answer ended"),
    "reasoning": ({**TEXT, "change": split}, "asks in text, gets text back"),
    "echo": ({**TEXT, "change": echo}, "repeats the prompt"),
}


@pytest.mark.parametrize(("habits", "line"), HABITS.values(), ids=HABITS)
def test_an_evaluation_scores_the_same_in_every_dialect(
    habits: dict[str, Any], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(toy(**habits), tmp_path / "out") == 0
    said = capsys.readouterr()
    last = json.loads(said.out)["rows"][-1]
    assert (last["avg"]["value"], last["errors"], last["samples"]) == (1.0, 0, 8)
    assert said.err.count(line) == 1
    assert KEY not in said.out + said.err


@pytest.mark.parametrize(
    ("habits", "options", "text"),
    [
        ({"takes_ids": 400, "wraps": 9}, [], "puts a chat template around each prompt"),
        ({"takes_ids": 404, "takes_text": 404}, [], "One with chat alone cannot be used"),
        ({**EXACT, "heeds": ("temperature", "seed")}, ["--top-k", "5"], "ignores --top-k"),
        ({"takes_fields": False, "strips": False}, ["--min-p", "0.1"], "leave out --top-k"),
    ],
    ids=["template", "chat", "ignored", "no fields"],
)
def test_an_evaluation_that_would_measure_something_else_is_refused(
    habits: dict[str, Any],
    options: list[str],
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate(toy(**habits), tmp_path / "out", *options) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("habits", [EXACT, TEXT], ids=["ids", "text"])
def test_traces_of_a_server_that_changes_in_a_run_are_errors_and_no_scores(
    habits: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, count = toy(**habits), 0

    def upgrade(made: dict[str, Any], asked: dict[str, Any]) -> Any:
        nonlocal count
        count += asked["max_tokens"] > 20
        if count > 3:
            made["choices"][0].pop("token_ids", None)
            made["choices"][0].pop("finish_reason")
        return made

    model.change = upgrade
    assert evaluate(model, tmp_path / "out", "--in-flight", "1") == 0
    last = json.loads(capsys.readouterr().out)["rows"][-1]
    assert last["errors"] == 5
    assert last["avg"]["value"] == 1.0  # of the others
    written = (tmp_path / "out" / "traces.jsonl").read_text()
    assert ("returns no token ids any more" if habits is EXACT else "no finish_reason") in written


@pytest.mark.parametrize(
    ("habits", "status", "found"),
    [
        (EXACT, "ok", "chunk boundaries are exact"),
        (TEXT, "warning", "as exact as text"),
        ({**EXACT, "heeds": ("temperature", "seed", "top_p")}, "warning", "ignores --top-k"),
        ({**EXACT, "heeds": ("temperature", "top_p", "top_k", "min_p")}, "warning", "same seed"),
        ({"takes_ids": 400, "wraps": 9}, "problem", "chat template around each prompt"),
        ({"takes_ids": 503, "takes_text": 503}, "problem", "HTTP 503"),
    ],
    ids=["exact", "text", "cut", "seed", "template", "busy"],
)
def test_the_doctor_shows_how_a_server_is_asked(
    habits: dict[str, Any], status: str, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with listening(toy(**habits), MODELS) as model:
        code = main(["doctor", "-m", "toy", "--base-url", model.url, "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["server"]["status"] == status
    assert found in checks["server"]["found"]
    assert code == (status == "problem")


def test_the_doctor_needs_a_tokenizer_and_an_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--base-url", "http://127.0.0.1:9"]) == 2
    assert "--base-url needs -m MODEL" in capsys.readouterr().err
    assert main(["doctor", "-m", "toy", "--served-model", "m"]) == 2
    assert "--served-model needs --base-url" in capsys.readouterr().err
    assert main(["doctor", "-m", "toy", "--base-url", "http://127.0.0.1:9"]) == 1
    assert "cannot be reached" in capsys.readouterr().out


def test_a_probe_samples_its_traces_from_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thinking = "01101:10010" * 9
    model = toy(script=f"{thinking}</think>1<eos>", **EXACT)
    with listening(model, MODELS):
        command = ["probe", "-m", "toy", "--task", "automaton", "--num-problems", "3"]
        command += ["--task-arg", "min_steps=3", "--task-arg", "max_steps=5"]
        command += ["--budget", "300", "-C", "40", "--carryover-size", "20", "--head-size", "0"]
        command += ["--base-url", model.url, "-o", str(tmp_path / "out"), "--json"]
        assert main(command) == 0
        said = capsys.readouterr()
        assert said.err.count("chunk boundaries are exact") == 1
        assert json.loads(said.out)["lines"]
        sampled = [asked for asked in model.asked if asked["max_tokens"] > 100]
        assert len(sampled) == 3
        assert {asked["temperature"] for asked in sampled} == {0.6}
    for options, text in (
        (["--traces", "x"], "--base-url has no effect"),
        (["--task", "automaton", "engine=vllm"], "engine settings have no effect"),
    ):
        assert main(["probe", "-m", "toy", "--base-url", "http://127.0.0.1:9", *options]) == 2
        assert text in capsys.readouterr().err
