"""Exports traces: a static page to send, or a log of Inspect for an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from delethink.errors import ConfigError
from delethink.trace_html import TraceView, card_html, html_text, page_html, trace_html
from delethink.view.index import ListedTrace
from delethink.view.traces import TraceOpener


def export_html(views: list[TraceView]) -> str:
    """Return traces as one static page; several begin with a card for each."""
    bodies = [trace_html(view, f"shade-{number}") for number, view in enumerate(views)]
    title = views[0].title if len(views) == 1 else f"{len(views)} traces"
    cards = _cards_html(views) if len(views) > 1 else ""
    return page_html(
        title,
        cards + "".join(f'<div id="trace-{n}">{body}</div>' for n, body in enumerate(bodies)),
    )


def _cards_html(views: list[TraceView]) -> str:
    """Return all traces in short, each with a link to the whole."""
    cards = []
    for number, view in enumerate(views):
        trace = view.trace
        chunks = len(trace.thinking)
        facts = f"{trace.stop.value} · {chunks:,} chunk{'s' * (chunks != 1)} · "
        cards.append(
            f'<li class="card"><h2><a href="#trace-{number}">{html_text(view.title)}</a></h2>'
            f'<p class="count">{facts}{trace.length:,} tokens</p>'
            f'<div class="trace">{card_html(view)}</div></li>'
        )
    return f'<ol class="cards">{"".join(cards)}</ol>'


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
