"""The environment of one session: prompts go out, chunks come in, rewards follow the end."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import EnvironmentMetadata

from delethink.errors import ActionError, ConfigError, did_you_mean
from delethink.integrations.episodes import Episode, EpisodeSource
from delethink.integrations.releases import check_release
from delethink.tasks import SPLITS, as_problem
from delethink.tokens import as_list
from delethink.types import Chunk, Problem
from delethink_openenv.models import ChunkAction, EpisodeState, PromptObservation

NAME = "delethink"
TRIED = ("0.10", "0.11")  # of openenv: the first release, and the first that was not tried
_MAX_LISTED = 1000  # tasks in one answer
_OPTIONS = ("seed", "episode_id", "split", "index", "problem")


class SharedSource:
    """The problems and rewards of all sessions, loaded by the first one that needs them."""

    def __init__(
        self, recipe: str | Path, overrides: Sequence[str] = (), plain_prompts: bool = False
    ) -> None:
        self._arguments = recipe, overrides, plain_prompts
        self._lock = threading.Lock()
        self._source: EpisodeSource | None = None

    def __call__(self) -> EpisodeSource:
        """Return the source.

        Raises:
            UserError: the recipe is wrong, or the release of OpenEnv was not tried.
        """
        with self._lock:
            if self._source is None:
                check_release("openenv", *TRIED)
                self._source = EpisodeSource.from_recipe(*self._arguments)
            return self._source

    def close(self) -> None:
        """Stop the verifiers."""
        if self._source is not None:
            self._source.close()


class ThinkingEnvironment(Environment[ChunkAction, PromptObservation, EpisodeState]):
    """Thinking as an environment. Each session has one, and all share the source.

    The client samples: a step takes a finished chunk, so no step waits for a model.
    """

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, source: Callable[[], EpisodeSource]) -> None:
        super().__init__()
        self._source = source
        self._episode: Episode | None = None
        self._place: tuple[str | None, int | None] = None, None
        self._episode_id: str | None = None

    def reset(
        self, seed: int | None = None, episode_id: str | None = None, **options: Any
    ) -> PromptObservation:
        """Begin a trace; see ``reset_async``."""
        return asyncio.run(self.reset_async(seed, episode_id, **options))

    async def reset_async(
        self, seed: int | None = None, episode_id: str | None = None, **options: Any
    ) -> PromptObservation:
        """Begin a trace of a drawn problem, of a problem by its index, or of a given one.

        Args:
            seed: seed of the draw.
            episode_id: name of the episode; by default a new one.
            options: ``split`` ("train" or "heldout"), ``index``, or ``problem``: a mapping with
                prompt and answer, and optionally metadata and before.

        Raises:
            UserError: an option is unknown or wrong, or the query is too long.
        """
        self._episode = None  # no step follows a reset that fails
        for name in options:
            if name not in _OPTIONS:
                near = did_you_mean(name, _OPTIONS)
                raise ConfigError(f"reset has no option {name!r:.80}.{near}")
        source = await asyncio.to_thread(self._source)  # the first session loads the tokenizer
        split, index, problem = _chosen(source, seed, **options)
        self._episode, self._place = source.begin(problem), (split, index)
        self._episode_id = episode_id or str(uuid.uuid4())
        return self._observed(self._episode, None)

    def step(
        self, action: ChunkAction, timeout_s: float | None = None, **options: Any
    ) -> PromptObservation:
        """Add a chunk; see ``step_async``."""
        return asyncio.run(self.step_async(action, timeout_s, **options))

    async def step_async(
        self, action: ChunkAction, timeout_s: float | None = None, **options: Any
    ) -> PromptObservation:
        """Add a chunk to the trace, and score the trace at its end.

        Raises:
            ActionError: the chunk is no chunk of this trace, or there is no trace to go on with.
        """
        episode = self._episode
        if episode is None:
            raise ActionError(
                "no trace has begun in this session: call reset first, over the same WebSocket "
                "(/ws); POST /reset and POST /step keep nothing between calls"
            )
        if isinstance(action.chunk, str):
            chunk = episode.add_text(action.chunk, action.ended)
        elif isinstance(action.chunk, list):
            chunk = episode.add(action.chunk, action.ended)
        else:
            raise ActionError(
                f"chunk must be a text or a list of token ids, got {action.chunk!r:.80}"
            )
        seen = self._observed(episode, chunk)
        if episode.stop is None:
            return seen
        score = await episode.score()
        return seen.model_copy(
            update={
                "reward": score.total,
                "rewards": dict(score.parts),
                "reward_errors": {**score.zeroed, **score.errors},
            }
        )

    def _observed(self, episode: Episode, chunk: Chunk | None) -> PromptObservation:
        state = episode.state
        position = episode.retokenized_at()
        return PromptObservation(
            done=state.stop is not None,
            reward=None if chunk is None else 0.0,
            prompt=episode.prompt,
            prompt_ids=episode.prompt_ids,
            max_new_tokens=state.max_new_tokens,
            role=state.role.value,
            chunk=state.num_chunks,
            carried=state.num_carried,
            num_sampled=state.num_sampled,
            budget_left=state.budget_left,
            chunk_ids=[] if chunk is None else as_list(chunk.output_ids),
            chunk_stop=None if chunk is None else chunk.stop.value,
            stop=None if state.stop is None else state.stop.value,
            retokenized_at=-1 if position is None else position,
        )

    @property
    def state(self) -> EpisodeState:
        """Return the problem of the episode, and the place in its trace."""
        split, index = self._place
        if self._episode is None:
            return EpisodeState(episode_id=None, step_count=0)
        state = self._episode.state
        return EpisodeState(
            episode_id=self._episode_id,
            step_count=len(self._episode.chunks),
            split=split,
            index=index,
            num_sampled=state.num_sampled,
            stop=None if state.stop is None else state.stop.value,
        )

    def get_metadata(self) -> EnvironmentMetadata:
        """Return the name and the purpose."""
        return EnvironmentMetadata(
            name=NAME,
            description=(
                "Thinking in chunks: the client samples each chunk, and at a boundary the context "
                "is reset to the query and a bounded carryover."
            ),
            version="0.1.0",
        )

    # -- tasks ---------------------------------------------------------------------------------

    def list_splits(self) -> list[dict[str, str]]:
        """Return the splits."""
        kinds = {"heldout": "test"}
        return [{"name": split, "type": kinds.get(split, split)} for split in SPLITS]

    def num_tasks(self, split: str) -> int:
        """Return the number of problems; 2**31 for a task without an end."""
        return self._source().size(split)

    def list_tasks(self, split: str) -> list[dict[str, Any]]:
        """Return the problems of a split, the first thousand at most."""
        return self.get_task_range(split)

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """Return a problem without its answer.

        Raises:
            IndexError: the split has no such problem.
        """
        source = self._source()
        if not 0 <= index < source.size(split):
            raise IndexError(f"{split!r} has {source.size(split)} problems, got index {index}")
        problem = source.problem(split, index)
        return {
            "id": f"{split}-{index}",
            "split": split,
            "index": index,
            "prompt": problem.prompt,
            "before": [dict(message) for message in problem.before],
        }

    def get_task_range(
        self, split: str, start: int | None = None, stop: int | None = None
    ) -> list[dict[str, Any]]:
        """Return problems as a slice does, the first thousand of them at most."""
        indices = range(self._source().size(split))[start:stop][:_MAX_LISTED]
        return [self.get_task(split, index) for index in indices]


def _chosen(
    source: EpisodeSource,
    seed: Any,
    split: str = "train",
    index: int | None = None,
    problem: Any = None,
) -> tuple[str | None, int | None, Problem]:
    """Return the problem of a reset, with its split and index, if it has any."""
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        raise ConfigError(f"seed must be a whole number from 0, got {seed!r:.80}")
    if problem is not None:
        if index is not None:
            raise ConfigError("give index or problem, not both")
        return None, None, as_problem(problem, "problem")
    if index is not None:
        return split, index, source.problem(split, index)
    return (split, *source.draw(split, seed))
