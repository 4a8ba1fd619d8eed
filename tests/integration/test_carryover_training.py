"""Training with a carryover that the model writes, through the command, engine and trainer.

The toy reasoner cannot summarize, so it learns nothing here. The tests check that the tokens of the
summary are sampled, recorded, trained on and counted like any other tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from delethink.config import load_recipe
from delethink.engines.loading import TOY, load_tokenizer
from delethink.envs.spaces import CharacterTokenizer
from delethink.rollout import retrace
from delethink.trace_io import read_traces
from delethink.types import ChunkRole, StopReason

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart" / "recipe.yaml"
SMALL = [
    "task.args.min_steps=2",
    "task.args.max_steps=4",
    "thinking.context_size=24",
    "thinking.carryover_size=16",
    "thinking.max_chunks=4",
    "training.max_steps=1",
    "training.per_device_train_batch_size=8",
    "training.gradient_accumulation_steps=1",
    "evaluation.num_problems=2",
    "evaluation.num_problems_at_intervals=2",
]
ARGS = r'{instruction: "\n", before: ":", after: "\n"}'
SUMMARY = f"thinking.carryover={{name: summary, args: {ARGS}}}"
OVERRIDES = [*SMALL, SUMMARY, "thinking.boundary={name: line_break, args: {within: 4}}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("summary")
    command = [sys.executable, "-m", "delethink.cli.main", "train", str(RECIPE), *OVERRIDES]
    done = subprocess.run(
        [*command, "output=run"],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_summary_is_sampled_and_trained_on(run: Path) -> None:
    (metrics,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert metrics["trained_tokens"] == metrics["sampled_tokens"] > 0
    assert metrics["logprob_difference_max"] < 1e-3, "a chunk was not trained under its own prompt"
    traces = [record.trace for record in read_traces(run / "traces" / "step_000001.jsonl")]
    written = [c for t in traces for c in t.chunks if c.role is ChunkRole.CARRYOVER]
    assert written, "no trace reached a boundary"
    assert sum(trace.length for trace in traces) == metrics["sampled_tokens"]
    assert metrics["chunks"] == sum(len(trace.thinking) for trace in traces) / len(traces)
    for chunk in written:
        assert len(chunk.logprobs) == len(chunk.output_ids) > 0
        assert chunk.stop in (StopReason.EOS, StopReason.LENGTH)


def test_the_traces_follow_the_resolved_recipe(run: Path) -> None:
    tokenizer = load_tokenizer(TOY)
    spec = load_recipe(run / "config.yaml").thinking.spec().bind(tokenizer)
    assert spec.budget == 24 + 3 * 8 + 3 * 14
    for record in read_traces(run / "traces" / "step_000001.jsonl"):
        assert retrace(spec, record.trace).stop is record.trace.stop


def test_the_default_tokenizer_of_environments_equals_that_of_the_toy() -> None:
    ours, toy = CharacterTokenizer(), load_tokenizer(TOY)
    text = "02:11011001011\n</think>10100101000<eos>"
    assert ours(text)["input_ids"] == toy(text, add_special_tokens=False)["input_ids"]
    conversation = [{"role": "user", "content": "03:01101001101"}]
    options: dict[str, Any] = {"add_generation_prompt": True, "return_dict": True}
    theirs = toy.apply_chat_template(conversation, tokenize=True, **options)["input_ids"]
    assert ours.apply_chat_template(conversation)["input_ids"] == theirs
    assert (len(ours), ours.eos_token_id) == (len(toy), toy.eos_token_id)
