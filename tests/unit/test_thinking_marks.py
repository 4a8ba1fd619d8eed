"""Marks of the end of thinking: found in vocabulary or template, and compared with the rewards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from chat_tokenizers import make_chat_tokenizer

from delethink.config import load_recipe
from delethink.engines.loading import load_tokenizer
from delethink.thinking_marks import shown_ends
from delethink.tokenization import encode, keep_marks, reward_text
from delethink.training.preflight import check_recipe

TOY = Path(__file__).parents[2] / "delethink" / "assets" / "toy_reasoner"
RECIPE = "recipes/quickstart/recipe.yaml"


@pytest.mark.parametrize(
    ("template", "marks", "expected"),
    [
        (None, [], ()),
        ("{{ messages[-1]['content'] }}", [], ()),
        (None, ["<think>", "</think>"], ("</think>",)),
        ("{{ messages[-1]['content'] }}<think>\n", [], ("</think>",)),
        ("{% set content = content.split('</think>')[-1] %}", [], ("</think>",)),
        (None, ["[THINK]", "[/THINK]"], ("[/THINK]",)),
        (None, ["<|channel|>", "<|message|>"], ("<|channel|>final<|message|>",)),
        ("<|channel|>analysis<|message|>", [], ("<|channel|>final<|message|>",)),
        (None, ["<|channel>", "<channel|>"], ("<channel|>",)),
        (None, ["<seed:think>", "</seed:think>"], ("</seed:think>",)),
        (None, ["<|START_THINKING|>", "<|END_THINKING|>"], ("<|END_THINKING|>",)),
        ("{{ messages[-1]['content'] }}<thought>\n", [], ("</thought>",)),
        ("\u25c1think\u25b7", [], ("\u25c1/think\u25b7",)),
    ],
)
def test_marks_are_found(template: Any, marks: list[str], expected: tuple[str, ...]) -> None:
    assert shown_ends(make_chat_tokenizer(template, marks)) == expected


def test_the_toy_has_the_usual_mark() -> None:
    assert shown_ends(load_tokenizer("toy")) == ("</think>",)


def check_of(model: Path, *overrides: str) -> Any:
    checks = check_recipe(load_recipe(RECIPE, [f"model={model}", *overrides]))
    return next(check for check in checks if check.name == "thinking")


def test_doctor_says_so_before_every_reward_is_0(tmp_path: Path) -> None:
    model = Path(shutil.copytree(TOY, tmp_path / "model"))
    found = check_of(model)
    assert found.status == "ok"
    assert found.found == "the answer begins after </think> (from the chat template)"
    found = check_of(model, "task.end_of_thinking=[/THINK]")
    assert found.status == "warning"
    assert "after [/THINK] (from the setting); the tokenizer shows </think>" in found.found
    assert "set task.end_of_thinking in the recipe" in found.advice
    found = check_of(model, "task.end_of_thinking=null")
    assert found.status == "ok"
    assert "the whole output is the answer" in found.found


MAGISTRAL = ("[THINK]", "[/THINK]")
GPT_OSS = ("<|channel|>", "<|message|>")


@pytest.mark.parametrize(
    ("marks", "text", "expected"),
    [
        (MAGISTRAL, "a[/THINK]b<|end|>", "a[/THINK]b"),
        (MAGISTRAL, "[THINK]a[/THINK]<|pad|>b[/THINK]<|end|>", "a[/THINK]b[/THINK]"),
        (
            GPT_OSS,
            "a<|pad|><|channel|>final<|message|>4<|end|>",
            "a<|channel|>final<|message|>4",
        ),
        (("</think>",), "a</think>b<|end|>", "a</think>b"),
        (("<|END_THINKING|>",), "\u4f60<|END_THINKING|>\u597d", "\u4f60<|END_THINKING|>\u597d"),
        (("<|other|>",), "a<|other|>b<|end|>", "ab"),
    ],
)
def test_a_mark_among_the_special_tokens_stays_for_rewards(
    marks: tuple[str, ...], text: str, expected: str
) -> None:
    tokenizer = make_chat_tokenizer(None, marks)
    keep_marks(tokenizer)
    assert reward_text(tokenizer, encode(tokenizer, text)) == expected
    assert reward_text(tokenizer, ()) == ""


def test_a_special_mark_is_no_reason_to_refuse_a_tokenizer(tmp_path: Path) -> None:
    make_chat_tokenizer(None, ["</think>"]).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert reward_text(tokenizer, encode(tokenizer, "a</think>b<|end|>")) == "a</think>b"


def test_the_rewards_of_a_recipe_are_checked_with_their_own_mark(tmp_path: Path) -> None:
    for end in ("'[/THINK]'", "null"):
        checks = check_recipe(load_recipe(RECIPE, [f"rewards={{exact: {{args: {{end: {end}}}}}}}"]))
        (rewards,) = [check for check in checks if check.name == "rewards"]
        assert rewards.status == "ok"
