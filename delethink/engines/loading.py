"""Loads models and tokenizers, and reports broken ones in a sentence."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from delethink.engines.adapters import ADAPTER_SETTINGS, Adapter, merge
from delethink.engines.generation_settings import savable_settings, settings_of_config
from delethink.engines.loading_faults import check_files, check_kind, load_error
from delethink.engines.weight_files import WEIGHT_FILES, check_report, check_values, weight_files
from delethink.errors import ConfigError, MissingExtraError, ModelError
from delethink.json_io import read_json
from delethink.output import get_logger
from delethink.tokenization import bind_template, end_tokens, keep_marks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ASSISTED_GENERATION = "transformers.generation.candidate_generator"
TOY = "toy"
_DIGEST_BYTES = 2**20  # read by a digest at each end of a file
_HUB_TIMEOUT_S = 10.0
_HUB_NAME = re.compile(r"([\w.-]+/)?[\w.-]+", re.ASCII)
_TOKENIZER, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_logger = get_logger(__name__)
_SHIPPED_TOY = Path(__file__).parent.parent / "assets" / "toy_reasoner"


def locate(model: str, part: str = "model") -> str:
    """Return the folder or Hugging Face id of a model; ``"toy"`` is the shipped reasoner.

    An id keeps its revision (``split_revision``) and is not looked up. With the part
    ``"tokenizer"`` a folder with a tokenizer alone is found too. In the folder of a LoRA adapter,
    the part is that of its base model; the tokenizer is the adapter's own, if it has one.

    Raises:
        ModelError: the folder does not exist or has no such part.
    """
    path = _folder(model)
    if path.is_dir():
        if (adapter := find_adapter(model)) is not None:
            return _locate_in(adapter, model, part)
        files = ("config.json", _TOKENIZER)[: 2 if part == "tokenizer" else 1]
        if not any((path / file).is_file() for file in files):
            raise ModelError(
                f"the folder {path} has no {' or '.join(files)}, so no {part} can be loaded"
            )
        return str(path)
    name, revision = split_revision(model)
    if revision == "":
        raise ModelError(f"the model {model!r} names no revision after @; write ID@REVISION or ID")
    if path.is_file():
        raise ModelError(
            f"the model {model} is a file: name the folder with config.json, safetensors weights "
            f"and a tokenizer{'; GGUF cannot be loaded' if path.suffix == '.gguf' else ''}"
        )
    if _is_path(name):
        raise ModelError(
            f"the model folder {path} does not exist; give a folder with config.json, safetensors "
            f"weights and a tokenizer, a Hugging Face id, or {TOY!r} for the shipped reasoner"
        )
    if not _HUB_NAME.fullmatch(name):
        raise ModelError(
            f"there is no folder {model!r}, and it is no Hugging Face id, which has the form "
            "OWNER/NAME of letters, digits, '-', '_' and '.': correct the name"
        )
    return model


def find_source(model: str, part: str = "model") -> str:
    """Return the folder or id from which a part of a model is loaded.

    As ``locate``, and the id of a LoRA adapter is looked up too.

    Raises:
        ModelError: as ``locate``.
    """
    adapter = find_adapter(model)
    if adapter is not None:
        return _locate_in(adapter, model, part)
    found = locate(model, part)
    if not Path(found).is_dir() and (reason := hub_error(*split_revision(found))) is not None:
        raise ModelError(reason)
    return found


def _locate_in(adapter: Adapter, model: str, part: str) -> str:
    """Return the place of a part of an adapter's model."""
    if part == "tokenizer" and _file(model, _TOKENIZER) is not None:
        return model
    try:
        return find_source(adapter.base, part)
    except ModelError as error:
        raise ModelError(
            f"the base model of the adapter in {adapter.folder} cannot be used: {error}; "
            f"base_model_name_or_path in its {ADAPTER_SETTINGS} names it"
        ) from None


def _folder(model: str) -> Path:
    return _SHIPPED_TOY if model == TOY else Path(model).expanduser()


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def find_adapter(model: str) -> Adapter | None:
    """Return the LoRA adapter that a folder or Hugging Face id holds; ``None`` for a whole model.

    Raises:
        ModelError: the folder also holds a whole model, or the adapter cannot be used.
    """
    found, seen = _read_adapter(model), [model]
    adapter = found
    while adapter is not None:  # the base of an adapter may be another adapter
        if adapter.base in seen:
            raise ModelError(
                f"the adapter in {adapter.folder} names {adapter.base} as its base model, which is "
                f"the adapter itself or adapts it: correct its {ADAPTER_SETTINGS}"
            )
        seen.append(adapter.base)
        adapter = _read_adapter(adapter.base)
    return found


def base_model(model: str) -> str:
    """Return the whole model that a LoRA adapter adapts, or the model itself."""
    while (adapter := find_adapter(model)) is not None:
        model = adapter.base
    return model


def _read_adapter(model: str) -> Adapter | None:
    settings = None if _is_cached_whole(model) else _file(model, ADAPTER_SETTINGS)
    if settings is None:
        return None
    if any(_file(model, name) for name in WEIGHT_FILES):
        raise ModelError(
            f"{model} holds a whole model and a LoRA adapter, and does not say whether the adapter "
            f"is merged already: remove {ADAPTER_SETTINGS}, or move the adapter's files into a "
            "folder of their own"
        )
    return Adapter.read(settings.parent, lambda name: _file(model, name))


def _file(model: str, name: str) -> Path | None:
    """Return a file of a folder or Hugging Face id; ``None`` without one, or if it is not there."""
    path = _folder(model)
    if path.is_dir():
        return path / name if (path / name).is_file() else None
    hub_name, revision = split_revision(model)
    return None if revision == "" or _is_path(hub_name) else _hub_file(hub_name, revision, name)


def _is_cached_whole(model: str) -> bool:
    """Return whether the cache of the hub has a whole model, which loads without a connection."""
    name, revision = split_revision(model)
    if revision == "" or _is_path(name) or _folder(model).is_dir():
        return False
    whole = any(_is_cached(name, file, revision) for file in WEIGHT_FILES)
    return whole and not _is_cached(name, ADAPTER_SETTINGS, revision)


def _is_cached(model: str, file: str, revision: str | None) -> bool:
    """Return whether the cache of the hub has a file of an id."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return False
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(model, file, revision=revision), str)
    except HFValidationError:  # the name is no id: loading says why
        return False


@cache
def hub_error(model: str, revision: str | None = None) -> str | None:
    """Return why a Hugging Face id that is not in the cache cannot be had, or ``None``.

    One request without retries tells a mistyped name and a missing connection at once.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    names = ("config.json", ADAPTER_SETTINGS, _TOKENIZER)
    if constants.HF_HUB_OFFLINE or any(_is_cached(model, name, revision) for name in names):
        return None
    try:
        HfApi().model_info(model, revision=revision, timeout=_HUB_TIMEOUT_S)
    except RevisionNotFoundError:
        return f"the model {model} has no revision {revision!r}"
    except RepositoryNotFoundError:
        return (
            f"there is no folder {model}, and the Hugging Face hub has no such model, or it is "
            "private: correct the name, or log in with `hf auth login`"
        )
    except Exception as error:  # the hub and its client raise many types
        if re.search("Connect|Timeout|Network", type(error).__name__):
            return (
                f"there is no folder {model}, and the Hugging Face hub cannot be asked for a model "
                f"of this name ({' '.join(str(error).split())}): correct the path, or check the "
                "connection"
            )
    return None


@cache
def _hub_file(model: str, revision: str | None, name: str) -> Path | None:
    """Return a file of the hub; ``None`` if it cannot be had: loading then says why."""
    if importlib.util.find_spec("transformers") is None or hub_error(model, revision) is not None:
        return None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(
            model, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
    except Exception:  # the hub and its client raise many types
        return None
    return Path(found) if found is not None and Path(found).is_file() else None


def split_revision(model: str) -> tuple[str, str | None]:
    """Return a Hugging Face id and its revision: a branch, tag or commit after ``@``.

    >>> split_revision("Qwen/Qwen3-0.6B@main")
    ('Qwen/Qwen3-0.6B', 'main')
    """
    name, at, revision = model.partition("@")
    if not at or Path(model).expanduser().is_dir():
        return model, None
    return name, revision


def load_tokenizer(
    model: str,
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint, with variables for its chat template.

    Raises:
        ConfigError: the chat template has no such variable.
        ModelError: loading failed, or the tokenizer has no end-of-sequence token. Or text decoded
            without special tokens lacks the end-of-thinking mark: rewards would find no answer.
    """
    tokenizer: Any = _load("AutoTokenizer", "tokenizer", model, trust_remote_code)
    if (adapter := find_adapter(model)) is not None:
        _complete_tokenizer(tokenizer, model, adapter, trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {model} has no end-of-sequence token, so no answer could end; set "
            "eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    keep_marks(tokenizer)
    bind_template(tokenizer, chat_template_kwargs)
    return tokenizer


def _complete_tokenizer(
    tokenizer: Any, model: str, adapter: Adapter, trust_remote_code: bool
) -> None:
    """Give the tokenizer of an adapter its chat template, and compare it with the base model.

    The template is the adapter's own, else that of the base model.

    Raises:
        ModelError: there is no base model, or the tokenizer has more tokens.
    """
    find_source(model)  # names the adapter if there is no such base

    def load_base() -> Any:
        return _load("AutoTokenizer", "tokenizer", adapter.base, trust_remote_code)

    template = _file(model, _TEMPLATE)
    if _file(model, _TOKENIZER) is None and template is not None:
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = load_base().chat_template
    vocabulary = vocabulary_size(load_shell(adapter.base, trust_remote_code))
    outside = {token for token, i in tokenizer.get_vocab().items() if i >= vocabulary}
    # Some base models have tokens outside their own vocabulary, which they never see.
    if outside and (added := sorted(outside - load_base().get_vocab().keys())):
        raise ModelError(
            f"the tokenizer of the adapter in {adapter.folder} has the token {added[0]!r:.80}, "
            f"outside the vocabulary of {vocabulary} of its base model {adapter.base}: merge the "
            "adapter into the model with the added tokens by merge_and_unload() of PEFT, and name "
            "that folder"
        )


def load_model(
    model: str, dtype: str, trust_remote_code: bool = False, *, values_checked: bool = False
) -> PreTrainedModel:
    """Load the causal language model of a checkpoint, with weights from safetensors.

    A LoRA adapter is merged into its base model.

    ``values_checked`` says that another process has called this, so that none reads all values
    again in search of NaN.

    Raises:
        ModelError: loading failed; weights are missing, unexpected or mis-shaped; or a value is NaN
            or infinite.
    """
    if (adapter := find_adapter(model)) is not None:
        find_source(model)  # names the adapter if there is no such base
        base = load_model(adapter.base, dtype, trust_remote_code, values_checked=values_checked)
        merged = merge(base, adapter)
        merged.name_or_path = _recorded_name(model)
        return merged
    files = weight_files(_fetch(model))
    if not values_checked:
        check_values(files)
    loaded = _load_whole(model, trust_remote_code, dtype=dtype)
    loaded.name_or_path = _recorded_name(model)
    _, left_out, file = _generation_settings(model)
    if left_out:
        _logger.warning(
            "%s of %s has generation settings that transformers cannot write back: checkpoints "
            "leave out %s; the evaluation and training here do not read them",
            file,
            model,
            ", ".join(left_out),
        )
    return loaded


def _recorded_name(model: str) -> str:
    """Return the name by which an adapter that is trained on a model finds it from anywhere."""
    folder = _folder(model)
    return str(folder.absolute()) if folder.is_dir() else split_revision(model)[0]


def _generation_settings(model: str) -> tuple[Any, tuple[str, ...], str]:
    """Read the generation settings of a model.

    Returns:
        The settings, or ``None`` where transformers reads them itself; the names of those that
        cannot be saved and are left out; and the name of their file.

    Raises:
        ModelError: the file is no mapping.
    """
    where = find_source(model)
    for name in ("generation_config.json", "config.json"):
        if (file := _file(where, name)) is None:
            continue
        values = read_json(file, ModelError)
        if not isinstance(values, dict):
            raise ModelError(f"{file} must be a mapping of names to values")
        if name == "config.json":
            return *settings_of_config(values), name
        return *savable_settings(values, str(file)), name
    return None, (), ""


def check_checkpoint(model: str, trust_remote_code: bool = False) -> None:
    """Check the weights of a checkpoint for engines of other processes, without loading them.

    Names and shapes are compared by transformers, on its device without memory. A quantized
    checkpoint, and a model that only its engine knows, have other names: their engine compares.

    Raises:
        ModelError: as ``load_model``.
    """
    check_values(weight_files(_fetch(model)))
    config = _load("AutoConfig", "configuration", model, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        return
    from transformers import AutoModelForCausalLM

    known = type(config) in AutoModelForCausalLM._model_mapping
    if known or "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        _load_whole(model, trust_remote_code, device_map="meta")


def _load_whole(model: str, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """Load a model, and refuse it unless the checkpoint has exactly its weights."""
    options |= {
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # else the error names no weight
    }
    settings, _, _ = _generation_settings(model)
    if settings is not None:
        options["generation_config"] = settings
    with _without_report():
        loaded, report = _load("AutoModelForCausalLM", "model", model, trust_remote_code, **options)
    check_report(model, report, type(loaded).__name__)
    whole: PreTrainedModel = loaded
    return whole


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from printing its loading report: names are printed by our error."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _fetch(model: str) -> Path:
    """Return the folder of a model; weights of a Hugging Face id are fetched unless cached."""
    where = find_source(model)
    if Path(where).is_dir():
        return Path(where)
    _require_transformers()
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    name, revision = split_revision(where)
    if_there = {"_raise_exceptions_for_missing_entries": False}
    try:
        config = cached_file(name, "config.json", revision=revision)
        if cached_file(name, "model.safetensors", revision=revision, **if_there) is None:
            index = cached_file(name, "model.safetensors.index.json", revision=revision, **if_there)
            if index is not None:
                get_checkpoint_shard_files(name, index, revision=revision)
        return Path(config).parent
    except Exception as error:  # the hub and its client raise many types
        raise load_error("weights", model, error, {}) from error


def digest(model: str) -> str | None:
    """Return a digest of the sizes and both ends of a local model's files; ``None`` for the hub.

    That of a LoRA adapter also covers its settings and its base model.
    """
    if not _folder(model).is_dir():
        locate(model)
        return None
    hasher = hashlib.blake2b(digest_size=8)
    if (adapter := find_adapter(model)) is not None:
        hasher.update((adapter.folder / ADAPTER_SETTINGS).read_bytes())
        hasher.update((digest(adapter.base) or adapter.base).encode())
        files = [adapter.weights()]
    else:
        files = [f for f in sorted(Path(locate(model)).glob("*.safetensors")) if f.is_file()]
    for file in files:
        size = file.stat().st_size
        hasher.update(f"{file.name} {size} ".encode())
        with file.open("rb") as weights:
            hasher.update(weights.read(_DIGEST_BYTES))
            weights.seek(max(0, size - _DIGEST_BYTES))
            hasher.update(weights.read(_DIGEST_BYTES))
    return hasher.hexdigest()


def load_shell(model: str, trust_remote_code: bool = False) -> Any:
    """Load ``config`` and ``generation_config`` of a model, without its weights.

    Raises:
        ModelError: they cannot be loaded.
    """
    config = _load("AutoConfig", "configuration", model, trust_remote_code)
    check_kind(config, model)
    settings, _, file = _generation_settings(model)
    has_own = file == "generation_config.json"  # it is optional
    return SimpleNamespace(config=config, generation_config=settings if has_own else None)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that end an answer (``end_tokens``).

    Tokens outside the model's vocabulary are left out: they are never sampled.

    Raises:
        ModelError: the tokenizer's token is outside the model's vocabulary. transformers invents
            one for a tokenizer without.
    """
    own, vocabulary = int(tokenizer.eos_token_id), vocabulary_size(model)
    if own >= vocabulary:
        raise ModelError(
            f"the tokenizer's end-of-sequence token {tokenizer.eos_token!r} has the id {own}, "
            f"outside the model's vocabulary of {vocabulary}, so no answer could end; "
            "set eos_token in its tokenizer_config.json"
        )
    return tuple(token for token in end_tokens(tokenizer, model) if token < vocabulary)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the vocabulary size of a model; raise ``ModelError`` if unknown."""
    return _from_config(model, "vocab_size")


_WINDOW_KEYS = ("n_positions", "max_seq_len", "seq_length", "model_max_length", "max_seq_length")
# Other kinds of scaling (YaRN, LongRoPE, Llama 3) are part of max_position_embeddings already.
_UNSCALED_ROPE = ("linear", "dynamic", "ntk")


def longest_sequence(model: PreTrainedModel) -> int:
    """Return the longest sequence (prompt and new tokens), as vLLM derives it.

    Raises:
        ModelError: the configuration does not say.
    """
    config = model.config.get_text_config()
    keys = ("max_position_embeddings", *_WINDOW_KEYS)
    known = (getattr(config, key, None) for key in keys)
    window = next((int(value) for value in known if value is not None), None)
    if window is None:
        raise ModelError(f"the model's config.json has no {keys[0]}")
    if config.model_type.startswith("gemma3"):  # its scaling is part of the window
        return window
    factors = [rope.get("factor") for rope in _ropes(config) if _type_of(rope) in _UNSCALED_ROPE]
    return int(window * (factors[-1] if factors and factors[-1] else 1))


def scaled_window(model: PreTrainedModel) -> int:
    """Return the longest sequence for which YaRN is set up.

    It may exceed ``longest_sequence``: some checkpoints state the original window beside a factor.
    """
    config = model.config.get_text_config()
    sizes = [
        int(rope["original_max_position_embeddings"] * rope["factor"])
        for rope in _ropes(config)
        if rope.get("original_max_position_embeddings") and rope.get("factor")
    ]
    return max([longest_sequence(model), *sizes])


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """Return the RoPE settings of a configuration, one for each kind of layer."""
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [each for each in ropes.values() if isinstance(each, Mapping)]
    return nested or [ropes]


def _type_of(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type"))


def engine_window(model: PreTrainedModel, max_model_tokens: int | None) -> int:
    """Return the longest sequence of an engine.

    Args:
        model: a model, or ``load_shell``.
        max_model_tokens: setting of the engine; ``None`` for the model's window.

    Raises:
        ConfigError: the setting exceeds the window.
        ModelError: the window is unknown.
    """
    window = longest_sequence(model)
    if max_model_tokens is not None and max_model_tokens > window:
        raise ConfigError(
            f"engine.max_model_tokens={max_model_tokens} is more than the {window} tokens that the "
            "model takes; lower it, or leave it out"
        )
    return max_model_tokens or window


def _from_config(model: PreTrainedModel, key: str) -> int:
    value = getattr(model.config.get_text_config(), key, None)
    if value is None:
        raise ModelError(f"the model's config.json has no {key}")
    return int(value)


def import_transformers() -> Any:
    """Import transformers, and return it, without the scikit-learn that it would load.

    That takes a third of the import, and serves assisted generation alone.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    _require_transformers()
    import transformers
    from transformers import utils

    if _ASSISTED_GENERATION not in sys.modules:
        is_available = utils.is_sklearn_available
        utils.is_sklearn_available = lambda: False
        try:
            importlib.import_module(_ASSISTED_GENERATION)
        except ImportError:  # another version of transformers
            _logger.debug("there is no module %s", _ASSISTED_GENERATION)
        finally:
            utils.is_sklearn_available = is_available
    return transformers


def _load(loader: str, part: str, model: str, trust_remote_code: bool, **options: Any) -> Any:
    transformers = import_transformers()
    source = find_source(model, "tokenizer" if part == "tokenizer" else "model")
    name, revision = split_revision(source)
    if (folder := Path(source)).is_dir():
        check_files(folder, part)
    if revision is not None:
        options["revision"] = revision  # of its code too, where that is in the same repository
    cls = getattr(transformers, loader)
    try:
        return cls.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # a checkpoint can be broken in any way
        file = _file(source, "config.json")
        config = {} if file is None else read_json(file, ModelError)
        raise load_error(part, model, error, config) from error


def _require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError("transformers", "train")
