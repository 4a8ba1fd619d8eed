"""Tasks from rows of a data set: prompts, filters and held-out problems."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from delethink.envs.sources import PassRates, SourceRow, read_rows
from delethink.errors import ConfigError, UserError, did_you_mean
from delethink.tasks import check_split
from delethink.types import END_OF_THINKING, Problem

BOXED = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."

Convert = Callable[["DatasetSpec", SourceRow], Problem | None]
Demonstrate = Callable[[Problem], tuple[str | None, str | None]]


def demonstrate_boxed(problem: Problem) -> tuple[str, str]:
    """Return the gold answer in a box, and a wrong number in a box."""
    return _boxed(problem.answer), _boxed("-987654321")


def _boxed(answer: str) -> str:
    return f"Let me see.{END_OF_THINKING}The answer is \\boxed{{{answer}}}."


@dataclass(frozen=True)
class DatasetTask:
    """Problems of a finite set. Each epoch has its own order of the training problems."""

    train: Sequence[Problem]
    heldout: Sequence[Problem]
    rewards: Mapping[str, float]
    left_out: Mapping[str, int]  # problems removed by each filter
    seed: int = 0
    name: str = "dataset"
    demonstrate: Demonstrate = demonstrate_boxed

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
        """Return a right and a wrong answer."""
        return self.demonstrate(problem)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def convert_plain(spec: DatasetSpec, row: SourceRow) -> Problem | None:
    """Convert a row with a problem and an answer column; ``None`` if one is empty."""
    question, answer = spec.value(row, spec.problem_key), spec.value(row, spec.answer_key)
    if question is None or answer is None:
        return None
    question, answer = str(question).strip(), str(answer).strip()
    if not question or not answer:
        return None
    metadata = {key: spec.value(row, key) for key in spec.metadata_keys}
    return spec.make_problem(question, answer, metadata)


@dataclass(frozen=True)
class DatasetSpec:
    """Description of a data set. Calling the spec creates the task.

    Args:
        name: the registered name.
        dataset: a local file or folder, or a name on the Hugging Face hub.
        split: the part with the problems.
        config: the configuration, for a data set with several.
        files: a pattern of file names, if they are not named after the split.
        problem_key: the column with the problem. ``a|b`` means the first of these in a row.
        answer_key: the column with the gold answer, as ``problem_key``.
        metadata_keys: additional columns for rewards.
        template: the prompt, with ``{problem}`` in place of the problem.
        system: a system message before the prompt.
        rewards: names and weights of the rewards.
        for_evaluation: hold out all problems.
        heldout_share: share of held-out problems, chosen by a hash of the problem; 1 means all.
        convert: converts a row to a problem.
        demonstrate: returns a right and a wrong answer of a problem.
    """

    name: str
    dataset: str | None = None
    split: str = "train"
    config: str | None = None
    files: str | None = None
    problem_key: str = "problem"
    answer_key: str = "answer"
    metadata_keys: tuple[str, ...] = ()
    template: str = BOXED
    system: str | None = None
    rewards: Mapping[str, float] = field(default_factory=lambda: {"math": 1.0})
    for_evaluation: bool = False
    heldout_share: float = 0.02
    convert: Convert = convert_plain
    demonstrate: Demonstrate = demonstrate_boxed

    def __call__(
        self,
        dataset: str | None = None,
        split: str | None = None,
        config: str | None = None,
        files: str | None = None,
        problem_key: str | None = None,
        answer_key: str | None = None,
        metadata_keys: Sequence[str] | None = None,
        template: str | None = None,
        system: str | None = None,
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

        The others are:

        - ``reward``: the name of the only reward.
        - ``eval_dataset``: source of held-out problems; by default the same data set.
        - ``eval_split``: its split; by default a share of the problems is held out.
        - ``pass_rate_key``: the column with a measured pass rate.
        - ``pass_rates``: a file with measured pass rates, or with scored traces.
        - ``min_pass_rate``, ``max_pass_rate``: range of pass rates for training problems.
        - ``seed``: seed for the order of training problems.

        Raises:
            ConfigError: a data set, column or template is missing or invalid.
        """
        replaced: dict[str, Any] = {
            "dataset": dataset,
            "split": split,
            "config": config,
            "files": files,
            "problem_key": problem_key,
            "answer_key": answer_key,
            "metadata_keys": None if metadata_keys is None else tuple(metadata_keys),
            "template": template,
            "system": system,
            "rewards": None if reward is None else {reward: 1.0},
            "heldout_share": heldout_share,
        }
        spec = replace(self, **{key: value for key, value in replaced.items() if value is not None})
        spec.check()
        rates = PassRates.read(pass_rate_key, pass_rates, min_pass_rate, max_pass_rate)
        return _TaskBuilder(spec, rates, eval_dataset, eval_split).build(seed)

    def check(self) -> None:
        """Raise a ``ConfigError`` for a missing data set or an invalid template or share."""
        if self.dataset is None:
            raise ConfigError(
                f"task.args of {self.name!r} must have 'dataset': a JSON-lines, JSON, Parquet or "
                "CSV file, a folder, or a name on the Hugging Face hub"
            )
        if "{problem}" not in self.template:
            raise ConfigError(f"the template {self.template!r} must contain {{problem}}")
        if "\\n\\n" in self.template:
            raise ConfigError(
                "the template has a backslash and an n instead of a line break: in YAML, write it "
                "in double quotes"
            )
        if not 0 <= self.heldout_share <= 1:
            raise ConfigError(f"heldout_share must be in 0..1, got {self.heldout_share}")

    @property
    def summary(self) -> str:
        """Return one line for lists of tasks."""
        if self.dataset is None:
            return "Problems of a file, a folder, or a data set on the Hugging Face hub."
        use = "evaluation" if self.for_evaluation else "training"
        return f"{self.dataset} ({use}; reward {', '.join(self.rewards)})."

    def value(self, row: SourceRow, keys: str) -> Any:
        """Return the value of the first column of ``keys`` in a row.

        Raises:
            ConfigError: the row has none of them.
        """
        for key in keys.split("|"):
            if key in row:
                return row[key]
        raise ConfigError(
            f"the data set {self.dataset} has no column {keys.replace('|', ' or ')!r}."
            f"{did_you_mean(keys, row)} Set task.args.problem_key and task.args.answer_key"
        )

    def make_problem(self, question: str, answer: str, metadata: Mapping[str, Any]) -> Problem:
        """Return the problem with its prompt and system message."""
        before = () if self.system is None else ({"role": "system", "content": self.system},)
        return Problem(self.template.replace("{problem}", question), answer, metadata, before)


@dataclass(frozen=True)
class _TaskBuilder:
    """Builds one task, and counts the problems removed by each filter."""

    spec: DatasetSpec
    rates: PassRates
    eval_dataset: str | None
    eval_split: str | None
    left_out: Counter[str] = field(default_factory=Counter)

    def build(self, seed: int) -> DatasetTask:
        spec = self.spec
        problems = self._problems(spec, "")
        if spec.for_evaluation:
            train, heldout = [], problems
        elif self.eval_dataset or self.eval_split:
            source = replace(
                spec,
                dataset=self.eval_dataset or spec.dataset,
                split=self.eval_split or spec.split,
            )
            heldout = self._problems(source, "heldout_")
            heldout_keys = {_key(problem) for problem in heldout}
            train = [problem for problem in problems if _key(problem) not in heldout_keys]
            self.left_out["also_heldout"] = len(problems) - len(train)
        else:
            train, heldout = [], []
            for problem in problems:
                is_held_out = _is_held_out(problem, spec.heldout_share)
                (heldout if is_held_out else train).append(problem)
        train = self._filter_by_pass_rate(train)
        left_out = {name: number for name, number in self.left_out.items() if number}
        if not train and not heldout:
            counts = ", ".join(f"{number} {name}" for name, number in self.left_out.items())
            raise ConfigError(
                f"the data set {spec.dataset} has no problem left: {counts or 'no rows'}"
            )
        return DatasetTask(
            train=[_without_mark(problem) for problem in train],
            heldout=[_without_mark(problem) for problem in heldout],
            rewards=spec.rewards,
            left_out=left_out,
            seed=seed,
            name=spec.name if spec.name != "dataset" else str(spec.dataset),
            demonstrate=spec.demonstrate,
        )

    def _problems(self, spec: DatasetSpec, prefix: str) -> list[Problem]:
        """Return the different problems, without those with contradictory answers."""
        assert spec.dataset is not None
        found: dict[str, Problem] = {}
        answers: dict[str, set[str]] = {}
        rows = read_rows(spec.dataset, spec.split, spec.config, spec.files)
        for number, row in enumerate(rows, 1):
            problem = _convert_row(spec, row, number)
            if problem is None:
                self.left_out[prefix + "without_problem_or_answer"] += 1
                continue
            problem = self.rates.mark(problem, row)
            key = _key(problem)
            self.left_out[prefix + "duplicates"] += key in found
            found.setdefault(key, problem)
            answers.setdefault(key, set()).add(problem.answer)
        contradictory = [key for key in found if len(answers[key]) > 1]
        self.left_out[prefix + "contradictory"] += len(contradictory)
        return [problem for key, problem in found.items() if len(answers[key]) == 1]

    def _filter_by_pass_rate(self, problems: list[Problem]) -> list[Problem]:
        kept = [problem for problem in problems if self.rates.keeps(problem)]
        unknown = sum(self.rates.is_unknown(problem) for problem in problems)
        self.left_out["pass_rate_unknown"] = unknown
        self.left_out["pass_rate_out_of_range"] = len(problems) - len(kept) - unknown
        return kept


def _convert_row(spec: DatasetSpec, row: SourceRow, number: int) -> Problem | None:
    try:
        return spec.convert(spec, row)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"row {number} of {spec.dataset} does not have the schema of {spec.name!r}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _without_mark(problem: Problem) -> Problem:
    kept = {key: value for key, value in problem.metadata.items() if key != PassRates.MARK}
    return Problem(problem.prompt, problem.answer, kept, problem.before)


def _key(problem: Problem) -> str:
    """Return the prompt without differences of case and white space."""
    return " ".join(problem.prompt.casefold().split())


def _is_held_out(problem: Problem, share: float) -> bool:
    digest = hashlib.blake2b(_key(problem).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


dataset_task = DatasetSpec("dataset")
