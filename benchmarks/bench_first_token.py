"""Seconds from the start of a command to its first sampled token, and the longest silence of it.

Run it with ``python benchmarks/bench_first_token.py --rounds 2``. Each round runs the real commands
as processes on a terminal of their own: ``train`` on the quickstart in process and with vLLM, a
bare start of Ray and vLLM with the same settings, and ``doctor`` on both recipes. The order turns
with the round.

The engines are those of the library, with a line written at the first token.
"""

from __future__ import annotations

import argparse
import os
import pty
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve()
RECIPE = HERE.parents[1] / "recipes" / "quickstart" / "recipe.yaml"
FIRST_TOKEN = "DELETHINK_FIRST_TOKEN"  # file that says when the first token was sampled
TIMEOUT_S = 600
STOP_TIMEOUT_S = 60


class Measured(NamedTuple):
    """A command's seconds to its first token or its end, and the longest time without output."""

    seconds: float
    silence_s: float


def note_first_token() -> None:
    """Write the time, once."""
    path = Path(os.environ[FIRST_TOKEN])
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(str(time.time()))
        part.rename(path)


# -- engines with a clock, which a recipe names as bench_first_token:ClockedPool


def __getattr__(name: str) -> Any:
    """Make an engine class when it is asked for, since each imports its libraries."""
    if name == "ClockedEngine":
        return _clocked_engine()
    if name in ("ClockedPool", "ClockedWorker"):
        pool, worker = _clocked_pool()
        return pool if name == "ClockedPool" else worker
    raise AttributeError(name)


def _clocked_engine() -> Any:
    from delethink.engines import transformers

    sample = transformers._Sampler.__call__

    def sample_and_note(self: Any, *args: Any) -> Any:
        found = sample(self, *args)
        note_first_token()
        return found

    transformers._Sampler.__call__ = sample_and_note  # type: ignore[method-assign]
    return transformers.TransformersEngine


def _clocked_pool() -> tuple[Any, Any]:
    from delethink.engines.vllm import VllmPool, VllmWorker

    class ClockedWorker(VllmWorker):
        """Notes the first token after the warm-up."""

        async def start(self) -> Any:
            state = await super().start()
            record = self._counter.record

            def record_and_note(*args: Any, **kwargs: Any) -> None:
                record(*args, **kwargs)
                if self._counter.counts.tokens:
                    note_first_token()

            self._counter.record = record_and_note
            return state

    class ClockedPool(VllmPool):
        worker_class = ClockedWorker

    return ClockedPool, ClockedWorker


# -- a bare start of Ray and vLLM -----------------------------------------------------------------


def bare() -> None:
    """Start Ray, an actor and vLLM's engine in it, and sample a token."""
    import ray

    folder = str(HERE.parents[1] / "delethink" / "assets" / "toy_reasoner")
    os.environ.setdefault("RAY_worker_niceness", "0")  # as ours: else others take its cores
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)

    class Engine:
        async def sample(self) -> int:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            os.environ["TORCH_COMPILE_DISABLE"] = "1"
            os.environ["OMP_NUM_THREADS"] = "1"
            from vllm import SamplingParams
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            arguments = AsyncEngineArgs(
                model=folder,
                load_format="safetensors",
                skip_tokenizer_init=True,
                dtype="float32",
                max_model_len=465,  # of the quickstart
                enforce_eager=True,
                kv_cache_memory_bytes=2**30,
                enable_chunked_prefill=False,
                distributed_executor_backend="uni",
                disable_log_stats=True,
            )
            engine = AsyncLLM.from_engine_args(arguments)
            params = SamplingParams(max_tokens=1, detokenize=False)
            async for output in engine.generate({"prompt_token_ids": [2, 3]}, params, "1"):
                token = int(output.outputs[0].token_ids[0])
            return token

    actor = ray.remote(num_cpus=1)(Engine).remote()
    ray.get(actor.sample.remote())
    note_first_token()
    print("sampled", flush=True)
    time.sleep(STOP_TIMEOUT_S)  # until this process is ended


# -- measurement -----------------------------------------------------------------------------------


def measure(arguments: list[str], folder: Path, until_token: bool) -> Measured:
    """Run a command on a terminal until its first token, or until its end."""
    mark = folder / "first_token"
    mark.unlink(missing_ok=True)
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        FIRST_TOKEN: str(mark),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TERM": "xterm",
    }
    ours, theirs = pty.openpty()
    began = shown = time.time()
    process = subprocess.Popen(
        [sys.executable, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    silence, tail, end = 0.0, b"", None
    try:
        while end is None:
            if select.select([ours], [], [], 0.02)[0]:
                try:
                    piece = os.read(ours, 65_536)
                except OSError:  # the other side is closed
                    piece = b""
                if piece:
                    now = time.time()
                    silence, shown, tail = max(silence, now - shown), now, (tail + piece)[-4000:]
            if mark.exists():
                end = float(mark.read_text())
            elif process.poll() is not None:
                if until_token:
                    raise RuntimeError(f"{arguments} ended early:\n{tail.decode(errors='replace')}")
                end = time.time()
            elif time.time() - began > TIMEOUT_S:
                raise RuntimeError(f"{arguments} took too long:\n{tail.decode(errors='replace')}")
        return Measured(end - began, max(silence, end - shown))
    finally:
        process.terminate()  # a shell in the background has SIGINT ignored
        _drain(ours, process)
        os.close(ours)


def _drain(terminal: int, process: subprocess.Popen[bytes]) -> None:
    """Read until a process has ended; kill it after a while."""
    end = time.monotonic() + STOP_TIMEOUT_S
    while process.poll() is None:
        if time.monotonic() > end:
            process.kill()
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                os.read(terminal, 65_536)
            except OSError:
                process.wait()


def commands(folder: Path) -> dict[str, tuple[list[str], bool]]:
    """Return the commands, and whether each is measured to its first token."""
    train = ["-m", "delethink.cli.main", "train", str(RECIPE)]
    local = [f"output={folder / 'local'}", "engine=bench_first_token:ClockedEngine"]
    pool = [f"output={folder / 'pool'}", "engine=bench_first_token:ClockedPool"]
    doctor = ["-m", "delethink.cli.main", "doctor", str(RECIPE)]
    return {
        "train, in process": ([*train, *local], True),
        "train, vLLM": ([*train, *pool], True),
        "bare Ray and vLLM": ([str(HERE), "--bare"], True),
        "doctor": (doctor, False),
        "doctor, vLLM": ([*doctor, "engine=vllm"], False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="rows to measure")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        bare()
        return
    found: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory() as name:
        for number in range(arguments.rounds):
            rows = list(commands(Path(name) / str(number)).items())
            for row, (command, until_token) in rows if number % 2 == 0 else reversed(rows):
                if arguments.only and row not in arguments.only:
                    continue
                folder = Path(name) / f"{number}-{len(found)}"
                folder.mkdir(exist_ok=True)
                measured = measure(command, folder, until_token)
                found.setdefault(row, []).append(measured)
                print(f"round {number + 1}: {row}: {measured}", flush=True)
    print(f"\n{'medians':<22}{'seconds':>9}{'longest silence, s':>20}")
    for row, values in found.items():
        seconds = statistics.median(value.seconds for value in values)
        silence = max(value.silence_s for value in values)
        print(f"{row:<22}{seconds:>9.1f}{silence:>20.1f}")


if __name__ == "__main__":
    main()
