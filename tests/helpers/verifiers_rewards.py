"""Grades with the rewards of the guide in both directions, and prints the values as JSON.

Runs in the environment of verifiers, with the guide's ``my_tasks.py`` beside it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import verifiers.v1 as vf
import yaml
from my_tasks import SumData, SumTask, graded

from delethink.config import RewardConfig, ScoringConfig
from delethink.scoring.rollouts import attempt_from_text
from delethink.scoring.scorer import make_scorer
from delethink.types import Problem


def trace_of(data: SumData, said: str) -> vf.Trace:
    reply = vf.AssistantMessage(content=said, reasoning_content="let me see")
    trace = vf.Trace(
        task=vf.TraceTask(type="SumTask", data=data), agent=vf.AgentInfo(config=vf.AgentConfig())
    )
    trace.nodes = [
        vf.MessageNode(message=vf.UserMessage(content=data.prompt_text)),
        vf.MessageNode(parent=0, message=reply, sampled=True),
    ]
    return trace


async def ours_in_theirs(task: SumTask) -> dict[str, list[float]]:
    trace = trace_of(task.data, "5")
    await task.score(trace)
    return {name: [reward.score, reward.weight] for name, reward in trace.rewards.items()}


def fault(method: str) -> str:
    from delethink_verifiers import task_reward

    try:
        task_reward("5", "5", {}, "2+3", method)
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    task = SumTask(SumData(prompt="2+3", answer="5"))
    found = asyncio.run(ours_in_theirs(task))
    config = vf.TaskConfig(rewards={"plugged": {"fn": "my_tasks:graded"}})
    plugged = SumTask(task.data, config)
    trace = trace_of(task.data, "5")
    asyncio.run(plugged.score(trace))
    sections = yaml.safe_load(Path(sys.argv[1]).read_text())["rewards"]
    rewards = {name: RewardConfig.model_validate(value) for name, value in sections.items()}
    problem = Problem("2+3", "5")
    texts = ("sum</think>5", "sum</think>" + "a long answer " * 3)
    with make_scorer(rewards, next(iter(rewards)), ScoringConfig(timeout=300)) as scorer:
        scores = scorer.score_now([attempt_from_text(problem, text) for text in texts])
    assert all(not score.errors for score in scores), scores
    faults = [fault("my_tasks:SumTask.long"), fault("my_tasks:SumTask.hash")]
    print(
        json.dumps(
            {
                "ours in theirs": {
                    "exact": found["exact_match"],
                    "short": found["short"],
                },
                "ours plugged in": trace.rewards["plugged"].score,
                "theirs in ours": [score.total for score in scores],
                "faults": [
                    known
                    for known, text in zip(("no reward", "is no reward"), faults, strict=True)
                    if known in text
                ],
            }
        )
    )
    assert graded.__name__ == "exact_match"


if __name__ == "__main__":
    main()
