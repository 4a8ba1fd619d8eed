"""Opens a trace of the list with everything to show: token texts, facts, rewards, the answer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from delethink.chunking import ChunkSpec, ThinkingState
from delethink.errors import DelethinkError, TraceFileError
from delethink.evaluation.settings import Setting
from delethink.json_io import (
    as_mapping,
    get_count,
    get_list,
    get_text,
    optional,
    parse_json,
    read_json,
)
from delethink.scoring.answer import answer_span
from delethink.tokens import as_list
from delethink.trace_html import JudgedAnswer, TokenTexts, TraceView, answer_place, token_texts
from delethink.trace_index import TOKEN_STATS
from delethink.trace_io import TraceRecord, read_traces
from delethink.types import END_OF_THINKING, Chunk, ChunkRole, StopReason, Trace, TraceStop
from delethink.view.index import ListedTrace, TraceIndex, is_inside, read_part

_TOKEN_VALUES = {"entropies": "entropy", "trainer_logprobs": "difference"}  # of stored chunks
_MARK = END_OF_THINKING  # of evaluations that stored none
_MAX_NOTE_CHARACTERS = 20_000


class TraceOpener:
    """Opens traces of an index.

    Args:
        index: the list.
        tokenizer: name or folder; ``None`` for the one that the folder names.
    """

    def __init__(self, index: TraceIndex, tokenizer: str | None = None) -> None:
        self.index = index
        self._tokenizer = tokenizer
        self._texts: dict[str | None, tuple[TokenTexts, str]] = {}  # by model: texts, advice
        self._decoders: dict[str | None, tuple[Any, str]] = {}  # by model: tokenizer, advice

    def open(self, row: ListedTrace) -> TraceView:
        """Return a trace with everything to show about it.

        Raises:
            TraceFileError: it cannot be read any more, or has another version.
        """
        if row.sample is not None:
            return self._open_evaluated(row)
        if row.file.suffix == ".parquet":
            record = next(r for n, r in enumerate(read_traces(row.file), 1) if n == row.begin)
            return self._open_record(row, record, {})
        values = self.index.read_line(row)
        try:
            record = TraceRecord.from_json(values)
        except TraceFileError as error:
            raise TraceFileError(f"{row.name}: {error}") from None
        return self._open_record(row, record, values)

    def texts(self, folder: Path, setting: str | None = None) -> tuple[TokenTexts, str]:
        """Return the texts of tokens, and advice where there is no tokenizer."""
        model = self._tokenizer or model_of(folder, setting)
        if model not in self._texts:
            tokenizer, advice = self.tokenizer(folder, setting)
            self._texts[model] = token_texts(tokenizer), advice
        return self._texts[model]

    def tokenizer(self, folder: Path, setting: str | None = None) -> tuple[Any, str]:
        """Return what decodes tokens, or ``None`` and advice."""
        model = self._tokenizer or model_of(folder, setting)
        if model not in self._decoders:
            self._decoders[model] = _load_tokenizer(model)
        return self._decoders[model]

    def _open_record(
        self, row: ListedTrace, record: TraceRecord, values: Mapping[str, Any]
    ) -> TraceView:
        trace, problem = record.trace, record.problem
        home = self.home(row.file)
        texts, advice = self.texts(home)
        config, mark = _config_of(home), _mark_of_run(home)
        place = None if advice else answer_place(trace, texts, mark)
        said = _said(trace, texts, place, record.text if advice else None, mark)
        parts = {f"reward {name}": value for name, value in record.rewards.items()}
        facts = {
            "step": row.place,
            "reward": record.reward,
            **(parts if len(parts) > 1 or record.reward is None else {}),
            "advantage": record.advantage,
            "stop": trace.stop.value,
            "chunks": len(trace.thinking),
            "sampled tokens": f"{trace.length:,}",
        }
        if not _is_step(row):
            facts["file"] = facts.pop("step")
        if record.advantage is None:
            del facts["advantage"]
        notes = {
            "problem": problem.prompt,
            **{f"error of reward {name}": text for name, text in record.reward_errors.items()},
            "tokens are shown by their ids": advice,
            "text of the trace": (record.text or "")[:_MAX_NOTE_CHARACTERS] if advice else "",
        }
        return TraceView(
            trace,
            texts,
            title=row.name,
            facts=facts,
            notes=notes,
            answer=place,
            verdict=_verdict(record, said, config),
            context_size=_context_size(config),
            values=_stored_values(trace, _token_stats(row, trace, self.index.root)),
            workers=[chunk.worker for chunk in trace.chunks],
        )

    def home(self, file: Path) -> Path:
        """Return the folder of the run of a file, inside the root."""
        for folder in file.parents:
            if not is_inside(folder, self.index.root):
                break
            if (folder / "config.yaml").is_file() or (folder / "settings.json").is_file():
                return folder
        return file.parent

    def _open_evaluated(self, row: ListedTrace) -> TraceView:
        folder = row.file.parent
        record = self.index.read_line(row)
        texts, advice = self.texts(folder, row.place)
        outcomes = record["outcomes"]
        facts = {
            "setting": row.place,
            "problem": record["problem"],
            "sample": row.sample,
            "stop": row.summary.stop,
            "chunks": row.summary.chunks,
            "sampled tokens": f"{row.summary.length:,}",
            "right by budget": ", ".join(
                f"{o['budget']:,} {'✓' if o['score'] else '✕'}" for o in outcomes
            ),
        }
        if outcomes and outcomes[-1].get("forced"):
            facts["answer"] = "forced when the budget was spent"
        prompt, gold = self.index.problem_texts(row)
        vote = outcomes[-1].get("vote") if outcomes else None
        notes = {"problem": prompt, "error": row.error or ""}
        notes["tokens are shown by their ids"] = advice
        part = self.index.tokens.get(row.key)
        if part is None:
            notes["no tokens"] = "the evaluation has not stored the tokens of this trace"
            verdict = JudgedAnswer(gold, vote, row.summary.reward, "score")
            chunk = Chunk((), (), (), StopReason.ERROR, error=row.error)
            trace = Trace((), (chunk,), TraceStop.ERROR)
            return TraceView(trace, texts, row.name, facts, notes, verdict=verdict)
        values = read_part(folder / "tokens.jsonl", *part, self.index.root, row.name)
        setting, mark = _setting(folder, row.place)
        trace = _evaluated_trace(values, setting.spec, row)
        place = None if advice else answer_place(trace, texts, mark)
        said = _said(trace, texts, place, None, mark) or vote
        return TraceView(
            trace,
            texts,
            row.name,
            facts,
            notes,
            place,
            verdict=JudgedAnswer(gold, said, row.summary.reward, "score"),
            context_size=setting.spec.context_size,
        )


def _is_step(row: ListedTrace) -> bool:
    return row.file.name.startswith("step_")


def _token_stats(row: ListedTrace, trace: Trace, root: Path) -> list[Any]:
    """Return what the run has stored of the tokens of each chunk, from the first step on them."""
    found: list[Any] = [{} for _ in trace.chunks]
    file = row.file.parent.parent / TOKEN_STATS / row.file.name
    if not file.is_file() or not is_inside(file, root):
        return found
    start = b'{"trace": %d,' % (int(row.name.rpartition(":")[2]) - 1)
    with file.open("rb") as lines:
        for line in lines:
            if not line.startswith(start):
                continue
            try:
                values = parse_json(line, str(file), TraceFileError)
                chunk = get_count(values, "chunk")
            except (TraceFileError, KeyError, ValueError, TypeError):
                continue  # the trace is shown without
            if chunk < len(found) and not found[chunk]:
                found[chunk] = values
    return found


def _stored_values(trace: Trace, stored: Sequence[Any]) -> dict[str, list[Sequence[float]]]:
    """Return what a run stored beside log-probs, as far as it fits the tokens."""
    found: dict[str, list[Sequence[float]]] = {}
    for key, name in _TOKEN_VALUES.items():
        columns = [chunk.get(key) for chunk in stored if isinstance(chunk, Mapping)]
        lists: list[Sequence[float]] = []
        for column, chunk in zip(columns, trace.chunks, strict=False):
            numbers = _numbers(column, len(chunk.output_ids))
            if name == "difference":
                pairs = zip(chunk.logprobs, numbers, strict=False)
                numbers = [engine - trainer for engine, trainer in pairs]
            lists.append(numbers)
        if not any(lists):
            continue
        found[name] = lists
    return found


def _numbers(column: Any, count: int) -> list[float]:
    """Return a stored column if it has a number for each token, else an empty one."""
    if not isinstance(column, list) or len(column) != count:
        return []
    return column if all(isinstance(number, (int, float)) for number in column) else []


def _said(
    trace: Trace,
    texts: TokenTexts,
    place: tuple[int, int] | None,
    text: str | None,
    mark: str | None,
) -> str | None:
    """Return the model's answer: from its tokens, or from the stored text of the trace."""
    if place is not None:
        ids = [i for chunk in trace.chunks for i in as_list(chunk.output_ids)]
        return "".join(texts(ids[slice(*place)])).strip()
    span = None if text is None else answer_span(text, mark)
    return None if span is None or text is None else text[slice(*span)]


def _verdict(record: TraceRecord, said: str | None, config: Mapping[str, Any]) -> JudgedAnswer:
    """Return the verdict of the reward for right or wrong: the named one, else the first."""
    name = _section(config, "evaluation").get("reward")
    if name not in record.rewards:
        name = next(iter(record.rewards), None)
    score = record.reward if name is None else record.rewards[name]
    return JudgedAnswer(record.problem.answer, said, score, name or "reward")


def _config_of(folder: Path) -> Mapping[str, Any]:
    """Return the configuration of a run; empty if it cannot be read."""
    try:
        from delethink.yaml_io import YAML_ERRORS, load_yaml
    except DelethinkError:  # no YAML here
        return {}
    try:
        text = (folder / "config.yaml").read_text("utf-8")
        return as_mapping(load_yaml(text), "config.yaml")
    except (OSError, *YAML_ERRORS):
        return {}


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _context_size(config: Mapping[str, Any]) -> int | None:
    """Return C of a run, if its configuration says it."""
    size = _section(config, "thinking").get("context_size")
    return size if isinstance(size, int) else None


def _mark_of_run(folder: Path) -> str | None:
    """Return the mark of the end of thinking that a run names, by default the usual one."""
    try:
        values = as_mapping(read_json(folder / "marks.json", TraceFileError), "marks.json")
        return optional(get_text, values, "end_of_thinking")
    except (TraceFileError, KeyError, ValueError):
        return _MARK


# -- evaluations -------------------------------------------------------------------------------


def _setting(folder: Path, key: str) -> tuple[Setting, str | None]:
    """Return a setting of an evaluation and its mark of the end of thinking."""
    values = as_mapping(read_json(folder / "settings.json", TraceFileError), "settings.json")
    marks = values.get("end_of_thinking")
    for one in get_list(values, "settings"):
        setting = Setting.from_dict(as_mapping(one, "a setting"))
        if setting.key == key:
            mark = marks.get(setting.model, _MARK) if isinstance(marks, dict) else _MARK
            return setting, mark
    raise TraceFileError(f"settings.json in {folder} has no setting {key!r} any more")


def _evaluated_trace(values: Mapping[str, Any], spec: ChunkSpec, row: ListedTrace) -> Trace:
    """Return the trace of stored tokens; carried ones follow from the rule, or are stored."""
    outputs: list[list[int]] = values["output_ids"]
    query = tuple(values.get("query_ids", ()))
    logprobs = values.get("logprobs") or [[] for _ in outputs]
    prompts = values.get("prompts")  # of carryovers that do not follow from the sizes
    roles = values.get("roles") or ["thinking"] * len(outputs)
    state = ThinkingState(spec, query or (0,))
    chunks: list[Chunk] = []
    for index, output in enumerate(outputs):
        is_last = index == len(outputs) - 1
        stop = StopReason.LENGTH
        if is_last and row.summary.stop == "completed":
            stop = StopReason.EOS
        carried = tuple(prompts[index]) if prompts else tuple(state.carried)
        if not prompts and not is_last:
            state = state.advance(output, StopReason.LENGTH)
        prompt, role = query + carried, ChunkRole(roles[index])
        chunks.append(
            Chunk(prompt, tuple(output), tuple(logprobs[index]), stop, len(carried), None,
                  role=role)
        )  # fmt: skip
    end = {"completed": TraceStop.COMPLETED, "budget": TraceStop.BUDGET}
    return Trace(query, tuple(chunks), end.get(row.summary.stop, TraceStop.ERROR))


# -- tokenizers --------------------------------------------------------------------------------


def model_of(folder: Path, setting: str | None = None) -> str | None:
    """Return the name or folder of the tokenizer for the traces in a folder, if it tells.

    Args:
        folder: a run, an evaluation, or the folder of a trace file.
        setting: of an evaluation: the setting of the trace.
    """
    final = folder / "checkpoints" / "final"
    if (final / "tokenizer_config.json").is_file():
        return str(final)
    try:
        if (folder / "settings.json").is_file():
            values = as_mapping(read_json(folder / "settings.json", TraceFileError), "settings")
            models = [str(one["model"]) for one in get_list(values, "settings")]
            fitting = [m for m in models if setting is None or setting.startswith(f"{m} |")]
            return fitting[0] if fitting else None
    except (DelethinkError, KeyError, ValueError, TypeError):
        return None
    model = _config_of(folder).get("model")
    return model if isinstance(model, str) else None


class _FastTokenizer:
    """The decoder of a ``tokenizer.json``, without the seconds that transformers takes to load."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        self._inner: Any = Tokenizer.from_file(str(file))

    def decode(self, ids: list[int]) -> str:
        return str(self._inner.decode(ids, skip_special_tokens=False))


def _load_tokenizer(model: str | None) -> tuple[Any, str]:
    """Return what decodes a model's tokens, or ``None`` and the reason."""
    if model is None:
        return None, "the folder names no model: pass --tokenizer NAME"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # looking at a trace asks no server
    try:
        from delethink.engines.loading import load_tokenizer, locate

        file = Path(locate(model, "tokenizer")) / "tokenizer.json"
        return _FastTokenizer(file) if file.is_file() else load_tokenizer(model), ""
    except Exception as error:  # a tokenizer of any library, for a file of anybody
        return None, f"the tokenizer of {model} cannot be loaded ({error}): pass --tokenizer NAME"
