"""How often Python's garbage collector looks for cycles."""

from __future__ import annotations

import gc

_PYTHONS_THRESHOLDS = {(700, 10, 10), (2000, 10, 10), (2000, 10, 0)}  # of its versions
_OBJECTS = 50_000


def look_rarely() -> None:
    """Raises the number of new objects after which the collector looks at them.

    Modules stay, and chunks and traces until their step is over: as often as Python does it by
    itself, it looks at each of them several times in vain. That is a tenth of what vLLM takes to
    import (``scripts/bench_startup.py``), and 40 to 65 us of what a short chunk costs the driver
    (docs/rollouts.md).
    Who has set a threshold keeps it.
    """
    if gc.get_threshold() in _PYTHONS_THRESHOLDS:
        gc.set_threshold(_OBJECTS)
