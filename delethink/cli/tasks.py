"""``delethink tasks``: what there is, how problems are asked, and whether graders work."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from delethink.config import RewardConfig, ScoringConfig, parse_values
from delethink.engines.loading import load_tokenizer, locate
from delethink.errors import ConfigError
from delethink.registry import make_task, names, resolve
from delethink.scoring.rollouts import answer_of
from delethink.scoring.scorer import make_scorer
from delethink.tasks import (
    SPLITS,
    Task,
    demonstrations_of,
    left_out_of,
    rewards_of,
    size_of,
)
from delethink.tokenization import query_ids
from delethink.types import Problem


def run(
    name: str | None,
    overrides: Sequence[str],
    options: Mapping[str, str | None],
    *,
    number: int,
    checks: int,
    split: str | None,
    model: str | None,
    seed: int,
    as_json: bool,
) -> int:
    """Prints the tasks, or one of them; 1 if its grader does not take its own gold answers."""
    if name is None:
        report: dict[str, Any] = {"tasks": _summaries("tasks"), "rewards": _summaries("rewards")}
        print(json.dumps(report, indent=2) if as_json else _listed(report))
        return 0
    if model is not None:
        locate(model)
    given = {key: value for key, value in options.items() if value is not None}
    task = make_task(name, parse_values(overrides) | given, seed)
    sizes = {each: size_of(task, each) for each in SPLITS}
    split = split or ("heldout" if sizes["train"] == 0 else "train")
    problems = _first(task, split, max(number, checks))
    report = {
        "task": name,
        "sizes": sizes,
        "left_out": left_out_of(task),
        "rewards": rewards_of(task),
        "split": split,
        "problems": [_shown(problem, model) for problem in problems[:number]],
        "check": _check(task, problems[:checks]) if checks else None,
    }
    print(json.dumps(report, indent=2, default=str) if as_json else _text(report))
    return 1 if checks and report["check"]["failures"] else 0


def _summaries(group: str) -> dict[str, str]:
    known = names(f"delethink.{group}")
    return {name: _summary(resolve(f"delethink.{group}", name)) for name in sorted(known)}


def _summary(value: Any) -> str:
    own = getattr(value, "summary", None)
    return str(own or (inspect.getdoc(value) or "").partition("\n")[0])


def _listed(report: Mapping[str, Mapping[str, str]]) -> str:
    lines = []
    for title, entries in report.items():
        lines += [title, *(f"  {name:18}{says}" for name, says in entries.items()), ""]
    return "\n".join([*lines, "one of them: delethink tasks NAME [key=value ...] -n 3"])


def _first(task: Task, split: str, number: int) -> list[Problem]:
    size = size_of(task, split)
    return [task.problem(split, i) for i in range(number if size is None else min(number, size))]


def _shown(problem: Problem, model: str | None) -> dict[str, Any]:
    if model is None:
        asked = "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in problem.messages)
        return {"prompt": asked, "answer": problem.answer, "metadata": sorted(problem.metadata)}
    tokenizer = load_tokenizer(model)
    ids = query_ids(tokenizer, problem)
    return {
        "prompt": str(tokenizer.decode(list(ids))),
        "tokens": len(ids),
        "answer": problem.answer,
        "metadata": sorted(problem.metadata),
    }


def _check(task: Task, problems: Sequence[Problem]) -> dict[str, Any]:
    """Scores the gold answer and a wrong one of each problem with the task's own rewards."""
    named = rewards_of(task)
    if not named:
        raise ConfigError("this task names no rewards, so there is nothing to check: use --check 0")
    configs = {name: RewardConfig(weight=weight) for name, weight in named.items()}
    scorer = make_scorer(configs, next(iter(configs)), ScoringConfig())
    shown = [(p, *demonstrations_of(task, p)) for p in problems]
    cases = [(p, right, 1.0) for p, right, _ in shown if right is not None]
    cases += [(p, wrong, 0.0) for p, _, wrong in shown if wrong is not None]
    try:
        scores = scorer.score_now([answer_of(problem, text) for problem, text, _ in cases])
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
        f"{split} {'without end' if size is None else size}"
        for split, size in report["sizes"].items()
    )
    left_out = ", ".join(f"{n} {why}" for why, n in report["left_out"].items()) or "none"
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
