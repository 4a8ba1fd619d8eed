"""LoRA adapters of PEFT: reads their settings, and merges their weights into a base model.

Every engine samples from merged weights, in the data type asked for. vLLM's own support of adapters
is not used: it computes base and adapter apart, refuses DoRA and saved modules, and would give
other log-probs than the trainer's.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delethink.engines.weight_files import check_values, has_finite_values, listed
from delethink.errors import MissingExtraError, ModelError
from delethink.json_io import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_SETTINGS, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
# Settings of PEFT with which an adapter is more than a change of the base model's weights.
_UNMERGEABLE = {
    "alora_invocation_tokens": "it starts after certain tokens only",
    "arrow_config": "it chooses between adapters for each token",
    "kasa_config": "it also changes the base model",
    "layer_replication": "it repeats layers of the base model",
    "monteclora_config": "its weights are drawn at random",
    "use_bdlora": "its weights are split over the ranks of one engine",
    "use_qalora": "it belongs to a quantized base model",
}
# Named starts of the adapter's training that leave the base model as it is; PiSSA, OLoRA, CorDA
# and LoftQ do not. The list is that of vLLM (lora/peft_helper.py).
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_SHOWN_CHARACTERS = 300  # of a reason
_PREFIX = "base_model.model."  # of names in the files of PEFT


@dataclass(frozen=True)
class Adapter:
    """A folder with a LoRA adapter, and the model that it adapts."""

    folder: Path
    base: str  # folder, or Hugging Face id with its revision
    find: Callable[[str], Path | None]  # file of the adapter by name

    @classmethod
    def read(cls, folder: Path, find: Callable[[str], Path | None]) -> Adapter:
        """Read ``adapter_config.json`` in a folder; ``find`` returns a file of the adapter by name.

        Raises:
            ModelError: it names no base model, or another kind of adapter than a mergeable LoRA.
        """
        file = folder / ADAPTER_SETTINGS
        settings = read_json(file, ModelError)
        if not isinstance(settings, dict):
            raise ModelError(f"{file} must be a mapping of PEFT's settings")
        kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
        if kind != "LORA":
            raise ModelError(
                f"{file} describes an adapter of the type {kind!r:.80}: only LORA (DoRA and saved "
                "modules included) can be merged into its base model here"
            )
        if not isinstance(base, str) or not base:
            raise ModelError(
                f"{file} names no base model: set base_model_name_or_path to a folder or a "
                "Hugging Face id"
            )
        for key, reason in _UNMERGEABLE.items():
            if settings.get(key):
                raise ModelError(
                    f"the adapter in {folder} cannot be merged into its base model: it sets {key}, "
                    f"so {reason}"
                )
        start = settings.get("init_lora_weights")
        if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
            raise ModelError(
                f"the adapter in {folder} belongs to a changed base model, because of "
                f"init_lora_weights={start!r:.40}: convert it to a plain one with "
                "path_initial_model_for_weight_conversion of PEFT"
            )
        return cls(folder, _locate_base(folder, base, settings.get("revision")), find)

    def weights(self) -> Path:
        """Return the file of weights.

        Raises:
            ModelError: there is none in safetensors.
        """
        if (file := self.find(_WEIGHTS)) is not None:
            return file
        pickle = (self.folder / _PICKLE).is_file()
        advice = (
            f"{_PICKLE} cannot be used, because a pickle can run any code: save the adapter again "
            "with a newer PEFT"
            if pickle
            else "download or copy the adapter again"
        )
        raise ModelError(f"the adapter in {self.folder} has no {_WEIGHTS}: {advice}")


def _locate_base(folder: Path, base: str, revision: Any) -> str:
    """Return the base model: a folder beside the adapter or of the machine, or an id."""
    path = Path(base).expanduser()
    if path.is_absolute():
        return str(path)
    # PEFT itself looks in the current directory; an adapter that is moved with its base does not.
    if (folder / path).is_dir() or base.startswith("."):
        beside = (folder / path).resolve()
        return str(path if path.is_dir() and not beside.is_dir() else beside)
    if path.is_dir() or not isinstance(revision, str) or not revision:
        return base
    return f"{base}@{revision}"


def merge(base: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """Return the base model with the weights of an adapter merged into its own.

    The base model itself changes, and keeps its names, shapes and data type.

    Raises:
        MissingExtraError: PEFT is not installed.
        ModelError: the adapter's weights are not whole, not finite, or not those of this model.
    """
    if find_spec("peft") is None:
        raise MissingExtraError("peft", "lora")
    file = adapter.weights()
    check_values([file])
    if getattr(base.config, "quantization_config", None) is not None:
        raise ModelError(
            f"the base model {adapter.base} of the adapter in {adapter.folder} is quantized, and "
            "merging would round its weights again: name the model before quantization in "
            f"{ADAPTER_SETTINGS}"
        )
    tied = _tied_modules(base)
    try:
        with warnings.catch_warnings(action="ignore"):  # the names are checked below
            adapted = _inject(base, adapter)
            _check_tied(adapted, adapter, tied)
            _load_weights(adapted, adapter, file)
            # Not merge_and_unload(safe_merge=True), which rounds the change before it is added.
            merged: PreTrainedModel = adapted.merge_and_unload()
    except ModelError:
        raise
    except Exception as error:  # PEFT raises many types, also for settings it does not know
        raise ModelError(
            f"the adapter in {adapter.folder} cannot be merged into its base model {adapter.base}: "
            f"{_reason(error)}"
        ) from error
    for name, parameter in merged.named_parameters():
        if not has_finite_values(parameter.detach()):
            raise ModelError(
                f"the adapter in {adapter.folder} takes {name} of its base model {adapter.base} "
                f"beyond the range of {parameter.dtype}: choose another data type"
            )
    merged.requires_grad_(True)  # PEFT has frozen the base model
    return merged


def _reason(error: Exception) -> str:
    """Return why PEFT cannot merge an adapter, with advice."""
    first = (str(error).strip() or repr(error)).splitlines()[0]
    if absent := re.match(r"Target modules (.+?) not found", first):
        names = sorted(re.findall(r"'([^']+)'", absent[1])) or [absent[1]]
        return (
            f"its target_modules name {', '.join(names)}, no layer of that model; name the model "
            f"that it was trained on as base_model_name_or_path in {ADAPTER_SETTINGS}"
        )
    return (
        f"PEFT cannot use a value in its {ADAPTER_SETTINGS} ({first[:_SHOWN_CHARACTERS]}); correct "
        "it, or copy the adapter again"
    )


def _inject(base: PreTrainedModel, adapter: Adapter) -> Any:
    """Return the base model with empty layers of the adapter."""
    import peft

    config = peft.PeftConfig.from_pretrained(str(adapter.folder))
    config.init_lora_weights = True  # other starts need data, and the weights are loaded anyway
    config.inference_mode = True
    return peft.PeftModel(base, config)


def _tied_modules(model: PreTrainedModel) -> set[str]:
    """Return the names of modules that share a weight with another one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return {module for modules in names.values() if len(modules) > 1 for module in modules}


def _check_tied(adapted: Any, adapter: Adapter, tied: set[str]) -> None:
    """Refuse an adapter of a weight that two layers share: merging would change both."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in adapted.named_modules():
        place = name.removeprefix(_PREFIX)
        if place in tied and isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise ModelError(
                f"the adapter in {adapter.folder} changes {place}, and the base model "
                f"{adapter.base} shares this weight between embeddings and output layer: merge it "
                "with merge_and_unload() of PEFT, set tie_word_embeddings to false, and name the "
                "saved folder"
            )


def _load_weights(adapted: Any, adapter: Adapter, file: Path) -> None:
    """Load the weights of the adapter, which must be exactly those of its settings."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(file)
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    # PEFT also saves embeddings that it has resized, or that have an adapter.
    whole = {name: tuple(tensor.shape) for name, tensor in adapted.state_dict().items()}
    known = whole | expected
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    _check_names(adapter, expected, known, found)
    set_peft_model_state_dict(adapted, weights)


def _check_names(
    adapter: Adapter,
    expected: Mapping[str, tuple[int, ...]],
    known: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
) -> None:
    shapes = [
        f"{name.removeprefix(_PREFIX)} {list(shape)} instead of {list(known[name])}"
        for name, shape in sorted(found.items())
        if name in known and shape != known[name]
    ]
    kinds = {
        "missing": [name.removeprefix(_PREFIX) for name in expected.keys() - found.keys()],
        "unexpected": [name.removeprefix(_PREFIX) for name in found.keys() - known.keys()],
        "of another shape": shapes,
    }
    faults = [f"{listed(names)} {kind}" for kind, names in kinds.items() if names]
    if not faults:
        return
    vocabulary = any("embed" in text or text.startswith("lm_head") for text in shapes)
    hint = "; the vocabularies differ, so the adapter was trained on another model"
    raise ModelError(
        f"the weights of the adapter in {adapter.folder} do not fit {ADAPTER_SETTINGS} and the "
        f"base model {adapter.base}: {'; '.join(faults)}{hint if vocabulary else ''}. Name the "
        "model that it was trained on as base_model_name_or_path, or copy the adapter again"
    )
