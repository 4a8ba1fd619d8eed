"""Environments for tinker-cookbook: its rollouts and training data have the library's chunks."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from guide_page import blocks
from peer_environment import ROOT, peer_python

from delethink.config import load_recipe
from delethink.engines.loading import eos_ids, load_model
from delethink.engines.transformers import TransformersEngine
from delethink.errors import MissingExtraError
from delethink.integrations.episodes import EpisodeSource
from delethink.policy import Sampling
from delethink.scoring.rollouts import RolloutResult, run_scored_rollouts
from delethink.tokenization import query_ids
from delethink.types import StopReason, TraceStop

pytestmark = pytest.mark.integration

RECIPE = ROOT / "recipes" / "quickstart" / "recipe.yaml"
PEER = Path(__file__).parents[1] / "helpers" / "tinker_peer.py"
OVERRIDES = ["task.args.min_steps=6", "task.args.max_steps=9", "thinking.max_chunks=3"]
MAX_TOKENS, GROUP, NUM_PROBLEMS = 45, 4, 3
TIMEOUT_S = 900


@pytest.fixture(scope="module")
def python() -> Path:
    return peer_python("tinker", "torch==2.13.0", "tinker-cookbook==0.5.8")


@pytest.fixture(scope="module")
def source() -> Iterator[EpisodeSource]:
    made = EpisodeSource.from_recipe(load_recipe(RECIPE, OVERRIDES))
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(source: EpisodeSource) -> TransformersEngine:
    model = load_model("toy", "float32")
    ends = eos_ids(model, source.tokenizer)
    return TransformersEngine(model, ends, int(source.tokenizer.pad_token_id))


def rollouts(
    source: EpisodeSource, engine: TransformersEngine, group: int, temperature: float
) -> RolloutResult:
    """Run the library's own rollout, a group for each problem."""
    indices = [index for index in range(NUM_PROBLEMS) for _ in range(group)]
    problems = [source.task.problem("train", index) for index in indices]
    queries = [query_ids(source.tokenizer, problem) for problem in problems]
    samplings = [Sampling(temperature, seed=i) for i in range(len(problems))]
    running = run_scored_rollouts(
        engine, source.spec, problems, queries, samplings, source.tokenizer, source.scorer
    )
    return asyncio.run(running)


def run_peer(python: Path, result: RolloutResult | None, **changes: Any) -> Any:
    traces = [] if result is None else result.traces
    recorded = [
        [{"prompt": list(c.prompt_ids), "output": list(c.output_ids)} for c in trace.chunks]
        for trace in traces
    ]
    builder = {
        "recipe": str(RECIPE),
        "overrides": OVERRIDES,
        "batch_size": NUM_PROBLEMS,
        "num_batches": 1,
        "group_size": GROUP,
        "max_tokens": MAX_TOKENS,
        **changes,
    }
    drops_end = builder.pop("drops_end", False)
    given = {"builder": builder, "traces": recorded, "drops_end": drops_end}
    ended = subprocess.run(
        [python, PEER], input=json.dumps(given), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_without_the_cookbook_the_extra_is_named() -> None:
    with pytest.raises(MissingExtraError, match=r"is not installed; .*'\.\[tinker\]'"):
        import delethink.integrations.tinker  # noqa: F401


def test_calls_of_one_size_sample_the_library_s_trace(
    source: EpisodeSource, engine: TransformersEngine
) -> None:
    (trace, *_), (score, *_), _ = rollouts(source, engine, 1, temperature=0.0)
    episode = source.begin(source.task.problem("train", 0))
    while episode.stop is None:
        seen = tuple(episode.prompt_ids + episode.open_ids)
        sampled = engine.generate(seen, MAX_TOKENS, Sampling(temperature=0.0))
        episode.extend(list(asyncio.run(sampled).token_ids))
    assert len(trace.chunks[0].output_ids) > MAX_TOKENS
    assert [c.output_ids for c in episode.chunks] == [c.output_ids for c in trace.chunks]
    assert asyncio.run(episode.score()) == score


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_each_chunk_is_a_datum_with_the_recipe_s_reward(
    python: Path, source: EpisodeSource, engine: TransformersEngine, temperature: float
) -> None:
    result = rollouts(source, engine, GROUP, temperature)
    found = run_peer(python, result, num_heldout=5)
    groups = [slice(i, i + GROUP) for i in range(0, NUM_PROBLEMS * GROUP, GROUP)]
    rewards = [[score.total or 0.0 for score in result.scores[group]] for group in groups]
    assert found["prompts"] == [
        source.task.problem("train", index).prompt for index in range(NUM_PROBLEMS)
    ]
    assert found["rewards"] == rewards
    names = {TraceStop.COMPLETED: "completed", TraceStop.BUDGET: "max_sampled_tokens"}
    assert list(chain.from_iterable(found["stops"])) == [
        names[trace.stop] for trace in result.traces
    ]
    expected = [
        (chunk, reward - fmean(own), place)
        for number, (group, own) in enumerate(zip(groups, rewards, strict=True))
        for trace, reward, place in zip(result.traces[group], own, range(GROUP), strict=True)
        for chunk in trace.chunks
        for place in [{"group_idx": number, "traj_idx": place}]
    ]
    assert len(found["data"]) == len(expected)
    for row, where, (chunk, advantage, place) in zip(
        found["data"], found["places"], expected, strict=True
    ):
        assert row["prompt"] == list(chunk.prompt_ids)
        assert row["output"] == list(chunk.output_ids)
        assert row["masks"] == [1.0]
        assert row["logprobs"] == [-0.25]
        assert row["advantages"] == pytest.approx([advantage])
        assert where == place
    for metrics, trace in zip(
        list(chain.from_iterable(found["metrics"])), result.traces, strict=True
    ):
        assert metrics["thinking_tokens"] == trace.length
        assert metrics["chunks"] == len(trace.chunks)
    assert found["num_test"] == 5
    if temperature:
        assert {trace.stop for trace in result.traces} == set(names)
        assert {score.total for score in result.scores} == {0.0, 1.0}


@pytest.mark.slow
def test_an_end_token_that_the_sampler_leaves_out_ends_the_trace(
    python: Path, source: EpisodeSource, engine: TransformersEngine
) -> None:
    result = rollouts(source, engine, GROUP, temperature=0.0)
    found = run_peer(python, result, drops_end=True)
    assert list(chain.from_iterable(found["rewards"])) == [score.total for score in result.scores]
    chunks = [chunk for trace in result.traces for chunk in trace.chunks]
    for row, chunk in zip(found["data"], chunks, strict=True):
        kept = chunk.output_ids[:-1] if chunk.stop is StopReason.EOS else chunk.output_ids
        assert row["output"] == list(kept)


@pytest.mark.slow
def test_mistakes_are_sentences(python: Path, tmp_path: Path) -> None:
    wrong = {
        "max_tokens=60 does not divide the chunks": {"max_tokens": 60},
        "'line_break' gives chunks of different sizes": {
            "overrides": [*OVERRIDES, "thinking.boundary=line_break"]
        },
        "none.yaml": {"recipe": str(tmp_path / "none.yaml")},
    }
    for expected, changes in wrong.items():
        assert expected in run_peer(python, None, **changes)["error"]


@pytest.mark.slow
def test_the_snippet_of_the_guide_runs(python: Path) -> None:
    (code,) = blocks("integrations_tinker.md", "python")
    ended = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["8", "groups,", "stop", "at", "[1]"]
