"""Actions, observations and states on the wire."""

from __future__ import annotations

from typing import Annotated, Any

from openenv.core.env_server.types import Action, Observation, State
from pydantic import Field, WithJsonSchema

_CHUNK = {
    "title": "Chunk",
    "description": "The sampled chunk: token ids, or text.",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}],
}


class ChunkAction(Action):
    """A sampled chunk. A token that ends an answer ends the trace; any other chunk goes on."""

    # Checked by the environment, because the client shows no sentence of a failed validation.
    chunk: Annotated[Any, WithJsonSchema(_CHUNK)]
    ended: bool = Field(
        False, description="The model ended its answer, and its server left out the end token."
    )


class PromptObservation(Observation):
    """The prompt of the next chunk, and after the end the rewards."""

    prompt: str = Field("", description="Text of the next prompt, special tokens included.")
    prompt_ids: list[int] = Field(default_factory=list, description="Its exact token ids.")
    max_new_tokens: int = Field(0, description="Longest next chunk, in tokens; 0 after the end.")
    role: str = Field("thinking", description="'thinking', or 'carryover' for a written one.")
    chunk: int = Field(0, description="Finished chunks of thinking.")
    carried: int = Field(0, description="Tokens of the prompt after the query.")
    num_sampled: int = Field(0, description="Tokens sampled so far; carried ones count once.")
    budget_left: int = Field(0, description="Maximum number of tokens still to come.")
    chunk_ids: list[int] = Field(default_factory=list, description="The last chunk, as recorded.")
    chunk_stop: str | None = Field(None, description="Its stop reason: 'eos' or 'length'.")
    stop: str | None = Field(None, description="After the end: 'completed' or 'budget'.")
    retokenized_at: int = Field(
        -1, description="First token of the prompt that its text does not give back; -1: none."
    )
    rewards: dict[str, float | None] = Field(
        default_factory=dict, description="Unweighted rewards of the finished trace, by name."
    )
    reward_errors: dict[str, str] = Field(
        default_factory=dict, description="Why a reward has no value; the reward is then null."
    )


class EpisodeState(State):
    """The problem of the episode, and the place in its trace."""

    split: str | None = Field(None, description="Split of the problem; null for a given one.")
    index: int | None = Field(None, description="Its index in the split.")
    num_sampled: int = Field(0, description="Tokens sampled so far.")
    stop: str | None = Field(None, description="Stop reason of the trace; null before its end.")
