"""A recipe's task behind the ``environment_factory`` of an unmodified ``GRPOTrainer``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from installed import need

from delethink import ConfigError
from delethink.integrations.trl_environment import LongcotTask

need("trl")
pytestmark = pytest.mark.integration

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
    """The reward that TRL logs is the recipe's of the completions that it sampled."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from delethink.engines.loading import TOY, load_model, load_tokenizer
    from delethink.scoring.rollouts import attempt_from_text
    from delethink.tokenization import reward_text

    overrides = ["task.args.min_steps=2", "task.args.max_steps=2"]
    task = LongcotTask.from_recipe(RECIPE, 40, overrides)
    seen: list[tuple[list[str], list[Any], list[Any]]] = []

    async def recipe_reward(**columns: Any) -> list[float | None]:
        rewards: list[float | None] = await task.reward(**columns)
        texts = [prompt[-1]["content"] for prompt in columns["prompts"]]
        seen.append((texts, columns["completion_ids"], rewards))
        return rewards

    tokenizer: Any = load_tokenizer(TOY)
    tokenizer.chat_template = TEMPLATE
    trainer = GRPOTrainer(
        model=load_model(TOY, "float32"),
        processing_class=tokenizer,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=task.budget,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(task.rows(4)),
        reward_funcs=[recipe_reward],
        environment_factory=task.environment,
    )
    trainer.train()
    ((texts, completion_ids, rewards),) = seen
    problems = {p.prompt: p for p in (task.source.problem("train", i) for i in range(4))}
    for text, ids, reward in zip(texts, completion_ids, rewards, strict=True):
        answer = reward_text(task.source.tokenizer, ids)
        (score,) = task.source.scorer.score_now([attempt_from_text(problems[text], answer)])
        assert reward == score.total
    assert max(filter(None, rewards)) == 1.0  # the toy solves what is this short
    logged = next(log for log in trainer.state.log_history if "reward" in log)
    assert logged["reward"] == pytest.approx(sum(filter(None, rewards)) / len(rewards))
    task.source.close()
