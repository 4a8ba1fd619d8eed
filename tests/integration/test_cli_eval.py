"""``delethink eval`` as a person meets it: the toy reasoner, interrupts, mistakes."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from delethink.cli.main import main

pytestmark = pytest.mark.integration

SMALL = [
    *("-m", "toy", "--task", "automaton", "--task-arg", "min_steps=4", "--task-arg", "max_steps=9"),
    *("-C", "60", "--carryover-size", "30", "--head-size", "0", "--num-problems", "8", "-n", "2"),
    *("--gpu", "cpu", "engine=transformers"),
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "delethink.cli.main", "eval", *arguments]


class Done(NamedTuple):
    code: int
    out: str
    err: str


def run(*arguments: str, cwd: Path) -> Done:
    """The command in this process, where torch has been loaded once for all."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(["eval", *arguments])
        finally:
            for sign, handler in handlers.items():
                signal.signal(sign, handler)
    return Done(code, out.getvalue(), err.getvalue())


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("finished")
    done = run(*SMALL, "--max-chunks", "1,2,4", "-o", "out", "--bootstrap", "128", cwd=folder)
    assert done.code == 0, done.err
    return folder / "out", done.out


def test_it_prints_tables_with_intervals_progress_and_the_folder(
    finished: tuple[Path, str],
) -> None:
    _, printed = finished
    assert re.search(r"16/16  accuracy \d\.\d{3} \(\d\.\d{3}-\d\.\d{3}\)  \d+ tokens/s", printed)
    for word in ("toy | longcot", "pass@2", "maj@2", "second minus first", "avg@128"):
        assert word in printed
    assert printed.strip().endswith("results: out")


def test_the_folder_holds_numbers_and_curves(finished: tuple[Path, str]) -> None:
    path, _ = finished
    found = results(path)
    assert [(row["mode"], row["budget"]) for row in found["rows"]] == [
        (mode, budget) for mode in ("delethink", "longcot") for budget in (60, 90, 150)
    ]
    for row in found["rows"]:
        assert row["flops"] > 0
        assert row["seconds"] > 0
        assert row["avg"]["low"] <= row["avg"]["value"] <= row["avg"]["high"]
        assert row["processed_tokens"] > row["thinking_tokens"]["value"]
    timing = json.loads((path / "timing.json").read_text())
    assert all(one["seconds"] > 0 and one["tokens_per_second"] > 0 for one in timing.values())
    assert (path / "curves.png").read_bytes().startswith(b"\x89PNG")
    points = list(csv.DictReader((path / "curves.csv").open()))
    assert {p["kind"] for p in points} == {"avg", "pass", "maj"}
    assert {p["setting"] for p in points} == {row["setting"] for row in found["rows"]}
    page = (path / "report.html").read_text()
    data = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page)
    assert data is not None
    assert len(json.loads(data[1])) == 9  # three kinds of scaling on three axes
    for row in found["rows"]:
        assert row["setting"] in page
    assert (path / "report.html").stat().st_size < 5e6


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_smaller_budget_equals_a_run_of_its_own(
    finished: tuple[Path, str], chunks: int, tmp_path: Path
) -> None:
    """The toy itself, through the engine: other batches, other lengths, the same seeds."""
    done = run(*SMALL, "--max-chunks", f"{chunks},{chunks}", "-o", "own", cwd=tmp_path)
    assert done.code == 0, done.err
    budget = 30 + 30 * chunks

    def at_budget(path: Path) -> dict[tuple[Any, ...], Any]:
        lines = [json.loads(line) for line in (path / "traces.jsonl").read_text().splitlines()]
        return {
            (line["setting"], line["problem"], line["sample"]): outcome
            for line in lines
            for outcome in line["outcomes"]
            if outcome["budget"] == budget
        }

    whole, own = at_budget(finished[0]), at_budget(tmp_path / "own")
    assert len(own) == 32
    assert whole == own


def test_killed_and_interrupted_and_resumed_it_gives_the_same_results(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    arguments = [*SMALL, "--max-chunks", "1,2,4", "-o", "out", "--bootstrap", "128"]
    traces = tmp_path / "out" / "traces.jsonl"
    for sign, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        resume = ["--resume"] if traces.exists() else []
        size = traces.stat().st_size if traces.exists() else 0
        process = subprocess.Popen(
            command(*arguments, *resume, "--in-flight", "2"),
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        while process.poll() is None and (not traces.exists() or traces.stat().st_size <= size):
            time.sleep(0.005)
        process.send_signal(sign)
        _, said = process.communicate()
        assert process.returncode == code, said.decode()
        assert b"Traceback" not in said
    before = traces.read_bytes()
    assert 0 < before.count(b"\n") < 32
    done = run(*arguments, "--resume", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert traces.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert results(tmp_path / "out") == results(finished[0])
    said = json.loads(done.out)
    assert said["rows"] == results(tmp_path / "out")["rows"]


def write_problems(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_of_problems_and_two_models_in_one_table(tmp_path: Path) -> None:
    import shutil

    from delethink.engines.loading import locate

    shutil.copytree(locate("toy"), tmp_path / "trained")
    file = write_problems(
        tmp_path / "problems.jsonl",
        {"ask": "01:01101001101", "gold": "11011001011"},
        {"ask": "01:11111111111", "gold": "00000000000"},
    )
    done = run(
        *[
            "-m",
            "toy,trained",
            "--mode",
            "longcot",
            "-C",
            "40",
            "--max-chunks",
            "1",
            "-n",
            "2",
            "engine=transformers",
        ],
        *["--task", file, "--task-arg", "problem_key=ask", "--task-arg", "answer_key=gold"],
        *["--task-arg", "template={problem}", "--reward", "exact"],
        *["-o", "out", "--json", "--no-curves", "--head-size", "0", "--no-tokens"],
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [row["model"] for row in found["rows"]] == ["toy", "trained"]
    (one,) = found["comparisons"]
    assert one["difference"]["value"] == 0
    assert one["difference"]["verdict"] == "not enough data"
    assert (tmp_path / "out" / "tokens.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("-m toy --task automatn", "unknown task 'automatn'. Did you mean 'automaton'?"),
        ("-m ./nowhere --task problems.jsonl", "the model folder nowhere does not exist"),
        ("-m toy --task problems.jsonl --mode delethonk", "Did you mean 'delethink'?"),
        ("-m toy --task problems.jsonl --reward exac", "Did you mean 'exact'?"),
        ("-m toy --task nowhere.jsonl", "the data set nowhere.jsonl does not exist"),
        ("-m toy --task problems.txt", "unknown task 'problems.txt'"),
        ("-m toy --task empty.jsonl", "has no problem"),
        ("-m toy --task broken.jsonl", "row 2 of broken.jsonl must be an object, got list"),
        (
            "-m toy --task problems.jsonl --task-arg answer_key=x",
            "has no column 'x'. Allowed:",
        ),
        ("-m toy --task problems.jsonl --task-arg anser_key=x", "Did you mean 'answer_key'?"),
        ("-m toy --task automaton", "the task 'automaton' needs 'min_steps'"),
        ("-m toy --task problems.jsonl --task-arg x", "KEY=VALUE, got 'x'"),
        (
            "-m toy --task problems.jsonl -C 90 --carryover-size 90",
            "carryover_size must be at least 0",
        ),
        ("-m toy --task problems.jsonl -C many", "-C: a whole number of tokens"),
        ("-m toy --task problems.jsonl -C 90 --max-chunks 0", "--max-chunks: a whole number"),
        ("-m toy --task problems.jsonl -n 0", "--samples must be at least 1, got 0"),
        ("-m toy --task problems.jsonl --num-problems 0", "at least 1, got 0"),
        ("-m toy --task problems.jsonl -C 90 --temperature -1", "at least 0, got -1.0"),
        ("-m toy,toy --task problems.jsonl", "names a model twice"),
        ("-m toy --task problems.jsonl --gpu h900", "h900"),
        ("-m toy --task problems.jsonl --cost-model ./nosuch", "nosuch"),
        ("-m toy --task problems.jsonl --resume", "--resume needs -o PATH"),
        ("-m toy --task problems.jsonl --force", "--force needs --resume"),
        ("-m toy --task problems.jsonl -C 90 --resume -o gone", "no evaluation to resume"),
        ("-m toy --task problems.jsonl -C 90 -o full", "full is not empty"),
        ("-m toy --task problems.jsonl -C 90 -o problems.jsonl/x", "cannot write"),
        ("-m toy --task problems.jsonl -C 90 --base-url 127.0.0.1:1", "must start with http://"),
        ("-m toy --task problems.jsonl -C 90 --base-url http://127.0.0.1:9/v1", "cannot be rea"),
        (
            "-m toy --task problems.jsonl --base-url http://127.0.0.1:9/v1 engine=vllm",
            "engine settings have no effect: remove engine=vllm",
        ),
        ("-m toy --task problems.jsonl --served-model x", "--served-model needs --base-url"),
        ("-m toy --task problems.jsonl --carryover 4k", "write --carryover-size 4k"),
        ("-m toy --task problems.jsonl --carryover tial", "Did you mean 'tail'?"),
        ("-m toy --task problems.jsonl --carryover tail:x=1", "has no parameter 'x'"),
        ("-m toy --task problems.jsonl --engine vllm", "now written engine=vllm"),
        ("-m toy --task problems.jsonl --num-workers 2", "now written engine.num_engines=2"),
        ("-m toy --task problems.jsonl --batch-size 9", "now written engine.max_batch_size=9"),
        ("-m toy --task problems.jsonl engine.num_engine=2", "Did you mean"),
        ("-m toy --task problems.jsonl training.seed=2", "unknown setting 'training'"),
        ("-m toy --task problems.jsonl --mode longcot -C 8k --max-chunks 23", "98304 of thinking"),
        ("-m toy --task problems.jsonl --mode delethink -C 8k", "lower -C to"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing_behind(
    arguments: str, said: str, tmp_path: Path
) -> None:
    write_problems(tmp_path / "problems.jsonl", {"problem": "01:01101001101", "answer": "1"})
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"problem": "a", "answer": "b"}\n[1]\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    plain = ["--task-arg", "template={problem}"] if "jsonl" in arguments else []
    plain += [] if "--reward" in arguments else ["--reward", "exact"]
    plain += [] if "--base-url" in arguments else ["engine=transformers"]
    done = run(*arguments.split(), *plain, cwd=tmp_path)
    assert done.code == 2
    assert said in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_longcot_can_be_capped_at_the_window_on_purpose(tmp_path: Path) -> None:
    file = write_problems(tmp_path / "p.jsonl", {"problem": "01:01101001101", "answer": "1"})
    arguments = "-m toy --mode longcot -C 8k --max-chunks 5,23 -n 1 engine=transformers --json "
    arguments += "--task-arg template={problem} --reward exact"
    done = run("--task", file, *arguments.split(), "--cap-longcot", "-o", "out", cwd=tmp_path)
    assert done.code == 0, done.err
    (row,) = json.loads(done.out)["rows"]
    assert row["budget"] < 8192


def test_the_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "guide" / "evaluation.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/guide/evaluation.md", "exec"), {})
    assert "toy | longcot" in capsys.readouterr().out
    assert len((tmp_path / "out" / "traces.jsonl").read_text().splitlines()) == 32


def test_the_papers_preset_and_answers_that_are_asked_for(tmp_path: Path) -> None:
    file = write_problems(tmp_path / "p.jsonl", {"problem": "09:01101001101", "answer": "1"})
    arguments = "-m toy --mode delethink -C 40 --head-size 0 --max-chunks 2 engine=transformers"
    done = run(
        *["--task", file, *arguments.split(), "--preset", "paper", "--force-answer", "14"],
        *["-o", "out", "--no-curves", "--json"],
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["samples"], found["temperature"]) == (256, 0.6)
    assert [row["budget"] for row in found["rows"]] == [40, 60]
    for row in found["rows"]:
        assert row["samples"] == 256
        assert (row["bootstrap"]["k"], row["bootstrap"]["resamples"]) == (128, 5000)
        assert row["forced"] == row["out_of_budget"] > 0.9
    lines = (tmp_path / "out" / "traces.jsonl").read_text().splitlines()
    assert any(json.loads(line)["outcomes"][0]["vote"] for line in lines)
