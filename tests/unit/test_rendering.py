"""Rendering shows model output and escapes its control characters."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import gymnasium
import pytest
from hypothesis import given
from hypothesis import strategies as st

import delethink.envs  # noqa: F401 - registers the ids
from delethink.envs.episode import render_ansi
from delethink.output import visible
from delethink.trace_html import sections_html
from delethink.types import Problem

PROBLEM = Problem("01:00000", "11111")
SIZES = {"context_size": 6, "carryover_size": 2, "max_chunks": 3}


class Reader(HTMLParser):
    """The text of each <pre> by the classes of its <div>, in order, and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self._kind = ""
        self._is_open = False

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.add(tag)
        if tag == "div":
            self._kind = dict(attributes).get("class", "").removeprefix("seg ")
        elif tag == "pre":
            self._is_open = True
            self.parts.append((self._kind, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre":
            # Browsers drop a line break after the tag too.
            kind, text = self.parts[-1]
            self.parts[-1] = kind, text.removeprefix("\n")
            self._is_open = False

    def handle_data(self, data: str) -> None:
        if self._is_open:
            kind, text = self.parts[-1]
            self.parts[-1] = kind, text + data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def made(kind: str, mode: str, **options: Any) -> Any:
    env = gymnasium.make(f"delethink/{kind}-v0", render_mode=mode, **{**SIZES, **options})
    assert env.unwrapped.render() is None
    env.reset(options={"problem": PROBLEM})
    return env


def test_html_shows_query_carryover_and_new_tokens_of_every_chunk() -> None:
    env = made("TextThinking", "html")
    env.step("00:111")
    page = env.render()
    assert read(page).parts == [
        ("query", "01:00000<think>"),
        ("new dropped", "00:1"),
        ("new kept", "11"),
        ("carried last", "11"),
    ]
    assert "context reset" in page
    assert "budget left</dt><dd>8" in page
    assert "the trace is not finished" in page


def test_html_without_a_kept_trace_shows_the_last_chunk() -> None:
    env = made("TextThinking", "html", keep_trace=False)
    env.step("00:111")
    shown = read(env.render())
    assert shown.parts == [("query", "01:00000<think>"), ("carried", "11"), ("new", "00:111")]
    assert "budget left 8" in env.render()


def test_html_marks_the_answer_of_a_finished_episode() -> None:
    env = made("TextThinking", "html")
    for action in ("00:111", "</think>111", "11<eos>"):
        env.step(action)
    page = env.render()
    assert "the answer is here" in page
    assert "the model ended its answer" in page


def test_at_token_level_the_open_chunk_is_shown() -> None:
    env = made("TokenThinking", "html")
    for token in [6, 6, 5, 7, 7, 7, 8]:
        env.step(token)
    assert read(env.render()).parts[-2:] == [("carried last", "11"), ("new last", "2")]


def test_ansi_shows_them_under_their_names() -> None:
    env = made("TextThinking", "ansi")
    env.step("00:111")
    env.step("22")
    lines = "[query]\n01:00000<think>\n[carried]\n22\n[sampled so far]\n00:11122"
    assert env.render() == lines
    short = made("TextThinking", "ansi", keep_trace=False)
    short.step("00:111")
    assert short.render().endswith("[carried]\n11\n[last chunk]\n00:111")
    tokens = made("TokenThinking", "ansi")
    for token in [6, 6, 5, 7, 7, 7, 8]:
        tokens.step(token)
    assert tokens.render().endswith("[carried]\n11\n[sampled so far]\n00:1112")


@given(st.text(), st.text())
def test_no_text_escapes_its_place(text: str, heading: str) -> None:
    shown = read(sections_html([("new", heading, text)], {"stop": text}))
    assert shown.tags <= {"style", "article", "div", "p", "section", "h3", "pre"}
    assert shown.parts == [("new", visible(text))]


@pytest.mark.parametrize(
    "attack", ["</pre><script>alert(1)</script>", "<img src=x onerror='a()'>", '"']
)
def test_markup_is_shown_and_not_obeyed(attack: str) -> None:
    page = sections_html([("new", "new", attack)], {})
    assert "<script" not in page
    assert "<img" not in page
    assert read(page).parts == [("new", attack)]


@pytest.mark.parametrize(
    ("hidden", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("\x00\x07", "\\x00\\x07"),
        ("\r", "\\r"),
        ("\u202e", "\\u202e"),
        ("\u200b", "\\u200b"),
        ("a\n\tb", "a\n\tb"),
        ("\ud800", "\\ud800"),
        ("é中🙂", "é中🙂"),
    ],
)
def test_what_would_move_a_terminal_or_hide_is_spelt_out(hidden: str, shown: str) -> None:
    assert visible(hidden) == shown
    assert render_ansi({"new": hidden}) == f"[new]\n{shown}"
