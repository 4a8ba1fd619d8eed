"""Refuses options that were given and have no effect beside the others."""

from __future__ import annotations

import argparse
from collections.abc import Collection

from delethink.errors import ConfigError

SERVER_OPTIONS = ("served_model", "retries", "timeout")
"""Options of requests to a server."""


def refuse_given(arguments: argparse.Namespace, names: Collection[str], reason: str) -> None:
    """Refuse those of the named options that were given.

    Args:
        arguments: the parsed arguments; an option with another value than its default was given.
            ``actions`` are the options of the command.
        names: attributes of ``arguments``.
        reason: the rest of the sentence, such as "needs --base-url".

    Raises:
        ConfigError: one of them was given; the text names it as it is written.
    """
    for action in arguments.actions:
        if action.dest in names and getattr(arguments, action.dest) != action.default:
            raise ConfigError(f"{action.option_strings[-1]} {reason}")
