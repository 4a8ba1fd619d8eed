"""A checkpoint is whole, or refused with the names of its weights, by every command."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from delethink.cli.main import main
from delethink.engines.loading import check_checkpoint, load_model, locate
from delethink.engines.weight_files import check_values, weight_files
from delethink.errors import ModelError, RunDirectoryError
from delethink.training.checkpointing import _newest_checkpoint, write_run_state
from delethink.training.progress import TrainingProgress
from tests.helpers import train_command

pytestmark = pytest.mark.integration

Weights = dict[str, torch.Tensor]
_HEAD, _NORM = "lm_head.weight", "model.norm.weight"


def copy_of_toy(
    folder: Path, change: Callable[[Weights], object] = lambda weights: None, **config: object
) -> Path:
    """A copy of the shipped reasoner, with changed weights and settings."""
    shutil.copytree(locate("toy"), folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def shard(folder: Path, index_names: str | None = None) -> Path:
    """Split the weights into two files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {}
    for number in range(2):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        part = dict(list(weights.items())[number::2])
        save_file(part, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, index_names or name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def set_value(name: str, value: float) -> Callable[[Weights], object]:
    return lambda weights: weights[name].view(-1)[-1:].fill_(value)


def no_head(weights: Weights) -> None:
    del weights[_HEAD]


BROKEN: dict[str, tuple[Callable[[Weights], object], str]] = {
    "missing": (no_head, "lm_head.weight missing. Expected are exactly the weights of Qwen2For"),
    "many missing": (
        lambda w: [w.pop(name) for name in list(w) if "mlp" in name],
        "gate_proj.weight, model.layers.0.mlp.up_proj.weight and 6 more missing",
    ),
    "unexpected": (lambda w: w.update(extra=torch.zeros(2)), "extra unexpected"),
    "shape": (
        lambda w: w.update({_NORM: torch.zeros(2)}),
        r"model.norm.weight \[2\] instead of \[128\] of another shape",
    ),
    "NaN": (set_value(_HEAD, float("nan")), "NaN or infinite values in lm_head.weight"),
    "infinite": (set_value(_NORM, float("inf")), "NaN or infinite values in model.norm.weight"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_with_names(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, text = BROKEN[case]
    folder = str(copy_of_toy(tmp_path / "model", change))
    with pytest.raises(ModelError, match=text):
        load_model(folder, "float32")
    with pytest.raises(ModelError, match=text):
        check_checkpoint(folder)
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_whole_checkpoints_of_all_kinds_load(tmp_path: Path) -> None:
    """Tied embeddings, buffers of old releases, shards, half precision, an adapter beside."""
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    half = copy_of_toy(
        tmp_path / "half",
        lambda w: w.update({name: value.bfloat16() for name, value in w.items()}),
    )
    (half / "adapter").mkdir()
    save_file({"a": torch.zeros(1)}, half / "adapter" / "adapter_model.safetensors")
    for folder in (
        copy_of_toy(tmp_path / "tied", no_head, tie_word_embeddings=True),
        copy_of_toy(tmp_path / "buffer", lambda w: w.update(buffer)),
        shard(copy_of_toy(tmp_path / "shards")),
        half,
    ):
        check_checkpoint(str(folder))
        model = load_model(str(folder), "float32")
        assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_pickles_are_refused_and_never_opened(tmp_path: Path) -> None:
    folder = copy_of_toy(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights in safetensors: expected is model\.saf"):
        weight_files(folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin cannot be used, .* convert it"):
        load_model(str(folder), "float32")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin cannot be used"):
        check_checkpoint(str(folder))


def test_shards_that_are_gone_or_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    gone = shard(copy_of_toy(tmp_path / "gone"))
    (gone / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"names model-00002-of-00002\.safetensors, missing in"):
        check_checkpoint(str(gone))
    elsewhere = shard(copy_of_toy(tmp_path / "elsewhere"), "../gone/model-00001.safetensors")
    with pytest.raises(ModelError, match="must name files in its folder"):
        check_checkpoint(str(elsewhere))
    index = elsewhere / "model.safetensors.index.json"
    for text in ("[" * 10**5, "{}", '{"weight_map": {"a": 3}}', "\x00", '{"weight_map": {}}'):
        index.write_text(text)
        with pytest.raises(ModelError, match=r"index\.json"):
            check_checkpoint(str(elsewhere))


@pytest.mark.parametrize("cut", [0, 4, 100, 10_000])
def test_a_file_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    folder = copy_of_toy(tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        load_model(str(folder), "float32")


def test_values_are_read_once_per_process_and_again_after_a_change(tmp_path: Path) -> None:
    folder = copy_of_toy(tmp_path / "model")
    check_values(weight_files(folder))
    (file,) = weight_files(folder)
    status = file.stat()
    weights = load_file(file)
    weights[_NORM][0] = float("-inf")
    save_file(weights, file)
    assert file.stat().st_mtime_ns != status.st_mtime_ns
    with pytest.raises(ModelError, match=_NORM):
        check_values(weight_files(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_short_formats_are_read(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    if dtype is torch.float8_e4m3fn and value == float("inf"):
        return  # this format has no infinity
    tensors = {"ok": torch.ones(300).to(dtype), "none": torch.zeros(0), "ids": torch.arange(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    check_values(weight_files(tmp_path))
    wrong = torch.ones(300)
    wrong[17] = value
    save_file({**tensors, "wrong": wrong.to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="values in wrong;"):
        check_values(weight_files(tmp_path))


def test_a_run_is_not_resumed_from_broken_weights(tmp_path: Path) -> None:
    """The state says that the file has its size; an earlier checkpoint is whole."""
    state = {"prompts": {"next": 4}, "skipped_steps": []}
    for step, change in ((1, lambda w: None), (2, set_value(_HEAD, float("nan")))):
        folder = copy_of_toy(tmp_path / f"checkpoint-{step}", change)
        write_run_state(folder, step, state)
    progress = TrainingProgress()
    with pytest.raises(RunDirectoryError, match=r"checkpoint-2: .* in lm_head\.weight.*delete"):
        _newest_checkpoint(tmp_path, progress)
    shutil.rmtree(tmp_path / "checkpoint-2")
    found = _newest_checkpoint(tmp_path, progress)
    assert found is not None
    assert (found.step, found.run_state) == (1, state)
    for odd in ("[" * 5000, "{}", '{"files": {}, "run": {"prompts": {"next": "4"}}}', "[]"):
        (tmp_path / "checkpoint-1" / "delethink.json").write_text(odd)
        assert _newest_checkpoint(tmp_path, progress) is None


# -- through commands ------------------------------------------------------------------------------


_TASK = [
    *("--task", "automaton", "--task-arg", "min_steps=4", "--task-arg", "max_steps=9"),
    *("-C", "60", "--carryover-size", "30", "--head-size", "0", "--num-problems", "2"),
]


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_eval_refuses_in_a_sentence(tmp_path: Path, engine: str) -> None:
    """With vLLM before any worker starts."""
    folder = copy_of_toy(tmp_path / "model", no_head)
    out, errors = io.StringIO(), io.StringIO()
    more = ["-m", str(folder), "--gpu", "cpu", "-o", str(tmp_path / "out"), f"engine={engine}"]
    if engine == "vllm":
        pytest.importorskip("vllm")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        assert main(["eval", *_TASK, *more]) == 2
    assert "lm_head.weight missing" in errors.getvalue()
    assert "Traceback" not in errors.getvalue()
    assert "accuracy" not in out.getvalue()
    assert not (tmp_path / "out").exists()


def test_probe_refuses_in_a_sentence(tmp_path: Path) -> None:
    folder = copy_of_toy(tmp_path / "model", set_value(_NORM, float("nan")))
    errors = io.StringIO()
    more = ["-m", str(folder), "-o", str(tmp_path / "out")]
    with contextlib.redirect_stderr(errors):
        assert main(["probe", *_TASK, *more]) == 2
    assert "NaN or infinite values in model.norm.weight" in errors.getvalue()


def test_train_refuses_and_leaves_no_run(tmp_path: Path) -> None:
    folder = copy_of_toy(tmp_path / "model", no_head)
    done = train_command.run(f"model={folder}", f"output={tmp_path / 'run'}", cwd=tmp_path)
    train_command.assert_one_sentence(done, "lm_head.weight missing", "tie_word_embeddings")
    assert not (tmp_path / "run").exists()
