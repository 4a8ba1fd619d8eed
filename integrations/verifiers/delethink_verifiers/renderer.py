"""Renderer for training with verifiers and prime-rl: carried tokens stay exactly their ids.

    [client.renderer]
    name = "custom"
    import_path = "delethink_verifiers.renderer.OpenPromptRenderer"

A conversation that ends with carried tokens (``prompts.py``) becomes an open prompt: the query,
then these ids, which no template and no tokenizer touches. Any other conversation is rendered with
the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict
from renderers import ParsedResponse, RenderedTokens
from renderers.base import Message, ToolSpec
from renderers.configs import BaseRendererConfig

from delethink.chat_templates import apply_template
from delethink.engines.openai_dialect import text_of
from delethink.errors import ConfigError, ModelError
from delethink.thinking_marks import AUTO
from delethink.tokenization import bind_marks, end_tokens, message_ids
from delethink_verifiers.prompts import CARRIED


class OpenPromptRendererConfig(BaseRendererConfig):
    """Settings of the renderer; any other field is a variable of the chat template."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = "custom"
    end_of_thinking: str | None = AUTO
    """Mark between thinking and answer; "auto": as the chat template and the tokens show it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer besides those of the tokenizer and its chat template."""

    _internal_fields = frozenset({"end_of_thinking", "stop_token_ids"})
    _allow_opaque_template_kwargs = True


class OpenPromptRenderer:
    """Renderer of the protocol of ``renderers``; it has no tools and bridges no turns.

    Raises:
        ModelError: the tokenizer has no chat template, or cannot write the end of thinking.
    """

    config_class = OpenPromptRendererConfig
    is_prefix_stable = False
    supports_tools = False

    def __init__(self, tokenizer: Any, config: OpenPromptRendererConfig | None = None) -> None:
        self.config = config or OpenPromptRendererConfig()
        if tokenizer.chat_template is None:
            raise ModelError(
                "the tokenizer has no chat template, so messages cannot become a prompt: add a "
                "chat_template.jinja"
            )
        self._tokenizer = tokenizer
        self._variables = dict(self.config.model_extra or {})
        self._marks = bind_marks(tokenizer, self.config.end_of_thinking)
        self._ends = list(dict.fromkeys([*end_tokens(tokenizer), *self.config.stop_token_ids]))

    def render(
        self,
        messages: list[Message],
        *,
        tools: list[ToolSpec] | None = None,
        add_generation_prompt: bool = False,
    ) -> RenderedTokens:
        """Return the token ids of a conversation, and the message that each belongs to.

        All tokens before carried ones belong to the last message before them.

        Raises:
            ConfigError: there are tools, or an open message of the assistant has no ids.
        """
        if tools:
            raise ConfigError("this renderer has no tools; thinking in chunks does not use any")
        carried = carried_ids(messages[-1]) if messages else None
        if carried is None:
            ids, owners = self._whole(messages, add_generation_prompt), [len(messages) - 1]
            owners *= len(ids)
        else:
            if text_of(self._tokenizer, carried) != (messages[-1]["content"] or ""):
                raise ConfigError("the text of carried tokens was changed on its way")
            query = self._whole(messages[:-1], True)
            ids = [*query, *carried]
            last = len(messages) - 1
            owners = [last - 1] * len(query) + [last] * len(carried)
        roles = [message["role"] for message in messages]
        return RenderedTokens(token_ids=ids, message_indices=owners, message_roles=roles)

    def render_ids(
        self,
        messages: list[Message],
        *,
        tools: list[ToolSpec] | None = None,
        add_generation_prompt: bool = False,
    ) -> list[int]:
        """Return the token ids of a conversation."""
        options = {"tools": tools, "add_generation_prompt": add_generation_prompt}
        return self.render(messages, **options).token_ids

    def parse_response(
        self,
        token_ids: list[int],
        *,
        tools: list[ToolSpec] | None = None,
        prompt_ids: list[int] | None = None,
    ) -> ParsedResponse:
        """Return the text of sampled tokens; an end-of-sequence token is left out."""
        ended = bool(token_ids) and token_ids[-1] in self._ends
        text = text_of(self._tokenizer, token_ids[:-1] if ended else token_ids)
        return ParsedResponse(content=text, reasoning_complete=self._marks.ends_in(text))

    def get_stop_token_ids(self) -> list[int]:
        """Return the tokens that end an answer."""
        return list(self._ends)

    def bridge_to_next_turn(
        self,
        previous_prompt_ids: list[int],
        previous_completion_ids: list[int],
        new_messages: list[Message],
        *,
        tools: list[ToolSpec] | None = None,
    ) -> None:
        """Return ``None``: each prompt is rendered from its beginning."""
        return

    def _whole(self, messages: Sequence[Any], opens: bool) -> list[int]:
        """Return the ids of messages by the chat template; ``opens`` begins the model's turn."""
        if opens and messages and messages[-1]["role"] == "assistant":
            raise ConfigError(
                "an open message of the assistant needs its token ids, as its text may be encoded "
                f"to others: put them into reasoning_details with the type {CARRIED!r}"
            )
        if opens:
            return list(message_ids(self._tokenizer, messages, self._variables))
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": False}
        encoded = apply_template(self._tokenizer, messages, self._variables, options)
        return list(encoded["input_ids"])


def carried_ids(message: Mapping[str, Any]) -> list[int] | None:
    """Return the carried token ids of a message, or ``None`` if it has none.

    Raises:
        ConfigError: they are no list of token ids.
    """
    if message.get("role") != "assistant":
        return None
    for entry in message.get("reasoning_details") or ():
        if isinstance(entry, Mapping) and entry.get("type") == CARRIED:
            ids = entry.get("token_ids")
            if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
                raise ConfigError(f"carried tokens must be a list of token ids, got {ids!r:.80}")
            return list(ids)
    return None
