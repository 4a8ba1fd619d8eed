"""Rendering of a thinking environment as terminal text and as HTML.

Model output is untrusted: control characters are spelled out, so they cannot move a terminal's
cursor, and characters with a meaning in HTML are escaped.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Mapping, Sequence

_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}  # Unicode categories of invisible characters
_STYLE = (
    ".delethink{font:14px/1.5 ui-monospace,monospace;max-width:60em}"
    ".delethink pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;padding:.5em;"
    "border-left:4px solid}"
    ".delethink h2{font-size:1em;margin:1em 0 .2em}"
    ".delethink .query{border-color:#5b6abf}"
    ".delethink .carried{border-color:#c27c0e}"
    ".delethink .new{border-color:#2e8b57}"
)


def render_ansi(parts: Mapping[str, str]) -> str:
    """Return each part below its name in brackets."""
    return "\n".join(f"[{name}]\n{visible(text)}" for name, text in parts.items())


def render_html(parts: Sequence[tuple[str, str, str]], facts: Mapping[str, object]) -> str:
    """Return self-contained HTML without scripts, one section for each part.

    Args:
        parts: (CSS class, heading, text) of each part.
        facts: names and values for the line on top.
    """
    # HTML drops one line break after <pre>. The extra one keeps a leading line break of the text.
    line = " · ".join(f"{name} {value}" for name, value in facts.items())
    sections = "".join(
        f'<section><h2>{_escape(heading)}</h2><pre class="{_escape(kind)}">\n{_escape(text)}</pre>'
        "</section>"
        for kind, heading, text in parts
    )
    return f'<style>{_STYLE}</style><div class="delethink"><p>{_escape(line)}</p>{sections}</div>'


def visible(text: str) -> str:
    """Return the text with control and invisible characters spelled out."""
    return "".join(_escape_code(c) if _is_invisible(c) else c for c in text)


def _is_invisible(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in _INVISIBLE


def _escape_code(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _escape(text: str) -> str:
    return html.escape(visible(text), quote=True)
