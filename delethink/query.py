"""From a problem to the token ids of its query, and from token ids back to text for rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from delethink.types import Problem, TokenIds


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of ``transformers`` have it."""

    chat_template: Any

    def __call__(self, text: str) -> Any:
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


def reward_text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """What a reward reads: the stitched trace without special tokens."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))
