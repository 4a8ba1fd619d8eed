"""Conversion of problems to query token ids, and of token ids to the text for rewards."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, Protocol

from delethink.errors import ModelError
from delethink.tokens import as_list
from delethink.types import END_OF_THINKING, Problem, TokenIds


class Tokenizer(Protocol):
    """The tokenizer interface of the library, implemented by tokenizers of ``transformers``."""

    chat_template: Any

    def __call__(self, text: str, **options: Any) -> Any:
        """Return a mapping with the token ids of ``text`` under ``"input_ids"``."""
        ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Return the token ids of a conversation."""
        ...

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Return the text of token ids."""
        ...


def query_ids(tokenizer: Tokenizer, problem: Problem) -> TokenIds:
    """Return q, the token ids of the templated prompt.

    The tokenizer's chat template may open the thinking. Without a template, the messages are joined
    with an empty line between them.
    """
    if tokenizer.chat_template is None:
        contents = [message["content"] for message in problem.messages]
        return tuple(tokenizer("\n\n".join(contents))["input_ids"])
    encoded = tokenizer.apply_chat_template(
        problem.messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return tuple(encoded["input_ids"])


def encode(tokenizer: Tokenizer, text: str) -> TokenIds:
    """Return the token ids of ``text`` without added special tokens.

    Special tokens spelled out in the text, such as EOS, become their ids.
    """
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def retokenized_at(tokenizer: Tokenizer, token_ids: Sequence[int]) -> int | None:
    """Return the first position at which decoding and encoding changes the ids, or ``None``.

    Sampled ids need not be the tokenizer's encoding of their text. From this position on, a client
    of the text alone continues from other ids than the sampled ones.
    """
    again = encode(tokenizer, str(tokenizer.decode(as_list(token_ids))))
    pairs = enumerate(zip_longest(token_ids, again))
    return next((i for i, (before, after) in pairs if before != after), None)


def reward_text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Return the text of a trace for rewards, without special tokens."""
    return str(tokenizer.decode(as_list(token_ids), skip_special_tokens=True))


def check_thinking_is_open(tokenizer: Tokenizer, problem: Problem) -> None:
    """Check that the query does not end with the end of thinking, which rewards search later.

    Raises:
        ModelError: the chat template closes the thinking, so every reward would be 0.
    """
    if tokenizer.chat_template is None:
        return
    user_text = problem.prompt + "".join(message["content"] for message in problem.before)
    query = str(tokenizer.decode(list(query_ids(tokenizer, problem))))
    if query.rstrip().endswith(END_OF_THINKING) and END_OF_THINKING not in user_text:
        raise ModelError(
            f"the tokenizer's chat template ends with {END_OF_THINKING}: it closes the thinking "
            "before the model begins, so no answer is ever found; use a template that leaves the "
            "thinking open"
        )
