"""When Python looks for garbage while it trains."""

from __future__ import annotations

import gc
from typing import Any

from transformers import TrainerCallback

_YOUNG = 1  # the oldest generation that is looked at: not the modules


class GarbageCollection(TrainerCallback):  # type: ignore[misc]
    """Looks for young garbage after each step: by itself, the process does so rarely.

    A precaution: a tensor that only garbage held would stay in memory for as long. See
    ``delethink.garbage``.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """For the trainer."""
        gc.collect(_YOUNG)
