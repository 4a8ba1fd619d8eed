"""Mistakes of users, made through the command: each is refused in one sentence of ours."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delethink.cli.main import main

TOY = Path(__file__).parents[2] / "delethink" / "assets" / "toy_reasoner"
RECIPE = """\
name: r
model: toy
task:
  name: automaton
  args: {min_steps: 2, max_steps: 4}
thinking: {context_size: 32, carryover_size: 16, max_chunks: 2, head_size: 0}
training: {max_steps: 1, num_generations: 2, per_device_train_batch_size: 2}
evaluation: {num_problems: 0}
engine: transformers
"""
TRAIN = ("train", "r.yaml", "output=run")
EVAL = (
    *("eval", "--task", "automaton", "--task-arg", "min_steps=2", "--task-arg", "max_steps=4"),
    *("--num-problems", "2", "-n", "1", "-C", "32", "--carryover-size", "16", "--max-chunks", "2"),
    *("--head-size", "0", "--mode", "delethink", "-o", "out"),
)
LOCAL = (*EVAL, "-m", "model", "engine=transformers")
# Words of libraries that mean nothing to a user here, or name settings that do not exist here.
FOREIGN = (
    "Traceback",
    "pydantic",
    "nput should be",
    "valid dictionary",
    "unable to parse",
    "Value error",
    "<unicode string>",
    "could not determine a constructor",
    "PreTrainedConfig",
    "Should have a `model_type`",
    "custom code which must be executed",
    "trust_remote_code=True",
    "does not recognize this architecture",
    "Unrecognized",
    "Repo id must",
    "Target modules {",
    "target_parameters",
    "`max_model_len`",
    "max_num_seqs`",
    "`gpu_memory_utilization`",
    "RayTaskError",
    "RaySystemError",
    "ray::",
    "huggingface.co/docs",
    "See https://",
)


@dataclass(frozen=True)
class Mistake:
    """Arguments of the command in a folder with files, and words of the sentence expected."""

    arguments: tuple[str, ...]
    words: tuple[str, ...]
    files: Mapping[str, str | bytes | None] = field(default_factory=dict)  # ``None``: a folder
    damage: Callable[[Path], Any] | None = None  # of a copy of the toy in "model"
    code: int = 2
    never: tuple[str, ...] = ()

    def prepare(self, folder: Path) -> None:
        """Write the files."""
        if self.damage is not None:
            shutil.copytree(TOY, folder / "model")
            self.damage(folder / "model")
        for name, content in ({"r.yaml": RECIPE} | dict(self.files)).items():
            if content is None:
                (folder / name).mkdir()
            else:
                data = content if isinstance(content, bytes) else content.encode()
                (folder / name).write_bytes(data)


def train(*overrides: str, words: tuple[str, ...], **rest: Any) -> Mistake:
    return Mistake((*TRAIN, *overrides), words, **rest)


def recipe(text: str | bytes, *words: str) -> Mistake:
    return Mistake(TRAIN, words, files={"r.yaml": text})


def model(damage: Callable[[Path], Any], *words: str, more: tuple[str, ...] = ()) -> Mistake:
    return Mistake((*LOCAL, *more), words, damage=damage)


def change(file: str, **values: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file of a model; ``None`` sets null, ``...`` removes a key."""

    def damage(folder: Path) -> None:
        known = json.loads((folder / file).read_text()) | values
        kept = {key: value for key, value in known.items() if value is not ...}
        (folder / file).write_text(json.dumps(kept))

    return damage


def write(file: str, content: str | bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / file).write_bytes(data)

    return damage


def remove(*files: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return damage


def assert_refused(mistake: Mistake, folder: Path) -> None:
    """Make a mistake in this process, where libraries are loaded once for all."""
    mistake.prepare(folder)
    out, err = io.StringIO(), io.StringIO()
    handlers = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(mistake.arguments)
        except SystemExit as exit:  # of argparse
            code = int(exit.code or 0)
        finally:
            for sign, handler in handlers.items():
                signal.signal(sign, handler)
    assert_is_sentence(mistake, code, out.getvalue(), err.getvalue())


def assert_is_sentence(mistake: Mistake, code: int, out: str, err: str) -> None:
    shown = f"{out}\n{err}"
    assert code == mistake.code, shown
    lines = [line for line in err.splitlines() if line.startswith("delethink: ")]
    assert len(lines) == 1, shown
    assert err.rstrip().endswith(lines[0]), shown
    for word in mistake.words:
        assert word in lines[0], lines[0]
    for word in (*FOREIGN, *mistake.never):
        assert word not in shown, shown
