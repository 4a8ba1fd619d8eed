"""An evaluation from its settings to its results: samples what is missing, then sums up.

problems = load_problems("automaton", {"min_steps": 4, "max_steps": 8}, limit=64)
settings = make_settings(["toy"], ["delethink", "longcot"], [90], [45], [5], head_size=0)
results = evaluate(Evaluation(problems, settings), open_model, Path("out"))
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from delethink.errors import ConfigError
from delethink.evaluation.plan import Asked, Setting, fingerprint
from delethink.evaluation.problems import Problems
from delethink.evaluation.records import Place, Record, ResultsDirectory
from delethink.evaluation.results import Reading, Results, collect, summarise
from delethink.evaluation.sampling import Sampler, end_mark
from delethink.policy import Policy
from delethink.query import Tokenizer, query_ids
from delethink.rule import ChunkSpec, start


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
