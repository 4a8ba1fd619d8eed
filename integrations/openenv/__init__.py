"""Thinking in chunks with context resets, as an OpenEnv environment."""

from delethink_openenv.client import ThinkingEnvClient
from delethink_openenv.models import ChunkAction, EpisodeState, PromptObservation

__all__ = ["ChunkAction", "EpisodeState", "PromptObservation", "ThinkingEnvClient"]
