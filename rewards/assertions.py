"""Tests written as assertions, judged outside the process of the program.

A program that shares a process with its assertions can pass them all: it exits early, replaces a
builtin, or returns an object that equals everything. So the assertions run in a second sandbox, the
judge, where each call of the program's functions is a record. The program's process gets the calls
and returns plain values; it never sees an assertion. Rounds:

1. the judge runs the test with unknown values, to collect the calls;
2. the program computes them, and the judge runs the test with the values;
3. calls that depend on values are unknown until then, and need another round.
"""

from __future__ import annotations

import ast
import builtins
import secrets
from hashlib import blake2b
from typing import NamedTuple

from delethink.errors import ConfigError
from delethink.rewards.prelude import program_source
from delethink.scoring.sandbox import Sandbox, SandboxLimits

_MAX_ROUNDS = 8
_MAX_REMEMBERED = 4096
_NO_CALLS = "[]"
_COLLECTED: dict[str, str] = {}  # calls of a test, by its digest

_CODEC = """
import collections, decimal, fractions, json, sys

class Remote:
    def __init__(self, number):
        self.number = number

def encode(value, number=None):
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if value - value == 0 else {"float": repr(value)}
    if isinstance(value, (collections.Counter, collections.defaultdict, collections.OrderedDict)):
        kind = dict
    if kind is dict:
        return {"dict": [[encode(k, number), encode(v, number)] for k, v in value.items()]}
    if kind is list:
        return [encode(v, number) for v in value]
    if kind in (tuple, collections.deque):
        return {kind.__name__: [encode(v, number) for v in value]}
    if kind in (set, frozenset):
        return {kind.__name__: sorted((encode(v, number) for v in value), key=json.dumps)}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    if kind is complex:
        return {"complex": [encode(value.real), encode(value.imag)]}
    if kind in (bytes, bytearray):
        return {kind.__name__: value.decode("latin-1")}
    if kind in (decimal.Decimal, fractions.Fraction):
        return {kind.__name__: str(value)}
    if isinstance(value, Remote):
        return {"remote": value.number}
    if kind.__module__ == "numpy":
        return encode(value.tolist(), number)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"tuple": [encode(v, number) for v in value]}
    if isinstance(value, bool | int | float | str | list | dict):
        base = next(t for t in (bool, int, float, str, list, dict) if isinstance(value, t))
        return encode(base(value), number)
    if hasattr(value, "__next__"):
        return {"iter": [encode(v, number) for v in value]}
    if kind in (type({}.keys()), type({}.values()), type({}.items())):
        return [encode(v, number) for v in value]
    if number is None:
        raise TypeError(f"cannot pass {kind.__name__}")
    return {"remote": number}

def decode(value, remotes=None):
    if isinstance(value, list):
        return [decode(v, remotes) for v in value]
    if not isinstance(value, dict):
        return value
    (kind, content), = value.items()
    if kind == "float":
        return float(content)
    if kind == "dict":
        return {decode(k, remotes): decode(v, remotes) for k, v in content}
    if kind == "remote":
        return remotes[content] if remotes is not None else Remote(content)
    if kind in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[kind](content.encode("latin-1"))
    if kind in ("Decimal", "Fraction"):
        return getattr({"Decimal": decimal, "Fraction": fractions}[kind], kind)(content)
    content = [decode(v, remotes) for v in content]
    if kind in ("range", "complex"):
        return {"range": range, "complex": complex}[kind](*content)
    kinds = {"tuple": tuple, "set": set, "frozenset": frozenset, "iter": iter}
    return {**kinds, "deque": collections.deque}[kind](content)
"""

_SERVE = """
def _serve(scope, mark):
    out, sys.stdout = sys.stdout, sys.stderr
    remotes, results = [], []
    for name, args, options in json.loads(sys.stdin.read()):
        try:
            args = [decode(v, remotes) for v in args]
            options = {k: decode(v, remotes) for k, v in options.items()}
            if name in scope or "Solution" not in scope:
                value = scope[name](*args, **options)
            else:
                value = getattr(scope["Solution"](), name)(*args, **options)
            remotes.append(value)
            after = [encode(v, -1) for v in args]
            results.append(["value", encode(value, len(remotes) - 1), after])
        except BaseException as error:
            remotes.append(None)
            results.append(["error", [t.__name__ for t in type(error).__mro__], str(error)[:500]])
    out.write("\\n" + mark + json.dumps(results))
"""

_JUDGE = """
import ast, random

class Unknown:
    def _self(self, *args, **options):
        return self
    def _true(self, *args):
        return True
    for _name in ("add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod "
                  "pow rpow neg pos abs call getitem round and or xor enter").split():
        locals()[f"__{_name}__"] = _self
    for _name in "eq ne lt le gt ge bool contains".split():
        locals()[f"__{_name}__"] = _true
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self
    def __hash__(self):
        return 0
    def __iter__(self):
        return iter(())
    def __len__(self):
        return 1
    def __int__(self):
        return 1
    __index__ = __int__
    def __float__(self):
        return 1.0
    def __str__(self):
        return ""

class Judge:
    def __init__(self, known, results):
        self.known, self.results = known, results
        self.calls, self.checks, self.is_collecting = [], 0, False

    def function(self, name):
        def call(*args, **options):
            number = len(self.calls)
            try:
                given = {k: encode(v) for k, v in options.items()}
                entry = [name, [encode(v) for v in args], given]
            except TypeError:
                if self.is_collecting:
                    return Unknown()
                raise
            self.calls.append(entry)
            if self.is_collecting or number >= len(self.results) or self.known[number] != entry:
                self.is_collecting = True
                return Unknown()
            kind, value, after = self.results[number]
            if kind == "error":
                found = (getattr(builtins, n, None) for n in value)
                raise next((t for t in found if isinstance(t, type) and issubclass(t, Exception)),
                           RuntimeError)(after)
            for mine, theirs in zip(args, map(decode, after)):
                write_back(mine, theirs)
            return decode(value)
        return call

    def check(self, compute, say=lambda: ""):
        try:
            is_true = bool(compute())
        except Exception:
            if not self.is_collecting:
                raise
            return
        if self.is_collecting:
            return
        self.checks += 1
        if not is_true:
            raise AssertionError(say())

def write_back(mine, theirs):
    if type(mine) is type(theirs) and mine != theirs:
        if isinstance(mine, list):
            mine[:] = theirs
        elif isinstance(mine, (dict, set)):
            mine.clear()
            mine.update(theirs)

class Asserts(ast.NodeTransformer):
    def visit_Assert(self, node):
        no_arguments = ast.arguments([], [], None, [], [], None, [])
        values = [node.test] if node.msg is None else [node.test, node.msg]
        function = ast.Attribute(ast.Name("__judge__", ast.Load()), "check", ast.Load())
        call = ast.Call(function, [ast.Lambda(no_arguments, value) for value in values], [])
        return ast.copy_location(ast.Expr(call), node)

import builtins
def judge(test, setup, names, mark):
    out, sys.stdout = sys.stdout, sys.stderr
    data = json.loads(sys.stdin.readline()), json.loads(sys.stdin.readline())
    scope = {"__name__": "__test__"}
    for module in MODULES:
        scope[module] = __import__(module)
    random.seed(0)
    exec(compile(setup, "setup.py", "exec"), scope)
    judge = scope["__judge__"] = Judge(*data)
    for name, function in names:
        scope[name] = judge.function(function)
    tree = ast.fix_missing_locations(Asserts().visit(ast.parse(test)))
    try:
        exec(compile(tree, "test.py", "exec"), scope)
    except Exception as error:
        if not judge.is_collecting:
            print(type(error).__name__, error)
            judge.checks = 0
    is_passed = judge.checks > 0 and not judge.is_collecting and bool(judge.calls)
    verdict = "more" if judge.is_collecting else "passed" if is_passed else "failed"
    out.write("\\n" + mark + verdict + "\\n" + json.dumps(judge.calls))
"""
_MODULES = (
    "collections",
    "copy",
    "datetime",
    "itertools",
    "json",
    "math",
    "random",
    "re",
    "string",
)


class _Answer(NamedTuple):
    verdict: str  # passed, failed, more (calls have no result yet) or broken (no answer)
    calls: str  # all calls of the test, as JSON


def passes_assertions(
    run: Sandbox,
    program: str,
    test: str,
    setup: str,
    function: str | None,
    limits: SandboxLimits,
) -> bool:
    """Return whether a program passes a test written as assertions.

    Args:
        run: sandbox, for the program and for the judge.
        program: source that defines the functions; it runs after ``setup``.
        test: assertions that call the functions by name, or the name ``candidate``.
        setup: trusted source, run in both processes. Its functions are not asked of the program,
            except ``function``.
        function: name behind ``candidate``.
        limits: limits of each process.

    Raises:
        ConfigError: the test is no Python, or calls nothing.
    """
    names = called_names(test, setup, function)
    asked = sorted({name for _, name in names})
    calls, results = _collect(run, test, setup, names, limits), ""
    for _ in range(_MAX_ROUNDS):
        mark = secrets.token_hex(16)
        serve = f"{_CODEC}{_SERVE}\n_serve(_scope, {mark!r})\n"
        ran = run(program_source(program, setup, asked) + serve, calls, limits)
        _, found, results = ran.stdout.rpartition(mark)
        if ran.status != "ended" or ran.exit_code != 0 or not found or "\n" in results:
            return False
        answer = _judge(run, test, setup, names, (calls, results), limits)
        if answer.verdict != "more":
            return answer.verdict == "passed"
        calls = answer.calls
    return False


def called_names(test: str, setup: str, function: str | None) -> list[tuple[str, str]]:
    """Return the names in a test that stand for functions of the program, and these functions.

    Raises:
        ConfigError: a source is no Python, or ``candidate`` has no function.
    """
    try:
        trees = ast.parse(test), ast.parse(setup)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"got an assertion test that is no Python ({error}); its input and its setup, if it "
            "has one, must be source code"
        ) from None
    bound, used = _bound_names(*trees), _used_names(trees[0])
    free = used - bound - set(dir(builtins)) - set(_MODULES) - {"candidate"}
    if "candidate" in used - _bound_names(trees[0], arguments=False) and function is None:
        raise ConfigError(
            'an assertion test with the name "candidate" needs the name of the function in '
            'metadata["function"]'
        )
    names = [(name, name) for name in sorted(free)]
    if function is not None:
        names += [(name, function) for name in ("candidate", function) if (name, name) not in names]
    return names


def _bound_names(*trees: ast.AST, arguments: bool = True) -> set[str]:
    names: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.arg) and arguments:
            names.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
    return names


def _used_names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _collect(
    run: Sandbox,
    test: str,
    setup: str,
    names: list[tuple[str, str]],
    limits: SandboxLimits,
) -> str:
    key = blake2b(repr((test, setup, names)).encode(), digest_size=16).hexdigest()
    if key not in _COLLECTED:
        answer = _judge(run, test, setup, names, (_NO_CALLS, _NO_CALLS), limits)
        if answer.verdict == "broken":
            return _NO_CALLS
        if answer.calls == _NO_CALLS:
            raise ConfigError(
                "got an assertion test that calls no function of the program; a test that defines "
                "check(candidate) must also call it"
            )
        if len(_COLLECTED) >= _MAX_REMEMBERED:
            _COLLECTED.clear()
        _COLLECTED[key] = answer.calls
    return _COLLECTED[key]


def _judge(
    run: Sandbox,
    test: str,
    setup: str,
    names: list[tuple[str, str]],
    known: tuple[str, str],
    limits: SandboxLimits,
) -> _Answer:
    """Run the test with the known calls and their results."""
    mark = secrets.token_hex(16)
    source = f"{_CODEC}\nMODULES = {_MODULES!r}\n{_JUDGE}\n"
    source += f"judge({test!r}, {setup!r}, {names!r}, {mark!r})\n"
    ran = run(source, "\n".join(known) + "\n", limits)
    _, found, said = ran.stdout.rpartition(mark)
    if ran.status != "ended" or ran.exit_code != 0 or not found:
        return _Answer("broken", _NO_CALLS)
    verdict, _, calls = said.partition("\n")
    return _Answer(verdict, calls)
