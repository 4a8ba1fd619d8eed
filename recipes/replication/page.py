"""Draws the results: tables and figures in a folder, and into the page of the documentation.

The page has blocks between ``<!-- NAME -->`` and ``<!-- end -->``. Their content is replaced, and
everything else is left as it was written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from cells import ROOT, Cell
from claims import Results
from drawing import NOT_RUN, Lines, make_tables
from figures import FIGURES, save

from delethink.errors import ConfigError, did_you_mean

PAGE = ROOT / "docs" / "replication.md"
BLOCK = re.compile(r"(<!-- (?P<name>[a-z]+(?: [a-zA-Z]+)?) -->\n).*?(<!-- end -->)", re.DOTALL)


def draw(
    cells: Mapping[str, Cell], results: Results, folder: Path, page: Path | None = None
) -> None:
    """Write ``tables.md`` and the figures, and fill the blocks of a page.

    Args:
        cells: all cells of the study.
        results: results of the finished ones.
        folder: place of the tables, and of the figures without a page.
        page: a page with blocks; its figures go into a folder of its name beside it.

    Raises:
        ConfigError: the page has a block of an unknown name.
        OSError: a file cannot be written.
    """
    tables = dict(make_tables(cells, results))
    images = page.with_suffix("") if page else folder
    folder.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    drawn = {name: _draw_figure(name, cells, results, images) for name in FIGURES}
    parts = [f"## {name}\n\n" + "\n".join(lines) for name, lines in tables.items()]
    _replace(folder / "tables.md", "# Results\n\n" + "\n\n".join(parts) + "\n")
    if page:
        prefix = f"{images.name}/"
        blocks = tables | {f"figure {n}": _figure_lines(n, drawn[n], prefix) for n in FIGURES}
        _replace(page, filled(page.read_text("utf-8"), blocks))
    places = [str(folder / "tables.md"), *([str(page)] if page else [])]
    print(f"{len(results)} of {len(cells)} cells are finished. Written: {', '.join(places)}")


def filled(text: str, blocks: Mapping[str, Lines]) -> str:
    """Return a page with the content of its blocks replaced.

    Raises:
        ConfigError: the page names a block that does not exist.
    """
    for match in BLOCK.finditer(text):
        if match["name"] not in blocks:
            hint = did_you_mean(match["name"], blocks)
            raise ConfigError(f"the page has an unknown block {match['name']!r}.{hint}")
    return BLOCK.sub(lambda m: m[1] + "\n" + "\n".join(blocks[m["name"]]) + "\n\n" + m[3], text)


def _draw_figure(name: str, cells: Mapping[str, Cell], results: Results, folder: Path) -> bool:
    make, _ = FIGURES[name]
    figure = make(cells, results)
    if figure is not None:
        save(figure, folder / f"{name}.svg")
    return figure is not None


def _figure_lines(name: str, is_drawn: bool, prefix: str) -> Lines:
    return [f"![{FIGURES[name][1]}]({prefix}{name}.svg)"] if is_drawn else [NOT_RUN]


def _replace(path: Path, text: str) -> None:
    """Write a text in one step, so that a full disk leaves the file as it was."""
    partial = path.with_suffix(".new")
    try:
        partial.write_text(text, "utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
