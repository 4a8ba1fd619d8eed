"""Evaluations: sample the missing traces, score them, and summarise all of them.

problems = load_problems("automaton", {"min_steps": 4, "max_steps": 8}, limit=64)
settings = make_settings(["toy"], ["delethink", "longcot"], [90], [45], [5], head_size=0)
results = evaluate(Evaluation(problems, settings), local_models(), Path("out"))
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delethink.chunking import ChunkSpec
from delethink.config import RewardConfig, ScoringConfig
from delethink.errors import ConfigError, RolloutError, UserError, WorkersLostError
from delethink.evaluation.models import (
    LoadedModel,
    ModelOpener,
    answer_room,
    check_window,
    longest_query,
)
from delethink.evaluation.records import (
    PROBLEMS,
    BudgetOutcome,
    Record,
    ResultsDirectory,
    SampleKey,
)
from delethink.evaluation.results import AnalysisSettings, Results, summarise
from delethink.evaluation.settings import SamplingPlan, Setting, cut_to_budget, fingerprint
from delethink.output import get_logger
from delethink.policy import Sampling
from delethink.redaction import json_text
from delethink.registry import make_task
from delethink.report_process import ReportProcess
from delethink.rollout import derive_seed, run_rollout
from delethink.scoring.answer import vote
from delethink.scoring.rollouts import make_attempt
from delethink.scoring.scorer import Scorer, make_scorer
from delethink.tasks import left_out_of, rewards_of, select_problems, task_size
from delethink.thinking_marks import marks_of
from delethink.tokenization import check_thinking_is_open, encode, query_ids, reward_text
from delethink.tokens import as_list
from delethink.types import Attempt, Problem, StopReason, Trace, TraceStop

if TYPE_CHECKING:
    from delethink.evaluation.report import EvaluationProgress

_logger = get_logger(__name__)

Grade = Callable[[Attempt], Awaitable[float | None]]
"""Scores an attempt 1 or 0; ``None`` if the attempt cannot be graded."""

_DEFAULT_PROBLEMS = 256  # for a task without an end
_MIN_UNSCORED, _MAX_UNSCORED_SHARE = 16, 0.1  # traces without a score, to stop an evaluation


class _UnscoredError(Exception):
    """The reward of a trace cannot be computed."""


@dataclass(frozen=True)
class ProblemSet:
    """Held-out problems and their grader. Close it after use: a reward may own processes."""

    name: str
    problems: tuple[Problem, ...]
    reward: str  # name of the grading reward
    grade: Grade
    scorer: Scorer | None = None  # scorer to close
    left_out: Mapping[str, int] = field(default_factory=dict)  # filtered rows by reason
    reward_args: Mapping[str, Any] = field(default_factory=dict)  # settings of the reward

    def close(self) -> None:
        """Stop the processes of the reward."""
        if self.scorer is not None:
            self.scorer.close()


def load_problems(
    task: str,
    arguments: Mapping[str, Any],
    limit: int | None,
    reward: str | None = None,
    split: str = "heldout",
    seed: int = 0,
    allow_unsafe_code: bool = False,
    reward_args: Mapping[str, Any] | None = None,
) -> ProblemSet:
    """Load problems from a registered task or a local file.

    Args:
        task: registered name (``aime_2024``, ``reasoning_gym/chain_sum``), or path of a file, all
            of which is held out.
        arguments: arguments of the task; a file takes those of the task ``dataset``.
        limit: number of problems; ``None`` for all, or 256 if the task has no end.
        reward: name of the reward; ``None`` for the task's first.
        split: split of a registered task.
        seed: seed for tasks with random problems.
        allow_unsafe_code: run model output without isolation where the machine has none.
        reward_args: settings of the reward.

    Raises:
        UserError: an unknown task, file, column, package or reward, or no problem.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of problems must be at least 1, got {limit}")
    made = make_task(task, arguments, seed, heldout_share=1.0)
    size = task_size(made, split)
    number = (limit or _DEFAULT_PROBLEMS) if size is None else min(limit or size, size)
    if not number:
        raise ConfigError(f"the task {task} has no problem in its split {split!r}")
    chosen = reward or next(iter(rewards_of(made)), "exact")
    scoring = ScoringConfig(allow_unsafe_code=allow_unsafe_code)
    given = dict(reward_args or {})
    scorer = make_scorer({chosen: RewardConfig(args=given)}, chosen, scoring)
    problems = tuple(select_problems(made, split, number).problems)

    async def grade(attempt: Attempt) -> float | None:
        # A finished future instead of a task: an interrupt inside a task would be lost.
        parts: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        parts.set_result(await scorer.parts(attempt))
        (score,) = await scorer.finish([attempt], [parts])
        if scorer.accuracy in score.errors:
            raise _UnscoredError(f"{scorer.accuracy}: {score.errors[scorer.accuracy]}")
        return score.parts[scorer.accuracy]

    return ProblemSet(task, problems, chosen, grade, scorer, left_out_of(made), given)


@dataclass(frozen=True)
class Evaluation:
    """Everything with an effect on the records of an evaluation."""

    problems: ProblemSet
    settings: Sequence[Setting]
    plan: SamplingPlan = field(default_factory=SamplingPlan)
    engine: str = "transformers"  # stored because results of two engines must not be mixed
    in_flight: int = 64  # maximum number of traces sampled at the same time
    keep_tokens: bool = True  # store the sampled tokens
    # digest of the weights by model (``engines.loading.digest``)
    weights: Mapping[str, str | None] = field(default_factory=dict)
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    # mark of the end of thinking by model, as resolved; ``None`` for a model without one
    end_of_thinking: Mapping[str, str | None] = field(default_factory=dict)
    command: Sequence[str] = ()  # arguments of the command, to continue from the folder alone

    def __post_init__(self) -> None:
        if self.in_flight < 1:
            raise ConfigError(f"in_flight must be at least 1, got {self.in_flight}")

    @property
    def traces_per_setting(self) -> int:
        """Number of traces of each setting."""
        return len(self.problems.problems) * self.plan.samples

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for ``settings.json``."""
        return {
            "task": self.problems.name,
            "problems": len(self.problems.problems),
            "problems_fingerprint": fingerprint(self.problems.problems),
            "reward": self.problems.reward,
            "engine": self.engine,
            "models": dict(self.weights),
            "reward_args": dict(self.problems.reward_args),
            "chat_template_kwargs": dict(self.chat_template_kwargs),
            "end_of_thinking": dict(self.end_of_thinking),
            **asdict(self.plan),
            "command": list(self.command),
            "settings": [setting.as_dict() for setting in self.settings],
        }


def evaluate(
    evaluation: Evaluation,
    open_model: ModelOpener,
    output: Path,
    *,
    analysis: AnalysisSettings | None = None,
    progress: EvaluationProgress | None = None,
    resume: bool = False,
    force: bool = False,
    retry_errors: bool = False,
) -> Results:
    """Sample every trace missing in ``output``, and summarise all traces.

    Writes ``settings.json``, ``traces.jsonl`` (a line when a trace ends), ``results.json`` and
    ``timing.json``.

    Args:
        evaluation: problems, settings and samples.
        open_model: loads a model; one model is open at a time.
        output: a new folder, or with ``resume`` the folder of an interrupted evaluation.
        analysis: margin, bootstrap, and device and shape for cost estimates.
        progress: prints the progress.
        resume: continue the evaluation in ``output``.
        force: resume with other settings than before.
        retry_errors: sample failed traces again.

    Raises:
        UserError: a mistake of the user; nothing is left behind if no trace was sampled.
    """
    asked = evaluation.as_dict()
    if resume:
        directory = ResultsDirectory.resume(output, asked, force)
    else:
        directory = ResultsDirectory.create(output, asked)
    live = ReportProcess("delethink.evaluation.live", output, _logger.warning)
    with contextlib.closing(directory), contextlib.closing(live):
        _write_problems(evaluation, directory)
        known = {record.key: record for record in _matching(evaluation, directory)}
        if retry_errors:
            known = {key: record for key, record in known.items() if record.error is None}
        for model in dict.fromkeys(setting.model for setting in evaluation.settings):
            missing = [
                setting
                for setting in evaluation.settings
                if setting.model == model
                and sum(key.setting == setting.key for key in known) < evaluation.traces_per_setting
            ]
            if missing:
                with open_model(model) as loaded:
                    _sample(evaluation, loaded, missing, known, directory, live, progress)
        records = _matching(evaluation, directory)
        results = summarise(evaluation.settings, records, analysis or AnalysisSettings())
        found = asked | directory.forced | results.as_dict()
        directory.write("results.json", json_text(found, indent=2) + "\n")
        directory.write("timing.json", json_text(results.timing, indent=2) + "\n")
    return results


def _write_problems(evaluation: Evaluation, directory: ResultsDirectory) -> None:
    lines = [
        json_text({"problem": index, "prompt": problem.prompt, "answer": problem.answer}) + "\n"
        for index, problem in enumerate(evaluation.problems.problems)
    ]
    directory.write(PROBLEMS, "".join(lines))


def _matching(evaluation: Evaluation, directory: ResultsDirectory) -> Iterator[Record]:
    """Yield the records of this evaluation.

    Samples above the requested number and records of replaced settings are left out.
    """
    budgets = {setting.key: setting.budgets for setting in evaluation.settings}
    problems, samples = len(evaluation.problems.problems), evaluation.plan.samples
    for record in directory.read():
        key = record.key
        if key.setting in budgets and key.problem < problems and key.sample < samples:
            found = tuple(outcome.budget for outcome in record.outcomes)
            if record.error is not None or found == budgets[key.setting]:
                yield record


def _sample(
    evaluation: Evaluation,
    loaded: LoadedModel,
    settings: Sequence[Setting],
    known: Mapping[SampleKey, Record],
    directory: ResultsDirectory,
    live: ReportProcess,
    progress: EvaluationProgress | None,
) -> None:
    """Sample the missing traces of one model."""
    check_thinking_is_open(loaded.tokenizer, evaluation.problems.problems[0])
    query_tokens = longest_query(loaded.tokenizer, evaluation.problems.problems)
    answer_tokens = answer_room(loaded.tokenizer, evaluation.plan)
    for setting in settings:
        check_window(setting, query_tokens, loaded.max_model_tokens, answer_tokens)

    def store(record: Record) -> None:
        directory.append(record)
        live.update()
        if progress is not None:
            progress.on_trace_end(record)

    for setting in settings:
        if progress is not None:
            own = [record for key, record in known.items() if key.setting == setting.key]
            progress.on_setting_begin(setting, evaluation.traces_per_setting, own)
        try:
            asyncio.run(_Sampler(evaluation, loaded, setting).run(known, store))
        finally:
            if progress is not None:
                progress.on_setting_end()


def _ignore_interrupts(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Hide tasks ended by an interrupt; the command reports the interrupt itself."""
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)


def _details(trace: Trace, spec: ChunkSpec) -> dict[str, Any]:
    """Return what is stored beside the sampled tokens, to show the trace.

    Prompts follow from the sizes, except those of other carryovers than head and tail.
    """
    details: dict[str, Any] = {
        "query_ids": as_list(trace.query_ids),
        "logprobs": [[round(value, 4) for value in chunk.logprobs] for chunk in trace.chunks],
    }
    if spec.carryover is not None or spec.boundary is not None:
        first = len(trace.query_ids)
        details["prompts"] = [as_list(chunk.prompt_ids)[first:] for chunk in trace.chunks]
        details["roles"] = [chunk.role.value for chunk in trace.chunks]
    return details


@dataclass(frozen=True)
class _Sampler:
    """Samples and scores the traces of one setting."""

    evaluation: Evaluation
    loaded: LoadedModel
    setting: Setting
    unscored: list[str] = field(default_factory=list)  # causes, one for each trace

    async def run(self, known: Collection[SampleKey], store: Callable[[Record], None]) -> None:
        """Sample every unknown trace, and store each record when its trace ends.

        Raises:
            UserError: a mistake with an effect on every trace; traces in flight are dropped.
            RolloutError: the reward of too many traces cannot be computed.
        """
        asyncio.get_running_loop().set_exception_handler(_ignore_interrupts)
        # Sample 0 of every problem first, for a running accuracy over all problems.
        keys = (
            SampleKey(self.setting.key, problem, sample)
            for sample in range(self.evaluation.plan.samples)
            for problem in range(len(self.evaluation.problems.problems))
        )
        missing = (key for key in keys if key not in known)

        finished = count(1)

        async def work() -> None:
            for key in missing:  # one iterator for all workers
                store(await self._record(key))
                self._check_scoring(next(finished))

        workers = [asyncio.ensure_future(work()) for _ in range(self.evaluation.in_flight)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            disconnect = getattr(self.loaded.policy, "disconnect", None)
            if disconnect is not None:  # connections belong to this event loop
                await disconnect()

    def _check_scoring(self, finished: int) -> None:
        """Stop a useless evaluation."""
        number = len(self.unscored)
        if number >= _MIN_UNSCORED and number > _MAX_UNSCORED_SHARE * finished:
            cause, _ = Counter(self.unscored).most_common(1)[0]
            raise RolloutError(
                f"{number} of {finished} traces could not be scored, more than "
                f"{_MAX_UNSCORED_SHARE:.0%}; most often: {cause}. Mend the reward or its data, and "
                "continue with --resume --retry-errors"
            )

    async def _record(self, key: SampleKey) -> Record:
        """Sample one trace and score it at every budget."""
        plan, tokenizer, started = self.evaluation.plan, self.loaded.tokenizer, time.time()
        problem = self.evaluation.problems.problems[key.problem]
        query = query_ids(tokenizer, problem)
        # The seed depends on problem and sample only, so models and settings draw alike, and paired
        # comparisons become sharper.
        seed = derive_seed("evaluation", plan.seed, key.problem, key.sample)
        sampling = plan.sampling(seed)
        trace = await run_rollout(
            self.loaded.policy, self.setting.spec, query, sampling, self.loaded.max_model_tokens
        )
        outcomes: list[BudgetOutcome] = []
        failure = (trace.error or trace.stop.value) if trace.stop.is_failure else None
        if failure is None:
            try:
                for budget, spec in zip(self.setting.budgets, self.setting.specs, strict=True):
                    if outcomes and not outcomes[-1].out_of_budget:
                        # A larger budget changes nothing.
                        outcomes.append(replace(outcomes[-1], budget=budget))
                    else:
                        outcomes.append(await self._outcome(spec, trace, problem, sampling))
            except (UserError, WorkersLostError):
                raise
            except _UnscoredError as error:
                failure, outcomes = str(error), []
                self.unscored.append(failure)
            except Exception as error:  # graders and engines may raise anything
                failure, outcomes = f"{type(error).__name__}: {error}", []
        return Record(
            key=key,
            outcomes=tuple(outcomes),
            query_tokens=len(query),
            started=started,
            ended=time.time(),
            error=failure,
            output_ids=tuple(chunk.output_ids for chunk in trace.chunks)
            if self.evaluation.keep_tokens
            else (),
            details=_details(trace, self.setting.spec) if self.evaluation.keep_tokens else {},
        )

    async def _outcome(
        self, spec: ChunkSpec, trace: Trace, problem: Problem, sampling: Sampling
    ) -> BudgetOutcome:
        """Score the trace cut to a budget, with a forced answer if the plan has one."""
        trace = cut_to_budget(trace, spec)
        attempt = make_attempt(problem, trace, self.loaded.tokenizer, spec)
        marks = marks_of(self.loaded.tokenizer)
        out_of_budget = trace.stop is TraceStop.BUDGET
        is_marked = marks.ends_in(attempt.text)
        forced = self.evaluation.plan.forced_answer_tokens > 0 and out_of_budget and not is_marked
        if forced:
            answer = await self._force_answer(trace, sampling, spec.budget)
            attempt = replace(attempt, text=f"{attempt.text}{marks.end}{answer}")
        score = await self.evaluation.problems.grade(attempt)
        if score is None:
            raise _UnscoredError("the reward cannot grade the answer")
        if score not in (0, 1):
            raise ConfigError(
                f"the reward {self.evaluation.problems.reward!r} must be 0 or 1, got {score}; "
                "name another with --reward"
            )
        return BudgetOutcome(
            budget=spec.budget,
            score=float(score),
            length=trace.length,
            chunks=len(trace.chunks),
            processed=sum(len(c.prompt_ids) + len(c.output_ids) for c in trace.chunks),
            out_of_budget=out_of_budget,
            vote=vote(attempt.text, marks.end),
            forced=forced,
            is_marked=is_marked,
        )

    async def _force_answer(self, trace: Trace, sampling: Sampling, budget: int) -> str:
        """Sample an answer after the end-of-thinking mark, in the context of the last chunk."""
        last = trace.chunks[-1]
        mark = encode(self.loaded.tokenizer, marks_of(self.loaded.tokenizer).forced)
        completion = await self.loaded.policy.generate(
            last.prompt_ids + last.output_ids + mark,
            self.evaluation.plan.forced_answer_tokens,
            replace(sampling, seed=derive_seed("answer", sampling.seed or 0, budget)),
        )
        if completion.stop in (StopReason.ABORT, StopReason.ERROR):
            raise RuntimeError("the engine aborted the forced answer")
        return reward_text(self.loaded.tokenizer, completion.token_ids)
