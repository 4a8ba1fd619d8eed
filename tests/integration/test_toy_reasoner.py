"""The shipped toy reasoner: size, tokenizer, and accuracy on short problems."""

from __future__ import annotations

import pytest

from delethink.chunking import ChunkSpec
from delethink.engines.loading import TOY, eos_ids, load_model, load_tokenizer, locate
from delethink.engines.transformers import TransformersEngine
from delethink.envs.automaton import AutomatonTask, solution_lines
from delethink.evaluation.heldout import Evaluator
from delethink.rewards.match import exact_match
from delethink.scoring.reward import Reward
from delethink.scoring.scorer import Scorer
from delethink.tokenization import query_ids, reward_text

pytestmark = pytest.mark.integration


def test_it_is_at_most_8_megabytes() -> None:
    from pathlib import Path

    files = [f for f in Path(locate(TOY)).rglob("*") if f.is_file()]
    assert any(f.suffix == ".safetensors" for f in files)
    assert sum(f.stat().st_size for f in files) <= 8 * 10**6


def test_the_tokenizer_keeps_text() -> None:
    tokenizer = load_tokenizer(TOY)
    problem = AutomatonTask(3, 3).problem("train", 0)
    lines = "\n".join(solution_lines(problem.metadata["state"], 3, 45))
    text = f"{lines}</think>{problem.answer}"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(lines) + 1 + len(problem.answer)
    assert reward_text(tokenizer, [*ids, tokenizer.eos_token_id]) == text
    assert tokenizer.decode(query_ids(tokenizer, problem)) == problem.prompt + "<think>"


def test_it_solves_short_problems() -> None:
    model, tokenizer = load_model(TOY, "float32"), load_tokenizer(TOY)
    problems = [AutomatonTask(1, 4).problem("heldout", i) for i in range(128)]
    engine = TransformersEngine(model, eos_ids(model, tokenizer), tokenizer.pad_token_id)
    with Scorer([Reward("exact", exact_match)]) as scorer:
        evaluator = Evaluator(problems, scorer, tokenizer, temperature=1.0, seed=0)
        row = evaluator.run(engine, ChunkSpec.longcot(96), "short")
    assert row.accuracy_interval.low > 0.8
    assert row.budget_share == 0
