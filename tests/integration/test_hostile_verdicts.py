"""Verdicts about hostile output: each call has one, it is right, and it comes in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faulty_rewards
import psutil
import pytest
from processes import assert_gone

from delethink.scoring.isolation import find_isolation
from delethink.scoring.pool import Verdict, VerifierPool, VerifierSettings

pytestmark = pytest.mark.integration
if find_isolation() == "none":
    pytest.skip(
        "this machine has no isolation, and the code must not run without", allow_module_level=True
    )

TIMEOUT_S = 4.0  # a busy machine does not reach it
LATE_S = 2.0
SETTINGS = VerifierSettings(num_verifiers=2, timeout=TIMEOUT_S, memory_mb=200)


@pytest.fixture
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(SETTINGS) as pool:
        yield pool
        processes = [
            process
            for host in map(psutil.Process, pool.verifier_ids())
            for process in [host, *host.children(recursive=True)]
        ]
    assert_gone(processes)


def judge(pool: VerifierPool, count: int, slow_share: float) -> list[float]:
    """Check the verdicts of random calls; return the seconds of each."""
    rows = list(faulty_rewards.outputs(count, slow_share, seed=count))
    wrong: list[tuple[str, Verdict]] = []

    def call(row: tuple[str, float]) -> float:
        started = time.monotonic()
        verdict = pool.call(faulty_rewards.faulty, text=row[0])
        is_harmless = row[0].startswith(faulty_rewards.RIGHT)
        if (verdict.status, verdict.value) != ("ok", row[1]) or is_harmless == bool(verdict.reason):
            wrong.append((row[0], verdict))
        return time.monotonic() - started

    pool.call(faulty_rewards.faulty, text="")  # loads the module
    hosts = pool.verifier_ids()
    with ThreadPoolExecutor(2) as threads:
        seconds = list(threads.map(call, rows))
    assert wrong == []
    assert pool.counts == {"ok": count + 1}
    assert pool.verifier_ids() == hosts
    return seconds


def test_a_thousand_calls_have_a_thousand_right_verdicts(pool: VerifierPool) -> None:
    assert len(judge(pool, 1000, slow_share=0.002)) == 1000


@pytest.mark.slow
def test_ten_thousand_verdicts_are_right_and_none_is_late(pool: VerifierPool) -> None:
    assert max(judge(pool, 10_000, slow_share=0.001)) < TIMEOUT_S + LATE_S


@pytest.mark.parametrize("behaviour", [*faulty_rewards.FAULTS, *faulty_rewards.SLOW_FAULTS])
def test_hostile_output_scores_0_with_a_reason(pool: VerifierPool, behaviour: str) -> None:
    verdict = pool.call(faulty_rewards.faulty, text=f"{behaviour} 0")
    assert (verdict.status, verdict.value) == ("ok", 0.0)
    assert verdict.reason
    assert pool.call(faulty_rewards.faulty, text=f"{faulty_rewards.RIGHT} 7") == ("ok", 7.0, None)


@pytest.mark.parametrize(
    ("function", "text", "reason"),
    [
        (faulty_rewards.broken, "any", "no such table"),
        (faulty_rewards.blind, "fail", "a right answer scores 0"),
        (faulty_rewards.asks_a_server, "any", "a reward that evaluates output has no network"),
    ],
)
def test_a_reward_that_fails_on_harmless_output_too_gives_none(
    pool: VerifierPool, function: Any, text: str, reason: str
) -> None:
    for _ in range(3):
        verdict = pool.call(function, text=text)
        assert (verdict.status, verdict.value) == ("error", None)
        assert reason in str(verdict.reason)
    assert pool.counts == {"error": 3}


def test_time_on_a_busy_machine_is_not_blamed_on_the_output(pool: VerifierPool) -> None:
    verdict = pool.call(faulty_rewards.busy, text="any")
    assert (verdict.status, verdict.value) == ("timeout", None)
    assert "the machine is busy" in str(verdict.reason)
