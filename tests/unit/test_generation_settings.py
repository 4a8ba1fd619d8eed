"""Generation settings of a checkpoint never keep a run from saving its own checkpoints."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from delethink.engines.loading import load_model, load_shell
from delethink.errors import ModelError

TOY = Path(__file__).parents[2] / "delethink" / "assets" / "toy_reasoner"


def folder_with(tmp_path: Path, text: str) -> str:
    folder = Path(shutil.copytree(TOY, tmp_path / "model"))
    (folder / "generation_config.json").write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "left_out", "kept"),
    [
        ({"temperature": 0.6, "top_p": 0.95}, ["temperature", "top_p"], {}),
        ({"temperature": 1e-6, "do_sample": False}, ["temperature"], {"do_sample": False}),
        ({"temperature": 0.9, "top_k": 20, "min_p": 0.1}, ["min_p", "temperature", "top_k"], {}),
        ({"early_stopping": True}, ["early_stopping"], {}),
        ({"length_penalty": 2.0}, ["length_penalty"], {}),
        ({"typical_p": 0.5, "max_length": 99}, ["typical_p"], {"max_length": 99}),
        ({"do_sample": True, "temperature": 0.6}, [], {"do_sample": True, "temperature": 0.6}),
        ({"repetition_penalty": 1.05}, [], {"repetition_penalty": 1.05}),
    ],
)
def test_a_checkpoint_is_saved_and_loaded_again(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    left_out: list[str],
    kept: dict[str, Any],
) -> None:
    text = json.dumps(settings | {"eos_token_id": [1, 4]})
    with caplog.at_level(logging.WARNING, "delethink"):
        model = load_model(folder_with(tmp_path, text), "float32")
    notes = [record.getMessage() for record in caplog.records if "leave out" in record.getMessage()]
    assert [note.partition("leave out ")[2].partition(";")[0] for note in notes] == (
        [", ".join(left_out)] if left_out else []
    )
    for again in ("first", "second"):  # the second from the first, as a run that is resumed
        model.save_pretrained(tmp_path / again)
        saved = json.loads((tmp_path / again / "generation_config.json").read_text())
        assert saved["eos_token_id"] == [1, 4]
        assert {name: saved.get(name) for name in kept} == kept
        assert not {name for name in left_out if saved.get(name) is not None}
        model = load_model(str(tmp_path / again), "float32")


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"early_stopping": "often"}', '{"num_return_sequences": 4}']
)
def test_settings_that_cannot_be_read_are_a_sentence(tmp_path: Path, text: str) -> None:
    """Or are left out, if they only cannot be saved."""
    folder = folder_with(tmp_path, text)
    with suppress(ModelError):
        load_shell(folder)
        load_model(folder, "float32").save_pretrained(tmp_path / "saved")
