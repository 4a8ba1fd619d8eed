"""How a pool treats its workers."""

from __future__ import annotations

from dataclasses import dataclass

from delethink.config import Order
from delethink.errors import ConfigError

_MARGIN = 4  # a worker has 1/4 more chunks than its batch takes, so that none waits for the driver


@dataclass(frozen=True)
class PoolSettings:
    """How a pool treats its workers. Times are in seconds.

    Attributes:
        order: "breadth" samples the chunks of the traces that have the fewest first: all lengths
            become known early, so that no long trace starts late. "depth" finishes what it began:
            groups complete sooner, the whole batch later.
        chunks_per_worker: chunks that a worker has at a time; ``None`` for a quarter more than the
            batch of its engine, and twice that batch while many wait.
        chunk_timeout: for which a worker may have a chunk, before it is given up for good.
        silence_timeout: without a sign of life, after which the chunks of a worker go to others, if
            there are any; the worker itself has ``hang_timeout`` to come back.
        hang_timeout: without a sign of life, or without a step of an engine that has chunks, after
            which a worker is given up.
        slow_factor: how many times over the other workers could have sampled a chunk (and no less
            than ``hang_timeout``) before the worker that has it is given up.
        lost_timeout: without any worker, after which everything is given up.
        weight_sync_timeout: that a worker without chunks has to take up weights.
        max_restarts: of a worker, in a row and without a chunk sampled in between.
        max_attempts: at a chunk whose workers die or raise, before it is data.
    """

    order: Order = "breadth"
    chunks_per_worker: int | None = None
    chunk_timeout: float | None = None
    silence_timeout: float = 15.0
    hang_timeout: float = 120.0
    slow_factor: float = 8.0
    lost_timeout: float = 600.0
    weight_sync_timeout: float = 60.0
    max_restarts: int = 5
    max_attempts: int = 5

    def __post_init__(self) -> None:
        if self.order not in ("breadth", "depth"):
            raise ConfigError(f"order must be 'breadth' or 'depth', got {self.order!r}")
        for name, least in (
            ("chunks_per_worker", 1),
            ("max_restarts", 0),
            ("max_attempts", 1),
            ("slow_factor", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        for name in (
            "chunk_timeout",
            "silence_timeout",
            "hang_timeout",
            "lost_timeout",
            "weight_sync_timeout",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be more than 0 seconds, got {value}")

    def room(self, batch_size: int) -> tuple[int, int]:
        """The chunks that a worker may always have, and how many more while many wait.

        Both together are twice its batch: an engine begins prompts that lie ready together, which
        is cheaper than one by one, and works on while the driver takes its time.
        """
        if self.chunks_per_worker is not None:
            return self.chunks_per_worker, 0
        margin = max(1, batch_size // _MARGIN)
        return batch_size + margin, max(0, batch_size - margin)
