"""Measures seconds, FLOPs and peak memory of thinking against its length, for claim 4.

    rows = measure(model_folder, 72, 18, sizes, Path("rows.jsonl"), seconds=780)

Every measurement is in a forked process of its own, on one thread. Its seconds are processor time,
which does not contain the time of other programs; its peak is the resident memory beyond that
before the work. No token ends an answer, so each trace has exactly the length that was asked for.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from delethink.chunking import ChunkSpec, start
from delethink.cost.flops import Cut, cut_traces, sampling_flops, training_flops
from delethink.cost.memory import cache_bytes, longest_context
from delethink.cost.models import shape_of_config
from delethink.engines.loading import load_model, load_tokenizer
from delethink.engines.transformers import TransformersEngine
from delethink.errors import ConfigError, RolloutError
from delethink.json_io import read_json_lines
from delethink.policy import Sampling
from delethink.rollout import run_rollouts
from delethink.training.batching import RolloutBatch
from delethink.training.grpo import DelethinkTrainer
from delethink.training.grpo_config import DelethinkConfig
from delethink.types import Chunk, StopReason, Trace, TraceStop

Phase = Literal["sampling", "training"]
PHASES: tuple[Phase, ...] = ("sampling", "training")
COLUMNS = ("seconds", "wall_seconds", "peak_bytes", "flops", "predicted_flops", "cache_bytes")
COUNTING = -1  # round of the rows with FLOPs
QUERY_ID = 6  # any token that is no mark
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # written to clear_refs, it sets the peak to the present size


@dataclass(frozen=True)
class Length:
    """A method and a length of thinking, in multiples of C; m is half of C."""

    method: str  # "delethink" or "longcot"
    multiple: int
    context_size: int
    query_tokens: int

    @property
    def spec(self) -> ChunkSpec:
        """Return the sizes of chunks with this budget."""
        if self.method == "longcot":
            return ChunkSpec.longcot(self.multiple * self.context_size)
        half = self.context_size // 2
        return ChunkSpec(2 * half, half, 2 * self.multiple - 1, head_size=0)


def measure(
    folder: str,
    context_size: int,
    query_tokens: int,
    sizes: Mapping[str, Any],
    done: Path,
    seconds: float,
) -> list[dict[str, Any]] | None:
    """Return the rows of all measurements; ``None`` if some are left after ``seconds``.

    A row has ``method``, ``phase``, ``multiple`` and ``round``, and names of ``COLUMNS``. Rows of
    the round -1 hold the FLOPs of one trace instead of times.

    Args:
        folder: the model.
        context_size: C, in tokens; even.
        query_tokens: tokens of a query.
        sizes: ``multiples`` of C, ``repetitions``, and ``traces`` of sampling and of training.
        done: JSON lines with the rows of earlier calls; new ones are added.
        seconds: no measurement starts after this time.

    Raises:
        ConfigError: this system does not tell the peak memory of a process.
    """
    if not (_STATUS.exists() and os.access(_CLEAR, os.W_OK)):
        raise ConfigError("claim 4 needs Linux: no /proc tells the peak memory of a process here")
    started = time.monotonic()
    rows = [row for _, row in read_json_lines(done, RolloutError)] if done.exists() else []
    known = {_key(row) for row in rows}
    model = load_model(folder, "float32", False)
    torch.set_num_threads(1)
    done.parent.mkdir(parents=True, exist_ok=True)
    with done.open("a", encoding="utf-8") as file:
        for row, length in _plan(context_size, query_tokens, sizes):
            if _key(row) in known:
                continue
            if time.monotonic() - started > seconds:
                return None
            work = _flops if row["round"] == COUNTING else _figures
            count = sizes["traces"][row["phase"]]
            rows.append(row | in_fork(work, model, length, row["phase"], count))
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
    return rows


def _plan(
    context_size: int, query_tokens: int, sizes: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], Length]]:
    """Yield each measurement: in a round all of them, so that none has a better hour."""
    for number in (COUNTING, *range(sizes["repetitions"])):
        for multiple in sizes["multiples"]:
            for method in ("delethink", "longcot"):
                for phase in PHASES:
                    row = {"method": method, "phase": phase, "multiple": multiple}
                    length = Length(method, multiple, context_size, query_tokens)
                    yield row | {"round": number}, length


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("method", "phase", "multiple", "round"))


def in_fork(work: Callable[..., Any], *given: Any) -> Any:
    """Return what ``work`` returns in a forked process.

    Raises:
        RolloutError: the process failed; its traceback is on the terminal.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(theirs, work, given))
    child.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        child.join()
        raise RolloutError(f"a measurement ended with exit code {child.exitcode}") from None
    except BaseException:  # an interrupt: the process must not outlive this one
        child.kill()
        raise
    finally:
        ours.close()
    child.join()
    return found


def _answer(pipe: Connection, work: Callable[..., Any], given: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops, and ends this process
    pipe.send(work(*given))


def sample(model: PreTrainedModel, length: Length, count: int) -> list[Trace]:
    """Return sampled traces of exactly this length."""
    engine = TransformersEngine(model, eos_ids=[model.config.vocab_size], pad_id=0)
    queries = [(QUERY_ID,) * length.query_tokens] * count
    samplings = [Sampling(1.0, seed) for seed in range(count)]
    traces = asyncio.run(run_rollouts(engine, length.spec, queries, samplings))
    if any(trace.length != length.spec.budget for trace in traces):
        raise RolloutError(f"a trace of {length} has another length")
    return traces


def train(model: PreTrainedModel, traces: list[Trace], watch: TrainerCallback) -> None:
    """Make one optimizer step on traces; a forward pass holds one context of Delethink a trace."""
    # The forward batches of Delethink then have one size from the shortest length on.
    shortest = min(len(chunk.prompt_ids) + len(chunk.output_ids) for chunk in traces[0].chunks[:1])
    with tempfile.TemporaryDirectory() as folder:
        trainer = DelethinkTrainer(
            model=model,
            processing_class=load_tokenizer("toy", False),
            args=DelethinkConfig(
                output_dir=folder,
                per_device_train_batch_size=len(traces),
                num_generations=len(traces),
                max_steps=1,
                learning_rate=1e-6,
                loss_type="grpo",
                forward_tokens=len(traces) * shortest,
                beta=0.0,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
                logging_strategy="no",
                use_cpu=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": "00:00000000001"}]),
            reward_funcs=[lambda prompts, **_: [float(i % 2) for i in range(len(traces))]],
            run_rollouts=lambda examples: RolloutBatch(examples, traces),
            on_sampled=lambda sampled: None,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


class Meter(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Measures a step of a trainer, or any work between ``start`` and ``stop``."""

    seconds = wall_seconds = float("nan")
    peak_bytes = 0

    def start(self) -> None:
        """Give free memory back, and begin."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text(_RESET_PEAK)
        self._before = resident_bytes("VmRSS")
        self._started = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        """Keep the processor time, the wall time and the peak."""
        self.seconds = time.process_time() - self._started[0]
        self.wall_seconds = time.perf_counter() - self._started[1]
        self.peak_bytes = resident_bytes("VmHWM") - self._before

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with the step."""
        self.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End with the step."""
        self.stop()


class _Counter(TrainerCallback):  # type: ignore[misc]  # as above
    """Counts the FLOPs of a step."""

    def __init__(self) -> None:
        self.counter = make_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counter.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counter.__exit__(None, None, None)


def make_counter() -> FlopCounterMode:
    """Return torch's counter, with the attention kernel of the CPU, which it does not know."""
    aten = torch.ops.aten
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward

    def count(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def count_backward(
        grad: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any
    ) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))

    return FlopCounterMode(display=False, custom_mapping={forward: count, backward: count_backward})


def resident_bytes(name: str) -> int:
    """Return a size of this process, such as ``VmRSS`` or ``VmHWM``."""
    lines = _STATUS.read_text("ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _figures(model: PreTrainedModel, length: Length, phase: Phase, count: int) -> dict[str, float]:
    """Return seconds, wall seconds and peak bytes."""
    torch.set_num_threads(1)
    shortest = Length("longcot", 1, length.context_size, length.query_tokens)
    meter = Meter()
    if phase == "sampling":
        sample(model, Length("longcot", 1, 8, length.query_tokens), 2)  # loads what is loaded late
        meter.start()
        sample(model, length, count)
        meter.stop()
    else:
        traces = made_up_traces(length, count)
        train(model, made_up_traces(shortest, 2), Meter())
        train(model, traces, meter)
    return {
        "seconds": round(meter.seconds, 4),
        "wall_seconds": round(meter.wall_seconds, 4),
        "peak_bytes": meter.peak_bytes,
    }


def made_up_traces(length: Length, count: int) -> list[Trace]:
    """Return traces of this length whose tokens are all the same; their cost is that of any."""
    state, chunks = start(length.spec, (QUERY_ID,) * length.query_tokens), []
    while state.stop is None:
        output = (QUERY_ID,) * state.max_new_tokens
        chunks.append(Chunk(state.prompt_ids, output, (-2.5,) * len(output), StopReason.LENGTH))
        state = state.advance(output, StopReason.LENGTH)
    return [Trace(state.query_ids, tuple(chunks), TraceStop.BUDGET)] * count


def _flops(model: PreTrainedModel, length: Length, phase: Phase, _: int) -> dict[str, float]:
    """Return the counted FLOPs of one trace, those of the cost model, and its cache in bytes.

    The counter knows no causal mask, and neither does the prediction then.
    """
    torch.set_num_threads(1)
    shape = shape_of_config(model.config.to_dict(), "the base")
    thinking, cut = length.spec.budget, Cut.of(length.spec)
    chunks = cut_traces(thinking, length.query_tokens, cut, prefix_cache=False)
    if phase == "sampling":
        with make_counter() as counter:
            sample(model, length, 1)
        counted, predicted = counter.get_total_flops(), sampling_flops(shape, chunks)
    else:
        watch, count = _Counter(), 2  # a group has at least two traces
        train(model, made_up_traces(length, count), watch)
        counted = watch.counter.get_total_flops() / count
        predicted = training_flops(shape, chunks, masked=True)
    cache = cache_bytes(shape, longest_context(thinking, length.query_tokens, cut), 4)
    return {
        "flops": counted,
        "predicted_flops": float(predicted),
        "cache_bytes": float(cache),
    }
