"""Hostile texts and secrets through each command: what is printed is safe, no file has a secret.

The texts come from task rows, file and model names, recipes, a server, and traces.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from delethink import Chunk, Problem, StopReason, Trace, TraceStop, redaction
from delethink.cli.main import main
from delethink.output import visible
from delethink.trace_io import TraceRecord, read_traces, write_traces

pytestmark = pytest.mark.integration

HOSTILE = "\x1b]0;title\x07\x1b[2J\u202eevil\u2066\u200b\ufeff\u2028\U000e0041\x9b\x7f\r"
KEY, TOKEN, PASSWORD = "sk-3f9a0c77e1b2", "hf_0123456789abcdef", "a-password-of-16"
TOY = Path(__file__).parents[2] / "delethink" / "assets" / "toy_reasoner"
SIZES = ["-C", "60", "--carryover-size", "30", "--head-size", "0"]


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def secrets_of_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(redaction, "_registered", set())
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("DELETHINK_OUTPUT", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / f"toy{HOSTILE}"
    shutil.copytree(TOY, folder)
    return str(folder)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """A data set whose problems and answers are hostile and hold a secret."""
    file = tmp_path / f"rows{HOSTILE}.jsonl"
    each = [{"problem": f"{i} {HOSTILE} {TOKEN}", "answer": f"{i}{HOSTILE}"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in each))
    return str(file)


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> Done:
    """The command in this process, where torch has been loaded once; no secret is printed."""
    handlers = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = main(arguments)
    except SystemExit as error:  # of argparse
        code = int(error.code or 0)
    finally:
        for sign, handler in handlers.items():
            signal.signal(sign, handler)
    printed = capfd.readouterr()
    for text in printed:
        text = text.replace("\r", "\n")  # of progress bars
        assert visible(text) == text
        assert not secrets_in(text.encode())
    return Done(code, printed.out, printed.err)


def secrets_in(data: bytes) -> list[str]:
    basic = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
    return [secret for secret in (KEY, TOKEN, PASSWORD, basic) if secret.encode() in data]


def assert_no_secret_in(folder: Path) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    assert {file.name: found for file in files if (found := secrets_in(file.read_bytes()))} == {}


@contextmanager
def serving(*statuses: int, text: str) -> Iterator[str]:
    """A server that repeats the Authorization header in errors and completions, in turn."""
    asked = 0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(200, {"data": [{"id": f"model {HOSTILE} {self._header()}"}]})

        def do_POST(self) -> None:
            nonlocal asked
            status = statuses[asked % len(statuses)]
            asked += 1
            self.rfile.read(int(self.headers["Content-Length"]))
            said = text.replace("HEADER", self._header())
            choice = {"text": said, "finish_reason": "stop"}
            self._reply(status, {"choices": [choice]} if status == 200 else said)

        def _header(self) -> str:
            return str(self.headers["Authorization"])

        def _reply(self, status: int, body: object) -> None:
            data = json.dumps(body).encode() if isinstance(body, dict) else str(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_tasks(rows: str, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["tasks", "dataset", "--dataset", rows]
    shown = run(capfd, *given, "-n", "3")
    assert r"\x1b]0;title\x07\x1b[2J\u202eevil" in shown.out
    report = json.loads(run(capfd, *given, "-n", "3", "--check", "0", "--json").out)
    assert HOSTILE in report["problems"][0]["prompt"]
    for wrong in ([*given, f"column{HOSTILE}=1"], ["tasks", HOSTILE], [*given, f"--{HOSTILE}"]):
        done = run(capfd, *wrong)
        assert done.code == 2
        assert r"\u202eevil" in done.err


def test_cost(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert r"\u202eevil" in run(capfd, "cost", "-m", model).out
    assert run(capfd, "cost", "-m", HOSTILE).code == 2


def recipe(folder: Path, model: str, rows: str) -> str:
    file = folder / f"recipe{HOSTILE}.yaml"
    values = {
        "name": f"run{HOSTILE}",
        "model": model,
        "task": {"name": "dataset", "args": {"dataset": rows}},
        "rewards": {"exact": 1.0, f"second{HOSTILE}": {"reward": "normalized"}},
        "thinking": {"context_size": 6, "carryover_size": 3, "max_chunks": 2, "head_size": 0},
        "training": {
            **{"max_steps": 1, "num_generations": 2, "per_device_train_batch_size": 4},
            "save_steps": None,
        },
        "evaluation": {"num_problems": 2, "num_problems_at_intervals": 2},
        "engine": "transformers",
        "preflight": "warn",
    }
    file.write_text(yaml.safe_dump(values))
    return str(file)


def test_doctor_and_train(
    model: str, rows: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path, model, rows)
    assert "checks:" in run(capfd, "doctor", file).out
    assert run(capfd, "doctor", file, f"wrong{HOSTILE}=1").code == 2
    done = run(capfd, "train", file, "output=out")
    assert done.code == 0, done.err
    assert r"run directory: " in done.out
    (traces,) = (tmp_path / "out" / "traces").glob("*.jsonl")
    first = next(read_traces(traces))
    assert HOSTILE in first.problem.prompt
    assert "***" in first.problem.prompt
    assert_no_secret_in(tmp_path / "out")


def evaluation(model: str, url: str, *more: str) -> list[str]:
    arguments = ["eval", "-m", model, "--task", "automaton", "--task-arg", "min_steps=3"]
    arguments += ["--task-arg", "max_steps=8", "--num-problems", "4", "-n", "2", *SIZES]
    return [*arguments, "--max-chunks", "1,2", "--retries", "0", "--base-url", url, *more]


def test_eval_with_a_server_that_repeats_the_key(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(200, 200, 200, 200, 500, text=f"HEADER {HOSTILE} </think>01 HEADER") as address:
        more = ["-o", "out", "--served-model", f"model {HOSTILE} Bearer {KEY}"]
        done = run(capfd, *evaluation(model, f"http://{address}", *more))
    assert done.code == 0, done.err
    assert r"\u202eevil" in done.out
    assert "HTTP 500" in done.out
    assert "Bearer ***" in done.out
    assert_no_secret_in(tmp_path / "out")
    for name in ("curves.csv", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        text = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)  # the plotting library
        assert visible(text) == text


@pytest.mark.parametrize("status", [400, 401, 500])
def test_eval_with_a_server_that_refuses(
    status: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(status, text=f"got HEADER {HOSTILE}") as address:
        for user in ("", f"user:{PASSWORD}@"):
            more = ["-o", f"out{user[:1]}", "--no-curves"]
            done = run(capfd, *evaluation("toy", f"http://{user}{address}", *more))
            assert done.code == (1 if status == 500 else 2)
            assert r"\u202eevil" in done.out + done.err
    for folder in tmp_path.glob("out*"):
        assert_no_secret_in(folder)


def test_eval_where_no_server_is(capfd: pytest.CaptureFixture[str]) -> None:
    for scheme, path in (("http", ""), ("http", HOSTILE), ("ftp", HOSTILE)):
        url = f"{scheme}://user:{PASSWORD}@127.0.0.1:9/v1{path}"
        assert run(capfd, *evaluation("toy", url, "--no-curves")).code == 2


def test_probe(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chunk = Chunk((5, 6), (7,) * 100, (0.0,) * 100, StopReason.EOS)
    trace = Trace((5, 6), (chunk,), TraceStop.COMPLETED)
    record = TraceRecord(Problem(HOSTILE, HOSTILE, {HOSTILE: TOKEN}), trace, text=HOSTILE + TOKEN)
    write_traces(tmp_path / "traces.jsonl", [record])
    (tmp_path / f"bad{HOSTILE}.jsonl").write_text("{}\n")
    probe = ["probe", "-m", model, *SIZES]
    done = run(capfd, *probe, "--traces", "traces.jsonl", "-o", "out")
    assert r"\u202eevil" in done.out + done.err
    assert run(capfd, *probe, "--traces", f"bad{HOSTILE}.jsonl", "-o", "other").code == 2
    page = (tmp_path / "out" / "probe.md").read_text()
    assert visible(page) == page
    assert not secrets_in((tmp_path / "traces.jsonl").read_bytes())


def test_a_run_is_resumed_only_with_its_secrets(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    given = recipe(tmp_path, "toy", "rows.jsonl")
    config = yaml.safe_load(Path(given).read_text())
    config["task"]["args"]["api_key"] = "***"
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(config))
    done = run(capfd, "train", "run")
    assert done.code == 2
    assert "to resume it, give task.args.api_key=VALUE" in done.err
