"""Chat templates of tokenizers: rendering, variables, and the text that begins an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, Protocol

from delethink.errors import ConfigError, ModelError, did_you_mean
from delethink.types import Problem


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


TEMPLATE_KWARGS = "chat_template_kwargs"
# Arguments of ``apply_chat_template`` that would change more than the text of the prompt.
_RESERVED = frozenset(
    (
        "conversation",
        "messages",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "tokenizer_kwargs",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
    )
)
# Variables with which templates of public models turn thinking on, and values that do.
THINKING_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "enable_thinking": (True,),  # Qwen3, GLM-4.5, SmolLM3, Hunyuan, EXAONE 4
    "thinking": (True,),  # DeepSeek-V3.1, Granite 3.2, Kimi K2.5
    "reasoning": (True,),  # Command A Reasoning
    "reasoning_effort": ("medium", "high"),  # gpt-oss, Mistral
    "thinking_mode": ("thinking", "on"),  # DeepSeek-V3.2, Ling
}


def bind_template(tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None) -> None:
    """Make these variables of the chat template the default for every query of a tokenizer.

    Raises:
        ConfigError: the tokenizer has no template, or its template has no such variable.
    """
    check_template_kwargs(tokenizer, chat_template_kwargs)
    if chat_template_kwargs:
        tokenizer.chat_template_kwargs = dict(chat_template_kwargs)


def check_template_kwargs(
    tokenizer: Tokenizer, chat_template_kwargs: Mapping[str, Any] | None
) -> None:
    """Refuse variables that the chat template of a tokenizer does not read.

    Raises:
        ConfigError: the tokenizer has no template, or its template has no such variable.
    """
    if not chat_template_kwargs:
        return
    if not isinstance(chat_template_kwargs, Mapping):
        raise ConfigError(
            f"{TEMPLATE_KWARGS} must be a mapping such as {{'enable_thinking': True}}, got "
            f"{chat_template_kwargs!r:.80}"
        )
    source = template_source(tokenizer)
    given = ", ".join(map(str, chat_template_kwargs))
    if source is None:
        raise ConfigError(
            f"{TEMPLATE_KWARGS} ({given}) has no effect: the tokenizer has no chat template; leave "
            "it out"
        )
    for name in chat_template_kwargs:
        if name in _RESERVED or not has_variable(source, str(name)):
            known = [option for option in THINKING_OPTIONS if has_variable(source, option)]
            raise ConfigError(
                f"{TEMPLATE_KWARGS} names {name!r}, which the tokenizer's chat template does not "
                f"read.{did_you_mean(str(name), known)}"
            )


def generation_prompt(
    tokenizer: Tokenizer, problem: Problem, chat_template_kwargs: Mapping[str, Any] | None
) -> str:
    """Return the text that a template adds for the model's turn; ``""`` if that is unknown."""
    if not hasattr(tokenizer, "get_chat_template"):
        return ""
    texts = []
    for adds in (True, False):
        options = {"tokenize": False, "add_generation_prompt": adds}
        try:
            texts.append(
                str(apply_template(tokenizer, problem.messages, chat_template_kwargs, options))
            )
        except ModelError:
            return ""
    pairs = enumerate(zip_longest(*texts))
    return texts[0][next((i for i, (one, other) in pairs if one != other), len(texts[0])) :]


def apply_template(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    chat_template_kwargs: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> Any:
    """Render messages with the chat template.

    Raises:
        ModelError: the template fails, or refuses the messages.
    """
    variables = bound_kwargs(tokenizer, chat_template_kwargs)
    try:
        return tokenizer.apply_chat_template(list(messages), **variables, **options)
    except Exception as error:  # a template is a program and may raise anything
        if not hasattr(tokenizer, "get_chat_template"):
            raise  # not of transformers: a bug of the tokenizer
        roles = ", ".join(message["role"] for message in messages)
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        advice = "use another template, or other messages"
        if "system" in roles:
            advice = "leave out the task's system message, or use another template"
        line = getattr(error, "lineno", None)  # of a fault in the template's own text
        if line is not None:
            raise ModelError(
                f"the tokenizer's chat template is no Jinja: line {line}: {reason.rstrip('.')}; "
                "correct its chat_template.jinja, or use another template"
            ) from error
        raise ModelError(
            f"the tokenizer's chat template fails on messages of the roles {roles}: "
            f"{reason.rstrip('.')}; {advice}"
        ) from error


def bound_kwargs(
    tokenizer: Tokenizer, chat_template_kwargs: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """Return the given variables of a template, or those bound to the tokenizer."""
    if chat_template_kwargs is not None:
        return chat_template_kwargs
    bound: Mapping[str, Any] = getattr(tokenizer, TEMPLATE_KWARGS, None) or {}
    return bound


def template_source(tokenizer: Tokenizer) -> str | None:
    """Return the source of the chat template; of several named ones, the default."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return None if template is None else str(template)


def has_variable(source: str, name: str) -> bool:
    """Return whether a template reads a variable: not an attribute, not a word of a text."""
    code = " ".join(re.findall(r"\{[{%](.*?)[}%]\}", source, re.DOTALL))
    code = re.sub(r"'[^']*'|\"[^\"]*\"", "''", code)
    return re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", code) is not None
