"""Reads JSON from files that may hold anything: every fault is one error, with file and line.

Text is refused if it is no UTF-8 or no standard JSON: NaN, infinity and numbers that overflow,
repeated keys, nesting beyond ``MAX_DEPTH``, half surrogate pairs. So whatever is returned can be
printed, compared, encoded and written again. Types of values are checked by the functions at the
end. A file may begin with a byte-order mark and may be compressed with gzip, up to a size.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import math
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

from delethink.errors import UserError

MAX_DEPTH = 100  # lists and mappings inside each other
_MAX_COUNT = 2**63 - 1
_MAX_DIGITS = 300  # an integer of more digits overflows as a float
_SHOWN = 60  # characters of a wrong value in an error text
_MAX_DECOMPRESSED_BYTES = 2**31  # of one file; gzip packs up to a thousand bytes in one
_GZIP_MARK = b"\x1f\x8b"

Value = TypeVar("Value")


def parse_json(text: str | bytes, where: str, error_class: type[UserError]) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the text; bytes are UTF-8.
        where: the place of the text, which begins the error text: "FILE, line 3".
        error_class: what to raise.
    """
    try:
        return _parse(text if isinstance(text, str) else text.decode("utf-8"))
    except UnicodeDecodeError as error:
        reason = f"is not JSON: byte {error.start + 1} is no UTF-8"
    except UnicodeEncodeError:
        reason = "cannot be used: a text has half a surrogate pair"
    except RecursionError:
        reason = f"cannot be used: it has more than {MAX_DEPTH} levels of lists and mappings"
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        reason = f"is not JSON: {error.msg} ({line}column {error.colno})"
    except ValueError as error:
        digits = "integer string conversion" in str(error)
        reason = f"cannot be used: {'a number has too many digits' if digits else error}"
    raise error_class(f"{where} {reason}")


def kind_of_file(file: Path) -> str:
    """Return the suffix that names the kind of a file: ``.jsonl`` of ``x.jsonl.gz``."""
    return Path(file.name.removesuffix(".gz")).suffix


def read_text(path: Path, error_class: type[UserError]) -> str:
    """Return the text of a UTF-8 file."""
    return _decode(_read_bytes(path, error_class), path, error_class)


def read_json(path: Path, error_class: type[UserError]) -> Any:
    """Return the value of a JSON file."""
    return parse_json(_read_bytes(path, error_class), str(path), error_class)


def read_json_lines(
    path: Path,
    error_class: type[UserError],
    *,
    partial: str = "refuse",
    place: str = "line",
) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each line of a file that is not blank.

    Args:
        path: the file.
        error_class: what to raise.
        partial: "refuse" or "skip" a last line that does not end, left by a killed writer;
            "read" accepts one that is whole JSON.
        place: name of a line in error texts.
    """
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                is_whole = line.endswith(b"\n")
                if not is_whole and partial == "skip":
                    return
                if not line.strip():
                    continue
                where = f"{path}, {place} {number}"
                try:
                    value = parse_json(line, where, error_class)
                except error_class as error:
                    why = "" if is_whole else "; the line is incomplete"
                    raise error_class(f"{error}{why}") from None
                yield number, value
    except UserError:  # may also be an OSError or a ValueError
        raise
    except (OSError, ValueError) as error:
        raise _read_error(path, error, error_class) from None


def _read_bytes(path: Path, error_class: type[UserError]) -> bytes:
    try:
        with _open(path) as file:
            return file.read().removeprefix(codecs.BOM_UTF8)
    except (OSError, ValueError) as error:
        raise _read_error(path, error, error_class) from None


def _open(path: Path) -> BinaryIO:
    """Open a file, and decompress it if it begins as gzip does, whatever its name."""
    file = io.BufferedReader(io.FileIO(path))
    if not file.peek(len(_GZIP_MARK)).startswith(_GZIP_MARK):
        return file
    return io.BufferedReader(_Decompressed(file))


class _Decompressed(io.RawIOBase):
    """The bytes of a gzip file, up to ``_MAX_DECOMPRESSED_BYTES``."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed, self._file, self._size = packed, gzip.GzipFile(fileobj=packed), 0

    def readable(self) -> bool:
        """Return true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` and return the number of bytes, 0 at the end."""
        try:
            data = self._file.read(len(buffer))
        except (EOFError, zlib.error) as error:  # a cut or damaged file
            raise OSError(f"its gzip data are damaged: {error}") from None
        self._size += len(data)
        if self._size > _MAX_DECOMPRESSED_BYTES:
            raise OSError(
                f"it has more than {_MAX_DECOMPRESSED_BYTES:,} bytes once decompressed; decompress "
                "it with gunzip if that is right"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._packed.close()
        super().close()


def _read_error(path: Path, error: Exception, error_class: type[UserError]) -> UserError:
    """Return the error for a file that cannot be read; a NUL in a path is a ``ValueError``."""
    return error_class(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")


def _decode(data: bytes, path: Path, error_class: type[UserError]) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise error_class(
            f"{path}, line {line} is no UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None


def _parse(text: str) -> Any:
    value = json.loads(
        text, object_pairs_hook=_mapping, parse_float=_float, parse_constant=_refuse_constant
    )
    # Brackets bound the depth from above, so that most texts need no walk.
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if "\\u" in text or not text.isascii():
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r:.{_SHOWN}} stands there twice")
    return values


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.{_SHOWN}} is too large; write null for no value")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number; write null for no value")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (list, dict))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (list, dict))
        ]
        if not level:
            return
    raise RecursionError


# -- values: each function returns values[key], or raises KeyError or ValueError ---------------


def optional(
    get: Callable[[Mapping[str, Any], str], Value], values: Mapping[str, Any], key: str
) -> Value | None:
    """Return a value, or ``None`` for null."""
    return None if values[key] is None else get(values, key)


def get_text(values: Mapping[str, Any], key: str) -> str:
    """Return a text."""
    value = values[key]
    if not isinstance(value, str):
        raise _wrong(key, "a text", value)
    return value


def get_flag(values: Mapping[str, Any], key: str) -> bool:
    """Return true or false."""
    value = values[key]
    if not isinstance(value, bool):
        raise _wrong(key, "true or false", value)
    return value


def get_count(values: Mapping[str, Any], key: str) -> int:
    """Return a whole number of at least 0 that fits in 64 bits."""
    value = values[key]
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise _wrong(key, "a whole number of at least 0", value)
    return value


def get_number(values: Mapping[str, Any], key: str) -> float:
    """Return a finite number, as it stands there."""
    value: float = values[key]
    if type(value) not in (int, float) or not is_finite(value):
        raise _wrong(key, "a finite number", value)
    return value


def get_list(values: Mapping[str, Any], key: str) -> list[Any]:
    """Return a list."""
    value = values[key]
    if not isinstance(value, (list, tuple)):
        raise _wrong(key, "a list", value)
    return list(value)


def get_mapping(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a mapping with text keys."""
    return as_mapping(values[key], repr(key))


def as_mapping(value: Any, what: str) -> dict[str, Any]:
    """Return a mapping with text keys; ``what`` names it in the error text."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{what} must be a mapping with text keys, got {shorten(value)}")
    return dict(value)


def get_ids(values: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Return token ids: whole numbers of at least 0 that fit in 64 bits."""
    found = tuple(get_list(values, key))
    if set(map(type, found)) <= {int}:
        try:
            if not found or min(array("q", found)) >= 0:
                return found
        except OverflowError:
            pass
    wrong = next(one for one in found if type(one) is not int or not 0 <= one <= _MAX_COUNT)
    raise _wrong(key, "a list of token ids", wrong)


def get_numbers(values: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """Return a list of finite numbers."""
    found = tuple(get_list(values, key))
    if set(map(type, found)) <= {int, float} and all(map(is_finite, found)):
        return found
    wrong = next(one for one in found if type(one) not in (int, float) or not is_finite(one))
    raise _wrong(key, "a list of finite numbers", wrong)


def is_finite(value: float) -> bool:
    """Return whether a number is finite as a float."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shorten(value: Any) -> str:
    """Return the beginning of a value's ``repr``, also of a huge number."""
    if isinstance(value, int) and abs(value) >= 10**_MAX_DIGITS:
        return f"a number of more than {_MAX_DIGITS} digits"
    try:
        return f"{value!r:.{_SHOWN}}"
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"


def _wrong(key: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{key!r} must be {expected}, got {shorten(value)}")
