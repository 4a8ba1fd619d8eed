"""Every trace is trained on whole and as often as it should be, or the run stops."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delethink.training.batching import TokenCoverageCheck

lengths = st.dictionaries(st.integers(0, 20), st.integers(1, 1000), max_size=8)


@given(lengths, st.integers(1, 3))
def test_a_batch_that_is_trained_on_in_any_order_adds_up(
    lengths: dict[int, int], times: int
) -> None:
    check = TokenCoverageCheck()
    check.start(lengths, times)
    for _ in range(times):
        for trace, tokens in lengths.items():
            check.add({trace: tokens})
    check.finish()


@pytest.mark.parametrize(
    ("counted", "words"),
    [
        ([{0: 5}], "1 of 2 traces were not trained on 1 times; the first: trace 1, 0"),
        ([{0: 5, 1: 7}, {0: 5}], "trace 0 is trained on 2 times instead of 1"),
        ([{0: 4}], "4 tokens of trace 0 are in the loss, but 5 were sampled"),
        ([{2: 4}], "4 tokens of trace 2 are in the loss, but none were sampled"),
    ],
    ids=["dropped", "repeated", "in part", "unknown"],
)
def test_what_does_not_add_up_is_an_error(counted: list[dict[int, int]], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        enter(counted)


def enter(counted: list[dict[int, int]]) -> None:
    check = TokenCoverageCheck()
    check.start({0: 5, 1: 7}, 1)
    for tokens in counted:
        check.add(tokens)
    check.finish()
