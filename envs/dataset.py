"""Tasks from rows of a data set: prompts, filters and held-out problems."""

from __future__ import annotations

import datetime
import hashlib
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from delethink.envs.sources import PassRates, RatedProblem, SourceRow, read_rows
from delethink.errors import ConfigError, UserError, did_you_mean
from delethink.json_io import shorten
from delethink.registry import resolve
from delethink.rows import (
    MISSING,
    Message,
    accepted_answers,
    has_picture,
    is_missing,
    names_of,
    read_date,
    read_question,
    value_at,
)
from delethink.scoring.answer import extract_answer
from delethink.tasks import check_split
from delethink.types import ACCEPTED_ANSWERS, END_OF_THINKING, Problem

BOXED = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."

# Columns of well-known sets: DeepScaleR, verl, TRL, Tulu, NeMo, DeepMath, Search-R1, SYNTHETIC-1.
PROBLEM_KEYS = "problem|prompt|question|messages"
ANSWER_KEYS = (
    "answer|ground_truth|reward_model.ground_truth|expected_answer|final_answer|gold|"
    "golden_answers|verification_info.ground_truth|label|target|solution"
)

_TEXTS = (
    *("dataset", "split", "config", "files", "problem_key", "answer_key", "template", "system"),
    *("reward", "eval_dataset", "eval_split", "pass_rate_key", "pass_rates", "date_key"),
)
_MATHEMATICAL = {"math", "numeric"}  # rewards that read answers as formulas
_WORD = re.compile(r"[^\W\d_]{2,}")  # a single letter may be a variable, and its case matters
_NUMBER = re.compile(r"[-+]?\d{1,40}(?:\.\d{1,40})?")

# What a converter raises for a row of another form.
_WRONG_ROW = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)

Convert = Callable[["DatasetSpec", SourceRow], Problem | None]
Demonstrate = Callable[[Problem], tuple[str | None, str]]


def demonstrate_boxed(problem: Problem) -> tuple[str, str]:
    """Return the gold answer in a box, and a wrong number in a box."""
    gold = extract_answer(problem.answer, None) or problem.answer  # it may have a box of its own
    return f"\\boxed{{{gold}}}", "\\boxed{-987654321}"


@dataclass(frozen=True)
class DatasetTask:
    """Problems of a finite set. Each epoch has its own order of the training problems."""

    train: Sequence[Problem]
    heldout: Sequence[Problem]
    rewards: Mapping[str, float]
    left_out: Mapping[str, int]  # problems removed by each filter
    seed: int
    name: str
    demonstrate: Demonstrate

    def problem(self, split: str, index: int) -> Problem:
        """Return problem ``index`` of ``split``.

        Raises:
            ConfigError: the split is empty, or has no held-out problem of that index.
        """
        check_split(split)
        if split == "heldout":
            if not 0 <= index < len(self.heldout):
                raise ConfigError(
                    f"{self.name} has {len(self.heldout)} held-out problems, got index {index}"
                )
            return self.heldout[index]
        if not self.train:
            raise ConfigError(
                f"{self.name} has no training problems: it is for evaluation, or its filters "
                "removed all"
            )
        epoch, position = divmod(index, len(self.train))
        return self.train[_order(self.seed, epoch, len(self.train))[position]]

    def size(self, split: str) -> int:
        """Return the number of problems in a split."""
        check_split(split)
        return len(self.heldout if split == "heldout" else self.train)

    def demonstrations(self, problem: Problem) -> tuple[str | None, str | None]:
        """Return a right answer, if there is one, and a wrong answer."""
        right, wrong = self.demonstrate(problem)
        before = f"Let me see.{END_OF_THINKING}"
        return None if right is None else before + right, before + wrong


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def convert_plain(spec: DatasetSpec, row: SourceRow) -> Problem | None:
    """Convert a row with a problem and an answer column; ``None`` if one is empty.

    Of several accepted answers the first is the problem's; all of them stand in its metadata.
    """
    question = read_question(spec.value(row, spec.problem_key))
    gold = spec.value(row, spec.answer_key)
    answers = accepted_answers(gold, as_mathematics=spec.rewards.keys() <= _MATHEMATICAL)
    if question is None or not answers:
        return None
    metadata = {key: spec.value(row, key) for key in spec.metadata_keys}
    if len(answers) > 1:
        metadata[ACCEPTED_ANSWERS] = list(answers)
    return spec.make_problem(question.prompt, answers[0], metadata, question.before)


@dataclass(frozen=True)
class DatasetSpec:
    """Description of a data set. Calling the spec creates the task."""

    name: str
    dataset: str | None = None  # a local file or folder, or a name on the Hugging Face hub
    split: str = "train"  # the part with the problems
    config: str | None = None  # the configuration, for a data set with several
    files: str | None = None  # a pattern of file names, if they are not named after the split
    # column with the problem; ``a|b``: the first of these in a row; ``a.b``: the key b inside a
    problem_key: str = PROBLEM_KEYS
    answer_key: str = ANSWER_KEYS  # the column with the gold answer, as ``problem_key``
    metadata_keys: Sequence[str] = ()  # additional columns for rewards
    template: str = BOXED  # the prompt, with ``{problem}`` in place of the problem
    conversation_template: str = "{problem}"  # as ``template``, for problems that are conversations
    system: str | None = None  # a system message before the prompt
    date_key: str | None = None  # the column with the date of a problem
    start_date: str | None = None  # first and last day of the problems used, as 2024-08-01
    end_date: str | None = None
    rewards: Mapping[str, float] = field(default_factory=lambda: {"math": 1.0})
    for_evaluation: bool = False  # hold out all problems
    heldout_share: float = 0.02  # chosen by a hash of the problem; 1 holds out all
    convert: Convert = convert_plain
    demonstrate: Demonstrate = demonstrate_boxed  # a right and a wrong answer, without thinking

    def __call__(
        self,
        dataset: str | None = None,
        split: str | None = None,
        config: str | None = None,
        files: str | None = None,
        problem_key: str | None = None,
        answer_key: str | None = None,
        metadata_keys: Sequence[str] | None = None,
        template: str | Mapping[str, None] | None = None,
        system: str | None = None,
        date_key: str | None = None,
        start_date: str | None = None,
        end_date: str | None = None,
        reward: str | None = None,
        eval_dataset: str | None = None,
        eval_split: str | None = None,
        heldout_share: float | None = None,
        pass_rate_key: str | None = None,
        pass_rates: str | None = None,
        min_pass_rate: float = 0.0,
        max_pass_rate: float = 1.0,
        seed: int = 0,
    ) -> DatasetTask:
        """Create the task. Arguments named as fields of the class replace these fields.

        Args:
            dataset: a file (JSON lines, JSON, Parquet, CSV, also compressed), a folder, or a name
                on the Hugging Face hub.
            split: the part with the problems; of a folder or a data set of the hub.
            config: the configuration, for a data set of the hub with several.
            files: a pattern of file names, for a folder whose files are not named after the split.
            problem_key: column of the problem; ``a|b`` takes the first that a row has, ``a.b`` the
                key b inside the column a.
            answer_key: column of the gold answer, in the same notation.
            metadata_keys: further columns for rewards, a list or separated by commas.
            template: the prompt, with ``{problem}`` in place of the problem. Given here, it is also
                put around the last message of a conversation, which otherwise stays as it is.
            system: a system message before the prompt; it replaces that of a conversation.
            date_key: column of the date of a problem.
            start_date: first day of the problems used, as 2024-08-01.
            end_date: last day of the problems used.
            reward: name of the only reward; a recipe's ``rewards`` come first.
            eval_dataset: source of held-out problems; unset, the same data set.
            eval_split: its split; unset, a share of the problems is held out.
            heldout_share: share of the problems that is held out, chosen by a hash of the problem;
                1 holds out all.
            pass_rate_key: column of a measured pass rate.
            pass_rates: a file with measured pass rates, or with scored traces.
            min_pass_rate: lowest pass rate of training problems.
            max_pass_rate: highest pass rate of training problems.
            seed: seed of the order of training problems.

        Raises:
            ConfigError: a data set, column or template is missing or invalid.
        """
        return self._make({name: value for name, value in locals().items() if name != "self"})

    def _make(self, arguments: dict[str, Any]) -> DatasetTask:
        """Create the task from the arguments of a call."""
        template, keys = arguments["template"], arguments["metadata_keys"]
        if isinstance(template, Mapping) and list(template.items()) == [("problem", None)]:
            arguments["template"] = template = "{problem}"  # which YAML reads as a mapping
        if isinstance(keys, str):
            arguments["metadata_keys"] = [key.strip() for key in keys.split(",")]
        _check_types(arguments)
        given = {f.name: arguments[f.name] for f in fields(self) if f.name in arguments}
        spec = replace(self, **{key: value for key, value in given.items() if value is not None})
        if template is not None:
            spec = replace(spec, conversation_template=str(template))
        if arguments["reward"] is not None:
            spec = replace(spec, rewards={arguments["reward"]: 1.0})
        spec._check()
        _refuse_splits_of_a_file(spec, arguments)
        rates = PassRates.read(
            *(arguments[key] for key in ("pass_rate_key", "pass_rates")),
            *(arguments[key] for key in ("min_pass_rate", "max_pass_rate")),
        )
        sources = (arguments[key] for key in ("eval_dataset", "eval_split", "seed"))
        return _build(spec, rates, *sources)

    def _check(self) -> None:
        """Raise a ``ConfigError`` for a missing data set or an invalid template or share."""
        if self.dataset is None:
            raise ConfigError(
                f"task.args of {self.name!r} must have 'dataset': a JSON-lines, JSON, Parquet or "
                "CSV file, a folder, or a name on the Hugging Face hub"
            )
        if not isinstance(self.template, str) or "{problem}" not in self.template:
            raise ConfigError(f"the template {self.template!r} must contain {{problem}}")
        if "\\n\\n" in self.template:
            raise ConfigError(
                "the template has a backslash and an n instead of a line break: in YAML, write it "
                "in double quotes"
            )
        if not 0 <= self.heldout_share <= 1:
            raise ConfigError(f"heldout_share must be in 0..1, got {self.heldout_share}")
        start, end = self._window
        if (start or end) and self.date_key is None:
            raise ConfigError("start_date and end_date need date_key, the column with the dates")
        if start and end and start > end:
            raise ConfigError(f"start_date must not be after end_date, got {start} and {end}")

    @property
    def _window(self) -> tuple[datetime.date | None, datetime.date | None]:
        days = (self.start_date, "start_date"), (self.end_date, "end_date")
        start, end = (None if day is None else read_date(day, name) for day, name in days)
        return start, end

    def is_in_window(self, row: SourceRow) -> bool:
        """Return whether the date of a row is from ``start_date`` to ``end_date``."""
        start, end = self._window
        if self.date_key is None or (start is None and end is None):
            return True
        day = read_date(self.value(row, self.date_key), self.date_key)
        return (start is None or start <= day) and (end is None or day <= end)

    @property
    def summary(self) -> str:
        """Return one line for lists of tasks."""
        if self.dataset is None:
            return "Problems of a file, a folder, or a data set on the Hugging Face hub."
        use = "evaluation" if self.for_evaluation else "training"
        return f"{self.dataset} ({use}; reward {', '.join(self.rewards)})."

    def value(self, row: SourceRow, keys: str) -> Any:
        """Return the value of the first column of ``keys`` that is not empty in a row, or ``None``.

        Raises:
            ConfigError: the row has none of them.
        """
        found = {key: value_at(row, key) for key in keys.split("|")}
        present = {key: value for key, value in found.items() if value is not MISSING}
        if keys == ANSWER_KEYS and len(present) > 1:
            present.pop("solution", None)  # beside an answer it is a text with the steps
        if present:
            filled = (value for value in present.values() if not is_missing(value) and value != "")
            return next(filled, None)
        raise ConfigError(_missing_column(self, keys, row))

    def make_problem(
        self,
        question: str,
        answer: str,
        metadata: Mapping[str, Any],
        before: Sequence[Message] | None = None,
    ) -> Problem:
        """Return the problem with its prompt and system message.

        Args:
            question: the text of the problem, or the last message of a conversation.
            answer: the gold answer.
            metadata: additional values for rewards.
            before: the earlier messages of a conversation; ``None`` if it is none.
        """
        template = self.template if before is None else self.conversation_template
        messages = tuple(before or ())
        if self.system is not None:
            system = {"role": "system", "content": self.system}
            messages = (system, *(m for m in messages if m["role"] != "system"))
        return Problem(template.replace("{problem}", question), answer, metadata, messages)


def _missing_column(spec: DatasetSpec, keys: str, row: SourceRow) -> str:
    """Return the sentence about a column that a row lacks, with the argument that names it."""
    argument = {spec.problem_key: "problem_key", spec.answer_key: "answer_key"}.get(keys)
    listed = ", ".join(map(str, names_of(row)))
    column = keys.replace("|", " or ")
    usual = keys in (PROBLEM_KEYS, ANSWER_KEYS)
    found = (
        f"no column with a usual name ({keys.replace('|', ', ')}), only: {listed}."
        if usual
        else f"no column {column!r}.{did_you_mean(keys, names_of(row))}"
    )
    advice = (
        f" Name the column by the task's argument {argument}: task.args.{argument} in a recipe, "
        f"--task-arg {argument}=NAME in eval and probe, {argument}=NAME in tasks"
        if argument
        else ""
    )
    return f"the data set {spec.dataset} has {found}{advice}"


def _check_types(arguments: Mapping[str, Any]) -> None:
    """Raise a ``ConfigError`` for an argument of another type, such as a name that is a number."""
    for name in _TEXTS:
        if not isinstance(arguments[name], (str, type(None))):
            raise ConfigError(
                f"{name} must be a text, got {shorten(arguments[name])}; put it in quotes"
            )
    for name in ("heldout_share", "min_pass_rate", "max_pass_rate"):
        value = arguments[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigError(f"{name} must be a number, got {shorten(value)}")
    keys = arguments["metadata_keys"]
    if keys is not None and not (
        isinstance(keys, (list, tuple)) and all(isinstance(key, str) for key in keys)
    ):
        raise ConfigError(f"metadata_keys must be a list of columns, got {shorten(keys)}")


def _refuse_splits_of_a_file(spec: DatasetSpec, arguments: Mapping[str, Any]) -> None:
    """Raise a ``ConfigError`` for arguments that choose a part of a data set that is one file."""
    for dataset, names in (
        (spec.dataset, ("split", "config", "files")),
        (arguments["eval_dataset"] or spec.dataset, ("eval_split",)),
    ):
        for name in names:
            if arguments[name] is not None and Path(str(dataset)).expanduser().is_file():
                raise ConfigError(
                    f"{name}={arguments[name]} has no effect, because {dataset} is one file; "
                    "remove it, or name a folder or a data set with splits"
                )


@dataclass(frozen=True)
class _Distinct:
    """Different problems in order, as a reader tells them apart."""

    by_text: dict[str, RatedProblem] = field(default_factory=dict)
    _by_answer: dict[Hashable, str] = field(default_factory=dict)

    def find(self, problem: Problem) -> str | None:
        """Return the text of the same problem, if it is known.

        White space makes no difference. Neither does the case of words if the answers agree:
        "ASCII code of A?" and "ASCII code of a?" are two problems.
        """
        text = _text_of(problem)
        return text if text in self.by_text else self._by_answer.get(_folded(problem))

    def add(self, problem: Problem, rate: float | None) -> None:
        """Add a problem that is not known yet."""
        text = _text_of(problem)
        self.by_text[text] = problem, rate
        self._by_answer[_folded(problem)] = text

    def without(self, removed: Callable[[Problem], bool]) -> _Distinct:
        """Return the problems that are not removed."""
        kept = _Distinct()
        for problem, rate in self.by_text.values():
            if not removed(problem):
                kept.add(problem, rate)
        return kept


def _text_of(problem: Problem) -> str:
    """Return the whole conversation with white space merged, in one Unicode form."""
    parts = [f"{message['role']}: {message['content']}" for message in problem.before]
    return unicodedata.normalize("NFC", " ".join(" ".join([*parts, problem.prompt]).split()))


def _folded(problem: Problem) -> Hashable:
    """Return a key that ignores the case of words, with the answer."""
    return _WORD.sub(lambda word: word[0].casefold(), _text_of(problem)), _gold_of(problem)


def _gold_of(problem: Problem) -> Hashable:
    """Return the accepted answers as a key; 070 and 70.0 are one number."""
    merged = (" ".join(answer.split()) for answer in problem.accepted)
    return frozenset(Fraction(one) if _NUMBER.fullmatch(one) else one for one in merged)


def _build(
    spec: DatasetSpec, rates: PassRates, eval_dataset: str | None, eval_split: str | None, seed: int
) -> DatasetTask:
    left_out: Counter[str] = Counter()
    train, heldout = _read_problems(spec, rates, left_out), _Distinct()
    if spec.for_evaluation:
        train, heldout = heldout, train
    elif eval_dataset or eval_split:
        source = replace(spec, dataset=eval_dataset or spec.dataset, split=eval_split or spec.split)
        heldout = _read_problems(source, rates, left_out, "heldout_")
        before = len(train.by_text)
        train = train.without(lambda problem: heldout.find(problem) is not None)
        left_out["also_heldout"] = before - len(train.by_text)
    else:
        heldout = train.without(lambda problem: not _is_held_out(problem, spec.heldout_share))
        train = train.without(lambda problem: _is_held_out(problem, spec.heldout_share))
    task = DatasetTask(
        rates.select(train.by_text.values(), left_out),
        [problem for problem, _ in heldout.by_text.values()],
        spec.rewards,
        {name: number for name, number in left_out.items() if number},
        seed,
        name=spec.name if spec.name != "dataset" else str(spec.dataset),
        demonstrate=spec.demonstrate,
    )
    if not task.train and not task.heldout:
        counts = ", ".join(f"{number} {name}" for name, number in task.left_out.items())
        raise ConfigError(f"the data set {spec.dataset} has no problem left: {counts or 'no rows'}")
    return task


def _read_problems(
    spec: DatasetSpec, rates: PassRates, left_out: Counter[str], prefix: str = ""
) -> _Distinct:
    """Return the different problems, without those with contradictory answers."""
    assert spec.dataset is not None
    found = _Distinct()
    contradictory = set()
    checks = _gold_checks(spec)
    rows = read_rows(spec.dataset, spec.split, spec.config, spec.files)
    for number, row in enumerate(rows, 1):
        if not spec.is_in_window(row):
            left_out[prefix + "outside_dates"] += 1
            continue
        if has_picture(row):
            left_out[prefix + "with_picture"] += 1
            continue
        problem = _convert_row(spec, row, number)
        if problem is None:
            left_out[prefix + "without_problem_or_answer"] += 1
            continue
        if not all(any(check(a, problem.metadata) for a in problem.accepted) for check in checks):
            left_out[prefix + "unreadable_answer"] += 1
            continue
        known = found.find(problem)
        if known is None:
            found.add(problem, rates.rate(problem, row))
            continue
        left_out[prefix + "duplicates"] += 1
        if _gold_of(problem) != _gold_of(found.by_text[known][0]):
            contradictory.add(known)
    left_out[prefix + "contradictory"] += len(contradictory)
    return found.without(lambda problem: _text_of(problem) in contradictory)


def _gold_checks(spec: DatasetSpec) -> list[Callable[[str, Mapping[str, Any]], bool]]:
    """Return the checks of gold answers that the rewards have (``delethink.rewards.gold``)."""
    functions = [resolve("delethink.rewards", name) for name in spec.rewards]
    return [f.can_read for f in functions if hasattr(f, "can_read")]


def _convert_row(spec: DatasetSpec, row: SourceRow, number: int) -> Problem | None:
    try:
        return spec.convert(spec, row)
    except UserError:
        raise
    except _WRONG_ROW as error:
        raise ConfigError(
            f"row {number} of {spec.dataset} does not have the schema of {spec.name!r}: "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error


def _is_held_out(problem: Problem, share: float) -> bool:
    """Choose by a hash of what was asked, so that problems alike but for case stay together."""
    turns = [message["content"] for message in problem.before if message["role"] != "system"]
    key = " ".join(" ".join([*turns, problem.prompt]).casefold().split())
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


dataset_task = DatasetSpec("dataset")
