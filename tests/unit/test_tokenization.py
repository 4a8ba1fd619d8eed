"""From a problem to its query: chat templates are respected, also those that open the thinking."""

from __future__ import annotations

from typing import Any

import pytest

from delethink.errors import ModelError
from delethink.tokenization import check_thinking_is_open, query_ids
from delethink.types import Problem


class Templated:
    """One token a character; renders ``<role>text`` for each message and then ``opening``."""

    def __init__(self, opening: str | None) -> None:
        self.chat_template = opening

    def __call__(self, text: str) -> Any:
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        assert options["add_generation_prompt"]
        said = "".join(f"<{m['role']}>{m['content']}" for m in conversation)
        return self(said + f"<assistant>{self.chat_template}")

    def decode(self, token_ids: Any, **options: Any) -> str:
        return "".join(map(chr, token_ids))


PROBLEM = Problem("1 + 1?", "2", before=({"role": "system", "content": "Be brief."},))


def rendered(opening: str | None, problem: Problem = PROBLEM) -> str:
    tokenizer = Templated(opening)
    return tokenizer.decode(query_ids(tokenizer, problem))


def test_messages_go_through_the_template() -> None:
    assert rendered("<think>\n") == "<system>Be brief.<user>1 + 1?<assistant><think>\n"


def test_without_a_template_messages_stand_as_they_are() -> None:
    assert rendered(None) == "Be brief.\n\n1 + 1?"
    assert rendered(None, Problem("1 + 1?", "2")) == "1 + 1?"


@pytest.mark.parametrize("opening", ["", "<think>", "<think>\n", None])
def test_thinking_may_be_open_or_not_begun(opening: str | None) -> None:
    check_thinking_is_open(Templated(opening), PROBLEM)


@pytest.mark.parametrize("opening", ["<think>\n\n</think>\n\n", "<think></think>"])
def test_a_template_that_closes_the_thinking_is_refused(opening: str) -> None:
    with pytest.raises(ModelError, match="no answer is ever found"):
        check_thinking_is_open(Templated(opening), PROBLEM)


def test_a_question_about_the_mark_is_allowed() -> None:
    check_thinking_is_open(Templated(""), Problem("What does </think> mean?", "x"))
    check_thinking_is_open(Templated(None), Problem("What is </think>", "x"))
