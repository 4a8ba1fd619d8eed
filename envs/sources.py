"""Rows of a data set: local files and folders, or the Hugging Face hub."""

from __future__ import annotations

import csv
import glob
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar

from delethink.errors import ConfigError, MissingExtraError, did_you_mean
from delethink.types import Problem

Row = dict[str, Any]
_KINDS = (".jsonl", ".json", ".parquet", ".csv")
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def read_rows(
    dataset: str, split: str, config: str | None = None, files: str | None = None
) -> list[Row]:
    """The rows of a split.

    Args:
        dataset: a file (JSON lines, JSON, Parquet, CSV), a folder that holds such files, as a
            download of a data set does, or the name of a data set on the Hugging Face hub.
        split: which part of a folder or of a data set on the hub; a file is taken whole.
        config: the configuration of a data set that has several.
        files: a pattern of the names of the files that hold the split, where they are not named
            after it.

    Raises:
        ConfigError: no such file, split or data set, or one that cannot be read or fetched.
        MissingExtraError: Parquet or the hub is asked for without the package for it.
    """
    path = Path(dataset).expanduser()
    if path.is_file():
        return list(_read_file(path))
    if path.is_dir():
        return [row for file in _files(path, split, config, files) for row in _read_file(file)]
    if path.suffix in _KINDS or dataset.startswith((".", "/", "~")) or dataset.count("/") > 1:
        raise ConfigError(f"there is no data set {path}: no such file or folder")
    return _fetch(dataset, split, config, files)


def _files(folder: Path, split: str, config: str | None, pattern: str | None) -> list[Path]:
    there = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix in _KINDS and file.name not in _NO_DATA and ".cache" not in file.parts
    )
    names = {file: file.relative_to(folder).as_posix() for file in there}
    if pattern is not None:
        chosen = [f for f in there if fnmatch(f.name, pattern) or fnmatch(names[f], pattern)]
    else:
        of_config = [f for f in there if config is not None and config in names[f]] or there
        chosen = [f for f in of_config if _is_of_split(f.relative_to(folder), split)]
        if not chosen and len(of_config) == 1:
            chosen = of_config
    if not chosen:
        listed = ", ".join(list(names.values())[:10]) or "no file of these kinds"
        what = f"like {pattern!r}" if pattern else f"of the split {split!r}"
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        raise ConfigError(
            f"the folder {folder} has no file {what} ({', '.join(_KINDS)}); it has {listed}{more}"
        )
    return chosen


def _is_of_split(file: Path, split: str) -> bool:
    stem = file.name.partition(".")[0]
    return stem == split or stem.startswith(f"{split}-") or split in file.parts[:-1]


def _read_file(file: Path) -> Iterator[Row]:
    try:
        if file.suffix == ".parquet":
            yield from _read_parquet(file)
        elif file.suffix == ".csv":
            csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
            with file.open(encoding="utf-8", newline="") as lines:
                yield from csv.DictReader(lines)
        elif file.suffix == ".json" and (values := _whole_json(file)) is not None:
            yield from _checked(values, file)
        elif file.suffix in _KINDS:
            with file.open(encoding="utf-8") as lines:
                yield from _checked(_json_lines(lines, file), file)
        else:
            raise ConfigError(f"{file} is none of {', '.join(_KINDS)}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None


def _whole_json(file: Path) -> list[Any] | None:
    """The list that a JSON file is or holds under ``data``; None where it has a value a line."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return None
    rows = value.get("data") if isinstance(value, dict) else value
    return rows if isinstance(rows, list) else [value]


def _json_lines(lines: Iterable[str], file: Path) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}, line {number} is not JSON: {error.msg}") from None


def _checked(values: Iterable[Any], file: Path) -> Iterator[Row]:
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise ConfigError(f"{file}: row {number} is no object but a {type(value).__name__}")
        yield value


def _read_parquet(file: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "tasks") from None
    try:
        yield from pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{file} is no Parquet file: {error}") from None


def _fetch(dataset: str, split: str, config: str | None, files: str | None) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "tasks") from None
    try:
        if files is None:
            loaded = datasets.load_dataset(dataset, config, split=split)
        else:
            kind = "json" if files.endswith(("json", "jsonl")) else Path(files).suffix[1:]
            where = f"hf://datasets/{dataset}/{files}"
            loaded = datasets.load_dataset(kind, data_files=where, split="train")
        return [dict(row) for row in loaded]
    except Exception as error:  # the hub and its client fail in many ways; the reason is told
        first = " ".join((str(error).strip() or repr(error)).split())[:300]
        only = f" --include '{files}'" if files else ""
        raise ConfigError(
            f"the data set {dataset} is not on this machine and cannot be fetched "
            f"({type(error).__name__}: {first}). Where there is a network: hf download "
            f"--repo-type dataset {dataset}{only} --local-dir FOLDER; then point at the copy with "
            "task.args.dataset=FOLDER. A private data set needs hf auth login"
        ) from None


@dataclass(frozen=True)
class PassRates:
    """The range to keep, and the measured rates by prompt."""

    MARK: ClassVar[str] = "delethink_pass_rate"

    key: str | None = None
    by_prompt: Mapping[str, float] | None = None
    least: float = 0.0
    most: float = 1.0

    @classmethod
    def read(cls, key: str | None, path: str | None, least: float, most: float) -> PassRates:
        """What the settings say.

        Raises:
            ConfigError: a range that is none, one without rates, or a file without rates.
        """
        if not 0 <= least <= most <= 1:
            raise ConfigError(
                f"pass rates must satisfy 0 <= min_pass_rate <= max_pass_rate <= 1, got {least} "
                f"and {most}"
            )
        if key is None and path is None and (least, most) != (0.0, 1.0):
            raise ConfigError(
                "min_pass_rate and max_pass_rate need measured rates: name a column with "
                "pass_rate_key, or a file with pass_rates"
            )
        return cls(key, None if path is None else _read(path), least, most)

    def mark(self, problem: Problem, row: Row) -> Problem:
        """The problem with its pass rate among its metadata, where one was measured."""
        if self.key is None and self.by_prompt is None:
            return problem
        rate = self.by_prompt.get(problem.prompt) if self.by_prompt is not None else None
        if self.key is not None:
            if self.key not in row:
                raise ConfigError(
                    f"the data set has no column {self.key!r}.{did_you_mean(self.key, row)}"
                )
            rate = None if row[self.key] is None else _number(row[self.key])
        if rate is None:
            return problem
        return replace(problem, metadata={**problem.metadata, self.MARK: rate})

    def is_unknown(self, problem: Problem) -> bool:
        """Whether rates are asked for and this problem has none."""
        asked = self.key is not None or self.by_prompt is not None
        return asked and self.MARK not in problem.metadata

    def keeps(self, problem: Problem) -> bool:
        """Whether the problem is of the right difficulty; one without a rate is not."""
        if self.key is None and self.by_prompt is None:
            return True
        rate = problem.metadata.get(self.MARK)
        return rate is not None and self.least <= rate <= self.most


def _read(path: str) -> dict[str, float]:
    files = sorted(glob.glob(str(Path(path).expanduser()))) or [path]
    seen: dict[str, list[float]] = {}
    for row in (row for file in files for row in read_rows(file, "train")):
        if "prompt" not in row or not ("pass_rate" in row or row.get("rewards")):
            raise ConfigError(
                f"{path} is no file of pass rates: a line has a prompt, and a pass_rate or "
                f"rewards; got the keys {', '.join(sorted(row)) or 'none'}"
            )
        rate = row["pass_rate"] if "pass_rate" in row else next(iter(row["rewards"].values()))
        if rate is not None:  # a trace that failed says nothing
            seen.setdefault(str(row["prompt"]), []).append(_number(rate))
    return {prompt: sum(rates) / len(rates) for prompt, rates in seen.items()}


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"a pass rate is a number, got {value!r}") from None
