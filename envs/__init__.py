"""Thinking environments and tasks (imported as ``delethink.envs``)."""

import gymnasium

if __name__ != "delethink.envs":
    raise ImportError(f"import this package as 'delethink.envs', not {__name__!r}")

gymnasium.register(id="delethink/Thinking-v0", entry_point="delethink.envs.thinking:ThinkingEnv")
gymnasium.register(
    id="delethink/TextThinking-v0",
    entry_point="delethink.envs.thinking:ThinkingEnv",
    kwargs={"interface": "text"},
)
gymnasium.register(
    id="delethink/TokenThinking-v0",
    entry_point="delethink.envs.token_thinking:TokenThinkingEnv",
)
