"""One self-contained page of charts and tables: the report of a run, an evaluation or a probe.

The charts are Bokeh's, whose JavaScript comes with its package and is put into the page. The page
works offline, and its own policy lets nothing run but these scripts, named by their hashes. Texts
are escaped.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from delethink.errors import MissingExtraError
from delethink.output import safe_text
from delethink.redaction import json_text

REPORT_FILE = "report.html"
_MAX_POINTS = 1000  # of a curve; more are averaged in bins
_SMOOTHED_POINTS = 8  # a shorter curve is not smoothed
_LEGEND_CHARACTERS = 56  # that fit into a line
_COLOURS = ("#0b62a8", "#c2410c", "#1a7f37", "#9333ea", "#b42318", "#0e7490", "#6b7280", "#a16207")
_DASHES = ("solid", "dashed", "dotted", "dotdash")
_MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "plus", "cross", "star")


@dataclass(frozen=True)
class ChartCurve:
    """A line of a chart. Values that are no finite numbers are left out."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float] = ()  # ends of an interval for each point, or nothing
    high: Sequence[float] = ()

    @property
    def points(self) -> list[tuple[float, float, float, float]]:
        """Return x, y and the interval of each point, of at most ``_MAX_POINTS``."""
        lows, highs = self.low or self.y, self.high or self.y
        found = [
            (float(x), float(y), float(low), float(high))
            for x, y, low, high in zip(self.x, self.y, lows, highs, strict=True)
            if y is not None and low is not None and high is not None and math.isfinite(y)
            and math.isfinite(x)
        ]  # fmt: skip
        size = math.ceil(len(found) / _MAX_POINTS) if found else 1
        bins = [found[i : i + size] for i in range(0, len(found), size)]
        return [tuple(sum(column) / len(own) for column in zip(*own, strict=True)) for own in bins]


@dataclass(frozen=True)
class Chart:
    """Curves over one axis."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[ChartCurve]
    log_x: bool = False
    smooth: bool = False  # the page's slider smooths its curves


@dataclass(frozen=True)
class ReportTable:
    """A table: names of the columns, and rows of texts and numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class ReportSection:
    """A part of a report."""

    title: str
    parts: Sequence[Chart | ReportTable | str] = ()  # a text is a paragraph


@dataclass(frozen=True)
class Report:
    """Everything on the page."""

    title: str
    status: str  # below the title: finished, or how far
    sections: Sequence[ReportSection]
    details: Mapping[str, str] = field(
        default_factory=dict
    )  # folded texts: configuration, versions


def write_report(report: Report, folder: Path) -> Path:
    """Write ``report.html`` into a folder, in place of an older one once it is complete.

    Raises:
        MissingExtraError: Bokeh is not installed.
        OSError: the file cannot be written.
    """
    text = report_html(report)
    path = folder / REPORT_FILE
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise
    return path


def report_html(report: Report) -> str:
    """Return the page.

    Raises:
        MissingExtraError: Bokeh is not installed.
    """
    charts: list[Chart] = []
    body = []
    for section in report.sections:
        shown = [_part_html(part, charts) for part in section.parts]
        body.append(f"<section><h2>{_text(section.title)}</h2>{''.join(shown)}</section>")
    details = "".join(
        f"<details><summary>{_text(name)}</summary><pre>\n{_text(text)}</pre></details>"
        for name, text in report.details.items()
    )
    smooth = _SMOOTHING if any(map(_is_smoothed, charts)) else ""
    items = [_chart_item(chart, number) for number, chart in enumerate(charts)]
    # A text must not close the element.
    data = json_text(items).replace("<", "\\u003c")
    scripts = [_library(), _asset("report.js")] if charts else []
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts) or "'none'"
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(report.title)}</title><style>{_asset('report.css')}</style></head><body>"
        f"<main><h1>{_text(report.title)}</h1><p>{_text(report.status)}</p>{smooth}"
        f"{''.join(body)}<section><h2>Details</h2>{details}</section></main>"
        f'<script type="application/json" id="charts">{data}</script>'
        + "".join(f"<script>{script}</script>" for script in scripts)
        + "</body></html>\n"
    )


_SMOOTHING = (
    '<p class="smoothing"><label>smoothing <input id="smoothing" type="range" min="0" max="0.98" '
    'step="0.02" value="0"></label> <output id="smoothed">off</output></p>'
)


def _part_html(part: Chart | ReportTable | str, charts: list[Chart]) -> str:
    if isinstance(part, str):
        return f"<p>{_text(part)}</p>"
    if isinstance(part, Chart):
        if not any(curve.points for curve in part.curves):
            return ""
        charts.append(part)
        label = _text(f"{part.title}: {part.y_label} over {part.x_label}")
        return (
            f"<figure><figcaption>{_text(part.title)}</figcaption>"
            f'<div class="chart" id="chart-{len(charts) - 1}" role="img" aria-label="{label}">'
            "</div></figure>"
        )
    heads = "".join(f'<th scope="col">{_text(name)}</th>' for name in part.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{_text(_cell(value))}</td>" for value in row) + "</tr>"
        for row in part.rows
    )
    caption = f"<caption>{_text(part.title)}</caption>" if part.title else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(part.title)}">'
        f"<table>{caption}<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(value: object) -> str:
    if value is None:
        return "none"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _text(text: str) -> str:
    return html.escape(safe_text(text), quote=True)


def _is_smoothed(chart: Chart) -> bool:
    return chart.smooth and any(len(curve.points) >= _SMOOTHED_POINTS for curve in chart.curves)


# -- Bokeh -------------------------------------------------------------------------------------


def _chart_item(chart: Chart, number: int) -> Any:
    """Return a chart as the JSON that Bokeh's own JavaScript draws, with no code in it."""
    try:
        from bokeh.embed import json_item
        from bokeh.models import ColumnDataSource, HoverTool
        from bokeh.plotting import figure
    except ImportError:
        raise MissingExtraError("bokeh", "eval") from None
    plot = figure(
        height=270,
        sizing_mode="stretch_width",
        x_axis_type="log" if chart.log_x else "linear",
        x_axis_label=safe_text(chart.x_label, lines=False),
        y_axis_label=safe_text(chart.y_label, lines=False),
        tools="pan,box_zoom,wheel_zoom,reset,save",
        active_scroll=None,
    )
    if chart.log_x:
        plot.xaxis[0].ticker.desired_num_ticks = 4
        plot.xaxis[0].ticker.num_minor_ticks = 0
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    shown = [curve for curve in chart.curves if curve.points]
    for index, curve in enumerate(shown):
        xs, ys, lows, highs = map(list, zip(*curve.points, strict=True))
        name = f"smoothed-{number}-{index}" if chart.smooth else None
        source = ColumnDataSource({"x": xs, "y": ys, "raw": ys, "low": lows, "high": highs},
                                  name=name)  # fmt: skip
        colour = _COLOURS[index % len(_COLOURS)]
        label = safe_text(curve.label, lines=False)
        legend = {"legend_label": label} if len(shown) > 1 else {}
        dash = _DASHES[index // len(_COLOURS) % len(_DASHES)]
        line = plot.line("x", "y", source=source, color=colour, line_width=2, line_dash=dash,
                         **legend)  # fmt: skip
        renderers = [line]
        if curve.low:
            plot.segment("x", "low", "x", "high", source=source, color=colour, line_width=1.5)
        if len(xs) <= 60:
            marker = _MARKERS[index % len(_MARKERS)]
            renderers.append(plot.scatter("x", "y", source=source, color=colour, size=6,
                                          marker=marker, **legend))  # fmt: skip
        interval = [("95 % interval", "@low{0.000} to @high{0.000}")] if curve.low else []
        tips = [(chart.x_label, "@x{0,0.[000]}"), (label, "@raw{0,0.[00000]}"), *interval]
        plot.add_tools(HoverTool(renderers=renderers[-1:], tooltips=tips, mode="vline"
                                 if len(shown) == 1 else "mouse"))  # fmt: skip
    if len(shown) > 1:
        plot.legend.click_policy = "hide"
        plot.legend.label_text_font_size = "9pt"
        if sum(len(curve.label) + 6 for curve in shown) < _LEGEND_CHARACTERS:
            plot.legend.orientation = "horizontal"
        else:
            plot.height += 20 * len(shown)
        plot.legend.background_fill_alpha = 0.7
        plot.add_layout(plot.legend[0], "below")
    return json_item(plot, f"chart-{number}")


def _library() -> str:
    """Return Bokeh's JavaScript, as its package holds it."""
    import bokeh

    path = Path(bokeh.__file__).parent / "server" / "static" / "js" / "bokeh.min.js"
    return path.read_text(encoding="utf-8").replace("</script", "<\\/script")


def _asset(name: str) -> str:
    return files("delethink").joinpath(f"assets/report/{name}").read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
