"""An evaluation from its settings to its results: samples what is missing, then sums up.

problems = load_problems("automaton", {"min_steps": 4, "max_steps": 8}, limit=64)
settings = make_settings(["toy"], ["delethink", "longcot"], [90], [45], [5], head_size=0)
results = evaluate(Evaluation(problems, settings), open_model, Path("out"))
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from delethink.chunking import ChunkSpec, start
from delethink.config import RewardConfig, ScoringConfig
from delethink.errors import ConfigError, UserError, WorkersLostError
from delethink.evaluation.records import Outcome, Place, Record, ResultsDirectory
from delethink.evaluation.results import Reading, Results, collect, summarise
from delethink.evaluation.settings import Asked, Setting, cut, fingerprint
from delethink.policy import Completion, Policy, Sampling
from delethink.registry import make_task
from delethink.rollout import derive_seed, run_rollout
from delethink.scoring.answer import vote
from delethink.scoring.scorer import Scorer, make_scorer
from delethink.tasks import left_out_of, rewards_of, size_of, take
from delethink.tokenization import Tokenizer, query_ids, reward_text
from delethink.tokens import token_array
from delethink.types import (
    END_OF_THINKING,
    Attempt,
    Problem,
    StopReason,
    TokenIds,
    Trace,
    TraceStop,
)

Grade = Callable[[Attempt], Awaitable[float | None]]  # 0 or 1; None: cannot be told

_FILES = (".jsonl", ".json", ".parquet", ".csv")
_USUAL_COLUMNS = {
    "problem_key": "problem|prompt|question",
    "answer_key": "answer|solution|gold",
}
_ENDLESS = 256  # problems of a task without an end, where no number is asked for


@dataclass(frozen=True)
class Problems:
    """Held-out problems and how an answer to one is graded.

    Close it after use: rewards that may hang have processes of their own.
    """

    name: str
    problems: tuple[Problem, ...]
    reward: str
    grade: Grade
    scorer: Scorer | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)  # rows of a data set, by reason

    def close(self) -> None:
        """Ends the processes of its reward."""
        if self.scorer is not None:
            self.scorer.close()


def load_problems(
    task: str,
    arguments: Mapping[str, Any],
    limit: int | None,
    reward: str | None = None,
    split: str = "heldout",
    seed: int = 0,
) -> Problems:
    """The problems of a registered task, or of a local file, all of which is then held out.

    Args:
        task: a registered name (``aime_2024``, ``reasoning_gym/chain_sum``), or a file.
        arguments: of the task; a file takes those of the task ``dataset``.
        limit: the first so many; ``None`` for all, or 256 of a task without an end.
        reward: what grades them; ``None`` for the task's own first one.
        split: of a registered task.
        seed: of a task that takes one.

    Raises:
        UserError: no such task, file, column, package or reward, or no problem.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of problems must be at least 1, got {limit}")
    name, given = _named(task, arguments)
    made = make_task(name, given, seed)
    size = size_of(made, split)
    number = (limit or _ENDLESS) if size is None else min(limit or size, size)
    if not number:
        raise ConfigError(f"the task {task} has no problem in its split {split!r}")
    chosen = reward or next(iter(rewards_of(made)), "exact")
    scorer = make_scorer({chosen: RewardConfig()}, chosen, ScoringConfig())
    taken = tuple(take(made, split, number).problems)
    return Problems(task, taken, chosen, _grade(scorer), scorer, left_out_of(made))


def _named(task: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    path = Path(task).expanduser()
    if path.suffix not in _FILES:
        return task, dict(arguments)
    whole = {"dataset": str(path), "heldout_share": 1.0}
    return "dataset", {**whole, **_USUAL_COLUMNS, **arguments}


def _grade(scorer: Scorer) -> Grade:
    async def grade(attempt: Attempt) -> float | None:
        # No task of its own: an interrupt in one would be lost.
        known: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        known.set_result(await scorer.parts(attempt))
        (score,) = await scorer.finish([attempt], [known])
        if scorer.accuracy in score.errors:
            raise RuntimeError(f"{scorer.accuracy}: {score.errors[scorer.accuracy]}")
        return score.parts[scorer.accuracy]

    return grade


def end_mark(tokenizer: Tokenizer) -> TokenIds:
    """The tokens of the end of thinking, and no others."""
    encode: Any = tokenizer
    return tuple(encode(END_OF_THINKING, add_special_tokens=False)["input_ids"])


class _Lean:
    """Passes on what a policy samples in less memory: long traces are many in flight.

    Log-probs, which nothing here reads, become zeros, and tokens one block of memory.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        done = await self._policy.generate(prompt_ids, max_new_tokens, sampling)
        ids = token_array(done.token_ids)
        return replace(done, token_ids=ids, logprobs=(0.0,) * len(ids))


@dataclass(frozen=True)
class Sampler:
    """Plays and scores traces of one model.

    Args:
        policy: the model.
        tokenizer: renders queries and decodes traces.
        problems: asked ``asked.samples`` times each.
        grade: says right (1) or wrong (0) of an attempt; ``None`` where it cannot.
        asked: how often and how.
        in_flight: the most traces that are played at the same time, and so held in memory.
        max_model_tokens: the longest sequence that the model takes, if it is known.
        keep_tokens: whether records hold what was sampled.
    """

    policy: Policy
    tokenizer: Tokenizer
    problems: Sequence[Problem]
    grade: Grade
    asked: Asked
    in_flight: int = 64
    max_model_tokens: int | None = None
    keep_tokens: bool = True

    @cached_property
    def _lean(self) -> _Lean:
        return _Lean(self.policy)

    async def run(
        self, setting: Setting, done: Collection[Place], keep: Callable[[Record], None]
    ) -> None:
        """Plays every trace of a setting that is not done, and hands each to ``keep`` when it ends.

        Sample 0 of every problem comes first, so that a running accuracy is over all problems.

        Raises:
            UserError: whatever concerns every trace; those in flight are given up.
        """
        places = self._places(setting, done)
        workers = [
            asyncio.ensure_future(self._work(setting, places, keep)) for _ in range(self.in_flight)
        ]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    def _places(self, setting: Setting, done: Collection[Place]) -> Iterator[Place]:
        for sample in range(self.asked.samples):
            for problem in range(len(self.problems)):
                if (place := Place(setting.key, problem, sample)) not in done:
                    yield place

    async def _work(
        self, setting: Setting, places: Iterator[Place], keep: Callable[[Record], None]
    ) -> None:
        for place in places:  # shared by all workers
            keep(await self._record(setting, place))

    async def _record(self, setting: Setting, place: Place) -> Record:
        problem, started = self.problems[place.problem], time.time()
        query = query_ids(self.tokenizer, problem)
        sampling = Sampling(
            self.asked.temperature,
            # Of the problem and the sample alone: models and settings then draw alike, which makes
            # comparisons of the same problems sharper.
            derive_seed("evaluation", self.asked.seed, place.problem, place.sample),
        )
        trace = await run_rollout(self._lean, setting.spec, query, sampling, self.max_model_tokens)
        outcomes: tuple[Outcome, ...] = ()
        error = (trace.error or trace.stop.value) if trace.stop.is_failure else None
        if error is None:
            try:
                outcomes = await self._outcomes(setting, trace, problem, sampling)
            except (UserError, WorkersLostError):
                raise
            except Exception as exc:  # the boundary to any grader, and to the engine
                error = f"{type(exc).__name__}: {exc}"
        return Record(
            place=place,
            outcomes=outcomes,
            query_tokens=len(query),
            started=started,
            ended=time.time(),
            error=error,
            output_ids=tuple(c.output_ids for c in trace.chunks) if self.keep_tokens else (),
        )

    async def _outcomes(
        self, setting: Setting, trace: Trace, problem: Problem, sampling: Sampling
    ) -> tuple[Outcome, ...]:
        """At each budget; what fits in a smaller one is the same in a larger one."""
        outcomes: list[Outcome] = []
        for budget, spec in zip(setting.budgets, setting.specs, strict=True):
            if outcomes and not outcomes[-1].out_of_budget:
                outcomes.append(replace(outcomes[-1], budget=budget))
                continue
            outcomes.append(await self._outcome(spec, cut(trace, spec), problem, sampling))
        return tuple(outcomes)

    async def _outcome(
        self, spec: ChunkSpec, trace: Trace, problem: Problem, sampling: Sampling
    ) -> Outcome:
        budget = spec.budget
        text = reward_text(self.tokenizer, trace.output_ids)
        spent = trace.stop is TraceStop.BUDGET
        forced = self.asked.forced_answer_tokens > 0 and spent and END_OF_THINKING not in text
        if forced:
            mark = end_mark(self.tokenizer)
            text += END_OF_THINKING + await self._answer(trace, mark, sampling, budget)
        score = await self.grade(
            Attempt(
                problem=problem,
                text=text,
                stop=trace.stop,
                length=trace.length,
                num_chunks=len(trace.thinking),
                budget=budget,
                max_chunks=spec.max_chunks,
                output_ids=trace.output_ids,
            )
        )
        if score not in (0, 1, None):
            raise ConfigError(
                f"an accuracy is counted by a reward of 0 or 1, got {score}; name another with "
                "--reward"
            )
        if score is None:
            raise RuntimeError("the reward could not tell whether the answer is right")
        return Outcome(
            budget=budget,
            score=float(score),
            length=trace.length,
            chunks=len(trace.chunks),
            processed=sum(len(c.prompt_ids) + len(c.output_ids) for c in trace.chunks),
            out_of_budget=spent,
            vote=vote(text),
            forced=forced,
        )

    async def _answer(self, trace: Trace, mark: TokenIds, sampling: Sampling, budget: int) -> str:
        """What the model answers in the context in which its budget was spent."""
        last = trace.chunks[-1]
        seed = derive_seed("answer", sampling.seed or 0, budget)
        done = await self.policy.generate(
            last.prompt_ids + last.output_ids + mark,
            self.asked.forced_answer_tokens,
            replace(sampling, seed=seed),
        )
        if done.stop in (StopReason.ABORT, StopReason.ERROR):
            raise RuntimeError("the engine gave up the answer that was asked for")
        return reward_text(self.tokenizer, done.token_ids)


class OpenModel(NamedTuple):
    """A model that is ready to be sampled."""

    policy: Policy
    tokenizer: Tokenizer
    max_model_tokens: int | None


Open = Callable[[str], AbstractContextManager[OpenModel]]


class Progress(Protocol):
    """Who is told how an evaluation goes."""

    def begin(self, setting: Setting, total: int, known: Sequence[Record]) -> None:
        """A setting begins; ``known`` are the records that it has already."""
        ...

    def add(self, record: Record) -> None:
        """A trace has ended."""
        ...

    def end(self) -> None:
        """The setting has ended, however."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What is asked.

    Args:
        problems: and how answers are scored.
        settings: models and ways of thinking.
        asked: samples, temperature, seed.
        engine: what samples, for the record: results of two engines are not mixed unknowingly.
        in_flight: the most traces played at the same time.
        keep_tokens: whether records hold what was sampled.
        weights: of each model, what tells its weights from others (``checkpoint.digest``).
    """

    problems: Problems
    settings: Sequence[Setting]
    asked: Asked = field(default_factory=Asked)
    engine: str = "transformers"
    in_flight: int = 64
    keep_tokens: bool = True
    weights: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.in_flight < 1 or self.asked.samples < 1:
            raise ConfigError(
                "an evaluation needs at least 1 sample of a problem and 1 trace in flight, got "
                f"{self.asked.samples} and {self.in_flight}"
            )
        if not 0 <= self.asked.temperature < float("inf"):
            raise ConfigError(f"temperature must be at least 0, got {self.asked.temperature}")

    @property
    def total(self) -> int:
        """Traces of a setting."""
        return len(self.problems.problems) * self.asked.samples

    def as_dict(self) -> dict[str, Any]:
        """What decides the records, as plain values."""
        return {
            "task": self.problems.name,
            "problems": len(self.problems.problems),
            "problems_fingerprint": fingerprint(self.problems.problems),
            "reward": self.problems.reward,
            "engine": self.engine,
            "models": dict(self.weights),
            **asdict(self.asked),
            "settings": [{**s.as_dict(), "budgets": list(s.budgets)} for s in self.settings],
        }


def evaluate(
    evaluation: Evaluation,
    open_model: Open,
    output: Path,
    *,
    reading: Reading | None = None,
    progress: Progress | None = None,
    resume: bool = False,
    force: bool = False,
    retry_errors: bool = False,
    cost_models: Mapping[str, str] | None = None,
) -> Results:
    """Samples every trace that ``output`` does not hold yet, and sums all of them up.

    Writes ``settings.json``, ``traces.jsonl`` (as traces end), ``results.json`` and
    ``timing.json``.

    Args:
        evaluation: what is asked.
        open_model: makes a model ready; models are open one after the other.
        output: a new folder, or with ``resume`` that of an evaluation that was interrupted.
        reading: how results are read.
        progress: who is told how it goes.
        resume: go on where ``output`` ends.
        force: go on even though it was asked something else.
        retry_errors: play traces again that failed.
        cost_models: for a model, the name under which the cost estimator knows its shape.

    Raises:
        UserError: something the user can mend; before the first trace nothing is left behind.
    """
    asked = evaluation.as_dict()
    if resume:
        directory = ResultsDirectory.resume(output, asked, force)
    else:
        directory = ResultsDirectory.create(output, asked)
    with contextlib.closing(directory):
        models = dict.fromkeys(setting.model for setting in evaluation.settings)
        for model in models:
            _sample(evaluation, model, open_model, directory, progress, retry_errors)
        results = summarise(
            collect(evaluation.settings, _fitting(evaluation, directory)),
            reading or Reading(),
            cost_models,
        )
        found = asked | directory.mixed | results.as_dict()
        directory.write("results.json", json.dumps(found, indent=2) + "\n")
        directory.write("timing.json", json.dumps(results.timing, indent=2) + "\n")
    return results


def check_window(
    setting: Setting, longest_query: int, max_model_tokens: int | None, answer_tokens: int = 0
) -> None:
    """Refuses a setting whose contexts the model cannot hold.

    Raises:
        ConfigError: and says what would fit.
    """
    if max_model_tokens is None:
        return
    room = max_model_tokens - longest_query - answer_tokens
    needed = setting.spec.max_thinking_context
    if needed <= room:
        return
    more = f" + {answer_tokens} to answer" if answer_tokens else ""
    sizes = f"query of up to {longest_query} + {needed} of thinking{more}"
    mend = (
        f"ask for a smaller budget, or pass --cap-longcot to end it at {room}"
        if setting.mode == "longcot"
        else f"lower -C to {max(room, 0)} or less"
    )
    raise ConfigError(
        f"{setting.key}: a context needs {needed + longest_query + answer_tokens} tokens "
        f"({sizes}) and the model takes {max_model_tokens}; {mend}"
    )


def longest_query(tokenizer: Tokenizer, problems: Problems) -> int:
    """Tokens of the longest query."""
    return max(len(query_ids(tokenizer, problem)) for problem in problems.problems)


def answer_room(tokenizer: Tokenizer, asked: Asked) -> int:
    """Tokens that a context needs beyond its thinking, where answers are asked for."""
    if not asked.forced_answer_tokens:
        return 0
    return asked.forced_answer_tokens + len(end_mark(tokenizer))


def _sample(
    evaluation: Evaluation,
    model: str,
    open_model: Open,
    directory: ResultsDirectory,
    progress: Progress | None,
    retry_errors: bool,
) -> None:
    settings = [setting for setting in evaluation.settings if setting.model == model]
    done = {
        record.place
        for record in _fitting(evaluation, directory)
        if record.error is None or not retry_errors
    }
    missing = [
        setting
        for setting in settings
        if sum(place.setting == setting.key for place in done) < evaluation.total
    ]
    if not missing:
        return
    with open_model(model) as opened:
        longest = longest_query(opened.tokenizer, evaluation.problems)
        for setting in missing:
            room = answer_room(opened.tokenizer, evaluation.asked)
            check_window(setting, longest, opened.max_model_tokens, room)
        sampler = Sampler(
            policy=opened.policy,
            tokenizer=opened.tokenizer,
            problems=evaluation.problems.problems,
            grade=evaluation.problems.grade,
            asked=evaluation.asked,
            in_flight=evaluation.in_flight,
            max_model_tokens=opened.max_model_tokens,
            keep_tokens=evaluation.keep_tokens,
        )
        for setting in missing:
            _play(sampler, setting, evaluation, directory, progress, done)


def _play(
    sampler: Sampler,
    setting: Setting,
    evaluation: Evaluation,
    directory: ResultsDirectory,
    progress: Progress | None,
    done: set[Place],
) -> None:
    def keep(record: Record) -> None:
        directory.append(record)
        if progress is not None:
            progress.add(record)

    async def play() -> None:
        asyncio.get_running_loop().set_exception_handler(_leave_out_interrupts)
        try:
            await sampler.run(setting, done, keep)
        finally:
            disconnect = getattr(sampler.policy, "disconnect", None)
            if disconnect is not None:  # connections belong to this event loop
                await disconnect()

    if progress is not None:
        known = [r for r in _fitting(evaluation, directory) if r.place in done]
        of_setting = [r for r in known if r.place.setting == setting.key]
        progress.begin(setting, evaluation.total, of_setting)
    try:
        asyncio.run(play())
    finally:
        if progress is not None:
            progress.end()


def _leave_out_interrupts(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An interrupt ends tasks wherever they are; the command says so once."""
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)


def _fitting(evaluation: Evaluation, directory: ResultsDirectory) -> list[Record]:
    """The records of what is asked, without their tokens.

    Samples beyond those asked for, and settings forced to change, are left out.
    """
    budgets = {setting.key: setting.budgets for setting in evaluation.settings}
    problems, samples = len(evaluation.problems.problems), evaluation.asked.samples
    return [
        record
        for record in directory.read()
        if record.place.setting in budgets
        and record.place.problem < problems
        and record.place.sample < samples
        and (
            record.error is not None
            or tuple(o.budget for o in record.outcomes) == budgets[record.place.setting]
        )
    ]


def longcot_cap(longest: int, max_model_tokens: int | None, answer_tokens: int = 0) -> int | None:
    """The largest budget of LongCoT that a model's window holds; ``None`` where it is not known.

    Raises:
        ConfigError: not a single token fits.
    """
    if max_model_tokens is None:
        return None
    room = max_model_tokens - longest - answer_tokens
    start(ChunkSpec.longcot(max(room, 1)), (0,) * longest, max_model_tokens - answer_tokens)
    return room
