"""Rewards in both directions: ours for tasks of verifiers, and theirs for recipes of ours."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import verifiers.v1 as vf
from pydantic import ValidationError
from verifiers.v1.utils.decorators import invoke

from delethink.errors import ConfigError, RewardError
from delethink.rows import accepted_answers
from delethink.scoring.pool import shared_pool
from delethink.scoring.reward import Reward
from delethink.scoring.scorer import Scorer
from delethink.types import ACCEPTED_ANSWERS, END_OF_THINKING, Problem
from delethink_verifiers.record import attempt_of

_GOLD_FIELDS = ("answer", "solution", "ground_truth", "target")


def for_verifiers(
    function: Callable[..., Any],
    *,
    answer_field: str | None = None,
    weight: float = 1.0,
    **args: Any,
) -> Callable[..., Awaitable[float]]:
    """Return a reward of this library as a ``@vf.reward``.

    It can be an attribute of a ``vf.Task``, or be plugged in by its path
    (``--env.taskset.task.rewards.NAME.fn module:name``). It reads the thinking that the harness of
    this package stored, or else the last message.

    Args:
        function: reward function of this library, or of the same kind.
        answer_field: field of the task's data with the gold answer, or several; by default the
            first existing one of ``answer``, ``solution``, ``ground_truth`` and ``target``.
        weight: weight of the reward.
        args: settings of the reward.

    Raises:
        UserError: the reward cannot be computed on this machine, or a setting is missing.
    """
    reward = Reward(function.__name__, function, args=args)
    reward.check()
    if reward.needs_correctness:
        raise ConfigError(
            f"{reward.name} has the parameter 'correct', which needs a second reward: configure "
            "both for the taskset of this package, with --env.taskset.task.score-by"
        )

    async def graded(*owner: Any, task: vf.TaskData, trace: vf.Trace) -> float:
        problem = Problem(task.prompt_text, *_gold(task, answer_field))
        with Scorer([reward], reward.name, pool=shared_pool()) as scorer:
            (score,) = await scorer.score([attempt_of(trace, problem)])
        if score.total is None:
            reason = score.errors.get(reward.name) or "it does not apply"
            raise RewardError(f"the reward {reward.name} has no value: {reason}")
        return score.total

    graded.__name__ = reward.name
    return vf.reward(weight=weight)(graded)


def _gold(task: vf.TaskData, name: str | None) -> tuple[str, Mapping[str, Any]]:
    """Return the gold answer of a task, and its metadata with all accepted answers."""
    for field in (name,) if name else _GOLD_FIELDS:
        value = getattr(task, field, None)
        if value is None:
            continue
        answers = accepted_answers(value, as_mathematics=False)
        several = {ACCEPTED_ANSWERS: list(answers)} if len(answers) > 1 else {}
        return (answers[0] if answers else ""), {**getattr(task, "metadata", {}), **several}
    if name:
        existing = ", ".join(type(task).model_fields)
        raise ConfigError(f"the task's data has no field {name!r}, only {existing}")
    return "", dict(getattr(task, "metadata", {}))


def task_reward(
    text: str,
    answer: str,
    metadata: Mapping[str, Any],
    prompt: str,
    method: str,
    end: str = END_OF_THINKING,
) -> float:
    """Return the value of a ``@vf.reward`` method for a trace of ours.

    For recipes: ``reward: delethink_verifiers:task_reward`` with
    ``args: {method: "package.module:Task.method"}``. The method gets the problem as its data, by
    the names of the fields, and a trace with one message: its reasoning and its answer.

    Args:
        text: the sampled text.
        answer: the gold answer, for a field ``answer``.
        metadata: further fields.
        prompt: the question.
        method: path of the method: ``package.module:Class.method``.
        end: mark of the end of thinking.

    Raises:
        ConfigError: the method cannot be found, needs a runtime, or its data lacks a field.
    """
    cls, name = _method(method)
    fields = {"idx": 0, **metadata, "prompt": prompt, "answer": answer}
    try:
        data = cls.data_type().model_validate(fields)
    except ValidationError as error:
        lacking = ", ".join(str(fault["loc"][0]) for fault in error.errors() if fault["loc"])
        raise ConfigError(
            f"{method} needs other data: the fields {lacking} cannot be made of the problem's "
            "answer and metadata"
        ) from None
    trace = _trace(cls, data, text, end)
    graded = getattr(cls(data), name)
    value = invoke(graded, {"task": data, "trace": trace})
    if inspect.isawaitable(value):
        value = asyncio.run(_awaited(value))
    if isinstance(value, Mapping):
        raise ConfigError(f"{method} returns several values, and a reward of a recipe is one")
    return float(value)


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def _method(path: str) -> tuple[type[vf.Task], str]:
    """Return the class of tasks and the name of the method that a path names."""
    module, _, qualified = path.partition(":")
    owner, _, name = qualified.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), owner)
        function = getattr(cls, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"no reward {path!r}, which is written package.module:Class.method: {error}"
        ) from None
    if not (isinstance(cls, type) and issubclass(cls, vf.Task)):
        raise ConfigError(f"{path!r} must be a method of a vf.Task, got one of {owner}")
    if not getattr(function, "reward", False):
        raise ConfigError(f"{path!r} is no reward: decorate it with @vf.reward")
    runtime = inspect.signature(function).parameters.get("runtime")
    if runtime is not None and runtime.default is inspect.Parameter.empty:
        raise ConfigError(f"{path!r} needs the runtime of a rollout, which training here has not")
    return cls, name


def _trace(cls: type[vf.Task], data: vf.TaskData, text: str, end: str) -> vf.Trace:
    """Return a finished trace with one answer."""
    thought, mark, said = text.rpartition(end) if end else ("", "", text)
    reply = vf.AssistantMessage(content=said, reasoning_content=thought if mark else None)
    trace = vf.Trace(
        task=vf.TraceTask(type=cls.__name__, data=data),
        agent=vf.AgentInfo(config=vf.AgentConfig()),
        is_completed=True,
        ok=True,
    )
    trace.nodes = [
        vf.MessageNode(message=vf.UserMessage(content=data.prompt_text)),
        vf.MessageNode(parent=0, message=reply, sampled=True),
    ]
    return trace
