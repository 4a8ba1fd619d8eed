"""A thinking environment as text for a terminal, and as HTML.

What a model wrote is shown, never obeyed: control characters are spelt out, so that no output can
move a terminal's cursor, and every character with a meaning in HTML is escaped.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Mapping, Sequence

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}  # Unicode's classes of what shows as nothing
_STYLE = (
    ".delethink{font:14px/1.5 ui-monospace,monospace;max-width:60em}"
    ".delethink pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;padding:.5em;"
    "boundary-left:4px solid}"
    ".delethink h2{font-size:1em;margin:1em 0 .2em}"
    ".delethink .query{boundary-color:#5b6abf}"
    ".delethink .carried{boundary-color:#c27c0e}"
    ".delethink .new{boundary-color:#2e8b57}"
)


def render_ansi(parts: Mapping[str, str]) -> str:
    """Each part under its name in brackets."""
    return "\n".join(f"[{name}]\n{visible(text)}" for name, text in parts.items())


def render_html(parts: Sequence[tuple[str, str, str]], facts: Mapping[str, object]) -> str:
    """A section for each part, which needs nothing from elsewhere and runs nothing.

    Args:
        parts: (class, heading, text) of each.
        facts: shown in a line on top.
    """
    # A line break after <pre> is no part of its text, so that one there keeps those of the text.
    line = " · ".join(f"{name} {value}" for name, value in facts.items())
    sections = "".join(
        f'<section><h2>{_escape(heading)}</h2><pre class="{_escape(kind)}">\n{_escape(text)}</pre>'
        "</section>"
        for kind, heading, text in parts
    )
    return f'<style>{_STYLE}</style><div class="delethink"><p>{_escape(line)}</p>{sections}</div>'


def visible(text: str) -> str:
    """The text with characters that show as nothing, or do something, spelt out."""
    return "".join(_spell(c) if _is_hidden(c) else c for c in text)


def _is_hidden(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in _HIDDEN


def _spell(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _escape(text: str) -> str:
    return html.escape(visible(text), quote=True)
