"""Rewards of this library in an unmodified ``GRPOTrainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import GRPOConfig

from delethink.engines.loading import TOY, load_model, load_tokenizer
from delethink.errors import ConfigError
from delethink.integrations.trl import for_trl
from delethink.rewards.length import cosine, overlong
from delethink.rewards.match import exact_match
from delethink.rewards.math import math_equal
from delethink.training.grpo import GRPOTrainer

pytest.importorskip("math_verify")
pytestmark = pytest.mark.integration


def test_a_stock_trainer_takes_them(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TOY)
    rows = [{"prompt": f"01:0000000000{i}", "solution": "1"} for i in range(2)]
    trainer = GRPOTrainer(
        model=load_model(TOY, "float32"),
        processing_class=tokenizer,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=8,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        reward_funcs=[
            for_trl(math_equal),
            for_trl(cosine, accuracy=exact_match, budget=8),
            for_trl(overlong, budget=8, cache=4),
        ],
    )
    trainer.train()
    logged = next(log for log in trainer.state.log_history if "rewards/math_equal/mean" in log)
    assert logged["rewards/math_equal/mean"] == 0.0
    assert -1.0 <= logged["rewards/cosine/mean"] < 0.0
    assert logged["rewards/overlong/mean"] == -1.0
    assert logged["verifier/errors"] == 0.0


def call(reward: Any, **columns: Any) -> Any:
    import asyncio

    return asyncio.run(reward(prompts=["q"] * 2, **columns))


def test_answers_are_taken_from_the_columns_people_have() -> None:
    said = [[{"role": "assistant", "content": f"</think>{i}"}] for i in (1, 2)]
    for column in ("answer", "solution", "ground_truth", "target"):
        assert call(for_trl(exact_match), completions=said, **{column: ["1", "1"]}) == [1.0, 0.0]
    own = for_trl(exact_match, answer_column="gold")
    assert call(own, completions=["</think>1", "2"], gold=[1, 2], answer=["0"] * 2) == [1.0, 0.0]


def test_answers_are_read_as_in_the_data_sets_of_tasks() -> None:
    said = ["</think>1/2", "</think>0.5"]
    lists = [["1/2", "0.5"], ["1/2"]]
    assert call(for_trl(exact_match), completions=said, answer=lists) == [1.0, 0.0]
    assert call(for_trl(exact_match), completions=said, answer=["0.5", 0.5]) == [0.0, 1.0]
    assert call(for_trl(exact_match), completions=said, answer=[None, 0.5]) == [None, 1.0]
    verl = [{"style": "rule", "ground_truth": answer} for answer in ("1/2", "2")]
    assert call(for_trl(exact_match), completions=said, reward_model=verl) == [1.0, 0.0]
    nested = for_trl(exact_match, answer_column="info.gold")
    assert call(nested, completions=said, info=[{"gold": "1/2"}, {"gold": 5.0}]) == [1.0, 0.0]
    length = for_trl(overlong, budget=10, cache=5)
    ids = [[1] * 9, [1]]
    rewards = call(length, completions=said, completion_ids=ids, answer=[None, "x"])
    assert rewards[0] is not None
    with pytest.raises(ConfigError, match="the column 'answer': the answer must be a text"):
        call(for_trl(exact_match), completions=said, answer=[{"a": 1, "b": 2}] * 2)


def test_mistakes_are_explained() -> None:
    with pytest.raises(ConfigError, match="only level: name one with answer_column="):
        call(for_trl(exact_match), completions=["1", "2"], level=[1, 2], log_extra=print)
    with pytest.raises(ConfigError, match="accuracy="):
        for_trl(cosine)
    with pytest.raises(ConfigError, match="'cache'"):
        for_trl(overlong)
