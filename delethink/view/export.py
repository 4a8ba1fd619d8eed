"""Exports traces: a static page to send, or a log of Inspect for an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from delethink.errors import ConfigError
from delethink.trace_html import TraceView, html_text, page_html, trace_html
from delethink.view.index import ListedTrace
from delethink.view.traces import TraceOpener


def export_html(views: list[TraceView]) -> str:
    """Return traces as one static page."""
    bodies = [trace_html(view, f"shade-{number}") for number, view in enumerate(views)]
    title = views[0].title if len(views) == 1 else f"{len(views)} traces"
    contents = "".join(
        f'<li><a href="#trace-{n}">{html_text(view.title)}</a></li>' for n, view in enumerate(views)
    )
    list_html = f"<ol>{contents}</ol>" if len(views) > 1 else ""
    return page_html(
        title,
        list_html + "".join(f'<div id="trace-{n}">{body}</div>' for n, body in enumerate(bodies)),
    )


def write_page(rows: Sequence[ListedTrace], opener: TraceOpener, file: Path) -> None:
    """Write traces as one static page, which works offline and allows no script.

    Raises:
        ConfigError: the file cannot be written.
        TraceFileError: a trace cannot be read.
    """
    text = export_html([opener.open(row) for row in rows])
    part = file.with_name(f"{file.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror or error}") from None
