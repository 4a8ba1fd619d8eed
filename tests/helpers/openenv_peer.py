"""Play traces and mistakes against an OpenEnv server; runs in an environment with OpenEnv.

python openenv_peer.py URL < JSON, a list of [function, argument]
"""

from __future__ import annotations

import json
import sys
from typing import Any

import requests
from openenv.core import GenericEnvClient


def play(url: str, episodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Play recorded chunks in as many sessions at once, chunk by chunk in turn."""
    sessions = [GenericEnvClient(base_url=url).sync() for _ in episodes]
    seen: list[list[Any]] = [
        [env.reset(**episode["reset"])] for env, episode in zip(sessions, episodes, strict=True)
    ]
    for number in range(max(len(episode["actions"]) for episode in episodes)):
        for env, episode, steps in zip(sessions, episodes, seen, strict=True):
            if number < len(episode["actions"]):
                steps.append(env.step(episode["actions"][number]))
    states = [env.state() for env in sessions]
    for env in sessions:
        env.close()
    return [
        {
            "steps": [{**s.observation, "reward": s.reward, "done": s.done} for s in steps],
            "state": state,
        }
        for steps, state in zip(seen, states, strict=True)
    ]


def mistakes(url: str, cases: list[dict[str, Any]]) -> list[str]:
    """Return the error of the last call of each case, each in a session of its own."""
    found = []
    for case in cases:
        error = "no error"
        with GenericEnvClient(base_url=url).sync() as env:
            for name, argument in case["calls"]:
                try:
                    env.reset(**argument) if name == "reset" else env.step(argument)
                    error = "no error"
                except RuntimeError as caught:
                    error = str(caught)
        found.append(error)
    return found


def http(url: str, calls: list[list[Any]]) -> list[list[Any]]:
    """Return status and body of each call without a session."""
    answers = [requests.request(method, url + path, json=body) for method, path, body in calls]
    return [[answer.status_code, answer.json()] for answer in answers]


if __name__ == "__main__":
    calls = {"play": play, "mistakes": mistakes, "http": http}
    print(json.dumps([calls[name](sys.argv[1], given) for name, given in json.load(sys.stdin)]))
