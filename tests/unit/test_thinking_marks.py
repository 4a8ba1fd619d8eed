"""Marks of the end of thinking: found in vocabulary or template, and compared with the rewards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from chat_tokenizers import make_chat_tokenizer

from delethink.config import dump_recipe, load_recipe
from delethink.engines.loading import load_tokenizer
from delethink.errors import ConfigError, ModelError
from delethink.thinking_marks import (
    ASSUMED,
    TEMPLATE,
    TOKENS,
    check_mark_setting,
    find_thinking_marks,
    marks_of,
    shown_ends,
)
from delethink.tokenization import (
    bind_marks,
    bind_template,
    check_thinking_is_open,
    encode,
    keep_marks,
    reward_text,
)
from delethink.training.preflight import check_recipe
from delethink.types import Problem

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


TURNS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
START = "{% if add_generation_prompt %}<|assistant|>"
QWEN3 = (
    TURNS
    + "{% set content = content.split('</think>')[-1] %}"
    + START
    + "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = TURNS + START + "<think>\n{% endif %}"
MAGISTRAL_2509 = (  # the system prompt speaks of the marks
    "[SYSTEM_PROMPT]Draft your thinking first. [THINK]Your thoughts[/THINK]Then answer."
    "[/SYSTEM_PROMPT]{% for m in messages %}[INST]{{ m['content'] }}[/INST]{% endfor %}"
)
HARMONY = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% if m['thinking'] %}<|start|>"
    "assistant<|channel|>analysis<|message|>{{ m['thinking'] }}<|end|>{% endif %}<|start|>assistant"
    "<|channel|>final<|message|>{{ m['content'] }}<|return|>{% else %}<|start|>{{ m['role'] }}"
    "<|message|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
RENDERED = (  # of a model that no list knows
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['reasoning_content'] %}<|BEGIN_IDEA|>"
    "{{ m['reasoning_content'] }}<|END_IDEA|>{% endif %}{{ m['content'] }}{% endfor %}"
)
EFFORTS = (  # K2 Horizon: the mark depends on a variable
    TURNS + START + "{% if reasoning_effort == 'low' %}<ifm|think_faster>{% else %}<ifm|think>"
    "{% endif %}{% endif %}"
)
GRANITE = "{% if thinking %}After 'Here is my thought process:', 'Here is my response:'{% endif %}"
APRIEL = TURNS + START + "\nHere are my reasoning steps:\n{% endif %}"
SOLAR = "<|begin|>assistant{% if think %}<|think|>{% endif %}<|end|><|begin|>assistant<|content|>"


@pytest.mark.parametrize(
    ("template", "tokens", "start", "end", "source"),
    [
        (QWEN3, (), "<think>", "</think>", TEMPLATE),
        (QWEN3, ("[THINK]", "[/THINK]"), "<think>", "</think>", TEMPLATE),
        (R1, (), "<think>", "</think>", TEMPLATE),
        (MAGISTRAL_2509, ("[THINK]", "[/THINK]"), "[THINK]", "[/THINK]", TEMPLATE),
        (TURNS, ("[THINK]", "[/THINK]"), "[THINK]", "[/THINK]", TOKENS),
        (
            HARMONY,
            ("<|channel|>", "<|message|>", "<|start|>"),
            "<|channel|>analysis<|message|>",
            "<|channel|>final<|message|>",
            TEMPLATE,
        ),
        (TURNS, ("<|channel>", "<channel|>"), "<|channel>thought", "<channel|>", TOKENS),
        (EFFORTS, (), "<ifm|think>", "</ifm|think>", TEMPLATE),
        (GRANITE, (), "Here is my thought process:", "Here is my response:", TEMPLATE),
        (APRIEL, (), "Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]", TEMPLATE),
        (SOLAR, (), "<|think|>", "<|content|>", TEMPLATE),
        (TURNS + START + "<longcat_think>{% endif %}", (), None, "</longcat_think>", TEMPLATE),
        (TURNS, ("<think:opensource>", "</think:opensource>"), None, "</think:opensource>", TOKENS),
        (RENDERED, (), None, "<|END_IDEA|>", TEMPLATE),
        (TURNS + "<reasoning_effort>high</reasoning_effort>", (), "<think>", "</think>", ASSUMED),
        (TURNS + "<begin_of_thought>", (), "<think>", "</think>", ASSUMED),
        (TURNS + START + "{% endif %}", (), "<think>", "</think>", ASSUMED),
        ("{# a <think> of the authors #}" + TURNS, (), "<think>", "</think>", ASSUMED),
        (TURNS, ("<|think|>",), "<think>", "</think>", ASSUMED),  # Gemma 4's switch alone
        (None, (), "<think>", "</think>", ASSUMED),
    ],
)
def test_the_marks_of_a_model(
    template: Any, tokens: tuple[str, ...], start: str | None, end: str, source: str
) -> None:
    marks = find_thinking_marks(make_chat_tokenizer(template, tokens))
    assert (marks.end, marks.source) == (end, source)
    assert start is None or marks.start == start
    assert marks.is_assumed == (source == ASSUMED)


def test_a_variable_of_the_template_chooses_the_mark() -> None:
    tokenizer = make_chat_tokenizer(EFFORTS)
    assert find_thinking_marks(tokenizer, "auto", {"reasoning_effort": "low"}).end == (
        "</ifm|think_faster>"
    )
    assert marks_of(tokenizer).end == "</ifm|think>"
    bind_template(tokenizer, {"reasoning_effort": "low"})
    assert marks_of(tokenizer).end == "</ifm|think_faster>"


def test_a_template_that_fails_on_answers_is_no_obstacle() -> None:
    strict = "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ raise_exception('no') }}"
    strict += "{% endif %}{% endfor %}" + START + "<think>{% endif %}"
    assert find_thinking_marks(make_chat_tokenizer(strict)).source == TEMPLATE


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("auto", "auto"),
        (None, None),
        ("null", None),
        ("[/THINK]", "[/THINK]"),
        (["/THINK"], "[/THINK]"),  # YAML reads a list
        ({"Here is my response": None}, "Here is my response:"),
        ("=", "="),
    ],
)
def test_a_setting_is_a_mark_or_none(given: Any, meant: str | None) -> None:
    assert check_mark_setting(given) == meant


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("", "a mark such as </think>, 'auto' or null"),
        (False, "a mark such as </think>, 'auto' or null"),
        ("none", "Did you mean null"),
        ("atuo", "Did you mean 'auto'"),
        ("<think>", "marks the start of thinking, and the setting names its end: write '</think>'"),
        ("[THINK]", "write '[/THINK]'"),
        ({"a": 1}, "quote a mark"),
    ],
)
def test_another_setting_is_refused_with_the_right_one(given: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_mark_setting(given)
    assert text in str(caught.value)


CLOSED = [
    (TURNS + START + "[THINK][/THINK]{% endif %}", "[/THINK]"),  # Ministral 3
    (TURNS + START + "<|START_THINKING|><|END_THINKING|>{% endif %}", "<|END_THINKING|>"),
    (APRIEL.replace("steps:\n", "steps:\n\n[BEGIN FINAL RESPONSE]\n"), "[BEGIN FINAL RESPONSE]"),
    (
        TURNS + START + "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final"
        "<|message|>{% endif %}",
        "<|channel|>final<|message|>",
    ),
    (TURNS + START + "<seed:think></seed:think>{% endif %}", "</seed:think>"),
]


@pytest.mark.parametrize(("template", "end"), CLOSED)
def test_closed_thinking_is_refused_with_any_mark_but_none(template: str, end: str) -> None:
    tokenizer, problem = make_chat_tokenizer(template), Problem("1 + 1?", "2")
    with pytest.raises(ModelError) as caught:
        check_thinking_is_open(tokenizer, problem)
    assert f"chat template ends with {end}: it closes the thinking" in str(caught.value)
    assert "--end-of-thinking, to null" in str(caught.value)
    bind_marks(tokenizer, None)
    check_thinking_is_open(tokenizer, problem)


def test_an_explicit_mark_of_special_tokens_stays_for_rewards() -> None:
    tokenizer = make_chat_tokenizer(None, ["<|sep|>"])
    ids = encode(tokenizer, "a<|sep|>4<|end|>")
    assert reward_text(tokenizer, ids) == "a4"
    assert bind_marks(tokenizer, "<|sep|>").end == "<|sep|>"
    assert reward_text(tokenizer, ids) == "a<|sep|>4"
    bind_marks(tokenizer, "auto")
    assert marks_of(tokenizer).is_assumed


def test_a_demonstration_is_rewritten_with_the_marks() -> None:
    text = "So 4.</think>\\boxed{4}"
    rewritten = [
        find_thinking_marks(make_chat_tokenizer(), setting).rewrite(text)
        for setting in ("</think>", "[/THINK]", None)
    ]
    assert rewritten == [text, "So 4.[/THINK]\\boxed{4}", "\\boxed{4}"]


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


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("auto", "auto"),
        ("null", None),
        ("[/THINK]", "[/THINK]"),
        ("</think>", "</think>"),
        ("<|channel|>final<|message|>", "<|channel|>final<|message|>"),
        ("Here is my response:", "Here is my response:"),
    ],
)
def test_a_recipe_names_the_mark_and_keeps_it(
    tmp_path: Path, written: str, meant: str | None
) -> None:
    recipe = load_recipe(RECIPE, [f"task.end_of_thinking={written}"])
    assert recipe.task.end_of_thinking == meant
    (tmp_path / "config.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "config.yaml").task.end_of_thinking == meant


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "task.end_of_thinking=none",
            "task.end_of_thinking: the end of thinking is a mark such as",
        ),
        ("task.end_of_thinking=<think>", "write '</think>'"),
        ("task.end_of_thought=null", "Did you mean 'end_of_thinking'"),
        (
            "evaluation.task={name: automaton, end_of_thinking: null}",
            "set task.end_of_thinking alone",
        ),
    ],
)
def test_a_recipe_with_another_value_is_refused(override: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(RECIPE, [override])
    assert text in str(caught.value)
