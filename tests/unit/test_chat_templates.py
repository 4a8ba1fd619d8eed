"""Chat templates of public models: closed thinking, their variables, and templates that fail.

The templates are cut to the lines that matter; the models that have such lines are named.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import pytest

pytest.importorskip("transformers")

from chat_tokenizers import make_chat_tokenizer

from delethink.cli.main import main
from delethink.config import load_recipe
from delethink.errors import ConfigError, ModelError
from delethink.evaluation.models import settings_for_model
from delethink.evaluation.settings import SamplingPlan
from delethink.tokenization import bind_template, check_thinking_is_open, query_ids
from delethink.types import Problem

PROBLEM = Problem("1 + 1?", "2")
TURNS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
START = "{% if add_generation_prompt %}<|assistant|>"
QWEN3 = (  # also SmolLM3, Hunyuan, EXAONE 4
    TURNS + START + "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QWEN3_5_SMALL = (
    TURNS + START + "{% if enable_thinking is defined and enable_thinking is true %}<think>\n"
    "{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
DEEPSEEK_V3_1 = TURNS + START + "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
GLM_4_5 = (
    TURNS + START + "{{ '<think></think>' if (enable_thinking is defined and not enable_thinking) "
    "else '' }}{% endif %}"
)
EFFORT = (
    TURNS + START + "{% if reasoning_effort == 'none' or reasoning_effort is undefined %}"
    "<think></think>{% endif %}{% endif %}"
)
STRICT_EFFORT = "{% if reasoning_effort is not in ['high', 'none', undefined] %}" + (
    "{{ raise_exception('reasoning_effort must be none or high') }}{% endif %}" + EFFORT
)
NO_SYSTEM = (  # Gemma 1 and 2
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
)


def is_open(template: Any, problem: Problem = PROBLEM, **kwargs: Any) -> str:
    """Return the text of the refusal, or an empty one."""
    tokenizer = make_chat_tokenizer(template)
    bind_template(tokenizer, kwargs)
    try:
        check_thinking_is_open(tokenizer, problem)
    except ModelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("template", "kwargs", "option"),
    [
        (QWEN3, {"enable_thinking": False}, "enable_thinking=true"),
        (QWEN3_5_SMALL, {}, "enable_thinking=true"),
        (DEEPSEEK_V3_1, {}, "thinking=true"),
        (DEEPSEEK_V3_1, {"thinking": False}, "thinking=true"),
        (GLM_4_5, {"enable_thinking": False}, "enable_thinking=true"),
        (EFFORT, {}, "reasoning_effort=medium"),
        (STRICT_EFFORT, {"reasoning_effort": "none"}, "reasoning_effort=high"),
        ({"default": DEEPSEEK_V3_1, "tool_use": QWEN3}, {}, "thinking=true"),
    ],
)
def test_the_refusal_names_the_option_that_opens_the_thinking(
    template: Any, kwargs: dict[str, Any], option: str
) -> None:
    name, value = option.split("=")
    text = is_open(template, **kwargs)
    assert f"set chat_template_kwargs.{option} in the recipe" in text
    assert f"--chat-template-kwargs {option}" in text
    as_given: Any = {"true": True}.get(value, value)
    assert is_open(template, **{name: as_given}) == ""


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1]['content'] }}<think></think>",
        TURNS + START + "<think>\n\n</think>\n\n{% endif %}",
        TURNS + START + "</think>{% endif %}",
        TURNS + START + "<think></think>The answer is {% endif %}",
        TURNS + "<|assistant|><think></think>",  # whatever add_generation_prompt says
    ],
)
def test_a_template_that_always_closes_the_thinking_has_no_option(template: str) -> None:
    assert "use a template that leaves the thinking open" in is_open(template)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, PROBLEM),
        (TURNS, PROBLEM),
        (TURNS + START + "<think>\n{% endif %}", PROBLEM),
        (QWEN3, PROBLEM),
        (GLM_4_5, PROBLEM),
        # Instructions may speak of the marks, and so may the problem.
        (TURNS + "Reason between <think> and </think>.\n" + START + "{% endif %}", PROBLEM),
        (TURNS + START + "{% endif %}", Problem("What ends with </think>", "x")),
        (
            TURNS + START + "<think>{% endif %}",
            Problem("?", "x", before=({"role": "system", "content": "<think></think>"},)),
        ),
    ],
)
def test_an_open_template_is_not_refused(template: Any, problem: Problem) -> None:
    assert is_open(template, problem) == ""


# -- variables -------------------------------------------------------------------------------------


def test_variables_reach_the_template_from_the_tokenizer_or_the_call() -> None:
    tokenizer = make_chat_tokenizer(QWEN3)
    plain = tokenizer.decode(query_ids(tokenizer, PROBLEM))
    closed = tokenizer.decode(query_ids(tokenizer, PROBLEM, {"enable_thinking": False}))
    assert plain.endswith("<|assistant|>")
    assert closed.endswith("<|assistant|><think>\n\n</think>\n\n")
    bind_template(tokenizer, {"enable_thinking": False})
    assert tokenizer.decode(query_ids(tokenizer, PROBLEM)) == closed
    assert tokenizer.decode(query_ids(tokenizer, PROBLEM, {})) == plain


@pytest.mark.parametrize(
    ("template", "kwargs", "text"),
    [
        (None, {"enable_thinking": True}, "the tokenizer has no chat template"),
        (TURNS, {"enable_thinking": True}, "names 'enable_thinking', which the tokenizer's chat"),
        (QWEN3, {"enable_thinkin": True}, "Did you mean 'enable_thinking'?"),
        (QWEN3, {"thinking": True}, "Did you mean 'enable_thinking'?"),
        (DEEPSEEK_V3_1, {"enable_thinking": True}, "Did you mean 'thinking'?"),
        (QWEN3, {"add_generation_prompt": False}, "names 'add_generation_prompt'"),
        ("detailed thinking on{{ m.thinking }}", {"thinking": True}, "names 'thinking'"),
        (QWEN3, "enable_thinking", "must be a mapping"),
    ],
)
def test_a_variable_without_effect_is_refused(template: Any, kwargs: Any, text: str) -> None:
    with pytest.raises(ConfigError, match="chat_template_kwargs") as caught:
        bind_template(make_chat_tokenizer(template), kwargs)
    assert text in str(caught.value)


# -- templates that fail ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (NO_SYSTEM, "System role not supported"),
        (
            "{% if messages[0]['role'] != 'user' %}{{ raise_exception('Conversation roles must "
            "alternate user/assistant/user/assistant/...') }}{% endif %}",
            "Conversation roles must alternate",
        ),
        ("{{ messages[0]['name'] + 'x' }}", "'dict object' has no attribute 'name'"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{{ unknown_function() }}", "'unknown_function' is undefined"),
        ({"tool_use": TURNS}, "multiple chat templates with no default"),
    ],
)
def test_a_template_that_fails_is_a_sentence(template: Any, reason: str) -> None:
    tokenizer = make_chat_tokenizer(template)
    problem = Problem("1 + 1?", "2", before=({"role": "system", "content": "Be brief."},))
    with pytest.raises(ModelError, match="chat template fails on messages of the roles") as caught:
        query_ids(tokenizer, problem)
    assert reason in str(caught.value)
    assert "leave out the task's system message" in str(caught.value)
    assert "system, user" in str(caught.value)


def test_a_template_that_is_no_jinja_is_a_sentence() -> None:
    tokenizer = make_chat_tokenizer("{% if messages %}")
    with pytest.raises(ModelError, match="is no Jinja: line 1: Unexpected end of template"):
        query_ids(tokenizer, Problem("1 + 1?", "2"))


# -- every way in ----------------------------------------------------------------------------------


@pytest.fixture
def closed(tmp_path: Any) -> str:
    """A folder of the toy's model with a template that is closed unless told to think."""
    import shutil
    from pathlib import Path

    toy = Path(__file__).parents[2] / "delethink" / "assets" / "toy_reasoner"
    folder = Path(shutil.copytree(toy, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(
        "{{ messages[-1]['content'] }}{% if add_generation_prompt %}"
        "<think>{% if not enable_thinking %}</think>{% endif %}{% endif %}"
    )
    return str(folder)


KWARGS = ["--chat-template-kwargs", "enable_thinking=true"]


def test_eval_refuses_before_the_weights_load(closed: str) -> None:
    problems = [Problem("02:0110", "1001")]

    def settings(**options: Any) -> Any:
        return settings_for_model(closed, ["delethink"], [64], problems, SamplingPlan(), **options)

    with pytest.raises(ModelError, match="--chat-template-kwargs enable_thinking=true"):
        settings()
    assert settings(chat_template_kwargs={"enable_thinking": True})


def test_the_commands_refuse_and_take_the_option(
    closed: str, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    task = ["tasks", "automaton", "min_steps=2", "max_steps=3", "--model", closed, "--check", "0"]
    sample = ["probe", "-m", closed, "--task", "automaton", "--num-problems", "1", "-C", "64"]
    sample += ["--task-arg", "min_steps=2", "--task-arg", "max_steps=3"]
    assert main(task) == 2
    assert main([*sample, "-o", str(tmp_path / "probe")]) == 2
    assert capsys.readouterr().err.count("--chat-template-kwargs enable_thinking=true") == 2
    assert main([*task, *KWARGS]) == 0
    assert "<think>" in capsys.readouterr().out
    assert main([*task[:4], *KWARGS]) == 2
    assert "--chat-template-kwargs needs --model" in capsys.readouterr().err


@pytest.mark.parametrize("env", ["Thinking-v0", "TextThinking-v0", "TokenThinking-v0"])
def test_the_environments_refuse_and_take_the_option(closed: str, env: str) -> None:
    name = f"delethink.envs:delethink/{env}"
    with pytest.raises(ModelError, match=r"chat_template_kwargs.enable_thinking=true"):
        gymnasium.make(name, tokenizer=closed).reset(seed=0)
    made: Any = gymnasium.make(
        name, tokenizer=closed, chat_template_kwargs={"enable_thinking": True}
    )
    made.reset(seed=0)
    with pytest.raises(ConfigError, match="Did you mean 'enable_thinking'"):
        gymnasium.make(name, tokenizer=closed, chat_template_kwargs={"enable_thinkin": True})


def test_a_recipe_takes_the_option(closed: str) -> None:
    from delethink.training.preflight import check_recipe

    recipe = "recipes/quickstart/recipe.yaml"
    refused = check_recipe(load_recipe(recipe, [f"model={closed}"]))[-1]
    assert refused.status == "problem"
    assert "set chat_template_kwargs.enable_thinking=true in the recipe" in refused.found
    fine = load_recipe(recipe, [f"model={closed}", "chat_template_kwargs.enable_thinking=true"])
    found = {check.name: check for check in check_recipe(fine)}
    assert found["tokenizer"].status == "ok"
    assert "ends with '" in found["tokenizer"].found
