"""Token and log-prob arrays behave like the tuples of the same numbers."""

from __future__ import annotations

import copy
import pickle
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delethink.tokens import (
    all_finite,
    as_list,
    as_logprobs,
    as_token_ids,
    joined,
    logprob_array,
    token_array,
)
from delethink.types import TokenIds

ids = st.lists(st.integers(0, 2**31), max_size=12).map(tuple)
places = st.one_of(st.none(), st.integers(-15, 15))


@given(ids, ids)
def test_sums_are_those_of_tuples_on_either_side(one: TokenIds, two: TokenIds) -> None:
    block, other = token_array(one), token_array(two)
    for left, right in ((block, two), (one, other), (block, other)):
        assert left + right == one + two
        assert tuple(left + right) == one + two


@given(ids, places, places, st.sampled_from([1, 2, -1]))
def test_slices_are_those_of_tuples(
    one: TokenIds, start: int | None, stop: int | None, stride: int
) -> None:
    block = token_array(one)
    assert tuple(block[start:stop:stride]) == one[start:stop:stride]
    assert block[start:stop:stride] == one[start:stop:stride]
    assert len(block) == len(one)
    assert tuple(reversed(block)) == one[::-1]
    assert [block.index(token) for token in one] == [one.index(token) for token in one]


@given(ids)
def test_equality_hashes_and_copies_are_those_of_tuples(one: TokenIds) -> None:
    block = token_array(one)
    assert block == one
    assert one == block
    assert hash(block) == hash(one)
    assert {one: "found"}[block] == "found"
    assert repr(block) == repr(one)
    assert block != (*one, 1)
    for again in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert again == block
    assert as_list(block) == list(one) == as_list(one)
    assert joined([block, one, ()]) == one + one


def test_adding_another_type_is_refused_as_by_a_tuple() -> None:
    block = token_array((1, 2))
    for wrong in ([3], "ab", 3, None):
        with pytest.raises(TypeError):
            block + wrong  # type: ignore[operator]
        assert block != wrong


def test_numpy_reads_the_memory_without_a_copy() -> None:
    numbers = np.arange(10, dtype=np.int64)
    block = token_array(numbers)
    numbers[0] = 99
    assert block[0] == 0, "a block must not change with its source"
    view = np.asarray(block)
    assert view.dtype == np.int64
    assert np.array_equal(view, range(10))
    assert not view.flags.writeable
    assert np.array(block, np.int32).dtype == np.int32
    assert token_array(np.arange(20, dtype=np.int64)[::2]) == tuple(range(0, 20, 2))


def test_immutable_sequences_are_returned_unchanged() -> None:
    block, plain = token_array((1, 2)), (1, 2)
    assert as_token_ids(block) is block
    assert as_token_ids(plain) is plain
    assert as_token_ids([1, 2]) == (1, 2)


def test_signed_zeros_are_equal_as_in_tuples() -> None:
    assert logprob_array((-0.0, -1.0)) == logprob_array((0.0, -1.0))


logprobs = st.lists(st.floats(-50, 0), max_size=12).map(tuple)


@given(logprobs, logprobs, places, places)
def test_log_probs_are_the_same_numbers_to_the_bit(
    one: tuple[float, ...], two: tuple[float, ...], start: int | None, stop: int | None
) -> None:
    block = logprob_array(one)
    assert block == one == tuple(block)
    assert hash(block) == hash(one)
    assert block[start:stop] == one[start:stop]
    assert block + two == one + two == one + logprob_array(two)
    assert pickle.loads(pickle.dumps(block)) == one
    assert as_logprobs(block) is block
    assert as_logprobs(list(one)) == one
    assert logprob_array(np.array(one)) == one


def test_ids_and_log_probs_do_not_mix() -> None:
    with pytest.raises(TypeError):
        token_array((1, 2)) + logprob_array((1.0, 2.0))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_one_number_that_is_not_finite_is_found_anywhere(odd: float, place: int) -> None:
    values = [-0.5] * 7
    assert all_finite(tuple(values))
    assert all_finite(logprob_array(values))
    values[place] = odd
    values[1] = -float("inf") if odd == float("inf") else values[1]
    assert not all_finite(tuple(values))
    assert not all_finite(logprob_array(values))
    assert all_finite(logprob_array(()))


def test_finite_numbers_whose_sum_is_not_are_finite() -> None:
    assert all_finite((-1e308, -1e308))
    assert all_finite(logprob_array((-1e308, -1e308)))


def test_nan_equals_nothing_as_in_tuples() -> None:
    one, other = (logprob_array((float("nan"),)) for _ in range(2))
    assert one != other


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint16, np.int64])
def test_arrays_of_other_integer_types_are_converted(dtype: type) -> None:
    assert token_array(np.array([1, 2, 3], dtype)) == (1, 2, 3)
    assert token_array(array("i", [1, 2, 3])) == (1, 2, 3)
    assert logprob_array(np.array([-0.5, -2.0], np.float32)) == (-0.5, -2.0)
    with pytest.raises(TypeError):
        token_array(np.array([1.0]))
    with pytest.raises(TypeError):
        token_array(np.array([[1, 2], [3, 4]]))
