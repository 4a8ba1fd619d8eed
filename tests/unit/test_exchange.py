"""What a pool and its workers say to each other arrives as it was said."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from delethink.engines.exchange import (
    Answer,
    EngineCounts,
    Job,
    Report,
    decode_jobs,
    decode_report,
    encode_jobs,
    encode_report,
)
from delethink.policy import Sampling
from delethink.tokens import token_array
from delethink.types import StopReason

IDS = st.lists(st.integers(0, 2**31), max_size=9).map(tuple)
NUMBERS = st.integers(1, 2**40)
SEEDS = st.none() | st.integers(0, 2**31 - 1)
JOBS = st.builds(
    Job.pack,
    NUMBERS,
    IDS | IDS.map(token_array),
    st.integers(1, 9_000),
    st.builds(Sampling, st.floats(0.01, 2.0), SEEDS),
)
ANSWERS = IDS.flatmap(
    lambda ids: st.builds(
        Answer.pack,
        NUMBERS,
        st.sampled_from([ids, list(ids), np.array(ids, np.int64)]),
        st.just([-0.5] * len(ids)),
        st.sampled_from(StopReason),
        st.integers(0, 99),
    )
)


@given(st.lists(JOBS, max_size=4), st.lists(NUMBERS, max_size=4))
def test_jobs_arrive_as_they_were_sent(jobs: list[Job], dropped: list[int]) -> None:
    arrived, taken_back = decode_jobs(encode_jobs(jobs, dropped))
    assert (arrived, taken_back) == (jobs, dropped)
    assert all(type(job) is Job for job in arrived)


@given(st.lists(ANSWERS, max_size=4), NUMBERS)
def test_a_report_arrives_as_it_was_sent(answers: list[Answer], steps: int) -> None:
    report = Report(answers, EngineCounts(steps=steps, tokens=3))
    arrived = decode_report(bytearray(encode_report(report)))
    assert arrived == report
    assert type(arrived) is Report
    for answer, sent in zip(arrived.answers, answers, strict=True):
        assert answer.completion() == sent.completion()


def test_what_a_worker_raised_arrives_with_its_number() -> None:
    sent = Report([Answer(7, error=MemoryError("no block is left"))], EngineCounts())
    (answer,) = decode_report(encode_report(sent)).answers
    assert answer.number == 7
    assert type(answer.error) is MemoryError
    assert str(answer.error) == "no block is left"
