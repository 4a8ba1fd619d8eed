"""Code that nobody has read: what it can do, what it cannot, and how it is scored."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from delethink.errors import ConfigError
from delethink.rewards.code import passes_tests
from delethink.scoring.isolation import find_isolation
from delethink.scoring.sandbox import SandboxLimits, SandboxResult, run_python

pytestmark = pytest.mark.integration
if find_isolation() == "none":
    pytest.skip(
        "this machine has no isolation, and the code must not run without", allow_module_level=True
    )

LIMITS = SandboxLimits(seconds=2.0, memory_mb=300, file_mb=1)


def run(code: str, stdin: str = "") -> SandboxResult:
    return run_python(code, stdin, LIMITS)


def test_a_program_reads_and_prints() -> None:
    assert run("print(sum(map(int, input().split())))", "1 2\n") == SandboxResult(
        "ended", 0, "3\n", ""
    )


@pytest.mark.parametrize("code", ["exit()", "quit(0)", "import numpy; print(numpy.ones(2).sum())"])
def test_usual_names_and_packages_are_there(code: str) -> None:
    assert run(code).exit_code == 0


def test_it_inherits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    said = run("import os, sys; print(dict(os.environ), sys.argv, sys.path, list(sys.modules))")
    assert said.exit_code == 0
    assert "hush" not in said.stdout
    assert "SECRET_TOKEN" not in said.stdout
    assert "delethink.rewards" not in said.stdout


def test_its_folder_is_its_own_and_goes_away() -> None:
    said = run("import os; open('x', 'w').write('1'); print(os.getcwd(), sorted(os.listdir('.')))")
    folder, _, listed = said.stdout.strip().partition(" ")
    assert listed == "['main.py', 'x']"
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os\nwhile True: os.fork()", "BlockingIOError"),
        ("import subprocess; subprocess.run(['ls'])", "BlockingIOError"),
        ("import os; os.system('true') and 1/0", ""),
        ("import multiprocessing as m; m.Process(target=print).start()", "Error"),
        ("open('/etc/passwd').read()", "PermissionError"),
        ("open('/tmp/delethink-escaped', 'w')", "PermissionError"),
        ("open('/dev/shm/delethink-escaped', 'w')", "PermissionError"),
        ("import os; open(f'/proc/{os.getppid()}/environ').read()", "PermissionError"),
        ("import os; os.listdir('/root')", "PermissionError"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
        ("import os; os.setsid()", "PermissionError"),
        ("import resource as r; r.setrlimit(r.RLIMIT_CPU, (99, 99))", "Error"),
        ("x = [0] * 10**10", "MemoryError"),
        ("f = open('a', 'w')\nfor i in range(999): f.write('x' * 9999)", "File too large"),
        ("while True: print('x' * 9999)", "the program printed too much"),
        ("import socket; socket.create_connection(('127.0.0.1', 9), 1)", "Error"),
        ("def f(n): return f(n + 1)\nf(0)", ""),
        ("import ctypes; ctypes.string_at(0)", ""),
        ("import sys; sys.exit(3)", ""),
        ("syntax error", "SyntaxError"),
        ("import os; os.rename('main.py', '/tmp/delethink-escaped')", "Error"),
        ("import os; os.symlink('/etc/passwd', 'p'); open('p').read()", "PermissionError"),
        ("import os; os.chroot('/')", "PermissionError"),
    ],
)
def test_what_it_must_not_do_fails(code: str, error: str) -> None:
    ran = run(code)
    assert ran.status == "ended"
    if "os.system" in code:
        return  # it says so by its value alone
    assert ran.exit_code != 0
    assert error in ran.stderr
    assert not Path("/tmp/delethink-escaped").exists()


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(1000)",
        "import signal\nfor s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n"
        "  except OSError: pass\nwhile True: pass",
        "3 ** (10 ** 10)",
        "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
        "import sys; sys.stdin.read(); import threading; threading.Event().wait()",
    ],
)
def test_what_runs_for_ever_is_killed(code: str) -> None:
    before = set(psutil.Process(os.getpid()).children(recursive=True))
    assert run_python(code, "", SandboxLimits(seconds=0.7)).status == "timeout"
    assert set(psutil.Process(os.getpid()).children(recursive=True)) <= before


def test_a_flood_on_standard_output_fills_no_memory() -> None:
    assert len(run("while True: print('x' * 9999)").stdout) <= 1 << 20


ADD = {"tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "2 2\n", "output": "4\n"}]}


def fenced(code: str) -> str:
    return f"let me see</think>\n```python\n{code}\n```"


@pytest.mark.parametrize(
    ("code", "score", "share"),
    [
        ("print(sum(map(int, input().split())))", 1.0, 1.0),
        ("print(3)", 0.0, 0.5),
        ("print(5)", 0.0, 0.0),
        ("import os; print(3); os._exit(0)", 0.0, 0.0),  # unflushed output is lost
        ("print(sum(map(int, input().split()))); 1/0", 0.0, 0.0),
        ("print('3\\n4')", 0.0, 0.0),
    ],
)
def test_code_is_scored_by_its_tests(code: str, score: float, share: float) -> None:
    assert passes_tests(fenced(code), ADD) == score
    assert passes_tests(fenced(code), ADD, partial=True) == share


def test_code_that_is_not_there_or_has_no_tests() -> None:
    assert passes_tests("no code</think>", ADD) == 0.0
    assert passes_tests(fenced("print(3)").replace("</think>", ""), ADD) == 0.0
    assert passes_tests(fenced("print(3)"), {}) is None
    assert passes_tests(fenced("print(3)"), ADD, max_tests=1) == 1.0


FUNCTION: Mapping[str, Any] = {
    "function": "add",
    "tests": [{"input": "[1, 2]\n3", "output": "[1, 2, 3]", "type": "functional"}],
}


@pytest.mark.parametrize(
    ("code", "score"),
    [
        ("def add(xs, x): return xs + [x]", 1.0),
        ("class Solution:\n    def add(self, xs, x): return [*xs, x]", 1.0),
        ("def add(xs, x):\n    print('[1, 2, 3]')\n    return xs", 0.0),
        ("def add(xs, x): return float('nan')", 0.0),
        ("def add(xs, x): return {1}", 0.0),
        ("def sub(xs, x): return xs + [x]", 0.0),
        ("xs = [1]", 0.0),  # the usual names include operator.add
        ("import sys; print('[1, 2, 3]'); sys.exit(0)", 0.0),
    ],
)
def test_a_function_is_called(code: str, score: float) -> None:
    assert passes_tests(fenced(code), FUNCTION) == score


@pytest.mark.parametrize(
    "code",
    [
        "class Solution:\n    def add(self, xs: List[int], x: int) -> List[int]: return xs + [x]",
        "def add(xs: Optional[list], x: Union[int, str]) -> Any: return xs + [x]",
        "def add(xs, x): return list(chain(xs, repeat(x, gcd(1, 3))))",
        "@cache\ndef one(): return 1\ndef add(xs, x): return [*xs, x][: 2 + one()]",
        "def add(xs, x):\n    d = deque(xs)\n    d.append(x)\n    return list(d)",
        "def add(xs, x): return sorted(xs + [x], key=itemgetter) if inf < 0 else xs + [x]",
        "def add(xs, x): return [*xs, pow(x, 1, 100)]",
        "def add(xs, x): return [*xs, heapq.nsmallest(1, [x])[0] + bisect_left([1], 0)]",
        "def add(xs, x): return xs + [math.ceil(x)] + [random.randint(0, 0)] * len(Counter())",
        "from __future__ import annotations\ndef add(xs: Missing, x): return xs + [x]",
    ],
)
def test_the_usual_names_need_no_import(code: str) -> None:
    assert passes_tests(fenced(code), FUNCTION) == 1.0


def test_a_program_that_reads_and_prints_needs_no_import() -> None:
    code = "a, b = map(int, sys.stdin.readline().split())\nprint(reduce(operator.add, [a, b]))"
    assert passes_tests(fenced(code), ADD) == 1.0


def test_an_unknown_type_of_test_is_refused_with_the_nearest() -> None:
    tests = [{"type": "funtional", "input": "1", "output": "1"}]
    with pytest.raises(ConfigError, match="Did you mean 'functional'"):
        passes_tests(fenced("print(1)"), {"tests": tests})


def test_a_stronger_sandbox_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_box.py").write_text(
        "from delethink.scoring.sandbox import SandboxResult\n"
        "def run(code, stdin, limits): return SandboxResult('ended', 0, '3', '')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    one = {"tests": ADD["tests"][:1]}
    assert passes_tests(fenced("anything"), one, sandbox="my_box:run") == 1.0
    with pytest.raises(ConfigError, match="cannot import the sandbox 'my_box:walk'"):
        passes_tests(fenced("anything"), one, sandbox="my_box:walk")


INTEGER = "7" * 5000


@pytest.mark.parametrize(
    ("code", "expected", "score"),
    [
        ("def add(xs, x): return int('7' * 5000)", INTEGER, 1.0),
        ("def add(xs, x): return int('7' * 4999)", INTEGER, 0.0),
        (
            "def add(xs, x):\n    y = []\n    for _ in range(90000): y = [y]\n    return y",
            "[1]",
            0.0,
        ),
        ("import sys\ndef add(xs, x):\n    sys.exit(0)", "[1]", 0.0),
        ("import os\ndef add(xs, x):\n    os.kill(os.getppid(), 9)", "[1]", 0.0),
        ("def add(xs, x): return 'x' * 10**7", "[1]", 0.0),
        ("def add(xs, x): return float('inf')", "1e999", 1.0),
        ("def add(xs, x): return 1e400", "1", 0.0),
    ],
)
def test_a_wrong_value_scores_0_whatever_its_form(code: str, expected: str, score: float) -> None:
    tests = [{"input": "[1, 2]\n3", "output": expected, "type": "functional"}]
    assert passes_tests(fenced(code), {"function": "add", "tests": tests}) == score


@pytest.mark.parametrize(
    ("code", "score"),
    [
        ("print(int('7' * 5000))", 1.0),
        ("print('[' * 100_000)", 0.0),
        ("print('1e99999999999999999999999')", 0.0),
        ("print('sNaN')", 0.0),
        ("import sys; sys.stdout.buffer.write(bytes(range(256)) * 100)", 0.0),
        ("print('9' * 500_000)", 0.0),
    ],
)
def test_output_of_any_form_is_compared(code: str, score: float) -> None:
    assert passes_tests(fenced(code), {"tests": [{"input": "", "output": INTEGER}]}) == score


def test_a_tree_of_any_depth_and_any_modes_is_removed() -> None:
    deep = "import os\nfor i in range(3000):\n    os.mkdir('d'); os.chdir('d')"
    closed = "import os\nos.mkdir('a', 0o300)\nopen('a/f', 'w')\nos.mkdir('a/b', 0)"
    for code in (deep, closed):
        assert run_python(code, "", SandboxLimits(seconds=5.0)).status == "ended"
    assert not list(Path(tempfile.gettempdir()).glob("delethink-host-*/delethink-code-*"))
