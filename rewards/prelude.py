"""Names that a program may use without an import, as in the graders of common benchmarks.

Starter code of LiveCodeBench writes ``List[int]`` without an import, because its own grader imports
the usual modules, and all of their names, before each program.
"""

from __future__ import annotations

from collections.abc import Sequence

_MODULES = (
    "bisect",
    "collections",
    "copy",
    "datetime",
    "functools",
    "heapq",
    "io",
    "itertools",
    "json",
    "math",
    "operator",
    "random",
    "re",
    "statistics",
    "string",
    "sys",
    "typing",
)
# Their names are imported too; later modules go before earlier ones, and builtins before all.
_WITH_NAMES = (
    "operator",
    "random",
    "string",
    "re",
    "statistics",
    "datetime",
    "copy",
    "math",
    "bisect",
    "heapq",
    "collections",
    "itertools",
    "functools",
    "typing",
    "builtins",
)
PRELUDE = "\n".join(
    [f"from {module} import *" for module in _WITH_NAMES]
    + [f"import {module}" for module in _MODULES]
)


def program_source(program: str, setup: str = "", asked: Sequence[str] = ()) -> str:
    """Return the source of a process that runs ``program`` after the prelude and ``setup``.

    The prelude leaves out the names ``asked`` of the program: ``add`` is no answer of its own. All
    share the namespace ``_scope``, which the lines that follow can read. Each is compiled on
    its own, so that a program may begin with ``from __future__ import``.
    """
    lines = ['_scope = {"__name__": "__main__", "__builtins__": __builtins__}']
    prelude = f"{PRELUDE}\nfor _name in {list(asked)!r}:\n    globals().pop(_name, None)"
    for name, source in (("prelude.py", prelude), ("setup.py", setup), ("program.py", program)):
        if source:
            lines.append(f"exec(compile({source!r}, {name!r}, 'exec', dont_inherit=True), _scope)")
    return "\n".join(lines) + "\n"
