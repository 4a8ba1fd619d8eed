"""``delethink.__all__`` lists exactly the public names."""

from __future__ import annotations

from types import ModuleType

import delethink
import delethink.errors


def test_all_equals_what_is_visible() -> None:
    visible = {
        name
        for name, value in vars(delethink).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert visible | {"__version__"} == set(delethink.__all__)


def test_no_name_is_listed_twice() -> None:
    assert len(delethink.__all__) == len(set(delethink.__all__))


def test_every_error_is_public() -> None:
    errors = {
        name
        for name, value in vars(delethink.errors).items()
        if isinstance(value, type) and issubclass(value, delethink.DelethinkError)
    }
    assert errors <= set(delethink.__all__)
