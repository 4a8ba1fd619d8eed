"""A recipe's task behind the ``environment_factory`` of an unmodified ``GRPOTrainer``."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
from guide_page import blocks
from installed import need

from delethink import ConfigError
from delethink.integrations.trl_environment import LongcotTask

need("trl")
pytestmark = pytest.mark.integration

SHORT = ["task.args.min_steps=3", "task.args.max_steps=5"]
RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart" / "recipe.yaml"
# The toy's prompt as its own template writes it. TRL asks for a template that shows tool calls,
# also of environments without tools.
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% for c in m['tool_calls'] or [] %}{{ c }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
)


def test_the_contract_of_an_environment() -> None:
    task = LongcotTask.from_recipe(RECIPE, 60, ["task.args.min_steps=3", "task.args.max_steps=5"])
    first, second = task.rows(2)
    environment = task.environment()
    problem = task.source.problem("train", 1)
    assert environment.reset(**second) == problem.prompt
    encode, end = task.source.tokenizer, task.source.tokenizer.eos_token_id
    right = [*encode(f"</think>{problem.answer}")["input_ids"], end]
    wrong = [*encode("</think>")["input_ids"], end]
    pair = {"environments": [environment] * 2, "completion_ids": [right, wrong], "prompts": []}
    assert asyncio.run(task.reward(**pair)) == [1.0, 0.0]
    assert environment.reset(**first) != problem.prompt

    with pytest.raises(ConfigError, match="must have the columns prompt, split and index"):
        environment.reset(prompt=[])
    with pytest.raises(ConfigError, match="unknown split 'dev'"):
        task.rows(2, "dev")
    task.source.close()


@pytest.mark.slow
def test_the_trainer_takes_it(tmp_path: Path) -> None:
    """The guide's code: the logged reward is the recipe's of the sampled completions."""
    from delethink.engines.loading import locate
    from delethink.scoring.rollouts import attempt_from_text
    from delethink.tokenization import reward_text

    model = tmp_path / "model"
    shutil.copytree(locate("toy"), model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    code = blocks("integrations_trl.md", "python")[1]
    sizes = "per_device_train_batch_size=4, num_generations=2, max_steps=1, logging_steps=1"
    quiet = "use_cpu=True, bf16=False, report_to='none', save_strategy='no', disable_tqdm=True"
    for old, new in {
        '("recipe.yaml", budget=4096)': f"({str(RECIPE)!r}, budget=100, overrides={SHORT})",
        "path/to/the/model": str(model),
        'output_dir="run"': f"output_dir={str(tmp_path)!r}, {sizes}, {quiet}",
        "task.rows(1000)": "task.rows(4)",
        "[task.reward]": "[recorded(task.reward)]",
    }.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    seen: list[tuple[list[str], list[Any], list[Any]]] = []

    def recorded(reward: Any) -> Any:
        async def recipe_reward(**columns: Any) -> list[float | None]:
            rewards: list[float | None] = await reward(**columns)
            texts = [prompt[-1]["content"] for prompt in columns["prompts"]]
            seen.append((texts, columns["completion_ids"], rewards))
            return rewards

        return recipe_reward

    names: dict[str, Any] = {"recorded": recorded}
    exec(code, names)  # the guide's
    source, trainer = names["task"].source, names["trainer"]
    ((texts, completion_ids, rewards),) = seen
    problems = {p.prompt: p for p in (source.problem("train", i) for i in range(4))}
    for text, ids, reward in zip(texts, completion_ids, rewards, strict=True):
        answer = reward_text(source.tokenizer, ids)
        (score,) = source.scorer.score_now([attempt_from_text(problems[text], answer)])
        assert reward == score.total
    assert max(filter(None, rewards)) == 1.0  # the toy solves what is this short
    logged = next(log for log in trainer.state.log_history if "reward" in log)
    assert logged["reward"] == pytest.approx(sum(filter(None, rewards)) / len(rewards))
    source.close()
