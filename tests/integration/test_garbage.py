"""Garbage of training is looked for after each step."""

from __future__ import annotations

import gc
import weakref

import pytest

pytestmark = pytest.mark.integration


class Knot:
    """Refers to itself, so that only the garbage collector takes it away."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_of_a_step_is_gone_after_it() -> None:
    from delethink.training.garbage import GarbageCollection

    gc.disable()
    try:
        left = weakref.ref(Knot())
        assert left() is not None
        GarbageCollection().on_step_end(None, None, None)
        assert left() is None
    finally:
        gc.enable()
