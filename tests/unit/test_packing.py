"""Forward batches: everything once, within the budget, hardly padded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from delethink.training.batching import MAX_PADDING_SHARE, pack_lengths, padding_share

some_lengths = st.lists(st.integers(1, 300), max_size=60)


@given(some_lengths, st.integers(1, 2000))
def test_every_sequence_is_packed_once_and_within_the_budget(
    lengths: list[int], forward_tokens: int
) -> None:
    batches = pack_lengths(lengths, forward_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= forward_tokens


@given(some_lengths, st.integers(1, 2000))
def test_padding_stays_below_its_share(lengths: list[int], forward_tokens: int) -> None:
    assert padding_share(lengths, pack_lengths(lengths, forward_tokens)) <= MAX_PADDING_SHARE


def test_equal_lengths_fill_their_batches() -> None:
    assert [len(batch) for batch in pack_lengths([100] * 10, 400)] == [4, 4, 2]


def test_unlike_lengths_are_packed_together_as_long_as_little_is_lost() -> None:
    lengths = [1000] * 20 + [980, 990]
    assert len(pack_lengths(lengths, 100_000)) == 1
    assert len(pack_lengths([*lengths, 10], 100_000)) == 2


def test_nothing_is_packed_into_nothing() -> None:
    assert pack_lengths([], 10) == []
    assert padding_share([], []) == 0.0
