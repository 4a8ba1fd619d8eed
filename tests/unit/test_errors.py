"""Errors keep their text across processes and refine the built-in types they promise."""

from __future__ import annotations

import copy
import pickle

import pytest

from delethink.errors import (
    ActionError,
    CarryoverError,
    ConfigError,
    ConformanceError,
    DelethinkError,
    MissingExtraError,
    ModelError,
    NonFiniteError,
    PolicyError,
    QueryTooLongError,
    RolloutError,
    RunDirectoryError,
    SandboxError,
    TraceFileError,
    UserError,
    WeightSyncError,
    did_you_mean,
)

TEXT = "context_size must be at least 1, got 0"

LEAVES = [
    (ConfigError(TEXT), UserError, ValueError),
    (QueryTooLongError(TEXT), UserError, ValueError),
    (ActionError(TEXT), UserError, ValueError),
    (CarryoverError(TEXT), UserError, ValueError),
    (TraceFileError(TEXT), UserError, ValueError),
    (ModelError(TEXT), UserError, ValueError),
    (RunDirectoryError(TEXT), UserError, OSError),
    (MissingExtraError("vllm", "gpu"), UserError, ImportError),
    (PolicyError(TEXT), DelethinkError, RuntimeError),
    (RolloutError(TEXT), DelethinkError, RuntimeError),
    (WeightSyncError(TEXT), DelethinkError, RuntimeError),
    (NonFiniteError(TEXT), DelethinkError, ArithmeticError),
    (SandboxError(TEXT), DelethinkError, RuntimeError),
    (ConformanceError(TEXT), DelethinkError, AssertionError),
]
ALL = [DelethinkError(TEXT), UserError(TEXT), *(leaf for leaf, _, _ in LEAVES)]


def name(value: object) -> str | None:
    return type(value).__name__ if isinstance(value, Exception) else None


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("error", ALL, ids=name)
def test_an_error_survives_pickling_with_its_text(error: Exception, protocol: int) -> None:
    back = pickle.loads(pickle.dumps(error, protocol))
    assert type(back) is type(error)
    assert (str(back), back.args) == (str(error), error.args)


@pytest.mark.parametrize("error", ALL, ids=name)
def test_an_error_survives_copying_with_its_text(error: Exception) -> None:
    assert str(copy.copy(error)) == str(copy.deepcopy(error)) == str(error)


@pytest.mark.parametrize(("error", "family", "builtin"), LEAVES, ids=name)
def test_an_error_is_caught_as_its_family_and_as_its_built_in(
    error: Exception, family: type[Exception], builtin: type[Exception]
) -> None:
    assert isinstance(error, DelethinkError)
    assert isinstance(error, family)
    assert isinstance(error, builtin)


@pytest.mark.parametrize("error", [PolicyError, RolloutError, WeightSyncError])
def test_what_the_user_cannot_mend_is_no_user_error(error: type[Exception]) -> None:
    assert not issubclass(error, UserError)


@pytest.mark.parametrize("error", ALL, ids=name)
def test_the_text_of_an_error_is_shown_as_it_was_given(error: Exception) -> None:
    if not isinstance(error, MissingExtraError):
        assert str(error) == TEXT


def test_a_missing_extra_says_what_to_type() -> None:
    error = pickle.loads(pickle.dumps(MissingExtraError("vllm", "gpu")))
    assert (error.package, error.extra) == ("vllm", "gpu")
    assert "vllm is not installed" in str(error)
    assert "pip install -e '.[gpu]'" in str(error)


@pytest.mark.parametrize("name", ["contxt_size", "context_sizes", "contextsize", "context-size"])
def test_the_nearest_allowed_name_is_suggested(name: str) -> None:
    allowed = ["carryover_size", "context_size", "head_size"]
    assert did_you_mean(name, allowed) == " Did you mean 'context_size'?"


def test_the_allowed_names_are_listed_in_order_where_none_is_near() -> None:
    assert did_you_mean("zzzzzz", ["max_chunks", "head_size"]) == " Allowed: head_size, max_chunks."


def test_nothing_is_suggested_where_nothing_is_allowed() -> None:
    assert did_you_mean("anything", []) == ""


def test_names_may_come_from_any_iterable() -> None:
    allowed = {"head_size": 1, "max_chunks": 2}
    assert did_you_mean("head_sise", allowed) == " Did you mean 'head_size'?"
    assert did_you_mean("head_sise", iter(allowed)) == " Did you mean 'head_size'?"


def test_a_suggestion_continues_a_sentence() -> None:
    assert f"Unknown key 'haed_size'.{did_you_mean('haed_size', ['head_size'])}" == (
        "Unknown key 'haed_size'. Did you mean 'head_size'?"
    )
