"""Rows of a data set: local files and folders, or the Hugging Face hub."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from delethink.errors import ConfigError, MissingExtraError

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
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise ConfigError(f"cannot read {file}: {problem}") from None


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
        except json.JSONDecodeError as problem:
            raise ConfigError(f"{file}, line {number} is not JSON: {problem.msg}") from None


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
    except pyarrow.ArrowException as problem:
        raise ConfigError(f"{file} is no Parquet file: {problem}") from None


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
    except Exception as problem:  # the hub and its client fail in many ways; the reason is told
        first = " ".join((str(problem).strip() or repr(problem)).split())[:300]
        only = f" --include '{files}'" if files else ""
        raise ConfigError(
            f"the data set {dataset} is not on this machine and cannot be fetched "
            f"({type(problem).__name__}: {first}). Where there is a network: hf download "
            f"--repo-type dataset {dataset}{only} --local-dir FOLDER; then point at the copy with "
            "task.args.dataset=FOLDER. A private data set needs hf auth login"
        ) from None
