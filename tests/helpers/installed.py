"""Which tests can run here, without loading what they need: pytest's workers read every module."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def need(*packages: str) -> None:
    """Skips the rest of a module, or a test, where one of the packages is not installed."""
    for name in packages:
        if find_spec(name) is None:
            pytest.skip(f"needs {name}", allow_module_level=True)
