"""Tasks from rows of a data set: prompts, filters and held-out problems."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

from delethink.envs.sources import PassRates, RatedProblem, SourceRow, read_rows
from delethink.errors import ConfigError, UserError, did_you_mean
from delethink.tasks import check_split
from delethink.types import END_OF_THINKING, Problem

BOXED = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."

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
    return f"\\boxed{{{problem.answer}}}", "\\boxed{-987654321}"


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
    """Convert a row with a problem and an answer column; ``None`` if one is empty."""
    values = spec.value(row, spec.problem_key), spec.value(row, spec.answer_key)
    # A missing number is NaN in Parquet files, and NaN differs from itself.
    given = ("" if value is None or value != value else str(value).strip() for value in values)
    question, answer = given
    if not question or not answer:
        return None
    metadata = {key: spec.value(row, key) for key in spec.metadata_keys}
    return spec.make_problem(question, answer, metadata)


@dataclass(frozen=True)
class DatasetSpec:
    """Description of a data set. Calling the spec creates the task."""

    name: str
    dataset: str | None = None  # a local file or folder, or a name on the Hugging Face hub
    split: str = "train"  # the part with the problems
    config: str | None = None  # the configuration, for a data set with several
    files: str | None = None  # a pattern of file names, if they are not named after the split
    problem_key: str = "problem"  # column with the problem; ``a|b``: the first of these in a row
    answer_key: str = "answer"  # the column with the gold answer, as ``problem_key``
    metadata_keys: Sequence[str] = ()  # additional columns for rewards
    template: str = BOXED  # the prompt, with ``{problem}`` in place of the problem
    system: str | None = None  # a system message before the prompt
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
        arguments = locals()
        given = {f.name: arguments[f.name] for f in fields(self) if f.name in arguments}
        spec = replace(self, **{key: value for key, value in given.items() if value is not None})
        if reward is not None:
            spec = replace(spec, rewards={reward: 1.0})
        spec._check()
        rates = PassRates.read(pass_rate_key, pass_rates, min_pass_rate, max_pass_rate)
        return _build(spec, rates, eval_dataset, eval_split, seed)

    def _check(self) -> None:
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


def _build(
    spec: DatasetSpec, rates: PassRates, eval_dataset: str | None, eval_split: str | None, seed: int
) -> DatasetTask:
    left_out: Counter[str] = Counter()
    train, heldout = _read_problems(spec, rates, left_out), {}
    if spec.for_evaluation:
        train, heldout = {}, train
    elif eval_dataset or eval_split:
        source = replace(spec, dataset=eval_dataset or spec.dataset, split=eval_split or spec.split)
        heldout = _read_problems(source, rates, left_out, "heldout_")
        left_out["also_heldout"] = len(train.keys() & heldout.keys())
    else:
        heldout = {k: known for k, known in train.items() if _is_held_out(k, spec.heldout_share)}
    train = {key: known for key, known in train.items() if key not in heldout}
    task = DatasetTask(
        rates.select(train.values(), left_out),
        [problem for problem, _ in heldout.values()],
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
) -> dict[str, RatedProblem]:
    """Return the different problems by key, without those with contradictory answers."""
    assert spec.dataset is not None
    found: dict[str, RatedProblem] = {}
    contradictory = set()
    rows = read_rows(spec.dataset, spec.split, spec.config, spec.files)
    for number, row in enumerate(rows, 1):
        problem = _convert_row(spec, row, number)
        if problem is None:
            left_out[prefix + "without_problem_or_answer"] += 1
            continue
        # Case and white space make no different problem.
        key = " ".join(problem.prompt.casefold().split())
        if key not in found:
            found[key] = problem, rates.rate(problem, row)
            continue
        left_out[prefix + "duplicates"] += 1
        if problem.answer != found[key][0].answer:
            contradictory.add(key)
    left_out[prefix + "contradictory"] += len(contradictory)
    return {key: known for key, known in found.items() if key not in contradictory}


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


def _is_held_out(key: str, share: float) -> bool:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


dataset_task = DatasetSpec("dataset")
