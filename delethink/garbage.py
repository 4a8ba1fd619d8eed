"""How often Python's garbage collector looks for cycles."""

from __future__ import annotations

import gc

_PYTHONS_THRESHOLD = (700, 10, 10)
_OBJECTS = 50_000


def look_rarely() -> None:
    """Lets more objects come together before the collector looks at them, for a process of ours.

    Modules stay, and chunks and traces until their step is over: with Python's default of 700
    objects it looks at each of them several times in vain. That is a tenth of what vLLM takes to
    import (``scripts/bench_startup.py``) and more than that of what a short chunk costs the driver.
    Who has set a threshold keeps it.
    """
    if gc.get_threshold() == _PYTHONS_THRESHOLD:
        gc.set_threshold(_OBJECTS)
