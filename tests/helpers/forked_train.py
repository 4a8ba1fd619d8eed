"""Runs ``delethink`` again and again in children that have everything imported already.

A program of its own: it reads one JSON object a line, ``{"args", "log", "die_at",
"largest_file"}``, and answers with the child's exit code (minus the signal) when it has ended. A
child with ``die_at = {"path": part, "count": n, "delay": seconds}`` kills itself with SIGKILL, or
the signal ``sign``, that long after its n-th opening of a file for writing whose path has that
part. With ``largest_file``,
the system refuses to write more bytes than that into any file.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import traceback
from typing import Any


def main() -> None:
    from delethink.cli.process import set_up_process

    set_up_process()
    import delethink.training.trainer  # noqa: F401  # what takes long to import

    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(request)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(request: dict[str, Any]) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    if request["largest_file"]:
        limits = (request["largest_file"], request["largest_file"])
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if request["die_at"]:
        die_at(**request["die_at"])
    code = 1
    try:
        from delethink.cli.main import main as command

        code = command(request["args"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def die_at(path: str, count: int, delay: float, sign: int = signal.SIGKILL) -> None:
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event != "open" or path not in str(args[0]) or not writes(args):
            return
        seen += 1
        if seen == count and not delay:
            os.kill(os.getpid(), sign)
        elif seen == count:
            threading.Timer(delay, os.kill, (os.getpid(), sign)).start()

    sys.addaudithook(hook)


def writes(args: tuple[Any, ...]) -> bool:
    _, mode, flags = args
    return bool(set(mode or "") & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR))


if __name__ == "__main__":
    main()
