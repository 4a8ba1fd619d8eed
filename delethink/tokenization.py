"""From a problem to the token ids of its query, and from token ids back to text for rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from delethink.errors import ModelError
from delethink.tokens import as_list
from delethink.types import END_OF_THINKING, Problem, TokenIds


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
    otherwise the messages are taken as they stand, with an empty line between.
    """
    if tokenizer.chat_template is None:
        said = [message["content"] for message in problem.messages]
        return tuple(tokenizer("\n\n".join(said))["input_ids"])
    encoded = tokenizer.apply_chat_template(
        problem.messages,
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


def check_thinking_is_open(tokenizer: Tokenizer, problem: Problem) -> None:
    """Rewards look for the end of thinking in what is sampled, so the query must not hold it.

    Raises:
        ModelError: the chat template closes the thinking itself, and every reward would be 0.
    """
    if tokenizer.chat_template is None:
        return
    asked = problem.prompt + "".join(message["content"] for message in problem.before)
    query = str(tokenizer.decode(list(query_ids(tokenizer, problem))))
    if query.rstrip().endswith(END_OF_THINKING) and END_OF_THINKING not in asked:
        raise ModelError(
            f"the tokenizer's chat template ends with {END_OF_THINKING}: it closes the thinking "
            "before the model begins, and no answer after it would ever be found; use a template "
            "that leaves it open"
        )
