"""The local viewer: read-only, on loopback, at an address that holds a token."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from delethink.errors import ConfigError, UserError
from delethink.output import safe_text
from delethink.redaction import json_text
from delethink.trace_html import (
    TracePart,
    TraceView,
    card_html,
    head_html,
    part_html,
    shading_html,
    trace_parts,
)
from delethink.view.export import export_html
from delethink.view.index import ListedTrace, TraceIndex, is_inside
from delethink.view.listing import ListQuery, grouped, matching_rows, row_values, sorted_groups
from delethink.view.search import TextSearch
from delethink.view.traces import TraceOpener

LOOPBACK = "127.0.0.1"
_ASSETS = {
    "base.js": "text/javascript",
    "viewer.js": "text/javascript",
    "list.js": "text/javascript",
    "group.js": "text/javascript",
    "trace.js": "text/javascript",
    "viewer.css": "text/css",
    "trace.css": "text/css",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Another page's scripts may run, but see nothing of the viewer: its origin is its own.
_REPORT_POLICY = "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; "
_REPORT_POLICY += "style-src 'unsafe-inline'; img-src data:"
_PART_TOKENS, _PAGE_TOKENS = 400, 1200  # of a piece of a trace, and of what is loaded at once
_MAX_OPEN_TRACES = 4
_MAX_EXPORTED = 100
_REFRESH_INTERVAL_S = 1.0


class OpenTrace:
    """A trace cut into pages, which the browser loads as they come into view."""

    def __init__(self, view: TraceView) -> None:
        self.view = view
        self.pages: list[list[TracePart]] = [[]]
        weight = 0
        for part in trace_parts(view, _PART_TOKENS):
            if weight and weight + part.weight > _PAGE_TOKENS:
                self.pages.append([])
                weight = 0
            self.pages[-1].append(part)
            weight += part.weight

    def head(self, group: str) -> dict[str, Any]:
        """Return the head of the trace, and the weight and chunks of each page."""
        view = self.view
        shading = shading_html(view, group) if view.shades else ""
        return {
            "head": f"{head_html(view)}{shading}",
            "pages": [
                {"weight": sum(part.weight for part in page), "chunk": page[0].index + 1}
                for page in self.pages
            ],
            "chunks": len(view.maps),
            "answer_page": self._answer_page(),
        }

    def page(self, number: int) -> str:
        """Return the HTML of a page."""
        return "".join(part_html(self.view, part) for part in self.pages[number])

    def _answer_page(self) -> int | None:
        if self.view.answer is None:
            return None
        for number, page in enumerate(self.pages):
            for part in page:
                origins = self.view.maps[part.index].origins[part.begin : part.end]
                is_new = part.segment is not None and part.segment.kind == "new"
                if is_new and self.view.answer[0] in origins:
                    return number
        return None


class ViewerError(Exception):
    """An answer that the viewer does not give, with the status of HTTP and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Viewer:
    """The answers of the viewer, for one folder or file."""

    def __init__(self, index: TraceIndex, opener: TraceOpener, token: str) -> None:
        self.index, self.opener, self.token = index, opener, token
        self.search = TextSearch(index, opener)
        self._open: OrderedDict[str, OpenTrace] = OrderedDict()
        self._lock = threading.Lock()
        self._refreshed = 0.0

    def app(self) -> Starlette:
        """Return the ASGI application."""
        answers: dict[str, Callable[[Request], Response]] = {
            "": lambda _: _asset("index.html", "text/html"),
            "report": self.report,
            "api/state": self.state,
            "api/list": self.list,
            "api/trace": self.trace,
            "api/card": self.card,
            "api/page": self.trace_page,
            "api/export": self.export,
            "{asset}": self.asset,
        }
        routes = [Route(f"/{{token}}/{path}", self._guarded(own)) for path, own in answers.items()]
        hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[LOOPBACK, "localhost"])
        return Starlette(routes=routes, middleware=[hosts])

    def _guarded(self, answer: Callable[[Request], Response]) -> Callable[[Request], Response]:
        """Return the answer for those who know the token, and each refusal in words.

        Plain functions run in threads, so that reading files holds up nobody.
        """

        def guarded(request: Request) -> Response:
            try:
                given = request.path_params["token"]
                if not secrets.compare_digest(given.encode(), self.token.encode()):
                    advice = "open the address that delethink view has printed: it holds a token"
                    raise ViewerError(403, advice)
                return answer(request)
            except ViewerError as error:
                return _failure(error.status, str(error))

        return guarded

    def asset(self, request: Request) -> Response:
        """Return a script or style sheet."""
        name = request.path_params["asset"]
        if name not in _ASSETS:
            raise ViewerError(404, "there is no such page")
        return _asset(name, _ASSETS[name])

    def report(self, request: Request) -> Response:
        """Return the report of a run."""
        file = self.index.root / "report.html"
        if not file.is_file() or not is_inside(file, self.index.root):
            raise ViewerError(404, "there is no report.html yet")
        try:
            return HTMLResponse(file.read_bytes(), headers=_headers(_REPORT_POLICY))
        except OSError as error:
            raise ViewerError(410, f"report.html cannot be read: {error.strerror}") from None

    def state(self, request: Request) -> Response:
        """Return the numbers that change while a run goes on."""
        self._refresh()
        index = self.index
        return _json(
            {
                "version": index.version,
                "traces": len(index.rows),
                "damaged": sum(index.damaged.values()),
                "unreadable": sorted(index.unreadable),
                "complete": index.is_complete,
                "gone": index.is_gone,
                "name": index.root.absolute().name,
                "report": (index.root / "report.html").is_file(),
                "stops": sorted({row.summary.stop for row in index.snapshot()}),
            }
        )

    def list(self, request: Request) -> Response:
        """Return a page of the list."""
        try:
            query = ListQuery.from_parameters(request.query_params)
        except ConfigError as error:
            raise ViewerError(400, str(error)) from None
        rows, note = matching_rows(self.index, query, self.search)
        here = slice(query.offset, query.offset + query.rows)
        if request.query_params.get("by") == "problem":
            groups = sorted_groups(grouped(rows), query)
            found = {"total": len(groups), "groups": groups[here]}
        else:
            found = {"total": len(rows), "rows": [row_values(row) for row in rows[here]]}
        return _json({**found, "offset": query.offset, "page": query.rows, "note": note})

    def trace(self, request: Request) -> Response:
        """Return the head of a trace, and the weights of its pages."""
        row = self._row(request)
        group = request.query_params.get("pane", "0")
        found = self._opened(row).head(f"shade-{group if group.isalnum() else 0}")
        return _json({**found, "group": row.summary.group})

    def card(self, request: Request) -> Response:
        """Return a trace in short: verdict and map."""
        # Not kept open: an overview has more traces than those that are open at once.
        return HTMLResponse(card_html(self._view(self._row(request))), headers=_headers())

    def trace_page(self, request: Request) -> Response:
        """Return a page of a trace, as HTML."""
        found = self._opened(self._row(request))
        number = request.query_params.get("n", "")
        if not number.isdecimal() or int(number[:9]) >= len(found.pages):
            raise ViewerError(404, "the trace has no such page")
        return HTMLResponse(found.page(int(number[:9])), headers=_headers())

    def export(self, request: Request) -> Response:
        """Return traces as a static page to save."""
        names = request.query_params.getlist("name")[:_MAX_EXPORTED]
        rows = [row for name in names if (row := self.index.find(name)) is not None]
        if not rows:
            raise ViewerError(404, "there is no such trace any more")
        body = export_html([self._view(row) for row in rows])
        headers = _headers() | {"Content-Disposition": 'attachment; filename="trace.html"'}
        return HTMLResponse(body, headers=headers)

    def _row(self, request: Request) -> ListedTrace:
        name = request.query_params.get("name", "")
        row = self.index.find(name)
        if row is None:
            raise ViewerError(404, f"there is no trace {name!r:.200}; the run may have gone on")
        return row

    def _view(self, row: ListedTrace) -> TraceView:
        try:
            return self.opener.open(row)
        except UserError as error:
            raise ViewerError(410, str(error)) from None
        except (KeyError, ValueError, TypeError) as error:
            raise ViewerError(410, f"{row.name}: {error!r}") from None

    def _opened(self, row: ListedTrace) -> OpenTrace:
        with self._lock:
            key = f"{row.name} {row.begin} {row.end}"
            if key not in self._open:
                self._open[key] = OpenTrace(self._view(row))
                while len(self._open) > _MAX_OPEN_TRACES:
                    self._open.popitem(last=False)
            self._open.move_to_end(key)
            return self._open[key]

    def _refresh(self) -> None:
        if time.monotonic() - self._refreshed > _REFRESH_INTERVAL_S:
            self._refreshed = time.monotonic()
            self.index.refresh()


def _asset(name: str, kind: str) -> Response:
    text = files("delethink").joinpath(f"assets/view/{name}").read_text(encoding="utf-8")
    return Response(text, media_type=kind, headers=_headers())


def _headers(policy: str = _POLICY) -> dict[str, str]:
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
        "Cross-Origin-Resource-Policy": "same-origin",
    }


def _json(value: Any) -> Response:
    return Response(json_text(value), media_type="application/json", headers=_headers())


def _failure(status: int, text: str) -> Response:
    return Response(
        json_text({"error": safe_text(text)}),
        status,
        media_type="application/json",
        headers=_headers(),
    )


def open_socket(port: int) -> socket.socket:
    """Return a listening socket on loopback; port 0 lets the system choose.

    Raises:
        ConfigError: the port is in use, or may not be used.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((LOOPBACK, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise ConfigError(
            f"port {port} cannot be used ({error}); leave out --port, and the system chooses one"
        ) from None
    listening.listen(64)
    return listening


def serve_viewer(viewer: Viewer, listening: socket.socket) -> None:
    """Answer on a socket until an interrupt."""
    import uvicorn

    threading.Thread(target=viewer.index.refresh, daemon=True).start()
    config = uvicorn.Config(viewer.app(), log_level="error", access_log=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[listening])
