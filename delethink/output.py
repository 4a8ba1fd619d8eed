"""Output: texts made safe to show, one way to print them, and the folders of results.

Every text that is printed, logged or shown passes ``safe_text``. It spells out characters that
would move a terminal's cursor or hide text, and redacts secrets.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
import traceback
import unicodedata
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delethink.errors import ConfigError
from delethink.redaction import json_text, redact_error

if TYPE_CHECKING:
    from rich.console import Console

VARIABLE = "DELETHINK_OUTPUT"
_LINE_INTERVAL_S = 10.0  # between lines about a wait, without a terminal
_RAY_TEMPORARY = {"runtime_resources", "working_dir_files"}  # path parts of a Ray job's folder

# Unicode categories of control characters and of invisible ones.
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
# Invisible characters of other categories (Default_Ignorable_Code_Point of Unicode, and the empty
# braille pattern). The variation selectors FE0E and FE0F choose the form of an emoji and stay.
_IGNORABLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0d\uffa0\ufff0-\ufff8"
    "\U000e0000-\U000e0fff]"
)


def visible(text: str, *, lines: bool = True) -> str:
    r"""Return the text with control and invisible characters spelled out, such as ``\x1b``.

    Line breaks and tabs stay, unless ``lines`` is false.
    """
    kept = "\n\t" if lines else ""
    if text.isascii() and text.translate(_WITHOUT_KEPT if lines else {}).isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode("ascii")
        if char not in kept and (unicodedata.category(char) in _INVISIBLE or _IGNORABLE.match(char))
        else char
        for char in text
    )


_WITHOUT_KEPT = {ord("\n"): None, ord("\t"): None}


def safe_text(text: str, *, lines: bool = True) -> str:
    """Return a text to show: secrets redacted, control and invisible characters spelled out."""
    return visible(redact_error(text), lines=lines)


def echo(text: str = "", *, stderr: bool = False) -> None:
    """Print a text, safe to show, to standard output or standard error."""
    stream = sys.stderr if stderr else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = safe_text(text).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=stream)


def echo_json(value: Any) -> None:
    """Print indented JSON for programs, in ASCII and without secrets."""
    print(json_text(value, indent=2, default=str))


def open_console(*, stderr: bool = False) -> Console:
    """Return a console of ``rich`` for tables and progress bars, whose every text is safe to show.

    It reads neither markup nor emoji names.
    """
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        def render_str(self, text: str, *args: Any, **options: Any) -> Any:
            # Before the layout, since a wrapped secret would not be found.
            return super().render_str(safe_text(text), *args, **options)

        def render(self, *args: Any, **options: Any) -> Any:
            # Texts that were made elsewhere, such as those of a progress bar.
            for segment in super().render(*args, **options):
                text, style, control = segment
                yield segment if control else Segment(safe_text(text), style)

    return SafeConsole(highlight=False, markup=False, emoji=False, stderr=stderr)


class Waiting:
    """Shows the purpose of a wait and its seconds so far, until ``stop``.

    On a terminal the line changes every second; elsewhere a line follows every ten seconds.
    """

    def __init__(self, console: Console, text: str) -> None:
        self._text, self._log = text, console.print
        self._started = time.monotonic()
        self._bars: Any = None
        self._ended = threading.Event()
        self.thread = threading.Thread(target=self._print_lines, daemon=True)
        if not console.is_terminal:
            self.thread.start()
            return
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            refresh_per_second=2,
        )
        self._bar = self._bars.add_task(safe_text(text, lines=False), total=None)
        self._bars.start()

    def change(self, text: str) -> None:
        """Name another purpose; the seconds go on."""
        self._text = text
        if self._bars is not None:
            self._bars.update(self._bar, description=safe_text(text, lines=False), refresh=True)

    def stop(self) -> None:
        """End the display. Safe to call twice."""
        self._ended.set()
        if self._bars is not None:
            self._bars.stop()

    def _print_lines(self) -> None:
        while not self._ended.wait(_LINE_INTERVAL_S):
            seconds = time.monotonic() - self._started
            self._log(safe_text(f"{self._text}: {seconds:.0f} s so far"), soft_wrap=True)


class _SafeRecords(logging.Filter):
    """Makes the texts of log records safe to show."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = safe_text(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = safe_text(logging.Formatter().formatException(record.exc_info))
            record.exc_info = None
        return True


class _SafeFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return safe_text(super().format(record))


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module, with records that are safe to show."""
    logger = logging.getLogger(name)
    if not any(isinstance(each, _SafeRecords) for each in logger.filters):
        logger.addFilter(_SafeRecords())
    return logger


def guard_process() -> None:
    """Make safe to show what Python prints: tracebacks, warnings, records without a handler.

    Hooks set by somebody else are kept.
    """
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_exception
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = lambda args: _print_exception(
            args.exc_type, args.exc_value, args.exc_traceback
        )
    if warnings.formatwarning is _format_warning:
        warnings.formatwarning = lambda *args, **options: safe_text(
            _format_warning(*args, **options)
        )
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_SafeFormatter())


_format_warning = warnings.formatwarning


def _print_exception(kind: Any, error: Any, trace: Any) -> None:
    echo("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), stderr=True)


def output_path(path: str | os.PathLike[str]) -> Path:
    """Return the folder for results.

    Args:
        path: the user's path, or a default; ``~`` is the home folder.

    Raises:
        ConfigError: the folder is inside a Ray job's working directory, which Ray deletes.
    """
    folder = os.environ.get(VARIABLE, "").strip()
    resolved = Path(folder).expanduser() / Path(path).expanduser()
    if "\0" in str(resolved):
        raise ConfigError(
            f"the output path {str(resolved)!r:.80} has a NUL character: leave it out"
        )
    if _RAY_TEMPORARY <= set(resolved.absolute().parts):
        raise ConfigError(
            f"the results would go to {resolved} in the job's working directory, which Ray deletes "
            f"after the job: give an absolute output path, or set {VARIABLE} to a permanent "
            "folder, under env_vars of the job's runtime environment"
        )
    return resolved
