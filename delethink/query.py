"""From a problem to the token ids of its query, and from token ids back to text for rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from delethink.errors import ModelError
from delethink.types import END_OF_THINKING, Problem, TokenIds


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


def reward_text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """What a reward reads: the stitched trace without special tokens."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))


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
