"""Rows of a data set in local files and folders or on the Hugging Face hub, and pass rates."""

from __future__ import annotations

import csv
import difflib
import glob
import io
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from delethink.errors import ConfigError, MissingExtraError, did_you_mean
from delethink.json_io import kind_of_file, read_json, read_json_lines, read_text, shorten
from delethink.rows import MISSING, names_of, read_question, value_at
from delethink.types import Problem

SourceRow = dict[str, Any]
RatedProblem = tuple[Problem, float | None]  # with its measured pass rate
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")  # of files; .gz may follow all but Parquet
_HUB_NAME = re.compile(r"([\w.-]+/)?[\w.-]+", re.ASCII)
_HUB_TIMEOUT_S = 10.0
_METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def read_rows(
    dataset: str, split: str, config: str | None = None, files: str | None = None
) -> list[SourceRow]:
    """Return the rows of a split.

    Args:
        dataset: a file (JSON lines, JSON, Parquet, CSV, also compressed as in ``.jsonl.gz``), a
            folder of such files, or the name of a data set on the Hugging Face hub.
        split: the split of a folder or of a data set on the hub; a file has one split.
        config: the configuration of a data set with several.
        files: a pattern of the names of the split's files, if they are not named after the split.

    Raises:
        ConfigError: the file, split or data set does not exist, or cannot be read.
        MissingExtraError: the package for Parquet or the hub is not installed.
    """
    path = Path(dataset).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return [row for file in _files(path, split, config, files) for row in _read_file(file)]
    is_path = not _HUB_NAME.fullmatch(dataset) or dataset.startswith(".")
    if is_path or kind_of_file(path) in SUFFIXES:
        raise ConfigError(
            f"the data set {path} does not exist: no such file or folder.{_near_file(path)}"
        )
    return _fetch(dataset, split, config, files)


def _near_file(path: Path) -> str:
    """Return a question for the data file with the nearest name in the same folder, if any."""
    try:
        present = [each.name for each in path.parent.iterdir() if kind_of_file(each) in SUFFIXES]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, present, n=1)
    return f" Did you mean {str(path.parent / near[0])!r}?" if near else ""


def _files(folder: Path, split: str, config: str | None, pattern: str | None) -> list[Path]:
    present = sorted(
        file
        for file in (path.relative_to(folder) for path in folder.rglob("*"))
        if kind_of_file(file) in SUFFIXES
        and file.name not in _METADATA_FILES
        and ".cache" not in file.parts
    )
    if pattern is not None:
        chosen = [f for f in present if fnmatch(f.name, pattern) or fnmatch(f.as_posix(), pattern)]
    else:
        of_config = [f for f in present if config and config in f.as_posix()] or present
        chosen = [f for f in of_config if _is_of_split(f, split)]
        if not chosen and len(of_config) == 1:
            chosen = of_config
    if not chosen:
        listed = ", ".join(file.as_posix() for file in present[:10]) or "no such file"
        what = f"matching {pattern!r}" if pattern else f"of the split {split!r}"
        more = f" and {len(present) - 10} more" if len(present) > 10 else ""
        raise ConfigError(
            f"the folder {folder} has no file {what} ({', '.join(SUFFIXES)}); it has {listed}{more}"
        )
    return [folder / file for file in chosen]


def _is_of_split(file: Path, split: str) -> bool:
    stem = file.name.partition(".")[0]
    return stem == split or stem.startswith(f"{split}-") or split in file.parts[:-1]


def _read_file(file: Path) -> list[SourceRow]:
    kind = kind_of_file(file)
    try:
        if file.suffix == ".parquet":
            return _read_parquet(file)
        if kind == ".csv":
            return _read_csv(file)
        if kind not in SUFFIXES or kind == ".parquet":
            raise ConfigError(
                f"{file} has an unknown suffix; allowed: {', '.join(SUFFIXES)}, and .gz after "
                "JSON and CSV"
            )
        rows = _read_json(file)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ConfigError(f"row {number} of {file} must be an object, got {type(row).__name__}")
    return rows


def _read_csv(file: Path) -> list[SourceRow]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = csv.DictReader(io.StringIO(read_text(file, ConfigError), newline=""))
    rows = []
    try:
        lines.fieldnames = _columns(file, lines.fieldnames or ())
        for row in lines:
            if None in row:
                raise ConfigError(
                    f"{file}, line {lines.line_num} has more values than the first line has "
                    "columns; quote values with commas"
                )
            rows.append(row)
    except csv.Error as error:
        raise ConfigError(f"{file}, line {lines.line_num} is not CSV: {error}") from None
    return rows


def _columns(file: Path, names: Sequence[str]) -> list[str]:
    """Return the names of the columns, without the spaces that people put around them."""
    names = [name.strip() for name in names]
    if len(names) == 1 and (other := re.search(r"[;\t]", names[0])):
        raise ConfigError(
            f"{file} separates its columns with {other[0]!r}; CSV needs commas, so save it again "
            "with commas or as JSON lines"
        )
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise ConfigError(f"{file} has the column {repeated[0]!r} twice; rename one of them")
    return names


def _read_json(file: Path) -> list[Any]:
    """Return the list of a JSON file, the one under its key ``data``, or JSON lines."""
    of_whole_file = None
    if kind_of_file(file) == ".json":
        try:
            value = read_json(file, ConfigError)
            listed = value.get("data") if isinstance(value, dict) else value
            return listed if isinstance(listed, list) else [value]
        except ConfigError as error:  # also raised for JSON lines
            of_whole_file = error
    rows = []
    try:
        for _, row in read_json_lines(file, ConfigError, partial="read"):
            rows.append(row)
    except ConfigError:
        if of_whole_file is not None and not rows:
            raise of_whole_file from None
        raise
    return rows


def _read_parquet(file: Path) -> list[SourceRow]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "tasks") from None
    try:
        rows: list[SourceRow] = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{file} is not Parquet ({reason}): write or download it again") from None
    return rows


def _fetch(dataset: str, split: str, config: str | None, files: str | None) -> list[SourceRow]:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "tasks") from None
    try:
        _look_up(dataset)
        if files is None:
            loaded = datasets.load_dataset(dataset, config, split=split)
        else:
            kind = kind_of_file(Path(files)).removeprefix(".").removesuffix("l")
            where = f"hf://datasets/{dataset}/{files}"
            loaded = datasets.load_dataset(kind, data_files=where, split="train")
        return [dict(row) for row in loaded]
    except Exception as error:  # the hub and its client raise many types; the text names the cause
        first = " ".join((str(error).strip() or repr(error)).split())[:300]
        only = f" --include '{files}'" if files else ""
        raise ConfigError(
            f"the data set {dataset} is not on this machine and cannot be fetched "
            f"({type(error).__name__}: {first}). On a machine with a network, run: hf download "
            f"--repo-type dataset {dataset}{only} --local-dir FOLDER; then set "
            "task.args.dataset=FOLDER, or in delethink eval --task-arg dataset=FOLDER. A private "
            "data set needs hf auth login"
        ) from None


def _look_up(dataset: str) -> None:
    """Ask the hub once for a data set that the caches lack, instead of with five retries.

    Raises:
        Exception: of the hub's client: there is none, or there is no connection.
    """
    import datasets
    from huggingface_hub import HfApi, constants

    caches = (Path(datasets.config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE))
    names = (dataset.replace("/", "___"), f"datasets--{dataset.replace('/', '--')}")
    is_cached = any((cache / name).is_dir() for cache in caches for name in names)
    if not constants.HF_HUB_OFFLINE and not is_cached:
        HfApi().dataset_info(dataset, timeout=_HUB_TIMEOUT_S)


@dataclass(frozen=True)
class PassRates:
    """Range of pass rates for training problems, and measured rates by prompt."""

    key: str | None = None  # column with the rate
    by_prompt: Mapping[str, float] | None = None
    minimum: float = 0.0
    maximum: float = 1.0

    @classmethod
    def read(cls, key: str | None, path: str | None, minimum: float, maximum: float) -> PassRates:
        """Create the filter from its settings.

        Raises:
            ConfigError: the range is empty, or has no measured rates.
        """
        if not 0 <= minimum <= maximum <= 1:
            raise ConfigError(
                "pass rates must satisfy 0 <= min_pass_rate <= max_pass_rate <= 1, got "
                f"{minimum} and {maximum}"
            )
        if key is None and path is None and (minimum, maximum) != (0.0, 1.0):
            raise ConfigError(
                "min_pass_rate and max_pass_rate need measured rates: set pass_rate_key to a "
                "column, or pass_rates to a file"
            )
        return cls(key, None if path is None else _read_rates(path), minimum, maximum)

    def rate(self, problem: Problem, row: SourceRow) -> float | None:
        """Return the measured pass rate of a problem, if any."""
        if self.key is None:
            return self.by_prompt.get(problem.prompt) if self.by_prompt is not None else None
        rate = value_at(row, self.key)
        if rate is MISSING:
            raise ConfigError(
                f"the data set has no column {self.key!r}.{did_you_mean(self.key, names_of(row))}"
            )
        return None if rate is None else _number(rate)

    def select(self, rated: Iterable[RatedProblem], left_out: Counter[str]) -> list[Problem]:
        """Return the problems with a rate in the range, and count the others in ``left_out``."""
        selected = []
        for problem, rate in rated:
            if self.key is None and self.by_prompt is None:
                selected.append(problem)
            elif rate is None:
                left_out["pass_rate_unknown"] += 1
            elif self.minimum <= rate <= self.maximum:
                selected.append(problem)
            else:
                left_out["pass_rate_out_of_range"] += 1
        return selected


def _read_rates(path: str) -> dict[str, float]:
    files = sorted(glob.glob(str(Path(path).expanduser()))) or [path]
    seen: dict[str, list[float]] = {}
    for row in (row for file in files for row in read_rows(file, "train")):
        if "prompt" not in row or not ("pass_rate" in row or row.get("rewards")):
            raise ConfigError(
                f"{path} is not a file of pass rates: each line needs a prompt, and a pass_rate or "
                f"rewards; got the keys {', '.join(sorted(row)) or 'none'}"
            )
        rate = row["pass_rate"] if "pass_rate" in row else _first_reward(path, row["rewards"])
        if rate is not None:  # None for a failed trace
            seen.setdefault(_prompt_of(path, row["prompt"]), []).append(_number(rate))
    return {prompt: sum(rates) / len(rates) for prompt, rates in seen.items()}


def _prompt_of(path: str, prompt: Any) -> str:
    """Return the text of a prompt, or the last message of a conversation."""
    try:
        question = read_question(prompt)
    except ValueError as error:
        raise ConfigError(f"{path} has a prompt that cannot be used: {error}") from None
    return "" if question is None else question.prompt


def _first_reward(path: str, rewards: Any) -> Any:
    if not isinstance(rewards, Mapping):
        raise ConfigError(f"{path}: rewards must be a mapping, got {shorten(rewards)}")
    return next(iter(rewards.values()))


def _number(value: Any) -> float:
    try:
        rate = float(value)
        if not math.isfinite(rate):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"a pass rate must be a number, got {shorten(value)}") from None
    return rate
