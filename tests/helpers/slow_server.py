"""A server of an endless trace, a token each hundredth of a second, with short times at its end."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

from made_up_reasoner import LETTERS
from served import service_of

from delethink import ChunkSpec, Completion, StopReason
from delethink.serve import start

start._GRACE_S = start._TELLING_S = 1  # of the real ones a test would wait ten seconds


class Endless:
    """Policy that samples for longer than any test waits."""

    async def generate(self, *call: Any) -> Completion:
        return await self.stream(*call, lambda *_: None)

    async def stream(self, prompt: Any, limit: int, sampling: Any, on_tokens: Any) -> Completion:
        ids = tuple(LETTERS[:1]) * limit
        for token in ids:
            await asyncio.sleep(0.01)
            on_tokens((token,), (0.0,))
        return Completion(ids, (0.0,) * limit, StopReason.LENGTH)


def main() -> None:
    """Print the port, then serve."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup hands on that it is ignored
    service = service_of(Endless(), ChunkSpec(100_000, 50_000, 9), window=300_000)
    sock = start.listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    start.serve_forever(service, sock, lambda: print(port, flush=True))


if __name__ == "__main__":
    sys.exit(main())
