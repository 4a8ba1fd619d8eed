"""Memory that some code allocates, as Python's allocator counts it."""

import gc
import json
import os
import signal
import traceback
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 300


@dataclass(frozen=True)
class Traced:
    """Bytes still held when the code ended, and the most that was held at a time."""

    held: int
    peak: int


def traced_memory(code: Callable[[], Any]) -> Traced:
    """Return what ``code`` allocates, run in a fork of this process.

    Threads that other tests left behind allocate too, and are not in a fork. Cyclic garbage would
    wait for the collector, which the tests call as rarely as the commands do.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if child == 0:
        _run_and_exit(code, writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the code ended with status {status}"
    return Traced(*json.loads(found))


def _run_and_exit(code: Callable[[], Any], writer: int) -> None:
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(TIMEOUT_S)
        gc.collect()
        gc.set_threshold(500)
        tracemalloc.start()
        kept = code()  # what it returns counts as held
        found = tracemalloc.get_traced_memory()
        del kept
        os.write(writer, json.dumps(found).encode())
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
