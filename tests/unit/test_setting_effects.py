"""No option is silently ignored: each has an effect on an engine, or is refused by its name.

Every key of ``EngineConfig`` is held against both engines, in training and in evaluation, and every
option of sampling against all three ways to sample. A new key without a row here fails.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from fake_workers import FakeCluster
from virtual_time import run_in_virtual_time

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import make_qwen2  # noqa: E402

from delethink.chunking import ChunkSpec  # noqa: E402
from delethink.cli.main import main  # noqa: E402
from delethink.config import EngineConfig  # noqa: E402
from delethink.engines import factory, vllm  # noqa: E402
from delethink.engines import ray as ray_engine  # noqa: E402
from delethink.engines.base import WorkerPlace, WorkerSpec  # noqa: E402
from delethink.engines.engine_settings import (  # noqa: E402
    IN_PROCESS,
    TRAINING_ONLY,
    check_engine_settings,
)
from delethink.engines.openai_dialect import Dialect, make_request  # noqa: E402
from delethink.engines.pool import WorkerPool  # noqa: E402
from delethink.engines.scheduler import rank  # noqa: E402
from delethink.engines.transformers import TransformersEngine  # noqa: E402
from delethink.errors import ConfigError, DelethinkError  # noqa: E402
from delethink.policy import Sampling, SchedulingHint  # noqa: E402
from delethink.rollout import run_rollouts  # noqa: E402
from delethink.training.data_parallel import gather_places  # noqa: E402

EOS = 1
KEYS = tuple(key for key in EngineConfig.model_fields if key != "name")
# A value of each key that is not its default, and further settings that it needs.
VALUES: dict[str, dict[str, Any]] = {
    "num_engines": {"num_engines": 3},
    "gpus_per_engine": {"gpus_per_engine": 1.0},
    "cpus_per_engine": {"cpus_per_engine": 7.0},
    "tensor_parallel_size": {"tensor_parallel_size": 2},
    "placement": {"placement": "colocated"},
    "node_placement": {"node_placement": "spread"},
    "dtype": {"dtype": "bfloat16"},
    "max_batch_size": {"max_batch_size": 3},
    "max_model_tokens": {"max_model_tokens": 99},
    "kv_cache_gib": {"kv_cache_gib": 0.5},
    "gpu_memory_utilization": {"gpu_memory_utilization": 0.5, "gpus_per_engine": 1.0},
    "sleep": {"sleep": True, "gpus_per_engine": 1.0},
    "order": {"order": "depth"},
    "chunks_per_engine": {"chunks_per_engine": 2},
    "weight_transfer": {"weight_transfer": "nccl", "gpus_per_engine": 1.0},
    "weight_sync_timeout": {"weight_sync_timeout": 3.0},
    "verify_weights": {"verify_weights": "every"},
    "startup_timeout": {"startup_timeout": 7.0},
    "rollout_timeout": {"rollout_timeout": 5.0},
    "chunk_timeout": {"chunk_timeout": 4.0},
    "heartbeat_timeout": {"heartbeat_timeout": 3.0},
    "hang_timeout": {"hang_timeout": 9.0},
    "slow_factor": {"slow_factor": 2.0},
    "lost_timeout": {"lost_timeout": 5.0},
    "max_restarts": {"max_restarts": 1},
    "max_attempts": {"max_attempts": 2},
}


def test_every_key_has_a_row() -> None:
    assert set(VALUES) == set(KEYS)
    assert {*VLLM_ARGUMENTS, *PLACES, *POOL, *OTHERS} == set(KEYS)


@pytest.fixture(autouse=True)
def all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules are the same whether vLLM is installed or not."""
    monkeypatch.setattr(factory, "_is_installed", lambda package: True)


def differ(observe: Callable[[EngineConfig], Any], key: str) -> None:
    """Assert that a setting changes an observation, beside the others that it needs."""
    values = VALUES[key]
    others = {name: value for name, value in values.items() if name != key}
    assert observe(EngineConfig(**values)) != observe(EngineConfig(**others))


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
@pytest.mark.parametrize("key", KEYS)
def test_a_setting_without_effect_is_refused_by_its_name(
    key: str, engine: str, trains: bool
) -> None:
    config = EngineConfig(name=engine, **VALUES[key])
    has_effect = trains or key not in TRAINING_ONLY
    if engine == "transformers":
        # In training the weights are those of the trainer.
        has_effect = has_effect and key in IN_PROCESS - ({"dtype"} if trains else set())
    if has_effect:
        check_engine_settings(config, trains=trains)
        return
    with pytest.raises(ConfigError) as caught:
        check_engine_settings(EngineConfig(name=engine, **VALUES[key]), trains=trains)
    named = [f"engine.{name}=" for name in VALUES[key]]  # or what it needs, likewise in vain
    assert any(name in str(caught.value) for name in named)
    assert "leave it out" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("engine", ["transformers", "vllm", "auto"])
def test_defaults_are_never_refused(engine: str, trains: bool) -> None:
    config = EngineConfig(name=engine)
    check_engine_settings(config, trains=trains)
    # As they stand in the config.yaml of a run, where each key is written out.
    check_engine_settings(EngineConfig(**config.model_dump()), trains=trains)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"kv_cache_gib": 2, "gpus_per_engine": 1}, "engine.kv_cache_gib=2.0 sizes the cache on"),
        ({"gpu_memory_utilization": 0.5}, "engine.gpus_per_engine is 0: leave it out"),
    ],
)
def test_a_cache_of_another_device_is_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_engine_settings(EngineConfig(name="vllm", **values), trains=True)


def test_an_adapter_is_sent_to_the_engines_so_that_its_limit_has_an_effect() -> None:
    config = EngineConfig(name="vllm", weight_sync_timeout=900)
    check_engine_settings(config, trains=False, sends_weights=lambda: True)
    with pytest.raises(ConfigError, match="weight_sync_timeout=900.0 has an effect in training"):
        check_engine_settings(config, trains=False)


# -- the engine in this process ------------------------------------------------------------------


def create(model: Any = None, **values: Any) -> TransformersEngine:
    """An engine of transformers as ``make_engine`` makes it."""
    return TransformersEngine.create(
        EngineConfig(**values),
        "toy",
        model,
        SimpleNamespace(eos_token_id=EOS, pad_token_id=0),
        trust_remote_code=False,
        seed=0,
        is_trained=model is not None,
    )


def observe_in_process(key: str, values: Mapping[str, Any]) -> Any:
    """What a setting changes in the engine of this process."""
    if key == "dtype":
        return create(**values).model.dtype
    engine = create(make_qwen2(0, vocab_size=16), **values)
    if key == "max_model_tokens":
        return engine.max_model_tokens
    if key == "max_batch_size":

        async def sample() -> None:
            calls = [engine.generate((3, 4), 2, Sampling(seed=i)) for i in range(6)]
            await asyncio.gather(*calls)

        asyncio.run(sample())
        return engine.take_metrics()["engine/batch_occupancy"]
    assert key == "rollout_timeout"
    timeout = None if values.get(key) is None else 1e-9  # over when the first chunk is done
    spec = ChunkSpec(4, 2, 3, 0)
    (trace,) = asyncio.run(run_rollouts(engine, spec, [(3, 4)], [Sampling(0.0)], timeout=timeout))
    return trace.stop


@pytest.mark.parametrize("key", sorted(IN_PROCESS - {"name"}))
def test_a_setting_has_an_effect_on_the_engine_in_this_process(key: str) -> None:
    assert observe_in_process(key, VALUES[key]) != observe_in_process(key, {})


# -- vLLM ----------------------------------------------------------------------------------------

VLLM_ARGUMENTS = {
    "tensor_parallel_size",
    "dtype",
    "max_batch_size",
    "kv_cache_gib",
    "gpu_memory_utilization",
    "sleep",
    "weight_transfer",
}


@pytest.mark.parametrize("key", sorted(VLLM_ARGUMENTS))
def test_a_setting_changes_the_arguments_of_vllm(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only classes that hold arguments are stand-ins, as importing vLLM takes long."""
    holder = SimpleNamespace(
        AsyncEngineArgs=lambda **options: options, WeightTransferConfig=lambda kind: kind
    )
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", holder)
    monkeypatch.setitem(sys.modules, "vllm.config", holder)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(config=holder))
    differ(lambda c: vllm._engine_args(spec_of(c), "extension"), key)


def spec_of(config: EngineConfig) -> WorkerSpec:
    return WorkerSpec("a/b", config, (EOS,), config.max_model_tokens, False, 0, 1)


# -- workers -------------------------------------------------------------------------------------


class Placements:
    """The part of Ray that places workers."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.util = self

    def placement_group(self, bundles: list[Any], strategy: str) -> Any:
        self.asked.append((bundles, strategy))

        def wait(limit: float) -> bool:
            self.asked.append(limit)
            return True

        return SimpleNamespace(wait=wait)


PLACES = {"num_engines", "gpus_per_engine", "cpus_per_engine", "node_placement", "startup_timeout"}


@pytest.mark.parametrize("key", sorted(PLACES))
def test_a_setting_changes_what_is_asked_of_ray(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(config: EngineConfig) -> Any:
        places = Placements()
        monkeypatch.setattr(ray_engine, "ray", places)
        if key != "node_placement":
            config = config.model_copy(update={"node_placement": "pack"})
        cpus = ray_engine.cpus_per_engine(config)
        resources = {"num_cpus": cpus, "num_gpus": config.gpus_per_engine}
        ray_engine._reserve(config, resources)
        return places.asked

    differ(ask, key)


def play(
    config: EngineConfig,
    scenario: Callable[[WorkerPool, FakeCluster], Any],
    num_workers: int = 2,
    **settings: Any,
) -> Any:
    """Return what a scenario on a pool of fake workers shows, in virtual time."""
    cluster = FakeCluster(num_workers, **settings)
    config = config.model_copy(update={"num_engines": num_workers})

    async def run() -> Any:
        pool = WorkerPool(cluster.launch, config)
        await pool.start()
        try:
            found = await scenario(pool, cluster)
        except DelethinkError as error:
            found = type(error)
        seen = (found, asyncio.get_running_loop().time(), [len(x) for x in cluster.lives])
        await pool.close()
        return seen

    return run_in_virtual_time(run())


async def sample(pool: WorkerPool, number: int, limit: int = 30) -> list[Any]:
    calls = [pool.generate((5,), limit, Sampling(seed=i)) for i in range(number)]
    return await asyncio.gather(*calls, return_exceptions=True)


async def most_in_flight(pool: WorkerPool, cluster: FakeCluster) -> int:
    await sample(pool, 40)
    return cluster.now(0).most_in_flight


async def order_of_starts(pool: WorkerPool, cluster: FakeCluster) -> list[int]:
    """Begin with a full worker, so that the others wait and are ordered."""
    done: list[int] = []

    async def one(num_chunks: int) -> None:
        hint = SchedulingHint(num_chunks=num_chunks, max_chunks=12)
        await pool.generate((5,), 30, Sampling(seed=3, hint=hint))
        done.append(num_chunks)

    await asyncio.gather(sample(pool, 8, 200), *map(one, range(10)))
    return done


async def update(pool: WorkerPool, cluster: FakeCluster) -> None:
    for lives in cluster.lives:
        lives[-1].update_seconds = 20
    await pool.update_weights("b", 1)


async def stop_a_process(pool: WorkerPool, cluster: FakeCluster) -> None:
    """Stop a worker that has chunks; they come back from the other one, or after its restart."""
    tasks = asyncio.ensure_future(sample(pool, 8, 200))
    await asyncio.sleep(0.5)
    cluster.now(0).stopped = True
    await tasks
    await asyncio.sleep(60)


async def slow_one_down(pool: WorkerPool, cluster: FakeCluster) -> None:
    await sample(pool, 16)  # so that the pace is known
    cluster.now(0).seconds_per_token *= 200
    await sample(pool, 16, 2_000)  # longer than hang_timeout, which is the least limit


async def fail_always(pool: WorkerPool, cluster: FakeCluster) -> int:
    for lives in cluster.lives:
        lives[-1].raises = lambda prompt_ids: ValueError("fails")
    await sample(pool, 1)
    return sum(life.started for lives in cluster.lives for life in lives)


async def lose_all(pool: WorkerPool, cluster: FakeCluster) -> Any:
    for lives in cluster.lives:
        lives[-1].dead = True
    cluster.settings["start_seconds"] = 5_000.0
    (found,) = await sample(pool, 1)
    return type(found)


async def restart_in_vain(pool: WorkerPool, cluster: FakeCluster) -> Any:
    cluster.settings |= {"start_seconds": 1.0, "start_error": RuntimeError("does not start")}
    for lives in cluster.lives:
        lives[-1].dead = True
    (found,) = await sample(pool, 1)
    return type(found)


async def take_long(pool: WorkerPool, cluster: FakeCluster) -> Any:
    return [type(found) for found in await sample(pool, 4, 200)]


POOL: dict[str, tuple[Callable[[WorkerPool, FakeCluster], Any], dict[str, Any]]] = {
    "chunks_per_engine": (most_in_flight, {}),
    "order": (order_of_starts, {"num_workers": 1, "batch_size": 1}),
    "weight_sync_timeout": (update, {}),
    "chunk_timeout": (take_long, {"seconds_per_token": 0.1}),
    "heartbeat_timeout": (stop_a_process, {"seconds_per_token": 0.05}),
    "hang_timeout": (stop_a_process, {"seconds_per_token": 0.05}),
    "slow_factor": (slow_one_down, {"seconds_per_token": 0.1}),
    "lost_timeout": (lose_all, {"start_seconds": 5.0}),
    "max_restarts": (restart_in_vain, {}),
    "max_attempts": (fail_always, {}),
}


@pytest.mark.parametrize("key", sorted(POOL))
def test_a_setting_changes_what_the_pool_does(key: str) -> None:
    scenario, settings = POOL[key]
    differ(lambda config: play(config, scenario, **settings), key)


# Shown elsewhere in this file, or by what training makes of them.
OTHERS = {"max_model_tokens", "verify_weights", "rollout_timeout", "placement"}


def test_all_updates_are_verified_if_asked_for() -> None:
    def verifies(config: EngineConfig) -> bool:
        worker = vllm.VllmWorker(spec_of(config))
        worker._updates = 9
        return worker._verifies

    differ(verifies, "verify_weights")


def test_colocated_engines_get_places_beside_the_ranks() -> None:
    """Training with them is in test_colocated."""
    place = WorkerPlace("node 7", None)
    ranks: Any = SimpleNamespace(gather=lambda own: [own])
    recipe: Any = SimpleNamespace(trainer=SimpleNamespace(gpus_per_rank=0))
    context = SimpleNamespace(get_node_id=lambda: "node 7", get_accelerator_ids=dict)

    def places(config: EngineConfig) -> Any:
        recipe.engine = config
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ray.get_runtime_context", lambda: context)
            return gather_places(recipe, ranks)

    differ(places, "placement")
    assert places(EngineConfig(placement="colocated")) == [place]


def test_the_longest_sequence_of_vllm_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(ray_engine.RayPool, "__init__", lambda self, *a, **o: made.append(o))
    for config in (EngineConfig(**VALUES["max_model_tokens"]), EngineConfig()):
        vllm.VllmPool.create(
            config,
            "toy",
            make_qwen2(0, vocab_size=16),
            SimpleNamespace(eos_token_id=EOS),
            trust_remote_code=False,
            seed=0,
            is_trained=False,
        )
    assert [options["max_model_tokens"] for options in made] == [99, 256]


def test_rollouts_of_a_step_end_in_time() -> None:
    async def roll_out(pool: WorkerPool, cluster: FakeCluster, timeout: float | None) -> Any:
        policy = SimpleNamespace(generate=pool.generate)
        spec = ChunkSpec(40, 20, 6, 4)
        samplings = [Sampling(seed=i) for i in range(8)]
        queries = [(5, i + 2) for i in range(8)]
        traces = await run_rollouts(policy, spec, queries, samplings, timeout=timeout)
        return [trace.stop for trace in traces]

    def observe(config: EngineConfig) -> Any:
        limit = config.rollout_timeout
        return play(config, lambda p, c: roll_out(p, c, limit), seconds_per_token=0.2)

    differ(observe, "rollout_timeout")


# -- sampling ------------------------------------------------------------------------------------

WARM = Sampling(temperature=0.9, seed=1)
# Each option with a value that changes what is sampled.
OPTIONS: dict[str, Any] = {
    "temperature": 0.0,
    "seed": 2,
    "top_p": 0.2,
    "top_k": 1,
    "min_p": 0.9,
}


def test_every_option_of_sampling_has_a_row() -> None:
    assert {field.name for field in dataclasses.fields(Sampling)} == {*OPTIONS, "hint"}
    assert rank(SchedulingHint(num_chunks=1), "breadth") != rank(SchedulingHint(), "breadth")


@pytest.mark.parametrize("option", [*OPTIONS, "max_new_tokens", "eos_ids"])
def test_an_option_has_an_effect_in_this_process(option: str) -> None:
    model = make_qwen2(0, scale=1.2, vocab_size=16)
    with torch.no_grad():
        chosen = int(model(torch.tensor([[3, 4]])).logits[0, -1].argmax())

    def run(sampling: Sampling, limit: int = 24, ends: tuple[int, ...] = (EOS,)) -> Any:
        return asyncio.run(TransformersEngine(model, ends, 0).generate((3, 4), limit, sampling))

    if option == "max_new_tokens":
        assert len(run(Sampling(0.0), 3).token_ids) < len(run(Sampling(0.0), 4).token_ids)
    elif option == "eos_ids":
        assert run(Sampling(0.0), ends=(chosen,)) != run(Sampling(0.0), ends=(15,))
    else:
        assert run(dataclasses.replace(WARM, **{option: OPTIONS[option]})) != run(WARM)


@pytest.mark.parametrize("option", [*OPTIONS, "max_new_tokens", "eos_ids"])
def test_an_option_is_part_of_a_request_of_vllm(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins hold the arguments; tests/integration/test_cut_sampling_vllm.py runs vLLM."""
    holder = SimpleNamespace(SamplingParams=lambda **options: options)
    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=2, DELTA=1))
    monkeypatch.setitem(sys.modules, "vllm", holder)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)
    plain = vllm._sampling_params(24, WARM, (EOS,))
    changed = {
        "max_new_tokens": lambda: vllm._sampling_params(23, WARM, (EOS,)),
        "eos_ids": lambda: vllm._sampling_params(24, WARM, (EOS, 5)),
    }
    other = dataclasses.replace(WARM, **{k: v for k, v in OPTIONS.items() if k == option})
    assert changed.get(option, lambda: vllm._sampling_params(24, other, (EOS,)))() != plain


DIALECTS = {
    "vLLM": Dialect(),
    "ids, and text back": Dialect(answers="text"),
    "OpenAI": Dialect(answers="text", extends=False),
    "text": Dialect(asks="text", answers="text", extends=False),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("option", [*OPTIONS, "max_new_tokens"])
def test_an_option_is_part_of_a_request_of_a_server_or_refused(option: str, dialect: str) -> None:
    """Whether the server heeds it is probed in test_openai_dialects.py."""
    from chat_tokenizers import make_chat_tokenizer

    tokenizer = make_chat_tokenizer()

    def body(sampling: Sampling, limit: int = 24) -> Any:
        return make_request(
            DIALECTS[dialect], "m", tokenizer, (EOS,), (70, 71, 72), limit, sampling
        ).body

    plain = body(WARM)
    if option == "max_new_tokens":
        assert body(WARM, 23) != plain
        return
    other = dataclasses.replace(WARM, **{option: OPTIONS[option]})
    if option in ("top_k", "min_p") and not DIALECTS[dialect].extends:
        with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')}"):
            body(other)
        return
    assert body(other) != plain


# -- options of the commands ---------------------------------------------------------------------

EVAL = "eval -m toy --task automaton"
PROBE = "probe -m toy"
STEPS = "--task-arg min_steps=4 --task-arg max_steps=9"


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (f"{EVAL} --retries 3", "--retries needs --base-url"),
        (f"{EVAL} --timeout 3", "--timeout needs --base-url"),
        (f"{EVAL} --served-model x", "--served-model needs --base-url"),
        (f"{EVAL} --resamples 10", "--resamples needs --bootstrap"),
        (f"{EVAL} --temperature 0 --top-k 3 {STEPS}", "--top-k"),
        (f"{EVAL} engine=vllm engine.sleep=true engine.gpus_per_engine=1", "engine.sleep=True"),
        (f"{EVAL} engine=vllm engine.weight_sync_timeout=9", "engine.weight_sync_timeout=9.0"),
        (f"{EVAL} engine=vllm engine.verify_weights=every", "engine.verify_weights=every"),
        (f"{EVAL} engine=vllm engine.rollout_timeout=9", "engine.rollout_timeout=9.0"),
        (f"{EVAL} engine=vllm engine.gpu_memory_utilization=0.5", "gpu_memory_utilization=0.5"),
        (f"{EVAL} engine=transformers engine.num_engines=2", "engine.num_engines=2"),
        (f"{EVAL} engine=transformers engine.kv_cache_gib=2", "engine.kv_cache_gib=2.0"),
        (f"{EVAL} engine=transformers engine.order=depth", "engine.order=depth"),
        (f"{EVAL} --base-url http://127.0.0.1:9/v1 engine.dtype=float16", "engine.dtype=float16"),
        (f"{PROBE} --traces x.jsonl --temperature 0.1", "--temperature has no effect"),
        (f"{PROBE} --traces x.jsonl --budget 3k", "--budget has no effect"),
        (f"{PROBE} --traces x.jsonl --seed 3", "--seed has no effect: --traces samples nothing"),
        (f"{PROBE} --traces x.jsonl --num-problems 3", "--num-problems has no effect"),
        (f"{PROBE} --traces x.jsonl --task-arg a=1", "--task-arg has no effect"),
        (f"{PROBE} --task automaton --retries 3", "--retries needs --base-url"),
        (f"{PROBE} --task automaton engine.num_engines=2", "engine.num_engines=2 applies to"),
    ],
)
def test_an_option_of_a_command_without_effect_is_one_sentence(
    command: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    assert main([*command.split(), "-o", "never made"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert named in lines[0]


def test_the_table_is_whole() -> None:
    """Each key is refused or shown, for both engines."""
    shown = [*VLLM_ARGUMENTS, *PLACES, *POOL, *OTHERS]
    assert len(shown) == len(set(shown))
    assert set(itertools.chain(IN_PROCESS, TRAINING_ONLY)) <= {*EngineConfig.model_fields}
