"""Loads models and tokenizers, and says in a sentence what is wrong with them."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from delethink.errors import MissingExtraError, ModelError
from delethink.tokenization import reward_text
from delethink.types import END_OF_THINKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOY = "toy"
_ENDS = 2**20  # bytes at each end of a file that its digest reads
_SHIPPED_TOY = Path(__file__).parent.parent / "assets" / "toy_reasoner"


def locate(model: str) -> str:
    """Where the weights are: a folder, a Hugging Face id, or ``"toy"`` for the shipped reasoner.

    Raises:
        ModelError: a folder that does not exist or holds no model.
    """
    path = _SHIPPED_TOY if model == TOY else Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"the folder {path} holds no model: it has no config.json")
        return str(path)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(
            f"there is no model folder {path}; give a folder with config.json, safetensors weights "
            f"and a tokenizer, a Hugging Face id, or {TOY!r} for the shipped reasoner"
        )
    return model


def load_tokenizer(model: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        ModelError: there is none, or it has no end-of-sequence token.
    """
    _require_transformers()
    from transformers import AutoTokenizer

    tokenizer: Any = _load(AutoTokenizer, "tokenizer", model, trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {model} has no end-of-sequence token, so a trace could never end "
            "its answer; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_end_of_thinking(tokenizer)
    return tokenizer


def check_end_of_thinking(tokenizer: PreTrainedTokenizerBase) -> None:
    """Rewards look for the mark in text without special tokens.

    Raises:
        ModelError: it would be gone there, and every reward 0.
    """
    ids = tokenizer(END_OF_THINKING, add_special_tokens=False)["input_ids"]
    if END_OF_THINKING not in reward_text(tokenizer, ids):
        raise ModelError(
            f"the tokenizer loses {END_OF_THINKING}, by which rewards find the answer: make it an "
            "added token that is not special"
        )


def load_model(model: str, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model of a checkpoint, its weights from safetensors.

    Raises:
        ModelError: there is none.
    """
    _require_transformers()
    from transformers import AutoModelForCausalLM

    loaded: Any = _load(
        AutoModelForCausalLM,
        "model",
        model,
        trust_remote_code,
        dtype=dtype,
        use_safetensors=True,
    )
    return loaded


def digest(model: str) -> str | None:
    """What tells the weights of a local checkpoint from others: sizes, and both ends of each file.

    Returns:
        ``None`` for a model on the hub.
    """
    folder = Path(locate(model))
    if not folder.is_dir():
        return None
    mark = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        mark.update(f"{file.name} {size} ".encode())
        with file.open("rb") as weights:
            mark.update(weights.read(_ENDS))
            weights.seek(max(0, size - _ENDS))
            mark.update(weights.read(_ENDS))
    return mark.hexdigest()


class Shell(NamedTuple):
    """What a checkpoint says of its model, without the weights."""

    config: Any
    generation_config: Any


def load_shell(model: str, trust_remote_code: bool = False) -> Any:
    """A stand-in for the model of a checkpoint wherever only its settings are read.

    Raises:
        ModelError: there is no model.
    """
    _require_transformers()
    from transformers import AutoConfig, GenerationConfig

    config = _load(AutoConfig, "configuration", model, trust_remote_code)
    try:
        settings = GenerationConfig.from_pretrained(locate(model))
    except OSError:  # a checkpoint need not have any
        settings = None
    return Shell(config, settings)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's, and those of the generation settings.

    Raises:
        ModelError: the tokenizer's is none that the model could ever sample. ``transformers`` makes
            one up where a tokenizer names none.
    """
    own, vocabulary = int(tokenizer.eos_token_id), vocabulary_size(model)
    if own >= vocabulary:
        raise ModelError(
            f"the tokenizer's end-of-sequence token {tokenizer.eos_token!r} has the id {own}, "
            f"outside the model's vocabulary of {vocabulary}, so a trace could never end; "
            "set eos_token in its tokenizer_config.json"
        )
    configured = getattr(model.generation_config, "eos_token_id", None)
    more = (configured,) if isinstance(configured, int) else tuple(configured or ())
    return tuple(dict.fromkeys((own, *more)))


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of token ids of a model.

    Raises:
        ModelError: its configuration does not say.
    """
    return _from_config(model, "vocab_size")


def longest_sequence(model: PreTrainedModel) -> int:
    """The most tokens that a model takes, prompt and new ones together.

    Raises:
        ModelError: its configuration does not say.
    """
    return _from_config(model, "max_position_embeddings")


def _from_config(model: PreTrainedModel, key: str) -> int:
    value = getattr(model.config.get_text_config(), key, None)
    if value is None:
        raise ModelError(f"the model's config.json has no {key}")
    return int(value)


def _load(kind: Any, what: str, model: str, trust_remote_code: bool, **options: Any) -> Any:
    where = locate(model)
    try:
        return kind.from_pretrained(where, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # a checkpoint can be broken in any way; the reason is told
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(f"cannot load the {what} of {model}: {first}") from error


def _require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError("transformers", "train")
