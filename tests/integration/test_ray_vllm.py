"""Real vLLM engines in real Ray actors, held against plain forward passes of the same weights.

Two workers are started once; the tests that damage them come last, in this order.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import os
import random
import re
import signal
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil
import pytest
from installed import need
from processes import assert_gone, started, wait_until

from delethink.chunking import ChunkSpec, start
from delethink.config import EngineConfig
from delethink.errors import ConfigError, PolicyError, WeightSyncError
from delethink.policy import Completion, Sampling
from delethink.rollout import run_rollouts
from delethink.types import StopReason, TokenIds

ray = pytest.importorskip("ray")
need("vllm")
torch = pytest.importorskip("torch")

from delethink.engines.low_rank import LowRankChange  # noqa: E402
from delethink.engines.vllm import VllmPool  # noqa: E402
from delethink.engines.weight_check import Columns, Pair, is_loaded, pair_weights  # noqa: E402

if TYPE_CHECKING:
    from conftest import TinyModel

pytestmark = pytest.mark.integration

EOS = 1
MAX_MODEL_TOKENS = 256
PROMPTS = [(5, 9, 3, 17), (11, 2), (7, 7, 20, 4, 13, 19), (23,)]
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def pool(
    others: set[psutil.Process], tiny_models: tuple[TinyModel, TinyModel], own_ray: None
) -> Iterator[VllmPool]:
    config = EngineConfig(
        num_engines=2, kv_cache_gib=0.25, weight_sync_timeout=60, startup_timeout=1200
    )
    pool = VllmPool(
        tiny_models[0].folder, config, eos_ids=(EOS,), max_model_tokens=MAX_MODEL_TOKENS
    )
    yield pool
    pool.close()


def complete(
    pool: VllmPool, prompts: list[TokenIds], limit: int, samplings: list[Sampling]
) -> list[Completion]:
    """All at once, in an event loop of their own."""

    async def scenario() -> list[Completion]:
        pairs = zip(prompts, samplings, strict=True)
        return await asyncio.gather(*[pool.generate(p, limit, s) for p, s in pairs])

    return asyncio.run(scenario())


def assert_greedy(model: TinyModel, prompt: TokenIds, completion: Completion) -> None:
    choices, logprobs = model.forward(prompt, completion.token_ids)
    assert list(completion.token_ids) == choices
    assert list(completion.logprobs) == pytest.approx(logprobs, abs=1e-3)


def test_greedy_tokens_are_those_of_a_plain_forward_pass(
    pool: VllmPool, tiny_models: tuple[TinyModel, TinyModel]
) -> None:
    for prompt, completion in zip(
        PROMPTS, complete(pool, PROMPTS, 24, [GREEDY] * len(PROMPTS)), strict=True
    ):
        assert_greedy(tiny_models[0], prompt, completion)
        assert completion.policy_version == 0


def test_logprobs_are_those_of_the_distribution_that_was_sampled(
    pool: VllmPool, tiny_models: tuple[TinyModel, TinyModel]
) -> None:
    samplings = [Sampling(temperature=0.7, seed=i) for i in range(len(PROMPTS))]
    # Greedy requests share the batch: each row must have its own temperature.
    completions = complete(pool, PROMPTS * 2, 24, samplings + [GREEDY] * len(PROMPTS))
    for prompt, completion in zip(PROMPTS, completions[: len(PROMPTS)], strict=True):
        _, logprobs = tiny_models[0].forward(prompt, completion.token_ids, temperature=0.7)
        assert list(completion.logprobs) == pytest.approx(logprobs, abs=1e-3)
    for prompt, completion in zip(PROMPTS, completions[len(PROMPTS) :], strict=True):
        assert_greedy(tiny_models[0], prompt, completion)


def test_a_completion_ends_with_eos_or_at_its_limit(pool: VllmPool) -> None:
    completions = complete(pool, [PROMPTS[0]] * 32, 40, [Sampling(seed=i) for i in range(32)])
    ended = [c for c in completions if c.stop is StopReason.EOS]
    full = [c for c in completions if c.stop is StopReason.LENGTH]
    assert ended
    assert full
    assert len(ended) + len(full) == len(completions)
    assert all(c.token_ids.index(EOS) == len(c.token_ids) - 1 for c in ended)
    assert all(len(c.token_ids) == 40 and EOS not in c.token_ids for c in full)


def test_requests_go_to_the_worker_with_the_fewest_tokens_in_flight(pool: VllmPool) -> None:
    before = [worker.completions for worker in pool.workers]
    complete(pool, [PROMPTS[0]] * 16, 8, [Sampling(seed=i) for i in range(16)])
    gained = [w.completions - b for w, b in zip(pool.workers, before, strict=True)]
    assert gained == [8, 8]
    assert [len(worker.chunks) for worker in pool.workers] == [0, 0]


def test_a_seed_gives_the_same_tokens_on_either_worker(pool: VllmPool) -> None:
    before = [worker.completions for worker in pool.workers]
    completions = complete(pool, [PROMPTS[2]] * 6, 24, [Sampling(seed=5)] * 6)
    assert {worker.completions - b for worker, b in zip(pool.workers, before, strict=True)} == {3}
    assert len({completion.token_ids for completion in completions}) == 1
    unseeded = complete(pool, [PROMPTS[2]] * 6, 24, [Sampling()] * 6)
    assert len({completion.token_ids for completion in unseeded}) > 1


def test_a_request_that_does_not_fit_is_refused(pool: VllmPool) -> None:
    assert pool.max_model_tokens == MAX_MODEL_TOKENS
    with pytest.raises(ConfigError, match="257 tokens.*max_model_tokens=256"):
        complete(pool, [(5,) * 250], 7, [Sampling()])
    with pytest.raises(ConfigError, match="temperature must be 0 or at least"):
        complete(pool, [(5,)], 7, [Sampling(temperature=1e-3)])


def test_an_abandoned_request_does_not_hold_up_new_weights(
    pool: VllmPool, tiny_models: tuple[TinyModel, TinyModel]
) -> None:
    async def abandon() -> None:
        requests = [pool.generate((5,), 250, Sampling(seed=i)) for i in range(64)]
        tasks = [asyncio.create_task(request) for request in requests]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(abandon())
    pool.update_weights(tiny_models[0].model.state_dict(), version=1)
    assert [len(worker.chunks) for worker in pool.workers] == [0, 0]


def test_an_update_waits_for_requests_in_flight_and_holds_new_ones(
    pool: VllmPool, tiny_models: tuple[TinyModel, TinyModel]
) -> None:
    weights = tiny_models[0].model.state_dict()
    pool.update_weights(weights, version=2)
    # Let in all at once, these are more than a batch takes. vLLM would split the prompt of one of
    # them, and with a seed its engine dies of that on the CPU.
    prompts = [tuple(random.Random(k).choices(range(2, 24), k=240)) for k in range(256)]
    samplings = [Sampling(seed=k) for k in range(256)]

    async def scenario() -> tuple[list[Completion], list[Completion]]:
        early = [asyncio.create_task(pool.generate((5,), 250, Sampling(seed=i))) for i in range(64)]
        await asyncio.sleep(0.05)
        update = asyncio.create_task(asyncio.to_thread(pool.update_weights, weights, 3))
        await asyncio.sleep(0.2)
        late = [pool.generate(p, 8, s) for p, s in zip(prompts, samplings, strict=True)]
        answers = await asyncio.gather(*early), await asyncio.gather(*late)
        await update
        return answers

    early, late = asyncio.run(scenario())
    assert {completion.policy_version for completion in early} == {2}
    assert {completion.policy_version for completion in late} == {3}
    for k in (0, 100, 255):
        (alone,) = complete(pool, [prompts[k]], 8, [samplings[k]])
        assert alone.token_ids == late[k].token_ids


def test_new_weights_reach_every_worker_and_nothing_old_is_left(
    pool: VllmPool, tiny_models: tuple[TinyModel, TinyModel]
) -> None:
    # Longer than a block of the prefix cache, so that what old weights left there would be found.
    prompt = tuple(2 + i % 22 for i in range(200))
    for version, model in ((4, tiny_models[1]), (5, tiny_models[0]), (6, tiny_models[1])):
        pool.update_weights(model.model.state_dict(), version)
        before = [worker.completions for worker in pool.workers]
        for completion in complete(pool, [prompt] * 4, 24, [GREEDY] * 4):
            assert_greedy(model, prompt, completion)
            assert completion.policy_version == version
        assert all(w.completions > b for w, b in zip(pool.workers, before, strict=True))


def test_ray_exports_what_the_pool_counts(pool: VllmPool) -> None:
    complete(pool, PROMPTS, 8, [GREEDY] * len(PROMPTS))
    taken = pool.take_metrics()
    (node,) = ray.nodes()
    address = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"

    def exported() -> dict[str, float]:
        with urllib.request.urlopen(address, timeout=10) as page:
            lines = page.read().decode().splitlines()
        found = {}
        for line in lines:
            if line.startswith("ray_delethink_"):
                name, value = line.rsplit(" ", 1)
                worker = re.search(r'worker="(worker \d)"', name)
                found[name.partition("{")[0] + (worker[1] if worker else "")] = float(value)
        return found

    wait_until(lambda: "ray_delethink_worker_chunksworker 1" in exported())
    seen = exported()
    assert seen["ray_delethink_workers"] == taken["engine/workers"] == 2
    chunks = [f"ray_delethink_worker_chunksworker {i}" for i in range(2)]
    assert [seen[name] for name in chunks] == [taken[f"engine/worker {i}/chunks"] for i in range(2)]
    assert sum(seen[name] for name in chunks) >= len(PROMPTS)


def test_traces_follow_the_chunk_rule(pool: VllmPool) -> None:
    spec = ChunkSpec(context_size=24, carryover_size=12, max_chunks=4, head_size=3)
    queries = PROMPTS * 4
    samplings = [Sampling(seed=i) for i in range(len(queries))]
    traces = asyncio.run(run_rollouts(pool, spec, queries, samplings, pool.max_model_tokens))
    assert max(len(trace.chunks) for trace in traces) > 2
    assert len({chunk.policy_version for trace in traces for chunk in trace.chunks}) == 1
    for query, trace in zip(queries, traces, strict=True):
        assert trace.error is None
        state = start(spec, query)
        for chunk in trace.chunks:
            assert chunk.prompt_ids == query + state.carried
            assert chunk.carried == len(state.carried)
            assert len(chunk.output_ids) <= state.max_new_tokens
            state = state.advance(chunk.output_ids, chunk.stop)
        assert trace.stop is state.stop


@pytest.mark.parametrize("mistake", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_are_refused_by_every_worker(
    pool: VllmPool, tiny_models: tuple[TinyModel, TinyModel], mistake: str
) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    weights = dict(tiny_models[0].model.state_dict())
    if mistake == "missing":
        del weights[name]
    elif mistake == "unknown":
        weights["model.layers.9.nothing.weight"] = weights[name]
    else:
        weights[name] = weights[name][:-1]
    with pytest.raises(WeightSyncError, match="version 7") as caught:
        pool.update_weights(weights, version=7)
    for worker in pool.workers:
        assert f"{worker.name} (process {worker.pid})" in str(caught.value)
    with pytest.raises(PolicyError, match="takes no requests since an update of weights failed"):
        complete(pool, [PROMPTS[0]], 8, [GREEDY])
    pool.update_weights(tiny_models[0].model.state_dict(), version=8)
    (completion,) = complete(pool, [PROMPTS[0]], 8, [GREEDY])
    assert_greedy(tiny_models[0], PROMPTS[0], completion)
    assert completion.policy_version == 8


def changes_of(model: TinyModel) -> tuple[TinyModel, dict[str, LowRankChange]]:
    """Return the model with changed weights, and the changes: of one part of a fused layer too."""
    merged, changes = copy.deepcopy(model.model), {}
    torch.manual_seed(0)
    for name in (
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ):
        weight = merged.get_parameter(name)
        rows, columns = weight.shape
        change = LowRankChange(torch.randn(2, columns), torch.randn(rows, 2), 0.5)
        changes[name] = change
        weight.data = change.added_to(weight.data)
    return dataclasses.replace(model, model=merged), changes


def test_low_rank_changes_give_the_merged_weights(
    pool: VllmPool, tiny_models: tuple[TinyModel, TinyModel]
) -> None:
    assert pool.merge_obstacle() is None
    merged, changes = changes_of(tiny_models[1])
    none = {name: change._replace(scale=0.0) for name, change in changes.items()}
    pool.update_weights(merged.model.state_dict(), version=20)
    whole = complete(pool, PROMPTS, 8, [GREEDY] * len(PROMPTS))
    pool.update_weights(tiny_models[1].model.state_dict(), version=21)
    for version, model, sent in ((22, merged, changes), (23, tiny_models[1], none)):
        pool.merge_weights(sent, version)
        before = [worker.completions for worker in pool.workers]
        for prompt, completion in zip(
            PROMPTS * 2, complete(pool, PROMPTS * 2, 8, [GREEDY] * 2 * len(PROMPTS)), strict=True
        ):
            assert_greedy(model, prompt, completion)
            assert completion.policy_version == version
        assert all(w.completions > b for w, b in zip(pool.workers, before, strict=True))
    pool.merge_weights(changes, 24)
    again = complete(pool, PROMPTS, 8, [GREEDY] * len(PROMPTS))
    assert [list(c.logprobs) for c in again] == [list(c.logprobs) for c in whole]
    name, change = changes.popitem()
    misfit = {**changes, name: change._replace(down=change.down[:, 1:])}
    with pytest.raises(WeightSyncError, match="and its change"):
        pool.merge_weights(misfit, 25)
    pool.update_weights(tiny_models[0].model.state_dict(), version=26)


def test_the_chunks_of_a_killed_worker_are_sampled_by_others_and_it_comes_back(
    pool: VllmPool, tiny_models: tuple[TinyModel, TinyModel]
) -> None:
    victim, _ = pool.workers
    pool.take_metrics()
    samplings = [Sampling(seed=i) for i in range(64)]
    undisturbed = complete(pool, [(5,)] * 64, 250, samplings)

    async def scenario() -> list[Completion]:
        requests = [pool.generate((5,), 250, sampling) for sampling in samplings]
        tasks = [asyncio.create_task(request) for request in requests]
        await asyncio.sleep(0.05)
        os.kill(victim.pid, signal.SIGKILL)
        return await asyncio.gather(*tasks)

    engine = psutil.Process(victim.pid).children(recursive=True)
    answers = asyncio.run(scenario())
    assert [answer.token_ids for answer in answers] == [c.token_ids for c in undisturbed]
    assert_gone(engine)
    merged, changes = changes_of(tiny_models[0])
    pool.merge_weights(changes, version=27)  # the new worker loads their base first
    wait_until(lambda: victim.in_service)
    before = victim.completions
    for completion in complete(pool, [PROMPTS[0]] * 8, 8, [GREEDY] * 8):
        assert_greedy(merged, PROMPTS[0], completion)
        assert completion.policy_version == 27
    assert victim.completions > before
    metrics = pool.take_metrics()
    assert metrics["engine/restarts"] == 1
    assert 1 <= metrics["engine/chunks_rescheduled"] <= 64
    assert metrics["engine/chunks_failed"] == 0
    for index in range(2):
        assert metrics[f"engine/worker {index}/tokens_per_second"] > 0
        assert metrics[f"engine/worker {index}/batch_occupancy"] > 0


def test_a_closed_pool_leaves_no_process(pool: VllmPool, others: set[psutil.Process]) -> None:
    processes = started() - others
    pids = {process.pid for process in processes}
    assert all(worker.pid in pids for worker in pool.workers), pids
    pool.close()
    pool.close()
    assert_gone(processes)
    with pytest.raises(PolicyError, match="closed"):
        complete(pool, [PROMPTS[0]], 8, [GREEDY])


def recorded(weights: dict[str, torch.Tensor]) -> dict[str, Columns]:
    return {name: Columns.of(tensor) for name, tensor in weights.items()}


def test_an_update_that_was_not_applied_is_seen() -> None:
    class Fused(torch.nn.Module):
        packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.attention = torch.nn.ModuleDict({"qkv_proj": torch.nn.Linear(8, 12, bias=False)})

    model = Fused()
    held = model.attention["qkv_proj"].weight.detach()
    parts = [f"attention.{part}_proj.weight" for part in "qkv"]
    sent = dict(zip(parts, held.clone().split(4), strict=True))
    (pair,) = pair_weights(model, recorded(sent))
    assert isinstance(pair, Pair)
    assert is_loaded(pair)
    for name in parts:
        changed = sent[name].clone()
        changed[-1, -1] *= 1 + 1e-6
        assert not is_loaded(pair_weights(model, {**recorded(sent), name: Columns.of(changed)})[0])
