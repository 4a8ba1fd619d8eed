"""math-verify behind our extractor and pool, against answers that were checked by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from delethink.rewards.math import math_equal
from delethink.scoring.pool import VerifierPool, VerifierSettings

pytest.importorskip("math_verify")
pytestmark = pytest.mark.integration

DATA = Path(__file__).parents[1] / "data"


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]


def text_of(case: dict[str, Any]) -> str:
    """Texts too long for a file are (before, repeated, times, after)."""
    if "text" in case:
        return str(case["text"])
    before, repeated, times, after = case["made"]
    return str(before + repeated * times + after)


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(VerifierSettings(num_verifiers=1, timeout=30.0)) as pool:
        yield pool


def test_every_answer_of_the_corpus_has_its_score(pool: VerifierPool) -> None:
    cases = lines("math_answers.jsonl")
    assert len(cases) >= 300
    futures = [
        pool.submit(math_equal, {"text": text_of(case), "answer": case["answer"]}) for case in cases
    ]
    wrong = [
        (case["kind"], case["answer"], text_of(case)[:100], f"expected {case['score']}", verdict)
        for case, verdict in zip(cases, [future.result() for future in futures], strict=True)
        if verdict.status != "ok" or verdict.value != case["score"]
    ]
    assert not wrong


def test_every_gold_answer_of_the_corpus_is_its_own_equal(pool: VerifierPool) -> None:
    golds = sorted({case["answer"] for case in lines("math_answers.jsonl")})
    for gold in golds:
        text = f"so</think>\\boxed{{{gold}}}"
        assert pool.call(math_equal, text=text, answer=gold).value == 1.0, gold
        assert pool.call(math_equal, text=text, answer=f"\\boxed{{{gold}}}").value == 1.0, gold
        assert pool.call(math_equal, text=text, answer=f"${gold}$").value == 1.0, gold


def test_what_stalls_is_killed_within_its_limit_and_nothing_is_left() -> None:
    cases = lines("hangs.jsonl")
    assert len(cases) >= 20
    with VerifierPool(VerifierSettings(num_verifiers=1, timeout=0.3, memory_mb=500)) as pool:
        futures = [pool.submit(math_equal, case) for case in cases]
        verdicts = [future.result(60) for future in futures]
        assert pool.call(math_equal, text="</think>\\boxed{2/4}", answer="0.5").value == 1.0
    stalled = [verdict for verdict in verdicts if verdict.status in ("timeout", "memory")]
    assert len(stalled) >= 20
    assert all(verdict.reason for verdict in stalled)
    assert all(verdict.value in (None, 0.0) for verdict in verdicts)
    assert sum(pool.counts.values()) == len(cases) + 1
    children = psutil.Process(os.getpid()).children(recursive=True)
    mine = [c for c in children if any("rewards.worker" in part for part in c.cmdline())]
    assert len(mine) <= 1  # the one of this module's own pool
