"""Checks the weights of a checkpoint: safetensors files, every weight there once, finite values.

No file is unpickled. ``check_values`` reads every weight once, on the CPU and tensor by tensor.
It takes about as long as reading the files: a second for each 2 to 4 GB in the page cache.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from delethink.errors import ModelError
from delethink.json_io import read_json

WEIGHT_FILES = _WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LFS_MARK = b"version https://git-lfs"
_NAMES_SHOWN = 3  # tensors named in an error text
_NAME_LENGTH = 100  # characters shown of a name


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files from which a checkpoint folder is loaded.

    Raises:
        ModelError: there are none, a shard is missing, or the index is no list of shards.
    """
    names = {_WEIGHTS} if (folder / _WEIGHTS).is_file() else set()
    if (folder / _INDEX).is_file():
        names |= _shards(folder / _INDEX)
    if not names:
        raise ModelError(f"{folder} has no weights in safetensors{_pickle_hint(folder)}")
    files = [folder / name for name in sorted(names)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"{folder} is not whole: {_INDEX} names {listed(missing)}, missing in the folder; "
            "download or copy the checkpoint again"
        )
    return files


def check_values(files: Iterable[Path]) -> None:
    """Read every weight, and refuse NaN and infinite values.

    Files that this process has read before, and that did not change, are not read again.

    Raises:
        ModelError: a value is not finite, or a file cannot be read as safetensors.
    """
    for file in files:
        status = file.stat()
        if found := _nonfinite(file, status.st_size, status.st_mtime_ns):
            raise ModelError(
                f"{file} has NaN or infinite values in {listed(found)}; weights must be finite: "
                "download the checkpoint again, or take one from before the training diverged"
            )


def check_report(model: str, report: Mapping[str, Any], cls: str) -> None:
    """Refuse a checkpoint whose weights are not those of its configuration.

    Args:
        model: folder or id, for the error text.
        report: loading report of transformers (``output_loading_info``).
        cls: the class of the model.

    Raises:
        ModelError: weights are missing, unexpected or have other shapes.
    """
    shapes = [
        f"{name[:_NAME_LENGTH]} {list(there)} instead of {list(expected)}"
        for name, there, expected in report["mismatched_keys"]
    ]
    kinds = {
        "missing": report["missing_keys"],
        "unexpected": report["unexpected_keys"],
        "of another shape": shapes,
        "not loaded": report["error_msgs"],
    }
    found = [f"{listed(names)} {what}" for what, names in kinds.items() if names]
    if not found:
        return
    tied = any(name.startswith("lm_head.") for name in report["missing_keys"])
    hint = "; if the embeddings are also the output layer, set tie_word_embeddings to true there"
    raise ModelError(
        f"the weights of {model} do not fit its config.json: {'; '.join(found)}. Expected are "
        f"exactly the weights of {cls}: save or download the checkpoint again, or correct its "
        f"config.json{hint if tied else ''}"
    )


def _shards(index: Path) -> set[str]:
    values = read_json(index, ModelError)
    shards = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{index} has no weight_map from the names of weights to files")
    for name in shards.values():
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise ModelError(f"{index} must name files in its folder, got {name!r:.80}")
    return set(shards.values())


@lru_cache(maxsize=4096)
def _nonfinite(file: Path, size: int, changed_ns: int) -> tuple[str, ...]:
    """Return the names of the tensors with values that are not finite."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            names = weights.keys()
            return tuple(name for name in names if not has_finite_values(weights.get_tensor(name)))
    except (SafetensorError, OSError, ValueError) as error:
        with file.open("rb") as content:
            if content.read(len(_LFS_MARK)) == _LFS_MARK:
                raise ModelError(
                    f"{file} stands for weights in Git LFS that are not there: run git lfs pull "
                    "where it was cloned, or download the checkpoint again"
                ) from None
        raise ModelError(
            f"{file} ({size} bytes) cannot be read as safetensors: {error}; download or copy the "
            "checkpoint again"
        ) from None


def has_finite_values(tensor: Any) -> bool:
    """Return whether a tensor has neither NaN nor infinite values."""
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() < 2:
        try:
            tensor = tensor.float()  # formats of 8 bits have no minimum
        except NotImplementedError:  # formats of 4 bits have neither NaN nor infinity
            return True
    # One pass without a copy. A NaN is both the minimum and the maximum.
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _pickle_hint(folder: Path) -> str:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if not pickles:
        gguf = "; GGUF cannot be loaded" if any(folder.glob("*.gguf")) else ""
        return f": expected is {_WEIGHTS}, or {_INDEX} with its shards{gguf}"
    return (
        f": {listed(pickles)} cannot be used, because a pickle can run any code. If you trust its "
        f"source, convert it: AutoModelForCausalLM.from_pretrained({str(folder)!r}, "
        "use_safetensors=False).save_pretrained(NEW_FOLDER)"
    )


def listed(names: Collection[str]) -> str:
    """Return a few names and the number of the others."""
    shown = [name[:_NAME_LENGTH] for name in sorted(names)[:_NAMES_SHOWN]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
