"""From a problem to the token ids of its query, and from token ids back to text for rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from delethink.tokens import as_list
from delethink.types import Problem, TokenIds


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of ``transformers`` have it."""

    chat_template: Any

    def __call__(self, text: str, **options: Any) -> Any:
        """A mapping with the token ids of ``text`` under ``"input_ids"``."""
        ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """The token ids of a conversation."""
        ...

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """The text of token ids."""
        ...


def query_ids(tokenizer: Tokenizer, problem: Problem) -> TokenIds:
    """q, the ids of the templated prompt.

    The tokenizer's chat template is used where it has one, also one that opens the thinking itself;
    otherwise the prompt is taken as it stands.
    """
    if tokenizer.chat_template is None:
        return tuple(tokenizer(problem.prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.prompt}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    return tuple(encoded["input_ids"])


def encode(tokenizer: Tokenizer, text: str) -> TokenIds:
    """The ids of a piece of text, without the special tokens that a tokenizer puts around a whole.

    Special tokens that are spelt out in the text, an end of sequence say, become their ids.
    """
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def retokenized_at(tokenizer: Tokenizer, token_ids: Sequence[int]) -> int | None:
    """Where the text of ``token_ids`` would be other tokens: the first such position, or ``None``.

    Sampled ids need not be those that a tokenizer makes of their text. Who handles text alone would
    go on from other ids than were sampled, from this position.
    """
    again = encode(tokenizer, str(tokenizer.decode(as_list(token_ids))))
    pairs = enumerate(zip(token_ids, again, strict=False))
    differs = next((i for i, (one, other) in pairs if one != other), None)
    if differs is None and len(again) != len(token_ids):
        return min(len(again), len(token_ids))
    return differs


def reward_text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """What a reward reads: the stitched trace without special tokens."""
    return str(tokenizer.decode(as_list(token_ids), skip_special_tokens=True))
