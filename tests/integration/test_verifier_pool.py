"""Verifiers that stall, crash, fill the memory or fork get a verdict and leave no process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from delethink.errors import ConfigError
from delethink.scoring.isolation import find_isolation
from delethink.scoring.pool import VerifierPool, VerifierSettings
from delethink.scoring.programs import SandboxLimits
from delethink.scoring.reward import Reward
from delethink.scoring.scorer import Scorer, ScoringRules
from delethink.types import Attempt, Problem, TraceStop

pytestmark = pytest.mark.integration

HOSTILE = """
import os, signal, sys, threading, time


def double(text):
    return 2 * len(text)


def none(text):
    return None


def sleeps(text):
    for sign in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(sign, signal.SIG_IGN)
    while True:
        time.sleep(1000)


def holds_the_lock(text):
    return float(len(str(3 ** (10 ** 10))))  # one call of C, which nothing interrupts


def stops_itself(text):
    os.kill(os.getpid(), signal.SIGSTOP)


def eats_memory(text):
    kept = []
    while True:
        kept.append(bytearray(b"x") * 10_000_000)


def asks_for_too_much(text):
    return float(len(bytearray(10**12)))


def many_threads(text):
    while True:
        threading.Thread(target=time.sleep, args=(1000,)).start()


def base_exception(text):
    class TimeoutException(BaseException):
        pass

    raise TimeoutException("Operation timed out!")


def leaves(text):
    os._exit(7)


def exits(text):
    sys.exit("bye")


def crashes(text):
    import ctypes

    ctypes.string_at(0)


def prints(text):
    os.write(1, b'{"value": 1.0}\\n')
    print('{"value": 1.0}')
    return 0.0


def reads(text):
    return float(len(open(text).read()))


def writes(text):
    return float(open(text, "w").write("x"))


def signals(text):
    os.kill(int(text), signal.SIGKILL)


def words(text):
    return "a word"
"""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Functions as a user might register them, in a module that workers can import."""
    (tmp_path / "hostile_rewards.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "hostile_rewards", raising=False)
    import hostile_rewards  # type: ignore[import-not-found]

    return hostile_rewards


@pytest.fixture
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(VerifierSettings(num_verifiers=1, timeout=1.0, memory_mb=200)) as pool:
        yield pool
        workers = verifiers_of(pool)
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive


def verifiers_of(pool: VerifierPool) -> list[psutil.Process]:
    """Return the processes of the pool's host and of everything that it started."""
    hosts = [host for number in pool.verifier_ids() for host in find(number)]
    return hosts + [child for host in hosts for child in host.children(recursive=True)]


def find(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid)] if psutil.pid_exists(pid) else []


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("sleeps", "timeout", "took more than 1 s"),
        ("holds_the_lock", "timeout", "took more than 1 s"),
        ("stops_itself", "timeout", "took more than 1 s"),
        ("eats_memory", "memory", "more than 200 MB"),
        ("asks_for_too_much", "memory", "more than 200 MB"),
        ("base_exception", "error", "TimeoutException: Operation timed out!"),
        ("leaves", "error", "exit code 7"),
        ("exits", "error", "SystemExit: bye"),
        ("crashes", "error", "signal 11"),
        ("words", "error", "could not convert string to float"),
    ],
)
def test_a_hostile_verifier_has_a_verdict_and_the_next_call_works(
    pool: VerifierPool, hostile: Any, name: str, status: str, reason: str
) -> None:
    verdict = pool.call(getattr(hostile, name), text="x")
    assert (verdict.status, verdict.value) == (status, None)
    assert reason in str(verdict.reason)
    assert pool.call(hostile.double, text="abc").value == 6.0
    assert pool.counts == {status: 1, "ok": 1}


def test_threads_without_end_are_stopped(pool: VerifierPool, hostile: Any) -> None:
    assert pool.call(hostile.many_threads, text="x").status != "ok"
    assert pool.call(hostile.double, text="abc").value == 6.0


def test_what_a_verifier_prints_is_no_answer(pool: VerifierPool, hostile: Any) -> None:
    assert pool.call(hostile.prints, text="x").value == 0.0
    assert pool.call(hostile.none, text="x") == ("ok", None, None)


def test_a_verifier_reaches_neither_files_nor_the_trainer(
    pool: VerifierPool, hostile: Any, tmp_path: Path
) -> None:
    if find_isolation() == "none":
        pytest.skip("this machine has no isolation")
    assert "Permission" in str(pool.call(hostile.reads, text="/etc/passwd").reason)
    environment = f"/proc/{os.getpid()}/environ"  # where secrets of the trainer are
    assert "Permission" in str(pool.call(hostile.reads, text=environment).reason)
    assert "Permission" in str(pool.call(hostile.writes, text=str(tmp_path / "x")).reason)
    assert "not permitted" in str(pool.call(hostile.signals, text=str(os.getpid())).reason)


def test_calls_behind_one_that_stalls_are_computed(hostile: Any) -> None:
    with VerifierPool(VerifierSettings(num_verifiers=2, timeout=1.0)) as pool:
        calls = [hostile.sleeps if i in (3, 5) else hostile.double for i in range(40)]
        futures = [pool.submit(call, {"text": "x" * i}) for i, call in enumerate(calls)]
        verdicts = [future.result(60) for future in futures]
    assert [v.value for v in verdicts] == [None if i in (3, 5) else 2.0 * i for i in range(40)]
    assert pool.counts == {"ok": 38, "timeout": 2}


def test_large_texts_go_through(pool: VerifierPool, hostile: Any) -> None:
    sizes = [10, 3_000_000, 10, 2_000_000, 100_000]
    futures = [pool.submit(hostile.double, {"text": "x" * size}) for size in sizes]
    assert [future.result(60).value for future in futures] == [2.0 * size for size in sizes]


def test_it_works_from_an_event_loop_which_goes_on(pool: VerifierPool, hostile: Any) -> None:
    async def turns_while_waiting() -> int:
        future = asyncio.wrap_future(pool.submit(hostile.sleeps, {"text": "x"}))
        turns = 0
        while not future.done():
            await asyncio.sleep(0.001)
            turns += 1
        assert future.result().status == "timeout"
        return turns

    assert asyncio.run(turns_while_waiting()) > 20


def test_a_cancelled_call_does_no_harm(pool: VerifierPool, hostile: Any) -> None:
    futures = [pool.submit(hostile.double, {"text": "x" * i}) for i in range(20)]
    futures[10].cancel()
    assert [f.result(60).value for f in futures if not f.cancelled()][:10] == [
        2.0 * i for i in range(10)
    ]
    assert pool.call(hostile.double, text="x").value == 2.0


def test_what_no_worker_could_run_is_refused_at_once(pool: VerifierPool) -> None:
    with pytest.raises(ConfigError, match="isolated: false"):
        pool.submit(lambda text: 1.0, {"text": "x"})
    with pytest.raises(ConfigError, match="cannot be pickled"):
        pool.submit(os.path.join, {"text": lambda: 1})


def test_a_module_that_does_not_load_is_an_error(
    pool: VerifierPool, hostile: Any, tmp_path: Path
) -> None:
    (tmp_path / "hostile_rewards.py").write_text("raise ImportError('half a module')")
    verdict = pool.call(hostile.double, text="x")
    assert verdict.status == "error"
    assert str(verdict.reason).startswith("ImportError: half a module (hostile_rewards.py, line 1")


def test_closing_gives_every_call_a_verdict(hostile: Any) -> None:
    pool = VerifierPool(VerifierSettings(num_verifiers=1, timeout=60.0))
    futures = [pool.submit(hostile.sleeps, {"text": "x"}) for _ in range(5)]
    while len(verifiers_of(pool)) < 2:
        time.sleep(0.01)
    workers = verifiers_of(pool)
    pool.close()
    assert [future.result(10).status for future in futures] == ["error"] * 5
    assert not psutil.wait_procs(workers, timeout=5)[1]
    with pytest.raises(ConfigError, match="closed"):
        pool.submit(hostile.double, {"text": "x"})


def test_a_sample_whose_verifier_stalls_is_an_error_and_never_a_zero(hostile: Any) -> None:
    attempt = Attempt(Problem("q", "1"), "text", TraceStop.COMPLETED, 4, 1, 10, 1)
    settings = VerifierSettings(num_verifiers=1, timeout=1.0)
    rewards = [Reward("fine", hostile.double), Reward("stalls", hostile.sleeps)]
    with Scorer(rewards, settings=settings) as scorer:
        (score,) = scorer.score_now([attempt])
    assert score.total is None
    assert score.parts == {"fine": 8.0, "stalls": None}
    assert score.errors == {"stalls": "timeout: computing the reward took more than 1 s"}
    with Scorer(rewards, rules=ScoringRules(error=-1.0), settings=settings) as scorer:
        assert scorer.score_now([attempt])[0].total == -1.0


def test_closing_leaves_no_folder(hostile: Any) -> None:
    temp = Path(tempfile.gettempdir())
    before = set(temp.glob("delethink-*"))
    with VerifierPool(VerifierSettings(num_verifiers=1)) as pool:
        assert pool.call(hostile.double, text="abc").value == 6.0
        pool.run_program("open('x', 'w').write('y')", "", SandboxLimits())
    assert set(temp.glob("delethink-host-*")) <= before


OWNER = """
import signal, time
import psutil
import hostile_rewards
from delethink.scoring.pool import VerifierSettings, VerifierPool

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

pool = VerifierPool(VerifierSettings(num_verifiers=2, timeout=1000))
futures = [pool.submit(hostile_rewards.{function}, {{"text": "x"}}) for _ in range(4)]
verifiers = []
while len(verifiers) < 3:  # the host and two workers
    time.sleep(0.01)
    verifiers = psutil.Process().children(recursive=True)
time.sleep(0.2)  # the workers are in the middle of it
print(*(verifier.pid for verifier in verifiers), flush=True)
futures[0].result()
"""


@pytest.mark.parametrize(
    ("function", "sign"),
    [
        ("sleeps", signal.SIGINT),
        ("sleeps", signal.SIGTERM),
        ("holds_the_lock", signal.SIGKILL),
    ],
)
def test_no_worker_outlives_its_owner(
    tmp_path: Path, hostile: Any, function: str, sign: signal.Signals
) -> None:
    code = OWNER.format(function=function)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert owner.stdout is not None
    workers = [p for pid in owner.stdout.readline().split() for p in find(int(pid))]
    assert len(workers) >= 3
    owner.send_signal(sign)
    owner.wait(30)
    assert not psutil.wait_procs(workers, timeout=10)[1]
