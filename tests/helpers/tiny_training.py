"""Tokenizer and trainer settings for training on traces of a dozen token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from delethink.training.grpo_config import DelethinkConfig

VOCABULARY, GROUP = 12, 4


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words t0, t1, ...; t0 is padding and t1 is EOS."""
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="t2"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t1")


def make_config(folder: Path | str, **options: Any) -> DelethinkConfig:
    """Return settings in float32 on the CPU, with a constant learning rate and no files."""
    settings: dict[str, Any] = {
        "num_generations": GROUP,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
    }
    return DelethinkConfig(output_dir=str(folder), **(settings | options))
