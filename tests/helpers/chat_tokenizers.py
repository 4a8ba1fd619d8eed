"""Tokenizers of transformers over bytes, made in a moment, with any chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END, PAD = "<|end|>", "<|pad|>"


def make_chat_tokenizer(
    template: Any = None,
    marks: Sequence[str] = (),
    eos: str | None = END,
    **options: Any,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per byte.

    Args:
        template: its chat template, or several by name.
        marks: further tokens, special ones, in the order of their ids.
        eos: its end-of-sequence token.
        options: of ``PreTrainedTokenizerFast``.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    own.decoder = decoders.ByteLevel()
    own.add_special_tokens([PAD, END, *marks])
    made = PreTrainedTokenizerFast(tokenizer_object=own, pad_token=PAD, eos_token=eos, **options)
    made.chat_template = template
    return made
