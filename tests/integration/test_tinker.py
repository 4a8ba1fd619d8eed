"""Environments for tinker-cookbook: its rollouts and training data have the library's chunks."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pytest
from guide_page import blocks
from peer_environment import ROOT, peer_python
from toy_episodes import library_rollouts, toy_engine

from delethink.config import load_recipe
from delethink.engines.transformers import TransformersEngine
from delethink.errors import MissingExtraError
from delethink.integrations.episodes import EpisodeSource
from delethink.policy import Sampling
from delethink.scoring.rollouts import RolloutResult
from delethink.types import StopReason, TraceStop

pytestmark = pytest.mark.integration

RECIPE = ROOT / "recipes" / "quickstart" / "recipe.yaml"
PEER = Path(__file__).parents[1] / "helpers" / "tinker_peer.py"
OVERRIDES = ["task.args.min_steps=6", "task.args.max_steps=12", "thinking.max_chunks=2"]
MAX_TOKENS, GROUP, NUM_PROBLEMS = 45, 4, 3
TEMPERATURES = (0.0, 1.0)  # at 1, rewards of a group differ
TIMEOUT_S = 900
MISTAKES = {
    "max_tokens=60 does not divide the chunks": {"max_tokens": 60},
    "'line_break' gives chunks of different sizes": {
        "overrides": [*OVERRIDES, "thinking.boundary=line_break"]
    },
    "none.yaml": {"recipe": "none.yaml"},
}


@pytest.fixture(scope="module")
def source() -> Iterator[EpisodeSource]:
    made = EpisodeSource.from_recipe(load_recipe(RECIPE, OVERRIDES))
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(source: EpisodeSource) -> TransformersEngine:
    return toy_engine(source)


def rollouts(
    source: EpisodeSource,
    engine: TransformersEngine,
    group: int,
    temperature: float,
    num_problems: int = NUM_PROBLEMS,
) -> RolloutResult:
    """Run the library's own rollout, a group for each problem."""
    places = [("train", index) for index in range(num_problems) for _ in range(group)]
    return library_rollouts(source, engine, places, temperature)


def job(result: RolloutResult | None, drops_end: bool = False, **changes: Any) -> dict[str, Any]:
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
    return {"builder": builder, "traces": recorded, "drops_end": drops_end}


class Peer(NamedTuple):
    """Rollouts of the library, and of the cookbook in one process, as its start takes longest."""

    results: dict[float, RolloutResult]  # by temperature
    found: dict[float, Any]
    without_end: Any  # at temperature 0
    mistakes: list[str]


@pytest.fixture(scope="module")
def peer(
    source: EpisodeSource, engine: TransformersEngine, tmp_path_factory: pytest.TempPathFactory
) -> Peer:
    python = peer_python("tinker", "torch==2.13.0", "tinker-cookbook==0.5.8")
    results = {t: rollouts(source, engine, GROUP, t) for t in TEMPERATURES}
    jobs = [
        *(job(results[t], num_heldout=5) for t in TEMPERATURES),
        job(results[0.0], drops_end=True),
        *(job(None, **changes) for changes in MISTAKES.values()),
    ]
    folder = tmp_path_factory.mktemp("peer")
    ended = subprocess.run(
        [python, PEER],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=folder,
    )
    assert ended.returncode == 0, ended.stderr
    cold, warm, without_end, *wrong = json.loads(ended.stdout)
    found = dict(zip(TEMPERATURES, (cold, warm), strict=True))
    return Peer(results, found, without_end, [answer["error"] for answer in wrong])


def test_without_the_cookbook_the_extra_is_named() -> None:
    with pytest.raises(MissingExtraError, match=r"is not installed; .*'\.\[tinker\]'"):
        import delethink.integrations.tinker  # noqa: F401


@pytest.mark.slow
def test_calls_of_one_size_sample_the_library_s_trace(
    source: EpisodeSource, engine: TransformersEngine
) -> None:
    (trace,), (score,), _ = rollouts(source, engine, 1, temperature=0.0, num_problems=1)
    episode = source.begin(source.task.problem("train", 0))
    while episode.stop is None:
        seen = tuple(episode.prompt_ids + episode.open_ids)
        sampled = engine.generate(seen, MAX_TOKENS, Sampling(temperature=0.0))
        episode.extend(list(asyncio.run(sampled).token_ids))
    assert len(trace.chunks[0].output_ids) > MAX_TOKENS
    assert [c.output_ids for c in episode.chunks] == [c.output_ids for c in trace.chunks]
    assert asyncio.run(episode.score()) == score


@pytest.mark.slow
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_each_chunk_is_a_datum_with_the_recipe_s_reward(
    peer: Peer, source: EpisodeSource, temperature: float
) -> None:
    result, found = peer.results[temperature], peer.found[temperature]
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
        (chunk, reward - fmean(own), {"group_idx": number, "traj_idx": place})
        for number, (group, own) in enumerate(zip(groups, rewards, strict=True))
        for trace, reward, place in zip(result.traces[group], own, range(GROUP), strict=True)
        for chunk in trace.chunks
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
def test_an_end_token_that_the_sampler_leaves_out_ends_the_trace(peer: Peer) -> None:
    result, found = peer.results[0.0], peer.without_end
    rewards = list(chain.from_iterable(found["rewards"]))
    assert rewards == [score.total for score in result.scores]
    chunks = [chunk for trace in result.traces for chunk in trace.chunks]
    assert any(chunk.stop is StopReason.EOS for chunk in chunks)
    for row, chunk in zip(found["data"], chunks, strict=True):
        kept = chunk.output_ids[:-1] if chunk.stop is StopReason.EOS else chunk.output_ids
        assert row["output"] == list(kept)


@pytest.mark.slow
def test_mistakes_are_sentences(peer: Peer) -> None:
    for expected, error in zip(MISTAKES, peer.mistakes, strict=True):
        assert expected in error


@pytest.mark.slow
def test_the_snippet_of_the_guide_runs() -> None:
    python = peer_python("tinker", "torch==2.13.0", "tinker-cookbook==0.5.8")
    (code,) = blocks("integrations_tinker.md", "python")
    ended = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["8", "groups,", "stop", "at", "[1]"]
