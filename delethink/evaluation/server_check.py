"""Check of an OpenAI-compatible server, for ``delethink doctor``."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from delethink.errors import PolicyError, UserError
from delethink.evaluation.models import served_model
from delethink.tokenization import query_ids
from delethink.types import Problem

_RETRIES = 2
_TIMEOUT_S = 60.0
_QUESTION = Problem("What is 1 + 1?", "2")
_ADVICE = "see the guide page on served models"


def check_server(
    model: str, base_url: str, served_name: str | None, **options: Any
) -> tuple[Literal["ok", "warning", "problem"], str, str]:
    """Return status, finding and advice for a server.

    Args:
        model: the tokenizer of the served model.
        base_url: address of the server.
        served_name: name of the model on the server.
        options: further arguments of ``served_model``.
    """
    from delethink.engines.openai import examine

    lines: list[str] = []
    open_model = served_model(
        base_url,
        served_name,
        retries=_RETRIES,
        timeout_s=_TIMEOUT_S,
        announce=lines.append,
        **options,
    )
    try:
        with open_model(model) as loaded:
            server: Any = loaded.policy
            faults = asyncio.run(examine(server, query_ids(loaded.tokenizer, _QUESTION)))
    except (UserError, PolicyError) as error:
        return "problem", str(error), ""
    found = "; ".join([*lines, *faults])
    if not faults and len(lines) == 1 and server.dialect.is_exact:
        return "ok", found, ""
    return "warning", found, _ADVICE
