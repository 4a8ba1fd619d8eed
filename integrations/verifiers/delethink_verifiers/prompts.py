"""Prompts of chunks as messages of the chat API.

A server renders messages with its chat template, so the carried tokens travel as the beginning of
an assistant's message that the server continues. Training sends their ids along, in a field that
the renderer of this package reads (``renderer.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from delethink.chat_templates import TEMPLATE_KWARGS, apply_template, bound_kwargs
from delethink.engines.openai_dialect import text_of
from delethink.errors import ModelError
from delethink.tokens import as_list
from delethink.types import TokenIds

CARRIED = "delethink.carried"  # type of the entry with carried ids in ``reasoning_details``
RAW_TEMPLATE = "{{ messages[0]['content'] }}"
_MARK = "ANSWER"  # content of an assistant's message, to find what stands before it


class ChatPrompts:
    """Messages for the prompts of one trace.

    Args:
        tokenizer: tokenizer of the model, with a chat template.
        messages: the question.
        query_ids: the token ids of the question and of the start of the model's turn.
        sends_ids: send carried ids for the renderer instead of continuing an assistant's message.
    """

    def __init__(
        self,
        tokenizer: Any,
        messages: Sequence[Mapping[str, Any]],
        query_ids: TokenIds,
        sends_ids: bool,
    ) -> None:
        self._tokenizer, self._messages, self._query = tokenizer, list(messages), query_ids
        self._sends_ids = sends_ids
        self._opening = None if sends_ids else self._find_opening()

    def body(self, prompt_ids: TokenIds) -> dict[str, Any]:
        """Return the fields of a request for a prompt: the query, then carried tokens."""
        carried = prompt_ids[len(self._query) :]
        variables = bound_kwargs(self._tokenizer, None)
        own = {TEMPLATE_KWARGS: dict(variables)} if variables and not self._sends_ids else {}
        if not len(carried):
            return {"messages": self._messages, **own}
        text = text_of(self._tokenizer, carried)
        if self._sends_ids:
            details = [{"type": CARRIED, "token_ids": as_list(carried)}]
            partial = {"role": "assistant", "content": text, "reasoning_details": details}
            return {"messages": [*self._messages, partial]}
        whole = text_of(self._tokenizer, prompt_ids)
        if self._opening is not None:
            messages = [*self._messages, {"role": "assistant", "content": self._opening + text}]
            if self._continued(messages) == whole:
                flags = {"continue_final_message": True, "add_generation_prompt": False}
                return {"messages": messages, **flags, **own}
        # The template changes what it continues, so the request brings one that does not.
        raw = [{"role": "user", "content": whole}]
        return {"messages": raw, "chat_template": RAW_TEMPLATE, "add_generation_prompt": False}

    def _find_opening(self) -> str | None:
        """Return what the template writes between an assistant's header and its answer.

        A template that opens the thinking does so for a new turn only. ``None``: it cannot
        continue a message.
        """
        probe = [*self._messages, {"role": "assistant", "content": _MARK}]
        continued = self._continued(probe)
        header = None if continued is None else continued.removesuffix(_MARK)
        query = text_of(self._tokenizer, self._query)
        if header is None or header == continued or not query.startswith(header):
            return None
        return query.removeprefix(header)

    def _continued(self, messages: Sequence[Mapping[str, Any]]) -> str | None:
        options = {"tokenize": False, "continue_final_message": True}
        try:
            return str(apply_template(self._tokenizer, messages, None, options))
        except ModelError:
            return None
