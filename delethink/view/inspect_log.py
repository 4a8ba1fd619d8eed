"""Writes traces as a log of Inspect (``.eval``), which ``inspect view`` opens.

Each chunk is a message of the assistant, and each boundary a message of the user between them:
Inspect moves messages of the system to the top. The transcript has a call of the model for each
chunk, with exactly what it saw. Texts are plain: control characters are spelled out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from delethink.errors import ConfigError, MissingExtraError
from delethink.output import safe_text
from delethink.trace_html import TraceView
from delethink.trace_map import UNKNOWN, ChunkMap
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
    home = folder if folder.is_dir() else folder.parent
    name = safe_text(home.absolute().name, lines=False)
    model = safe_text(model_of(home, settings[0] if settings else None) or "unknown", lines=False)
    samples = [_sample(row, opener.open(row), model, len(settings) > 1) for row in rows]
    began, ended = _times(rows, opener)
    score = inspect_log.EvalScore(
        name=_SCORER,
        scorer=_SCORER,
        scored_samples=sum(row.summary.reward is not None for row in rows),
        metrics={
            name: inspect_log.EvalMetric(name=name, value=value)
            for name, value in _means(rows, settings).items()
        },
    )
    log = inspect_log.EvalLog(
        status="success",
        eval=inspect_log.EvalSpec(
            created=ended,
            task=name,
            dataset=inspect_log.EvalDataset(name=name, samples=len({one.id for one in samples})),
            model=model,
            config=inspect_log.EvalConfig(epochs=max((one.epoch for one in samples), default=1)),
            metadata={"settings": settings, "written_by": "delethink view --export"},
        ),
        results=inspect_log.EvalResults(
            total_samples=len(samples), completed_samples=len(samples), scores=[score]
        ),
        stats=inspect_log.EvalStats(started_at=began, completed_at=ended),
        samples=samples,
    )
    try:
        inspect_log.write_eval_log(log, str(file.absolute()), format="eval")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror or error}") from None


def _means(rows: Sequence[ListedTrace], settings: Sequence[str]) -> dict[str, float]:
    """Return the mean reward, of several settings for each one: their mean says nothing."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row.summary.reward is not None:
            name = safe_text(row.place, lines=False) if len(settings) > 1 else "mean"
            groups.setdefault(name, []).append(row.summary.reward)
    return {name: fmean(values) for name, values in groups.items()}


def _times(rows: Sequence[ListedTrace], opener: TraceOpener) -> tuple[str, str]:
    """Return the first start and the last end of an evaluation's traces; now, if not stored."""
    lines = [opener.index.read_line(row) for row in rows if row.sample is not None]
    first, last = datetime.now(UTC), datetime.now(UTC)
    if lines:
        first = datetime.fromtimestamp(min(line["started"] for line in lines), UTC)
        last = datetime.fromtimestamp(max(line["ended"] for line in lines), UTC)
    return first.isoformat(timespec="seconds"), last.isoformat(timespec="seconds")


def _sample(row: ListedTrace, view: TraceView, model: str, has_settings: bool) -> Any:
    from inspect_ai.log import EvalError, EvalSample
    from inspect_ai.model import ModelOutput, ModelUsage
    from inspect_ai.scorer import Score

    summary, trace = row.summary, view.trace
    text = "".join(view.texts([i for c in trace.thinking for i in c.output_ids]))
    name: str = row.name
    if row.sample is not None:
        name = f"problem {row.problem}" + f" · {row.place}" * has_settings
    verdict, failure = view.verdict, row.error or trace.error
    said = verdict.said if verdict else None
    gold = verdict.gold if verdict and verdict.gold is not None else summary.answer
    read = sum(len(chunk.prompt_ids) for chunk in trace.chunks)
    usage = ModelUsage(
        input_tokens=read, output_tokens=trace.length, total_tokens=read + trace.length
    )
    return EvalSample(
        id=safe_text(name, lines=False),
        epoch=1 if row.sample is None else row.sample + 1,
        input=safe_text(view.notes.get("problem") or summary.prompt),
        target=safe_text(gold),
        messages=list(_messages(view)),
        events=list(_events(view, model)),
        output=ModelOutput.from_content(model, safe_text(text)),
        scores={
            _SCORER: Score(
                value=summary.reward if summary.reward is not None else "N",
                answer=None if said is None else safe_text(said),
                explanation=f"{summary.stop}, {summary.chunks:,} chunks, "
                f"{summary.length:,} sampled tokens",
            )
        },
        metadata={
            "trace": row.name,
            "setting" if row.sample is not None else "step": safe_text(row.place, lines=False),
            "stop": summary.stop,
            "chunks": summary.chunks,
            "sampled_tokens": summary.length,
        },
        model_usage={model: usage},
        error=None
        if failure is None
        else EvalError(message=safe_text(failure), traceback="", traceback_ansi=""),
    )


def _messages(view: TraceView) -> Iterator[Any]:
    """Yield the query, a message for each chunk, and one for each boundary."""
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser

    yield ChatMessageUser(content=safe_text("".join(view.texts(list(view.trace.query_ids)))))
    for index, one in enumerate(view.maps):
        if one.num_before and one.chunk.role is ChunkRole.THINKING:
            yield ChatMessageUser(
                content=_boundary_text(view, index), metadata=_boundary_facts(view, index)
            )
        yield ChatMessageAssistant(content=_new_text(view, one), metadata=_chunk_facts(one))


def _events(view: TraceView, model: str) -> Iterator[Any]:
    """Yield a call of the model for each chunk, and each reset of the context between them."""
    from inspect_ai.event import InfoEvent, ModelEvent
    from inspect_ai.model import ChatMessageUser, GenerateConfig, ModelOutput

    query = ChatMessageUser(content=safe_text("".join(view.texts(list(view.trace.query_ids)))))
    for index, one in enumerate(view.maps):
        seen = [query]
        if one.num_before:
            if one.chunk.role is ChunkRole.THINKING:
                yield InfoEvent(source="context reset", data=_boundary_facts(view, index))
            carried = safe_text("".join(view.texts(one.ids[: one.num_before])))
            seen.append(ChatMessageUser(content=carried))
        yield ModelEvent(
            model=model,
            input=seen,
            tools=[],
            tool_choice="none",
            config=GenerateConfig(),
            output=ModelOutput.from_content(
                model, _new_text(view, one), "max_tokens" if one.has_boundary else "stop"
            ),
            metadata=_chunk_facts(one),
        )


def _new_text(view: TraceView, one: ChunkMap) -> str:
    return safe_text("".join(view.texts(one.ids[one.num_before :])))


def _boundary_text(view: TraceView, index: int) -> str:
    one = view.maps[index]
    carried = safe_text("".join(view.texts(one.ids[: one.num_before])))
    dropped = _boundary_facts(view, index)["dropped"]
    return (
        f"✂ context reset: {dropped:,} tokens dropped, {one.num_before:,} carried over to chunk "
        f"{one.number}\n\n{carried}"
    )


def _boundary_facts(view: TraceView, index: int) -> dict[str, Any]:
    one = view.maps[index]
    before = view.maps[index - 1] if index else None
    known = sum(origin != UNKNOWN for origin in one.origins[: one.num_before])
    return {
        "boundary": True,
        "carried": one.num_before,
        "dropped": len(before.ids) - before.num_kept if before else 0,
        **({} if known == one.num_before else {"carried_of_the_trace": known}),
    }


def _chunk_facts(one: ChunkMap) -> dict[str, Any]:
    facts: Mapping[str, Any] = {
        "chunk": one.number,
        "carried_tokens": one.num_before,
        "new_tokens": len(one.chunk.output_ids),
        "kept_at_the_next_boundary": one.num_kept if one.has_boundary else None,
        "policy_version": one.chunk.policy_version,
        "worker": one.chunk.worker,
        "stop": one.chunk.stop.value,
        "role": None if one.chunk.role is ChunkRole.THINKING else one.chunk.role.value,
    }
    return {name: value for name, value in facts.items() if value is not None}
