"""The whole way of docs/guide/own_evaluation.md: its file and its commands, in its order.

The default tier takes the shipped toy as the reader's model, with problems in its alphabet, behind
a small server that samples from its weights. No pretrained model can be downloaded by a test, so
the slow tier takes a folder from a variable, and serves it with vLLM:

    DELETHINK_REAL_MODEL=FOLDER pytest -m slow tests/integration/test_own_evaluation.py
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from guide_page import blocks, command_lines
from installed import need
from server_process import started

need("transformers", "scipy", "matplotlib", "bokeh", "openai", "starlette", "uvicorn")

from toy_server import toy_server  # noqa: E402

from delethink.cli.main import main  # noqa: E402
from delethink.engines.loading import locate  # noqa: E402
from delethink.evaluation.records import ResultsDirectory  # noqa: E402

pytestmark = pytest.mark.integration

PAGE = "own_evaluation.md"
REAL = os.environ.get("DELETHINK_REAL_MODEL")
LINES = command_lines(PAGE)
ADDRESS = "http://127.0.0.1:8000/v1"  # of the page
BUDGETS = [16, 24, 32, 40, 48]
SAMPLES = 2
WAIT_S = 7200  # for a command with a pretrained model on a busy machine
_REAL_ONLY = [
    pytest.mark.slow,
    pytest.mark.skipif(not REAL, reason="DELETHINK_REAL_MODEL names no folder"),
]


def find(start: str) -> str:
    """Return the command of the page that begins so."""
    (line,) = [line for line in LINES if line.startswith(start)]
    return line


def problems(is_toy: bool) -> Iterator[str]:
    """Yield lines of the file; the toy has tokens for digits and colons only."""
    for line in blocks(PAGE, "json")[0].splitlines():
        row = json.loads(line)
        if is_toy:
            row["question"] = ":".join(re.findall(r"\d+", row["question"]))
        yield json.dumps(row) + "\n"


class Reader:
    """A folder with the reader's model and file, and what each command said."""

    def __init__(self, folder: Path, model: Path, is_toy: bool) -> None:
        self.folder, self.is_toy = folder, is_toy
        (folder / "my-model").symlink_to(model.resolve(), target_is_directory=True)
        (folder / "sums.jsonl").write_text("".join(problems(is_toy)))
        self.said: dict[str, str] = {}

    def run(self, line: str) -> int:
        """Run a command of the page from the reader's folder, in this process."""
        name, *arguments = shlex.split(line)
        assert name == "delethink"
        handlers = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
        printed = io.StringIO()
        try:
            with (
                contextlib.chdir(self.folder),
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(printed),
            ):
                code = main(arguments)
        finally:
            for sign, handler in handlers.items():
                signal.signal(sign, handler)
        self.said[line] = printed.getvalue()
        assert "Traceback" not in self.said[line]
        return code

    def follow(self, line: str) -> None:
        assert self.run(line) == 0, self.said[line]

    def interrupt(self, line: str) -> None:
        """Press Ctrl-C after the third trace."""
        stored, append = 0, ResultsDirectory.append

        def press(directory: ResultsDirectory, record: Any) -> None:
            nonlocal stored
            append(directory, record)
            stored += 1
            if stored == 3:
                signal.raise_signal(signal.SIGINT)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ResultsDirectory, "append", press)
            assert self.run(line) == 130, self.said[line]

    def kill(self, line: str) -> None:
        """End the command with SIGKILL as soon as a trace is stored."""
        folder = self.folder / shlex.split(line)[shlex.split(line).index("-o") + 1]
        process = subprocess.Popen(
            [sys.executable, "-m", "delethink.cli.main", *shlex.split(line)[1:]],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + WAIT_S
            while not json_lines(folder / "traces.jsonl"):
                assert process.poll() is None, "the command ended by itself"
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()

    def server(self) -> AbstractContextManager[str]:
        if self.is_toy:
            return toy_server(self.folder / "my-model")
        return real_server(self.folder)


@contextlib.contextmanager
def real_server(folder: Path) -> Iterator[str]:
    """Start vLLM as the page does for CPUs."""
    need("vllm")
    (line,) = [
        line
        for code in blocks(PAGE, "text")
        for line in code.replace("\\\n", " ").splitlines()
        if "api_server" in line
    ]
    words = shlex.split(line.partition("#")[0])
    values = dict(word.split("=") for word in words if "=" in word)
    command = [sys.executable, *words[words.index("python") + 1 :]]
    command[command.index("--port") :] = command[command.index("--port") + 2 :]
    command[command.index("./my-model")] = str(folder / "my-model")
    (folder / "server").mkdir()
    environment = {**values, "VLLM_NO_USAGE_STATS": "1", "TORCH_COMPILE_DISABLE": "1"}
    with started([*command, "--enforce-eager"], environment, folder / "server") as address:
        yield f"{address}/v1"


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a file, which may not be there yet."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture(scope="module", params=["toy", pytest.param("real", marks=_REAL_ONLY)])
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A reader who has gone through the whole page."""
    is_toy = request.param == "toy"
    model = Path(locate("toy")) if is_toy else Path(str(REAL))
    reader = Reader(tmp_path_factory.mktemp("reader"), model, is_toy)
    for line in LINES:
        if line.startswith("delethink eval -m ./my-model") and "-o out/local" in line:
            stop = reader.interrupt if is_toy else reader.kill
            stop(line)
        elif ADDRESS in line:
            with reader.server() as address:
                reader.follow(line.replace(ADDRESS, address))
            reader.said[line] = reader.said.pop(line.replace(ADDRESS, address))
        else:
            reader.follow(line)
    return reader


def test_the_grader_of_the_file_is_right(reader: Reader) -> None:
    said = reader.said[find("delethink tasks")]
    assert "4 gold and 4 wrong answers of 4 problems, 0 not scored as expected" in said


def test_an_interrupted_evaluation_goes_on_from_its_folder_alone(reader: Reader) -> None:
    said = reader.said["delethink eval out/local"]
    if reader.is_toy:  # the other model's traces all end together, after the interrupt
        assert re.search(r"traces of up to 48 tokens, \d+ of them from an earlier run", said)
    for name in ("local", "served"):
        lines = json_lines(reader.folder / "out" / name / "traces.jsonl")
        keys = {(line["setting"], line["problem"], line["sample"]) for line in lines}
        assert len(lines) == len(keys) == 2 * 4 * SAMPLES  # Delethink and LongCoT
        assert [line["error"] for line in lines] == [None] * len(lines)


@pytest.mark.parametrize("name", ["local", "served"])
def test_five_budgets_are_reported(reader: Reader, name: str) -> None:
    rows = json.loads((reader.folder / "out" / name / "results.json").read_text())["rows"]
    for mode in ("delethink", "longcot"):
        assert [row["budget"] for row in rows if row["mode"] == mode] == BUDGETS
    assert (reader.folder / "out" / name / "report.html").stat().st_size > 100_000


def test_the_server_gave_exact_boundaries(reader: Reader) -> None:
    (line,) = [line for line in LINES if ADDRESS in line]
    assert "asks in token ids, gets token ids back" in " ".join(reader.said[line].split())


def test_the_comparison_pairs_both_folders(reader: Reader) -> None:
    said = reader.said["delethink eval compare out/local out/served"]
    assert "local: ./my-model" in said
    assert "served: ./my-model" in said
    assert "second minus first, on the same problems" in said
    if reader.is_toy:  # the same weights, engine and seeds
        tokens = [
            {
                (line["setting"], line["problem"], line["sample"]): line["output_ids"]
                for line in json_lines(reader.folder / "out" / name / "tokens.jsonl")
            }
            for name in ("local", "served")
        ]
        assert tokens[0] == tokens[1]


def test_the_probe_scores_the_traces_of_the_evaluation(reader: Reader) -> None:
    found = json.loads((reader.folder / "out" / "probe" / "probe.json").read_text())
    assert found["traces"] == 4 * SAMPLES
    assert {line["carryover_size"] for line in found["lines"]} == {4, 8}


def test_cost_takes_the_lengths_of_the_evaluation(reader: Reader) -> None:
    own, planned = (reader.said[line] for line in LINES if line.startswith("delethink cost"))
    assert "my-model" in own
    assert "thinking tokens per trace" in own
    assert "24,576 thinking tokens per trace" in planned


def test_cost_needs_no_weights(reader: Reader, tmp_path: Path) -> None:
    shape = tmp_path / "shape"
    shape.mkdir()
    (shape / "config.json").write_bytes((reader.folder / "my-model" / "config.json").read_bytes())
    line = find("delethink cost -m ./my-model --thinking")
    reader.follow(line.replace("./my-model", str(shape)))
    assert "B parameters" in reader.said[line.replace("./my-model", str(shape))]
