"""Mistakes on the command line of evaluations and probes, refused before anything loads."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from delethink.cli.main import main

EVAL = "eval -m ./my-model --task sums.jsonl -C 16"
MISTAKES = {
    "file": ("eval -m toy --task sum.jsonl", "no such file or folder. Did you mean 'sums.jsonl'?"),
    "stem": ("eval -m toy --task sums", "unknown task 'sums'. Did you mean 'sums.jsonl'?"),
    "carryover": (f"{EVAL} --carryover-size 24", "got carryover_size=24 and context_size=16"),
    "number": (f"{EVAL} -m 8", "-m is the model, got the number '8': write --carryover-size 8"),
    "address": (f"{EVAL} --base-url localhost:8000", "must start with http:// or https://"),
    "column": (f"{EVAL} --answer-key total", "--answer-key. Write --task-arg answer_key=…"),
    "budget": (f"{EVAL} --budget 64", "Budgets follow from -C, --carryover-size and --max-chunks"),
    "spelling": (f"{EVAL} --max-chunk-s 5", "Did you mean --max-chunks?"),
    "folder": ("eval compare out/a out/b", "there is no folder out/a"),
    "boundary": (
        "probe -m toy --task sums.jsonl -C 16 --carryover-size 8 --budget 16",
        "--budget 16 ends within the first context of -C 16",
    ),
    "traces": ("probe -m toy --traces out/a -C 16", "there are no traces at out/a: name a file"),
    "size": ("probe -m 8k --traces sums.jsonl", "write --carryover-size 8k"),
}


@pytest.mark.parametrize("name", sorted(MISTAKES))
def test_a_mistake_is_told_before_a_model_is_looked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("transformers", "rich", "scipy", "matplotlib", "bokeh"):
        pytest.importorskip(package)
    (tmp_path / "sums.jsonl").write_text('{"problem": "1:2", "total": "3"}\n')
    monkeypatch.chdir(tmp_path)
    for refused in ("load_tokenizer", "load_shell"):
        monkeypatch.setattr(f"delethink.evaluation.models.{refused}", _refuse)
    command, sentence = MISTAKES[name]
    try:
        code = main(shlex.split(command))
    except SystemExit as error:  # of argparse
        code = int(str(error.code))
    assert code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def _refuse(*_: object) -> None:
    raise AssertionError("a model was looked for")


def test_a_file_of_something_else_is_no_file_of_traces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "sums.jsonl"
    path.write_text('{"question": "1:2", "total": "3"}\n')
    assert main(["probe", "-m", "toy", "--traces", str(path), "-C", "16"]) == 2
    assert "this is no trace: it has no 'chunks', but 'question', 'total'" in (
        capsys.readouterr().err
    )
