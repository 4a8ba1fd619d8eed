"""Frames on a pipe: the reader returns objects, or says that the pipe is broken."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delethink.scoring.frames import HEADER, BrokenChannelError, FrameReader, frame

MAX_BYTES = 4096
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


def read_all(data: bytes) -> list[dict[str, Any]]:
    """Return the frames in ``data``, up to its end or the first surprise."""
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    frames, source = [], FrameReader(reader, MAX_BYTES)
    try:
        while True:
            frames.append(source.read(time.monotonic() + 5))
    except BrokenChannelError:
        return frames
    finally:
        os.close(reader)


@given(st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), max_size=4))
def test_what_is_written_is_read(messages: list[dict[str, Any]]) -> None:
    assert read_all(b"".join(map(frame, messages))) == messages


@given(st.binary(max_size=200))
def test_garbage_ends_the_reading(garbage: bytes) -> None:
    first = {"id": 1}
    assert read_all(frame(first) + garbage)[:1] == [first]


@pytest.mark.parametrize("body", [b"[1]", b"1", b"{", b"\xff\xfe", b"[" * 4000, b"null", b""])
def test_other_json_is_refused(body: bytes) -> None:
    assert read_all(HEADER.pack(len(body)) + body + frame({"id": 1})) == []


def test_a_frame_without_an_end_is_not_collected() -> None:
    assert read_all(HEADER.pack(MAX_BYTES + 1) + b"x" * 100) == []


def test_half_a_frame_ends_at_the_deadline() -> None:
    reader, writer = os.pipe()
    os.write(writer, frame({"id": 1})[:-1])
    with pytest.raises(TimeoutError):
        FrameReader(reader, MAX_BYTES).read(time.monotonic() + 0.05)
    os.close(reader)
    os.close(writer)
