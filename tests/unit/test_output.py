"""Texts are safe to show, by every way of printing; results go to the asked folder."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delethink.errors import ConfigError
from delethink.output import (
    echo,
    echo_json,
    get_logger,
    open_console,
    output_path,
    safe_text,
    visible,
)

JOB = "session_1/runtime_resources/working_dir_files/_ray_pkg_1"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("DELETHINK_OUTPUT", raising=False)
    (tmp_path / JOB).mkdir(parents=True)


@pytest.mark.parametrize(
    ("variable", "asked", "found"),
    [
        (None, "runs/a", "runs/a"),
        (None, "~/a", "/home/somebody/a"),
        ("", "a", "a"),
        ("/data", "runs/a", "/data/runs/a"),
        ("~/delethink", "a", "/home/somebody/delethink/a"),
        ("/data", "/elsewhere/a", "/elsewhere/a"),
        ("/data", "~/a", "/home/somebody/a"),
    ],
)
def test_relative_paths_start_from_the_folder_that_the_environment_names(
    variable: str | None, asked: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("DELETHINK_OUTPUT", variable)
    assert output_path(asked) == Path(found)


@pytest.mark.parametrize("variable", [None, "", "here"])
def test_results_of_a_ray_job_do_not_go_where_they_are_deleted(
    variable: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / JOB)
    if variable is not None:
        monkeypatch.setenv("DELETHINK_OUTPUT", variable)
    with pytest.raises(ConfigError, match="set DELETHINK_OUTPUT to a permanent folder"):
        output_path("runs/a")
    with pytest.raises(ConfigError, match="absolute output path"):
        output_path(tmp_path / JOB / "a")
    assert output_path("/data/a") == Path("/data/a")
    monkeypatch.setenv("DELETHINK_OUTPUT", "/data")
    assert output_path("a") == Path("/data/a")


HOSTILE = "\x1b]0;title\x07\x1b[2J\u202eevil\u2066\u200b\ufeff\u2028\U000e0041\x85\x7f\r\ud800"
SHOWN = (
    r"\x1b]0;title\x07\x1b[2J\u202eevil\u2066\u200b\ufeff\u2028"
    r"\U000e0041\x85\x7f\r\ud800"
)
KEY = "hf_0123456789abcdef"


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", KEY)


@given(st.text())
def test_no_control_or_invisible_character_is_left(text: str) -> None:
    shown = visible(text, lines=False)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")]
    assert visible(shown, lines=False) == shown
    assert visible(text).count("\n") == text.count("\n")


@pytest.mark.parametrize(
    "char",
    [
        "\u034f",
        "\u115f",
        "\u2800",
        "\u3164",
        "\uffa0",
        "\ufe00",
        "\U000e0100",
        "\U000e007f",
        "\xad",
    ],
)
def test_characters_without_a_shape_are_spelt_out(char: str) -> None:
    assert visible(f"a{char}b") == f"a{ascii(char)[1:-1]}b"


def test_ordinary_text_of_all_scripts_stays() -> None:
    text = "é中ไทย हिन्दी עברית ❤️ 1 000 a\tb\nc"
    assert visible(text) == text
    assert visible("a\tb\nc", lines=False) == "a\\tb\\nc"


def test_echo_prints_safe_text(key: None, capsys: pytest.CaptureFixture[str]) -> None:
    echo(f"{HOSTILE} {KEY}")
    echo(HOSTILE, stderr=True)
    printed = capsys.readouterr()
    assert printed.out == f"{SHOWN} ***\n"
    assert printed.err == f"{SHOWN}\n"


def test_echo_spells_out_what_the_stream_cannot_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    echo("é")
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xe9\n"  # type: ignore[attr-defined]


def test_json_is_ascii_and_exact(key: None, capsys: pytest.CaptureFixture[str]) -> None:
    echo_json({"text": HOSTILE, "key": KEY})
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert visible(printed) == printed
    assert json.loads(printed) == {"text": HOSTILE, "key": "***"}


@pytest.mark.parametrize("colour", [None, "1"])
def test_the_console_shows_safe_text_in_tables_and_bars(
    colour: str | None,
    key: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rich.progress import Progress, TextColumn
    from rich.table import Table
    from rich.text import Text

    if colour:
        monkeypatch.setenv("FORCE_COLOR", colour)  # as in a terminal: rich writes its own codes
    console = open_console()
    table = Table(title=f"[red]{HOSTILE}[/green] :smile: {KEY}")
    table.add_column(HOSTILE, min_width=150)
    table.add_row(KEY)
    console.width = 400
    console.print(table)
    console.print(f"[link=http://a]{HOSTILE}")
    console.print(Text(HOSTILE))
    with Progress(TextColumn("{task.fields[text]}", markup=False), console=console) as bar:
        bar.add_task("", text=safe_text(HOSTILE + KEY))
    printed = capsys.readouterr().out
    assert f"[red]{SHOWN}[/green] :smile: ***" in printed
    assert f"[link=http://a]{SHOWN}" in printed
    assert f"{SHOWN}***" in printed
    for hidden in ("\x1b]", "\x1b[2J", "\u202e", "\u2066", "\x07", KEY[:4]):
        assert hidden not in printed


def test_log_records_are_safe(key: None) -> None:
    stream = io.StringIO()
    logger = get_logger("delethink.test_output")
    assert get_logger("delethink.test_output") is logger
    assert len(logger.filters) == 1
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        logger.warning("%s %s", HOSTILE, KEY)
        try:
            raise ValueError(f"{HOSTILE} {KEY}")
        except ValueError:
            logger.warning("failed", exc_info=True)
    finally:
        logger.removeHandler(handler)
    assert stream.getvalue().startswith(f"{SHOWN} ***\nfailed\nTraceback")
    assert f"ValueError: {SHOWN} ***" in stream.getvalue()
    assert visible(stream.getvalue()) == stream.getvalue()


def test_what_python_prints_itself_is_safe(tmp_path: Path) -> None:
    code = f"""
import logging, threading, warnings
from delethink.output import guard_process
guard_process()
hostile = {HOSTILE!r}.replace(chr(0xd800), "") + {KEY!r}
warnings.warn(hostile)
logging.getLogger("somebody").error(hostile)
def fail(): raise ValueError(hostile)
thread = threading.Thread(target=fail)
thread.start()
thread.join()
fail()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={"HF_TOKEN": KEY}, capture_output=True, check=False
    )
    printed = done.stderr.decode()
    assert done.returncode == 1
    assert visible(printed) == printed
    assert KEY not in printed.replace(repr(KEY), "")
    assert printed.count("\\x1b]0;title") >= 4


def test_safe_text_is_idempotent(key: None) -> None:
    once = safe_text(f"{HOSTILE} {KEY} http://u:p@h")
    assert once == f"{SHOWN} *** http://***@h"
    assert safe_text(once) == once
