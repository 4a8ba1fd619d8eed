"""Client with types. ``GenericEnvClient`` needs no package of this library."""

from __future__ import annotations

from typing import Any

from openenv.core import EnvClient
from openenv.core.client_types import StepResult

from delethink_openenv.models import ChunkAction, EpisodeState, PromptObservation


class ThinkingEnvClient(EnvClient[ChunkAction, PromptObservation, EpisodeState]):
    """One session with the server: one trace at a time.

    Example: ``with ThinkingEnvClient(base_url=URL).sync() as env: env.reset(split="heldout")``
    """

    def _step_payload(self, action: ChunkAction) -> dict[str, Any]:
        chunk = action.chunk if isinstance(action.chunk, str) else list(action.chunk)
        return {"chunk": chunk, "ended": action.ended}

    def _parse_result(self, payload: dict[str, Any]) -> StepResult[PromptObservation]:
        reward, done = payload.get("reward"), bool(payload.get("done", False))
        seen = {**payload.get("observation", {}), "reward": reward, "done": done}
        return StepResult(
            observation=PromptObservation(**seen),
            reward=reward,
            done=done,
            metadata=payload.get("metadata"),
        )

    def _parse_state(self, payload: dict[str, Any]) -> EpisodeState:
        return EpisodeState(**payload)
