"""Tasks out of rows: how problems are asked, which are kept, and which are held out."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

from delethink.envs.sources import PassRates, Row, read_rows
from delethink.errors import ConfigError, UserError, did_you_mean
from delethink.tasks import check_split
from delethink.types import END_OF_THINKING, Problem

BOXED = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."

Convert = Callable[["DatasetSpec", Row], Problem | None]
Demonstrate = Callable[[Problem], tuple[str | None, str | None]]


def demonstrate_boxed(problem: Problem) -> tuple[str, str]:
    """The gold answer in a box, and another number in a box."""
    return _boxed(problem.answer), _boxed("-987654321")


def _boxed(answer: str) -> str:
    return f"Let me see.{END_OF_THINKING}The answer is \\boxed{{{answer}}}."


@dataclass(frozen=True)
class DatasetTask:
    """Problems of a finite set; training problems come in an order of its own in each epoch."""

    train: Sequence[Problem]
    heldout: Sequence[Problem]
    rewards: Mapping[str, float]
    left_out: Mapping[str, int]
    seed: int = 0
    name: str = "dataset"
    demonstrate: Demonstrate = demonstrate_boxed

    def problem(self, split: str, index: int) -> Problem:
        """Problem ``index`` of ``split``; the same for ever.

        Raises:
            ConfigError: the split has no problem, or no held-out problem of that index.
        """
        check_split(split)
        if split == "heldout":
            if not 0 <= index < len(self.heldout):
                raise ConfigError(f"{self.name} has {len(self.heldout)} held-out problems")
            return self.heldout[index]
        if not self.train:
            raise ConfigError(
                f"{self.name} has no training problems: it is for evaluation, or filters left none"
            )
        epoch, place = divmod(index, len(self.train))
        return self.train[_order(self.seed, epoch, len(self.train))[place]]

    def size(self, split: str) -> int:
        """How many problems a split has."""
        check_split(split)
        return len(self.heldout if split == "heldout" else self.train)

    def demonstrations(self, problem: Problem) -> tuple[str | None, str | None]:
        """A right and a wrong answer."""
        return self.demonstrate(problem)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def convert_plain(spec: DatasetSpec, row: Row) -> Problem | None:
    """A problem and its answer, each in a column; ``None`` where one is empty."""
    asked, answer = spec.value(row, spec.problem_key), spec.value(row, spec.answer_key)
    if asked is None or answer is None or not str(asked).strip() or not str(answer).strip():
        return None
    metadata = {key: spec.value(row, key) for key in spec.metadata_keys}
    return spec.ask(str(asked).strip(), str(answer).strip(), metadata)


@dataclass(frozen=True)
class DatasetSpec:
    """What is to be known of a data set; calling it makes the task.

    ``problem_key`` and ``answer_key`` may name several columns, with ``|`` between: the first that
    a row has is taken.
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
    for_evaluation: bool = False  # all of it is held out
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
        """The task.

        Args:
            dataset: a local file or folder, or a name on the Hugging Face hub.
            split: the part that problems come from.
            config: the configuration, of a data set with several.
            files: a pattern of file names, where they are not named after the split.
            problem_key: the column with the problem.
            answer_key: the column with the gold answer.
            metadata_keys: columns that rewards need besides.
            template: how a problem is asked; ``{problem}`` stands for it.
            system: a system message before it.
            reward: the name of the reward that scores it.
            eval_dataset: where held-out problems come from; by default the same data set.
            eval_split: which part of it; by default a share of the problems themselves.
            heldout_share: how many then, by a hash of the problem: the same ones for ever;
                1 holds out all.
            pass_rate_key: the column with a measured pass rate.
            pass_rates: a file with measured pass rates, or with scored traces (``pass_rates.py``).
            min_pass_rate: easier problems are kept, and those as hard.
            max_pass_rate: harder problems are kept, and those as easy.
            seed: of the order of training problems.

        Raises:
            ConfigError: a data set, column or template that is not there or cannot work.
        """
        given = {
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
        spec = _replace(self, {key: value for key, value in given.items() if value is not None})
        rates = PassRates.read(pass_rate_key, pass_rates, min_pass_rate, max_pass_rate)
        return _Maker(spec, rates, eval_dataset, eval_split).make(seed)

    @property
    def summary(self) -> str:
        """A line for lists of tasks."""
        if self.dataset is None:
            return "Problems of a file, a folder, or a data set on the Hugging Face hub."
        use = "evaluation" if self.for_evaluation else "training"
        return f"{self.dataset} ({use}; reward {', '.join(self.rewards)})."

    def value(self, row: Row, keys: str) -> Any:
        """The value of the first of the columns ``keys`` that a row has.

        Raises:
            ConfigError: it has none of them.
        """
        for key in keys.split("|"):
            if key in row:
                return row[key]
        raise ConfigError(
            f"the data set {self.dataset} has no column {keys.replace('|', ' or ')!r}."
            f"{did_you_mean(keys, row)} Name the right ones with task.args.problem_key and "
            "task.args.answer_key"
        )

    def ask(self, asked: str, answer: str, metadata: Mapping[str, Any]) -> Problem:
        """The problem as it is put to the model."""
        before = () if self.system is None else ({"role": "system", "content": self.system},)
        return Problem(self.template.replace("{problem}", asked), answer, metadata, before)


def _replace(spec: DatasetSpec, given: Mapping[str, Any]) -> DatasetSpec:
    spec = replace(spec, **given)
    if spec.dataset is None:
        raise ConfigError(
            f"task.args of {spec.name!r}: 'dataset' is missing: a JSON-lines, JSON, Parquet or CSV "
            "file, a folder, or a name on the Hugging Face hub"
        )
    if "{problem}" not in spec.template:
        raise ConfigError(f"the template {spec.template!r} has no {{problem}}")
    if "\\n\\n" in spec.template:
        raise ConfigError(
            "the template holds a backslash and an n where a new line is meant: in YAML, write it "
            "in double quotes"
        )
    if not 0 <= spec.heldout_share <= 1:
        raise ConfigError(f"heldout_share must be in 0..1, got {spec.heldout_share}")
    return spec


@dataclass(frozen=True)
class _Maker:
    """Makes one task, and counts what is left out of it."""

    spec: DatasetSpec
    rates: PassRates
    eval_dataset: str | None
    eval_split: str | None
    left_out: Counter[str] = field(default_factory=Counter)

    def make(self, seed: int) -> DatasetTask:
        problems = self._problems(self.spec, "")
        if self.spec.for_evaluation:
            train, heldout = [], problems
        elif self.eval_dataset or self.eval_split:
            heldout = self._problems(self._evaluation_spec, "heldout_")
            asked = {_key(problem) for problem in heldout}
            train = [problem for problem in problems if _key(problem) not in asked]
            self.left_out["also_heldout"] = len(problems) - len(train)
        else:
            held = [_is_held_out(problem, self.spec.heldout_share) for problem in problems]
            heldout = [p for p, out in zip(problems, held, strict=True) if out]
            train = [p for p, out in zip(problems, held, strict=True) if not out]
        train = self._of_difficulty(train)
        if not train and not heldout:
            raise ConfigError(
                f"the data set {self.spec.dataset} has no problem left: {self._story}"
            )
        return DatasetTask(
            train=[_bare(problem) for problem in train],
            heldout=[_bare(problem) for problem in heldout],
            rewards=self.spec.rewards,
            left_out={name: number for name, number in self.left_out.items() if number},
            seed=seed,
            name=self.spec.name if self.spec.name != "dataset" else str(self.spec.dataset),
            demonstrate=self.spec.demonstrate,
        )

    @cached_property
    def _evaluation_spec(self) -> DatasetSpec:
        dataset = self.eval_dataset or self.spec.dataset
        return replace(self.spec, dataset=dataset, split=self.eval_split or self.spec.split)

    @property
    def _story(self) -> str:
        return ", ".join(f"{number} {name}" for name, number in self.left_out.items()) or "no rows"

    def _problems(self, spec: DatasetSpec, prefix: str) -> list[Problem]:
        """Problems without doubles; those with two different answers are left out altogether."""
        assert spec.dataset is not None
        found: dict[str, Problem] = {}
        answers: dict[str, set[str]] = {}
        rows = read_rows(spec.dataset, spec.split, spec.config, spec.files)
        for number, row in enumerate(rows, 1):
            problem = self._converted(spec, row, number)
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

    def _converted(self, spec: DatasetSpec, row: Row, number: int) -> Problem | None:
        try:
            return spec.convert(spec, row)
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"row {number} of {spec.dataset} is not of the schema of {spec.name!r}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _of_difficulty(self, problems: list[Problem]) -> list[Problem]:
        kept = [problem for problem in problems if self.rates.keeps(problem)]
        unknown = sum(self.rates.is_unknown(problem) for problem in problems)
        self.left_out["pass_rate_unknown"] = unknown
        self.left_out["pass_rate_out_of_range"] = len(problems) - len(kept) - unknown
        return kept


def _bare(problem: Problem) -> Problem:
    """As it was before it was marked."""
    kept = {key: value for key, value in problem.metadata.items() if key != PassRates.MARK}
    return Problem(problem.prompt, problem.answer, kept, problem.before)


def _key(problem: Problem) -> str:
    """Equal for the same question, however spaced and cased."""
    return " ".join(problem.prompt.casefold().split())


def _is_held_out(problem: Problem, share: float) -> bool:
    digest = hashlib.blake2b(_key(problem).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


dataset_task = DatasetSpec("dataset")
