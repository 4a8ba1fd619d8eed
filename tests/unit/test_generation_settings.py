"""Generation settings of a checkpoint never keep a run from saving its own checkpoints."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import GenerationConfig

from delethink.engines.generation_settings import (
    savable_settings,
    savable_values,
    settings_of_config,
)
from delethink.engines.loading import check_checkpoint, load_model, load_shell
from delethink.engines.transformers import TransformersEngine
from delethink.errors import ModelError
from delethink.policy import Sampling

TOY = Path(__file__).parents[2] / "delethink" / "assets" / "toy_reasoner"

NAMES = [*(name for name in GenerationConfig().to_dict() if name[0] != "_"), "of_mine", "validate"]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.floats(-2, 2),
    st.sampled_from(["static", "never", "x", "", [1, 2], ["a"], {}, {"mode": "x"}, [[1], [2]]]),
)


def folder_with(tmp_path: Path, text: str) -> str:
    folder = Path(shutil.copytree(TOY, tmp_path / "model"))
    (folder / "generation_config.json").write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    ("values", "left_out", "kept"),
    [
        ({"temperature": 0.6, "top_p": 0.95}, ["temperature", "top_p"], {}),
        ({"temperature": 1e-6, "do_sample": False}, ["temperature"], {"do_sample": False}),
        ({"temperature": 0.9, "top_k": 20, "min_p": 0.1}, ["min_p", "temperature", "top_k"], {}),
        ({"early_stopping": True}, ["early_stopping"], {}),
        ({"length_penalty": 2.0}, ["length_penalty"], {}),
        ({"typical_p": 0.5, "max_length": 99}, ["typical_p"], {"max_length": 99}),
        (
            {"num_return_sequences": 4, "of_mine": {"b": [1]}},
            ["num_return_sequences"],
            {"of_mine": {"b": [1]}},
        ),
        ({"do_sample": True, "temperature": 0.6}, [], {"do_sample": True, "temperature": 0.6}),
        ({"repetition_penalty": 1.05}, [], {"repetition_penalty": 1.05}),
    ],
)
def test_a_checkpoint_is_saved_and_loaded_again(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    values: dict[str, Any],
    left_out: list[str],
    kept: dict[str, Any],
) -> None:
    text = json.dumps(values | {"eos_token_id": [1, 4]})
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
    ("values", "left_out", "kept"),
    [
        ({"num_return_sequences": 4}, ["num_return_sequences"], {}),
        (
            {"num_return_sequences": 4, "num_beams": 2, "max_length": 99},
            ["num_return_sequences"],
            {"num_beams": 2, "max_length": 99},
        ),
        (
            {"num_return_sequences": 4, "do_sample": True, "temperature": 0.6},
            [],
            {"num_return_sequences": 4, "do_sample": True},
        ),
        (
            {"num_return_sequences": 4, "temperature": 0.6, "early_stopping": "often"},
            ["early_stopping", "num_return_sequences", "temperature"],
            {},
        ),
        ({"num_beams": 4, "early_stopping": True}, [], {"num_beams": 4, "early_stopping": True}),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, [], {"num_beams": 4}),
        ({"penalty_alpha": 0.6, "top_k": 4}, ["top_k"], {"penalty_alpha": 0.6}),
        ({"do_sample": True, "penalty_alpha": 0.6, "top_k": 4}, [], {"penalty_alpha": 0.6}),
        ({"cache_implementation": "static"}, [], {"cache_implementation": "static"}),
        ({"cache_implementation": "of my own"}, ["cache_implementation"], {}),
        (
            {"cache_implementation": "static", "use_cache": False},
            ["cache_implementation"],
            {"use_cache": False},
        ),
        ({"compile_config": {"mode": "default"}}, ["compile_config"], {}),
        ({"max_new_tokens": 0}, ["max_new_tokens"], {}),
        ({"max_new_tokens": "many"}, ["max_new_tokens"], {}),
        ({"output_scores": True}, ["output_scores"], {}),
        (
            {"forced_eos_token_id": 3, "suppress_tokens": [3, 5]},
            ["forced_eos_token_id"],
            {"suppress_tokens": [3, 5]},
        ),
        ({"suppress_tokens": 5}, ["suppress_tokens"], {}),
        ({"watermarking_config": {"seeding_scheme": "mine"}}, ["watermarking_config"], {}),
        ({"watermarking_config": {"bias": 3.0}}, [], {}),
        ({"a_key_of_mine": {"b": [1, None]}}, [], {"a_key_of_mine": {"b": [1, None]}}),
        ({"validate": 3, "max_length": 99}, ["validate"], {"max_length": 99}),
        ({"to_dict": "x"}, ["to_dict"], {}),
        ({"pad_token_id": -1, "max_length": 99}, ["pad_token_id"], {"max_length": 99}),
    ],
)
def test_what_is_kept_is_saved_as_it_was(
    tmp_path: Path, values: dict[str, Any], left_out: list[str], kept: dict[str, Any]
) -> None:
    made, names = savable_settings(values | {"eos_token_id": [1, 4]}, "the file")
    assert list(names) == left_out
    made.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, 4]
    assert {name: saved.get(name) for name in kept} == kept
    assert not {name for name in left_out if saved.get(name) is not None}
    assert savable_settings(saved, "the file")[1] == ()


@pytest.mark.parametrize(
    "text", ["{", "[1]", "3", '{"temperature": NaN}', '{"max_length": 1e999}', "\\x00", ""]
)
def test_a_file_that_is_no_mapping_is_a_sentence(tmp_path: Path, text: str) -> None:
    folder = folder_with(tmp_path, text)
    for load in (load_shell, check_checkpoint, lambda model: load_model(model, "float32")):
        with pytest.raises(ModelError) as caught:
            load(folder)
        assert "generation_config.json" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ends", ['"</s>"', "[1, null, {}]", "1.5", "true"])
def test_end_tokens_that_are_none_are_a_sentence(tmp_path: Path, ends: str) -> None:
    folder = folder_with(tmp_path, f'{{"eos_token_id": {ends}}}')
    with pytest.raises(ModelError, match="eos_token_id must be a token id or a list of them"):
        load_shell(folder)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6))
def test_settings_that_are_kept_can_be_saved_and_read_again(values: dict[str, Any]) -> None:
    kept, left_out = savable_values(values)
    assert kept.keys() | set(left_out) == values.keys()
    assert not kept.keys() & set(left_out)
    assert all(kept[name] == values[name] for name in kept)
    assert savable_values(kept) == (kept, ())


@pytest.mark.parametrize(
    ("values", "left_out"),
    [
        ({"num_return_sequences": 4}, ["num_return_sequences"]),
        ({"temperature": 0.6, "num_beams": 2}, ["temperature"]),
        ({"temperature": 0.6, "do_sample": True}, []),
    ],
)
def test_settings_in_the_configuration_of_the_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, values: dict[str, Any], left_out: list[str]
) -> None:
    """Old releases wrote them there."""
    folder = Path(shutil.copytree(TOY, tmp_path / "model"))
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, "delethink"):
        model = load_model(str(folder), "float32")
    notes = " ".join(record.getMessage() for record in caplog.records)
    assert all(name in notes for name in left_out)
    assert bool(left_out) == ("config.json" in notes)
    assert load_shell(str(folder)).generation_config is None
    model.save_pretrained(tmp_path / "saved")
    load_model(str(tmp_path / "saved"), "float32")


def test_settings_of_a_language_model_inside_another_one() -> None:
    config = {"text_config": {"num_return_sequences": 4, "max_length": 9, "hidden_size": 8}}
    made, left_out = settings_of_config(config)
    assert left_out == ("num_return_sequences",)
    assert made is not None
    assert (made.max_length, made.num_return_sequences) == (9, None)
    assert settings_of_config({"text_config": {"max_length": 9}}) == (None, ())


def test_settings_that_transformers_refuses_change_no_sampling(tmp_path: Path) -> None:
    """Of a greedy, a beam, a contrastive and a static cache's model."""
    prompt = (5, 6, 7, 8)
    for number, values in enumerate(({}, *SAMPLED)):
        folder = folder_with(tmp_path / str(number), json.dumps(values | {"eos_token_id": 1}))
        model = load_model(folder, "float32")
        engine = TransformersEngine(model, (1,), 0)
        made = asyncio.run(engine.generate(prompt, 5, Sampling(temperature=0.8, seed=3)))
        if not values:
            expected = made
        assert made == expected, values
        model.save_pretrained(tmp_path / f"saved {number}")


SAMPLED: tuple[dict[str, Any], ...] = (
    {"num_return_sequences": 4},
    {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
    {"penalty_alpha": 0.6, "top_k": 4, "do_sample": True},
    {"cache_implementation": "static", "max_new_tokens": 3},
    {"do_sample": True, "temperature": 0.1, "repetition_penalty": 3.0, "min_length": 50},
    {"suppress_tokens": [2, 3, 4], "forced_bos_token_id": 9, "unknown": 1},
)
