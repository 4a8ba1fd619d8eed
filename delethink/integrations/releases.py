"""Releases of other libraries that an adapter was tried with."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from delethink.errors import ConfigError


def check_release(package: str, at_least: str, below: str) -> str:
    """Return the installed version of a package that an adapter was tried with.

    Args:
        package: name of the distribution.
        at_least: first version that was tried, such as ``"0.10"``.
        below: first version that was not.

    Raises:
        ConfigError: the package is missing, or its version was not tried.
    """
    wanted = f"pip install '{package}>={at_least},<{below}'"
    try:
        installed = version(package)
    except PackageNotFoundError:
        raise ConfigError(f"{package} is not installed: {wanted}") from None
    if not _numbers(at_least) <= _numbers(installed) < _numbers(below):
        raise ConfigError(
            f"{package} {installed} is installed, and this adapter was tried with {at_least} to "
            f"below {below}: {wanted}"
        )
    return installed


def _numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, so that 0.10.0rc1 counts as 0.10.0."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found.group().split("."))) if found else ()
