"""A headless Chromium of the system, driven by playwright, and the viewer as its own process."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Root, as in containers, needs --no-sandbox. The others keep Chromium from calling its makers.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str:
    """The path of the browser; skips the test with the command that installs one."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("no Chromium: install it, on Debian with: apt-get install chromium")
    return found


@contextmanager
def open_browser() -> Iterator[Any]:
    pytest.importorskip("playwright", reason="no playwright: pip install -e '.[dev]'")
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def running_viewer(path: Path) -> Iterator[str]:
    """The address of ``delethink view PATH``, which is stopped at the end."""
    command = [sys.executable, "-m", "delethink.cli.main", "view", str(path), "--no-browser"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/\S+/", line)
        assert found, line
        yield found[0]
    finally:
        process.terminate()
        process.wait(60)
        process.stderr.close()


class Page:
    """A page of the browser that remembers what went wrong in it."""

    def __init__(self, browser: Any, width: int = 1280, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.set_default_timeout(60_000)
        self.faults: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on(
            "console",
            lambda message: message.type == "error" and self.faults.append(message.text),
        )

    def number_of_nodes(self) -> int:
        return int(self.page.evaluate("document.querySelectorAll('*').length"))
