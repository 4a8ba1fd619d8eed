"""The toy model behind episodes, and the library's own rollouts that adapters are compared with."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from delethink.engines.loading import eos_ids, load_model
from delethink.engines.transformers import TransformersEngine
from delethink.integrations.episodes import EpisodeSource
from delethink.policy import Sampling
from delethink.scoring.rollouts import RolloutResult, run_scored_rollouts
from delethink.tokenization import query_ids


def toy_engine(source: EpisodeSource) -> TransformersEngine:
    """Return the toy model in this process."""
    model = load_model("toy", "float32")
    ends = eos_ids(model, source.tokenizer)
    return TransformersEngine(model, ends, int(source.tokenizer.pad_token_id))


def library_rollouts(
    source: EpisodeSource,
    engine: TransformersEngine,
    places: Sequence[tuple[str, int]],
    temperature: float,
) -> RolloutResult:
    """Run the library's own rollout for each place, a split and an index; seeds count from 0."""
    problems = [source.task.problem(*place) for place in places]
    queries = [query_ids(source.tokenizer, problem) for problem in problems]
    samplings = [Sampling(temperature, seed=i) for i in range(len(places))]
    running = run_scored_rollouts(
        engine, source.spec, problems, queries, samplings, source.tokenizer, source.scorer
    )
    return asyncio.run(running)
