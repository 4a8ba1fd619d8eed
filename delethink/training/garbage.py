"""When Python looks for garbage while it trains."""

from __future__ import annotations

import gc
from typing import Any

from transformers import TrainerCallback

_YOUNG = 1  # the generation up to which a look takes milliseconds


class GarbageCollection(TrainerCallback):  # type: ignore[misc]
    """Looks for young garbage after each step: by itself, the process does so rarely.

    Tensors that only garbage holds would stay in memory for as long; see ``delethink.garbage``.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """For the trainer."""
        gc.collect(_YOUNG)
