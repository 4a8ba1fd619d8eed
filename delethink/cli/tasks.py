"""The command ``delethink tasks``: list tasks and rewards, show problems, check graders."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from delethink.config import RewardConfig, ScoringConfig, parse_values
from delethink.engines.loading import load_tokenizer, locate
from delethink.errors import ConfigError
from delethink.output import echo, echo_json
from delethink.registry import make_task, names, resolve
from delethink.scoring.rollouts import attempt_from_text
from delethink.scoring.scorer import make_scorer
from delethink.tasks import SPLITS, Task, demonstrations_of, left_out_of, rewards_of, task_size
from delethink.thinking_marks import AUTO
from delethink.tokenization import bind_marks, check_thinking_is_open, query_ids
from delethink.types import Problem

_TASK_OPTIONS = ("dataset", "split", "problem_key", "answer_key")  # arguments of the task


def run(arguments: argparse.Namespace) -> int:
    """Print all tasks and rewards, or the problems of one task and the check of its grader.

    Returns:
        The exit code: 1 if the grader rejects a gold answer or accepts a wrong one.
    """
    if arguments.name is None:
        listed = {"tasks": _summaries("tasks"), "rewards": _summaries("rewards")}
        if arguments.json:
            echo_json(listed)
        else:
            echo(_list_text(listed))
        return 0
    if arguments.model is not None:
        locate(arguments.model)
    elif arguments.chat_template_kwargs:
        raise ConfigError("--chat-template-kwargs needs --model, whose template it is for")
    elif arguments.end_of_thinking != AUTO:
        raise ConfigError("--end-of-thinking needs --model, whose mark it is")
    tokenizer = _tokenizer(arguments)
    given = {key: getattr(arguments, key) for key in _TASK_OPTIONS}
    given = {key: value for key, value in given.items() if value is not None}
    task = make_task(arguments.name, parse_values(arguments.values) | given, arguments.seed)
    sizes = {each: task_size(task, each) for each in SPLITS}
    split = arguments.of or ("heldout" if sizes["train"] == 0 else "train")
    number, size = max(arguments.number, arguments.check), sizes[split]
    number = number if size is None else min(number, size)
    problems = [task.problem(split, i) for i in range(number)]
    scoring = ScoringConfig(allow_unsafe_code=arguments.allow_unsafe_code)
    checked = problems[: arguments.check]
    check = _check_grader(task, checked, scoring) if checked else None
    report = {
        "task": arguments.name,
        "sizes": sizes,
        "left_out": left_out_of(task),
        "rewards": rewards_of(task),
        "split": split,
        "problems": [_problem_json(p, tokenizer) for p in problems[: arguments.number]],
        "check": check,
    }
    if arguments.json:
        echo_json(report)
    else:
        echo(_text(report))
    return 1 if check and check["failures"] else 0


def _summaries(group: str) -> dict[str, str]:
    summaries = {}
    for name in sorted(names(f"delethink.{group}")):
        value = resolve(f"delethink.{group}", name)
        first_line = (inspect.getdoc(value) or "").partition("\n")[0]
        summaries[name] = str(getattr(value, "summary", None) or first_line)
    return summaries


def _list_text(report: Mapping[str, Mapping[str, str]]) -> str:
    lines = []
    for title, entries in report.items():
        lines += [title, *(f"  {name:18}{summary}" for name, summary in entries.items()), ""]
    return "\n".join([*lines, "details of a task: delethink tasks NAME [key=value ...] -n 3"])


def _tokenizer(arguments: argparse.Namespace) -> Any:
    """Return the tokenizer of ``--model``, or ``None``."""
    if arguments.model is None:
        return None
    tokenizer = load_tokenizer(
        arguments.model, chat_template_kwargs=parse_values(arguments.chat_template_kwargs)
    )
    bind_marks(tokenizer, arguments.end_of_thinking)
    return tokenizer


def _problem_json(problem: Problem, tokenizer: Any) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    if tokenizer is None:
        shown["prompt"] = "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in problem.messages)
    else:
        check_thinking_is_open(tokenizer, problem)
        ids = query_ids(tokenizer, problem)
        shown |= {"prompt": str(tokenizer.decode(list(ids))), "tokens": len(ids)}
    return {**shown, "answer": problem.answer, "metadata": sorted(problem.metadata)}


def _check_grader(
    task: Task, problems: Sequence[Problem], scoring: ScoringConfig
) -> dict[str, Any]:
    """Score a gold and a wrong answer to each problem with the task's own rewards."""
    named = rewards_of(task)
    if not named:
        raise ConfigError(
            "the task names no rewards, so there is no grader to check: use --check 0"
        )
    configs = {name: RewardConfig(weight=weight) for name, weight in named.items()}
    scorer = make_scorer(configs, next(iter(configs)), scoring)
    shown = [(p, *demonstrations_of(task, p)) for p in problems]
    cases = [(p, right, 1.0) for p, right, _ in shown if right is not None]
    cases += [(p, wrong, 0.0) for p, _, wrong in shown if wrong is not None]
    try:
        scores = scorer.score_now([attempt_from_text(problem, text) for problem, text, _ in cases])
    finally:
        scorer.close()
    failures = [
        {
            "answer": problem.answer[:200],
            "said": text[-200:],
            "expected": expected,
            "got": score.total,
            "errors": dict(score.errors),
        }
        for (problem, text, expected), score in zip(cases, scores, strict=True)
        if score.total != expected
    ]
    return {
        "problems": len(problems),
        "gold_answers": sum(expected == 1.0 for *_, expected in cases),
        "wrong_answers": sum(expected == 0.0 for *_, expected in cases),
        "failures": failures,
    }


def _text(report: Mapping[str, Any]) -> str:
    sizes = ", ".join(
        f"{split} {'unlimited' if size is None else size}"
        for split, size in report["sizes"].items()
    )
    left_out = ", ".join(f"{n} {reason}" for reason, n in report["left_out"].items()) or "none"
    rewards = ", ".join(f"{name} x {weight:g}" for name, weight in report["rewards"].items())
    lines = [f"problems  {sizes}", f"left out  {left_out}", f"rewards   {rewards or 'none'}", ""]
    for i, problem in enumerate(report["problems"]):
        tokens = f", {problem['tokens']} tokens" if "tokens" in problem else ""
        lines += [f"--- {report['split']} {i}{tokens}", problem["prompt"], ""]
        lines += [f"answer: {problem['answer'][:500]}", ""]
    if (check := report["check"]) is not None:
        lines += [
            f"grader: {check['gold_answers']} gold and {check['wrong_answers']} wrong answers of "
            f"{check['problems']} problems, {len(check['failures'])} not scored as expected"
        ]
        lines += [f"  {failure}" for failure in check["failures"][:5]]
    return "\n".join(lines)
