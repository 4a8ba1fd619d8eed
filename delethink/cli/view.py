"""The ``delethink view`` command."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from delethink.cli.process import require_packages
from delethink.errors import ConfigError
from delethink.output import echo

if TYPE_CHECKING:
    from delethink.view.index import ListedTrace, TraceIndex
    from delethink.view.traces import TraceOpener

_SUFFIXES = (".html", ".eval")


def run(arguments: argparse.Namespace) -> int:
    """Show traces in a browser or a terminal, or export them."""
    path = Path(arguments.path).expanduser()
    if not os.access(path, os.F_OK):  # also where a folder above may not be entered
        raise ConfigError(f"{path} does not exist; name a run, an evaluation or a file of traces")
    if not os.access(path, os.R_OK):
        raise ConfigError(f"{path} cannot be read: permission denied; view it as its owner")
    if path.is_file() and path.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"{path} is no file of traces (.jsonl, .parquet) and no folder")
    if arguments.trace and not (arguments.text or arguments.export):
        raise ConfigError("--trace chooses what --text and --export show: add one of them")
    if not (arguments.text or arguments.export):
        return _serve(arguments, path)
    require_packages("view", "rich")
    from delethink.view.index import TraceIndex
    from delethink.view.traces import TraceOpener

    index = TraceIndex(path)
    index.refresh()
    _report_damage(index)
    rows = _chosen(index, arguments)
    opener = TraceOpener(index, arguments.tokenizer)
    if arguments.export:
        return _export(rows, opener, Path(arguments.export).expanduser(), index)
    from delethink.view.terminal import print_trace

    for row in rows:
        print_trace(opener.open(row))
    return 0


def _chosen(index: TraceIndex, arguments: argparse.Namespace) -> list[ListedTrace]:
    """Return the named traces; without names the first for a terminal, all for a file."""
    rows = index.snapshot()
    if not rows:
        raise ConfigError(_no_traces(index.root))
    if not arguments.trace:
        return rows if arguments.export and arguments.export.endswith(".eval") else rows[:1]
    found = []
    for name in arguments.trace:
        row = index.find(name)
        if row is None:
            raise ConfigError(
                f"there is no trace {name!r}; names are FILE:LINE, such as {rows[0].name!r}, the "
                "first of {:,}".format(len(rows))
            )
        found.append(row)
    return found


def _no_traces(path: Path) -> str:
    advice = "name a run, an evaluation or a file of traces"
    if (path / "report.html").is_file():  # of a probe
        advice = f"open {path / 'report.html'} in a browser, or {advice}"
    return f"{path} holds no traces: {advice}"


def _report_damage(index: TraceIndex) -> None:
    for file, lines in index.damaged.items():
        count = "one damaged line" if lines == 1 else f"{lines:,} damaged lines"
        echo(f"{file}: skipped {count}, or of another version", stderr=True)
    for file, reason in index.unreadable.items():
        echo(f"{file} cannot be read: {reason}", stderr=True)


def _export(rows: list[ListedTrace], opener: TraceOpener, file: Path, index: TraceIndex) -> int:
    if file.suffix not in _SUFFIXES:
        raise ConfigError(f"--export writes .html or .eval, got {file.name!r}")
    if file.suffix == ".eval":
        from delethink.view.inspect_log import write_eval_log

        write_eval_log(rows, opener, file, index.root)
    else:
        from delethink.view.export import write_page

        write_page(rows, opener, file)
    echo(f"{file}: {len(rows):,} trace{'s' * (len(rows) != 1)}")
    return 0


def _serve(arguments: argparse.Namespace, path: Path) -> int:
    require_packages("view", "starlette", "uvicorn")
    from delethink.view.index import TraceIndex, trace_files
    from delethink.view.server import LOOPBACK, Viewer, open_socket, serve_viewer
    from delethink.view.traces import TraceOpener

    if next(trace_files(path), None) is None:
        if not (path / "config.yaml").is_file():
            raise ConfigError(_no_traces(path))
        echo(f"{path} holds no traces yet; they appear when the run has sampled some")
    index = TraceIndex(path)
    viewer = Viewer(index, TraceOpener(index, arguments.tokenizer), secrets.token_urlsafe(16))
    with open_socket(arguments.port) as listening:
        port = listening.getsockname()[1]
        address = f"http://{LOOPBACK}:{port}/{viewer.token}/"
        # On standard error, which is never held back in a buffer.
        echo(f"{path}: {address}  (Ctrl-C stops)", stderr=True)
        if "SSH_CONNECTION" in os.environ:
            host = os.environ["SSH_CONNECTION"].split()[2:3] or ["THIS_MACHINE"]
            echo(
                f"from your own machine: ssh -N -L {port}:{LOOPBACK}:{port} {host[0]}", stderr=True
            )
        if arguments.browser and _has_browser():
            webbrowser.open(address)
        serve_viewer(viewer, listening)
    return 0


def _has_browser() -> bool:
    """Return whether a browser can show a page here, and not inside the terminal."""
    if sys.platform != "linux":
        return "SSH_CONNECTION" not in os.environ
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
