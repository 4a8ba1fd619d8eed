"""Writes traces as a log of Inspect (``.eval``), which ``inspect view`` opens.

Each chunk is a message of the assistant, and each boundary a message between them. Texts are plain:
control characters are spelled out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from delethink.errors import ConfigError, MissingExtraError
from delethink.output import safe_text
from delethink.trace_html import TraceView
from delethink.trace_map import UNKNOWN
from delethink.types import ChunkRole
from delethink.view.index import ListedTrace
from delethink.view.traces import TraceOpener, model_of

_SCORER = "reward"


def write_eval_log(
    rows: Sequence[ListedTrace], opener: TraceOpener, file: Path, folder: Path
) -> None:
    """Write traces as a log of Inspect.

    Raises:
        MissingExtraError: Inspect is not installed.
        ConfigError: the file cannot be written.
        TraceFileError: a trace cannot be read.
    """
    try:
        from inspect_ai import log as inspect_log
    except ImportError:
        raise MissingExtraError("inspect-ai", "inspect") from None
    settings = sorted({row.place for row in rows if row.sample is not None})
    samples = [_sample(row, opener.open(row), len(settings) > 1) for row in rows]
    scored = [row.summary.reward for row in rows if row.summary.reward is not None]
    home = folder if folder.is_dir() else folder.parent
    now = datetime.now(UTC).isoformat(timespec="seconds")
    mean = inspect_log.EvalMetric(name="mean", value=fmean(scored) if scored else 0.0)
    score = inspect_log.EvalScore(
        name=_SCORER, scorer=_SCORER, scored_samples=len(scored), metrics={"mean": mean}
    )
    log = inspect_log.EvalLog(
        status="success",
        eval=inspect_log.EvalSpec(
            created=now,
            task=safe_text(home.absolute().name, lines=False),
            dataset=inspect_log.EvalDataset(name=home.absolute().name, samples=len(samples)),
            model=safe_text(model_of(home, settings[0] if settings else None) or "unknown"),
            config=inspect_log.EvalConfig(),
            metadata={"settings": settings, "written_by": "delethink view --export"},
        ),
        results=inspect_log.EvalResults(
            total_samples=len(samples), completed_samples=len(samples), scores=[score]
        ),
        stats=inspect_log.EvalStats(started_at=now, completed_at=now),
        samples=samples,
    )
    try:
        inspect_log.write_eval_log(log, str(file.absolute()), format="eval")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror or error}") from None


def _sample(row: ListedTrace, view: TraceView, has_settings: bool) -> Any:
    from inspect_ai.log import EvalError, EvalSample
    from inspect_ai.model import ModelOutput
    from inspect_ai.scorer import Score

    summary, trace = row.summary, view.trace
    text = "".join(view.texts([i for c in trace.thinking for i in c.output_ids]))
    name: str = row.name
    if row.sample is not None:
        setting, _, problem = summary.group.rpartition(" · ")
        name = f"{setting} · {problem}" if has_settings else problem
    answer = None
    if view.answer is not None:
        answer = safe_text(view.sampled_text(*view.answer))
    failure = row.error or trace.error
    return EvalSample(
        id=safe_text(name, lines=False),
        epoch=1 if row.sample is None else row.sample + 1,
        input=safe_text(view.notes.get("problem") or summary.prompt),
        target=safe_text(summary.answer),
        messages=list(_messages(view)),
        output=ModelOutput.from_content("delethink", safe_text(text)),
        scores={
            _SCORER: Score(
                value=summary.reward if summary.reward is not None else "N", answer=answer
            )
        },
        metadata={
            "trace": row.name,
            "stop": summary.stop,
            "chunks": summary.chunks,
            "sampled_tokens": summary.length,
        },
        error=None
        if failure is None
        else EvalError(message=safe_text(failure), traceback="", traceback_ansi=""),
    )


def _messages(view: TraceView) -> Iterator[Any]:
    """Yield the query, a message for each chunk, and one for each boundary."""
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

    yield ChatMessageUser(content=safe_text("".join(view.texts(list(view.trace.query_ids)))))
    for one in view.maps:
        chunk = one.chunk
        if one.num_before and chunk.role is ChunkRole.THINKING:
            carried = safe_text("".join(view.texts(one.ids[: one.num_before])))
            known = sum(origin != UNKNOWN for origin in one.origins[: one.num_before])
            yield ChatMessageSystem(
                content=f"context reset: {one.num_before:,} tokens carried over\n\n{carried}",
                metadata={"boundary": True, "carried": one.num_before, "of_the_trace": known},
            )
        yield ChatMessageAssistant(
            content=safe_text("".join(view.texts(one.ids[one.num_before :]))),
            metadata={
                "chunk": one.number,
                "role": chunk.role.value,
                "new_tokens": len(chunk.output_ids),
                "kept_at_the_next_boundary": one.num_kept,
                "policy_version": chunk.policy_version,
                "stop": chunk.stop.value,
            },
        )
