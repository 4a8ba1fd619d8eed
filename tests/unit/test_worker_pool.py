"""The pool against workers that fail in every way, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fake_workers import FakeCluster, FakeWorker, sampled
from virtual_time import run_in_virtual_time

from delethink.chunking import ChunkSpec
from delethink.config import EngineConfig
from delethink.engines.pool import WorkerPool
from delethink.engines.scheduler import rank
from delethink.errors import (
    ConfigError,
    DeadlineError,
    MissingExtraError,
    PolicyError,
    WeightSyncError,
    WorkersLostError,
)
from delethink.policy import Completion, Sampling, SchedulingHint
from delethink.rollout import run_rollouts
from delethink.types import TokenIds, Trace, TraceStop

SPEC = ChunkSpec(context_size=40, carryover_size=20, max_chunks=6, head_size=4)
QUERIES = [(5, 6, 7, 10 + i // 4) for i in range(32)]


class PoolPolicy:
    """The policy protocol over a pool in the same event loop."""

    def __init__(self, pool: WorkerPool) -> None:
        self.generate = pool.generate


# Seeds of chunks that go to their limit of 30 tokens.
LONG_SEEDS = [s for s in range(100) if len(sampled((5,), 30, Sampling(seed=s))[0]) == 30]


def make_pool(cluster: FakeCluster, **settings: Any) -> WorkerPool:
    config = EngineConfig(num_engines=len(cluster.lives), **settings)
    return WorkerPool(cluster.launch, config)


def run(
    cluster: FakeCluster,
    scenario: Callable[[WorkerPool], Awaitable[Any]],
    **settings: Any,
) -> Any:
    """Run a scenario on a pool of the cluster's workers, and close the pool."""

    async def all_of_it() -> Any:
        pool = make_pool(cluster, **settings)
        try:
            await pool.start()
            return await scenario(pool)
        finally:
            await pool.close()
            for lives in cluster.lives:
                assert all(life.dead for life in lives)

    return run_in_virtual_time(all_of_it())


async def roll_out(pool: WorkerPool, timeout: float | None = None) -> list[Trace]:
    samplings = [Sampling(seed=i) for i in range(len(QUERIES))]
    policy = PoolPolicy(pool)
    return await run_rollouts(policy, SPEC, QUERIES, samplings, timeout=timeout)  # type: ignore[arg-type]


def undisturbed() -> list[Trace]:
    traces: list[Trace] = run(FakeCluster(2), roll_out)
    assert max(len(trace.chunks) for trace in traces) > 3
    return traces


async def sample(pool: WorkerPool, *seeds: int, prompt: TokenIds = (5,)) -> list[Completion]:
    return await asyncio.gather(*[pool.generate(prompt, 30, Sampling(seed=s)) for s in seeds])


def test_traces_do_not_depend_on_the_number_of_workers() -> None:
    alone: list[Trace] = run(FakeCluster(1, batch_size=1), roll_out)
    assert alone == undisturbed()


def test_a_stream_gives_its_tokens_as_they_come_and_is_not_repeated_after_a_fault() -> None:
    async def scenario(pool: WorkerPool) -> list[list[int]]:
        heard = list[list[int]]()
        for faulty in (False, True):
            so_far = list[int]()

            def listen(ids: TokenIds, _: object, so_far: list[int] = so_far) -> None:
                so_far.extend(ids)
                if len(so_far) == 5 and faulty:  # noqa: B023  # used in this round alone
                    worker = next(w for w in pool.workers if w.chunks)
                    assert isinstance(worker.handle, FakeWorker)
                    worker.handle.dead = True

            heard.append(so_far)
            call = pool.generate((5,), 30, Sampling(seed=3), listen)
            if faulty:
                with pytest.raises(PolicyError, match=r"worker \d .*is dead"):
                    await call
            else:
                assert list((await call).token_ids) == so_far
        assert pool.faults.chunks_rescheduled == 1
        (again,) = await sample(pool, 3)  # the other worker serves on
        assert list(again.token_ids) == heard[0]
        return heard

    whole, part = run(FakeCluster(2), scenario)
    assert part == whole[:5]


def test_a_stream_without_a_token_yet_goes_to_another_worker() -> None:
    async def scenario(pool: WorkerPool) -> None:
        heard = list[int]()
        call = pool.generate((5,), 30, Sampling(seed=3), lambda ids, _: heard.extend(ids))
        task = asyncio.ensure_future(call)
        while not any(worker.chunks for worker in pool.workers):
            await asyncio.sleep(0.001)
        worker = next(w for w in pool.workers if w.chunks)
        assert isinstance(worker.handle, FakeWorker)
        worker.handle.dead = True
        assert list((await task).token_ids) == heard

    run(FakeCluster(2), scenario)


Fault = Callable[[FakeWorker], None]


def die(worker: FakeWorker) -> None:
    worker.dead = True


def hang(worker: FakeWorker) -> None:
    worker.stopped = True


def hang_engine(worker: FakeWorker) -> None:
    worker.engine_stopped = True


def slow_down(worker: FakeWorker) -> None:
    worker.seconds_per_token *= 200


def raise_always(worker: FakeWorker) -> None:
    worker.raises = lambda prompt_ids: PolicyError("failed: out of memory")


def lose_engine(worker: FakeWorker) -> None:
    worker.raises = lambda prompt_ids: ConnectionError("has lost its vLLM engine process")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (die, "is dead"),
        (hang, "hangs: no heartbeat"),
        (hang_engine, "hangs: its engine made no step"),
        (slow_down, "is slow"),
        (raise_always, "only raised"),
        (lose_engine, "lost its vLLM engine"),
    ],
)
def test_a_fault_costs_time_and_nothing_else(fault: Fault, said: str) -> None:
    cluster = FakeCluster(2)

    async def scenario(pool: WorkerPool) -> tuple[list[Trace], dict[str, float]]:
        running = asyncio.ensure_future(roll_out(pool))
        await asyncio.sleep(0.5)
        fault(cluster.now(0))
        traces = await running
        while not pool.workers[0].in_service:
            await asyncio.sleep(1)
        assert said in pool.workers[0].reason
        assert pool.workers[0].restarts == 1
        assert not cluster.now(0).dead
        assert cluster.lives[0][0].dead
        await sample(pool, *range(20))
        assert cluster.now(0).started
        return traces, await pool.take_metrics()

    traces, metrics = run(cluster, scenario, hang_timeout=5, slow_factor=50)
    assert traces == undisturbed()
    assert metrics["restarts"] == 1
    assert metrics["workers"] == 2
    assert metrics["worker 0/restarts"] == 1
    assert 1 <= metrics["chunks_rescheduled"] <= 20
    assert metrics["chunks_failed"] == 0


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_doubled_or_mixed_up_under_any_sequence_of_faults(seed: int) -> None:
    rng = random.Random(seed)
    cluster = FakeCluster(3, start_seconds=2.0)
    faults: list[Fault] = [die, hang, hang_engine, slow_down, raise_always, lose_engine]

    async def scenario(pool: WorkerPool) -> list[Trace]:
        running = asyncio.ensure_future(roll_out(pool))
        while not running.done():
            await asyncio.sleep(rng.uniform(0, 2))
            rng.choice(faults)(cluster.now(rng.randrange(3)))
        assert pool.num_waiting == 0
        return await running

    assert run(cluster, scenario, hang_timeout=3, max_attempts=1000) == undisturbed()


def test_each_chunk_names_the_worker_that_sampled_it() -> None:
    names = {chunk.worker for trace in undisturbed() for chunk in trace.chunks}
    assert names == {"worker 0", "worker 1"}


def test_a_short_stop_is_borne() -> None:
    cluster = FakeCluster(2)

    async def scenario(pool: WorkerPool) -> list[Trace]:
        running = asyncio.ensure_future(roll_out(pool))
        await asyncio.sleep(0.5)
        cluster.now(0).stopped = True
        await asyncio.sleep(3)
        cluster.now(0).stopped = False
        traces = await running
        assert [worker.restarts for worker in pool.workers] == [0, 0]
        return traces

    assert run(cluster, scenario, hang_timeout=30) == undisturbed()


def test_chunks_of_a_silent_worker_go_to_others_before_it_is_given_up() -> None:
    cluster = FakeCluster(2)

    async def scenario(pool: WorkerPool) -> list[Trace]:
        running = asyncio.ensure_future(roll_out(pool))
        await asyncio.sleep(0.5)
        cluster.now(0).stopped = True
        traces = await running  # all of them, while one worker is stopped
        taken = await pool.take_metrics()
        assert taken["chunks_rescheduled"] >= 1
        assert (taken["restarts"], taken["workers"]) == (0, 2)
        cluster.now(0).stopped = False
        await asyncio.sleep(10)
        before = cluster.now(0).tokens
        await sample(pool, *range(8))
        assert cluster.now(0).tokens > before  # it is one of them again
        return traces

    assert run(cluster, scenario, heartbeat_timeout=5, hang_timeout=1e6) == undisturbed()


def test_a_silent_worker_keeps_its_chunks_where_there_is_no_other() -> None:
    cluster = FakeCluster(1)

    async def scenario(pool: WorkerPool) -> list[Completion]:
        sampling = asyncio.ensure_future(sample(pool, *range(4)))
        await asyncio.sleep(0.1)
        cluster.now(0).stopped = True
        await asyncio.sleep(60)
        cluster.now(0).stopped = False
        answers = await sampling
        assert pool.faults.chunks_rescheduled == 0
        return answers

    run(cluster, scenario, heartbeat_timeout=5, hang_timeout=1e6)


def test_a_chunk_that_silences_every_worker_is_data() -> None:
    cluster = FakeCluster(3)

    async def scenario(pool: WorkerPool) -> None:
        for index in range(3):
            cluster.now(index).stopped = True
        with pytest.raises(PolicyError, match="no heartbeat for"):
            await pool.generate((5,), 30, Sampling(seed=0))

    run(cluster, scenario, heartbeat_timeout=5, hang_timeout=60, max_attempts=2)


def test_an_answer_of_a_life_that_was_given_up_does_not_count() -> None:
    cluster = FakeCluster(2, batch_size=1)

    async def scenario(pool: WorkerPool) -> dict[str, float]:
        running = asyncio.ensure_future(sample(pool, *range(6)))
        await asyncio.sleep(0.05)
        late = cluster.now(0)
        late.kill = lambda: None  # type: ignore[method-assign]  # as if it took a while to die
        late.stopped = True
        await asyncio.sleep(10)
        late.stopped = False
        answers = await running
        await asyncio.sleep(10)
        assert len(answers) == 6
        assert sum(worker.completions for worker in pool.workers) == 6
        late.dead = True
        return await pool.take_metrics()

    metrics = run(cluster, scenario, hang_timeout=3)
    assert metrics["chunks_rescheduled"] >= 1


def test_a_dead_worker_gets_no_new_chunk_and_all_of_its_chunks_count_as_rescheduled() -> None:
    cluster = FakeCluster(2, batch_size=8)

    async def scenario(pool: WorkerPool) -> None:
        sampling = asyncio.ensure_future(sample(pool, *range(16)))
        await asyncio.sleep(0.005)
        dead = cluster.now(0)
        assert dead.started == 8
        dead.dead = True
        await asyncio.sleep(0.05)  # the first call has failed by now
        assert pool.faults.chunks_rescheduled == 8
        await sample(pool, *range(16, 32))
        assert dead.started == 8
        await sampling

    run(cluster, scenario)


def test_tokens_of_a_lone_lost_chunk_are_counted() -> None:
    """Its own failed call is the first to notice the loss."""
    cluster = FakeCluster(1, seconds_per_token=1.0)

    async def scenario(pool: WorkerPool) -> None:
        sampling = asyncio.ensure_future(sample(pool, 0))
        await asyncio.sleep(4.5)  # two health calls have been answered
        cluster.now(0).dead = True
        await asyncio.sleep(1.0)
        assert pool.faults.tokens_lost > 0
        await sampling

    run(cluster, scenario)


def test_a_chunk_that_kills_every_worker_is_data_and_not_the_end_of_all() -> None:
    cluster = FakeCluster(3, start_seconds=1)

    def poison(prompt_ids: TokenIds) -> Exception | None:
        return ConnectionError("has lost its engine") if prompt_ids[0] == 13 else None

    async def scenario(pool: WorkerPool) -> None:
        cluster.settings["raises"] = poison
        for worker in (lives[-1] for lives in cluster.lives):
            worker.raises = poison
        bad = asyncio.ensure_future(pool.generate((13,), 30, Sampling(seed=1)))
        await sample(pool, *range(20))
        with pytest.raises(PolicyError, match=r"worker \d .*has lost its engine \(attempt 3, the"):
            await bad
        await sample(pool, *range(20))

    run(cluster, scenario, max_attempts=3)


def test_a_worker_that_does_not_come_back_is_given_up_and_the_others_go_on() -> None:
    cluster = FakeCluster(2, start_seconds=1)

    async def scenario(pool: WorkerPool) -> None:
        cluster.settings["start_error"] = RuntimeError("no memory")
        cluster.now(0).dead = True
        while not pool.workers[0].given_up:
            await sample(pool, *range(4))
            await asyncio.sleep(1)
        assert len(cluster.lives[0]) == 1 + 3
        assert pool.workers[0].reason == "did not start: no memory"
        await sample(pool, *range(4))

    run(cluster, scenario, max_restarts=3)


def test_when_no_worker_comes_back_the_run_is_told_so() -> None:
    cluster = FakeCluster(2, start_seconds=1)

    async def scenario(pool: WorkerPool) -> None:
        running = asyncio.ensure_future(roll_out(pool))
        await asyncio.sleep(0.2)
        cluster.settings["start_error"] = RuntimeError("no memory")
        for lives in cluster.lives:
            lives[-1].dead = True
        with pytest.raises(WorkersLostError, match="all 2 workers are lost .*no memory"):
            await running
        with pytest.raises(WorkersLostError):
            await sample(pool, 1)
        with pytest.raises(WorkersLostError):
            await pool.update_weights("b", 1)

    run(cluster, scenario, max_restarts=2)


def test_workers_may_be_gone_for_so_long_and_no_longer() -> None:
    cluster = FakeCluster(1, start_seconds=1)

    async def scenario(pool: WorkerPool) -> None:
        cluster.settings["start_seconds"] = 1e6
        cluster.now(0).dead = True
        loop = asyncio.get_running_loop()
        started = loop.time()
        with pytest.raises(WorkersLostError, match=r"all 1 workers are lost \(for 5\d s\)"):
            await sample(pool, 1)
        assert 50 < loop.time() - started < 60

    run(cluster, scenario, lost_timeout=50)


# -- weights -----------------------------------------------------------------------------------


def test_an_update_comes_between_chunks() -> None:
    cluster = FakeCluster(2)

    async def scenario(pool: WorkerPool) -> None:
        early = asyncio.ensure_future(sample(pool, *range(8)))
        await asyncio.sleep(0.05)
        update = asyncio.ensure_future(pool.update_weights("b", 1))
        await asyncio.sleep(0)
        late = asyncio.ensure_future(sample(pool, *range(8, 16)))
        assert {completion.policy_version for completion in await early} == {0}
        assert {completion.policy_version for completion in await late} == {1}
        await update

    run(cluster, scenario)


@pytest.mark.parametrize("held", [None, 12], ids=["a quarter more", "many more"])
def test_an_update_waits_for_no_chunk_that_waits_itself(held: int | None) -> None:
    """Chunks take 300 s, and the worker has more of them than room in its batch of 4."""
    cluster = FakeCluster(1, batch_size=4, seconds_per_token=10.0, has_places=True)

    async def scenario(pool: WorkerPool) -> None:
        seeds = LONG_SEEDS[:12]
        calls = asyncio.gather(*[pool.generate((5,), 30, Sampling(seed=s)) for s in seeds])
        await asyncio.sleep(1.0)
        held_now = len(pool.workers[0].chunks)
        assert held_now == (held or 5)
        started = asyncio.get_running_loop().time()
        await pool.update_weights("new", 1)
        # One chunk's time, and not those of the ones behind it.
        assert asyncio.get_running_loop().time() - started < 310
        completions = await calls
        assert [c.policy_version for c in completions].count(0) == 4
        assert pool.faults.chunks_handed_back == held_now - 4
        assert (pool.faults.chunks_rescheduled, pool.faults.tokens_lost) == (0, 0)
        for seed, completion in zip(seeds, completions, strict=True):
            assert list(completion.token_ids) == sampled((5,), 30, Sampling(seed=seed))[0]

    run(cluster, scenario, chunks_per_engine=held)


def test_an_engine_with_room_for_less_than_its_batch_says_which_chunks_wait() -> None:
    """A full cache holds chunks back before the batch is full."""
    cluster = FakeCluster(1, batch_size=8, seconds_per_token=10.0, has_places=True)

    async def scenario(pool: WorkerPool) -> None:
        cluster.now(0).places = asyncio.Semaphore(2)
        calls = asyncio.gather(*[pool.generate((5,), 30, Sampling(seed=s)) for s in LONG_SEEDS[:6]])
        await asyncio.sleep(1.0)
        await pool.update_weights("new", 1)
        assert [c.policy_version for c in await calls] == [0, 0, 1, 1, 1, 1]
        assert pool.faults.chunks_handed_back == 4

    run(cluster, scenario)


def test_chunks_of_calls_after_an_update_began_come_from_its_weights() -> None:
    cluster = FakeCluster(2, batch_size=2, seconds_per_token=1.0)

    async def scenario(pool: WorkerPool) -> None:
        before = asyncio.create_task(sample(pool, *LONG_SEEDS[:2]))
        await asyncio.sleep(0.5)
        update = asyncio.create_task(pool.update_weights("new", 1))
        later = asyncio.create_task(sample(pool, *LONG_SEEDS[2:8]))
        assert {c.policy_version for c in await later} == {1}
        assert {c.policy_version for c in await before} == {0}
        await update

    run(cluster, scenario)


def test_a_worker_that_has_the_weights_does_not_wait_for_the_others() -> None:
    """With sampling ahead of the trainer there are chunks, and another may have a long one."""
    cluster = FakeCluster(2)

    async def scenario(pool: WorkerPool) -> None:
        busy = asyncio.ensure_future(sample(pool, 0))
        await asyncio.sleep(0.01)
        slow, idle = cluster.now(0), cluster.now(1)
        slow.engine_stopped = True
        update = asyncio.ensure_future(pool.update_weights("b", 1))
        assert {c.policy_version for c in await sample(pool, *range(1, 9))} == {1}
        assert idle.version == 1
        assert [update.done(), busy.done(), slow.version] == [False, False, 0]
        slow.engine_stopped = False
        await update
        assert [c.policy_version for c in await busy] == [0]
        assert slow.version == 1

    run(cluster, scenario)


@pytest.mark.parametrize("fault", [die, hang])
def test_a_worker_that_fails_over_an_update_comes_back_with_it(fault: Fault) -> None:
    cluster = FakeCluster(2)

    async def scenario(pool: WorkerPool) -> None:
        await pool.update_weights("b", 1)
        fault(cluster.now(0))
        await pool.update_weights("c", 2)
        assert {c.policy_version for c in await sample(pool, *range(8))} == {2}
        while not pool.workers[0].in_service:
            await asyncio.sleep(1)
        assert cluster.now(0).version == 2
        assert {c.policy_version for c in await sample(pool, *range(16))} == {2}

    run(cluster, scenario, weight_sync_timeout=5, hang_timeout=30)


def test_an_update_waits_for_a_worker_where_there_is_none() -> None:
    cluster = FakeCluster(1)

    async def scenario(pool: WorkerPool) -> None:
        cluster.now(0).dead = True
        await asyncio.sleep(3)
        await pool.update_weights("b", 1)
        assert [c.policy_version for c in await sample(pool, 1)] == [1]

    run(cluster, scenario)


def test_a_worker_that_restarts_while_weights_change_has_the_last_ones() -> None:
    cluster = FakeCluster(2, start_seconds=10)

    async def scenario(pool: WorkerPool) -> None:
        cluster.now(0).dead = True
        cluster.settings["update_seconds"] = 8.0
        await asyncio.sleep(5)
        for version in range(1, 6):
            await pool.update_weights("b", version)
            await asyncio.sleep(3)
        while not pool.workers[0].in_service:
            await asyncio.sleep(1)
        completions = await sample(pool, *range(40))
        assert {completion.policy_version for completion in completions} == {5}
        assert cluster.now(0).version == 5

    run(cluster, scenario)


def test_weights_that_all_refuse_are_an_error_and_the_next_ones_mend_it() -> None:
    cluster = FakeCluster(2)

    async def scenario(pool: WorkerPool) -> None:
        with pytest.raises(WeightSyncError, match="2 of 2 workers .*version 1: worker 0 .*fit; w"):
            await pool.update_weights("refused", 1)
        with pytest.raises(PolicyError, match="takes no requests since an update of weights fail"):
            await sample(pool, 1)
        await pool.update_weights("b", 2)
        assert [c.policy_version for c in await sample(pool, 1)] == [2]
        assert [worker.restarts for worker in pool.workers] == [0, 0]

    run(cluster, scenario)


def test_one_that_refuses_what_another_takes_is_restarted() -> None:
    cluster = FakeCluster(2)

    async def scenario(pool: WorkerPool) -> None:
        cluster.now(1).update_error = WeightSyncError("runs others than it was sent")
        await pool.update_weights("b", 1)
        while not pool.workers[1].in_service:
            await asyncio.sleep(1)
        assert pool.workers[1].reason == "runs others than it was sent"
        assert cluster.now(1).version == 1

    run(cluster, scenario)


def test_one_that_says_another_version_is_restarted() -> None:
    cluster = FakeCluster(2)

    async def scenario(pool: WorkerPool) -> None:
        cluster.now(1).answered_version = 7
        await pool.update_weights("b", 1)
        while not pool.workers[1].in_service:
            await asyncio.sleep(1)
        assert pool.workers[1].reason == "runs version 7 of the weights instead of 1"

    run(cluster, scenario)


# -- deadlines, order, sleep -------------------------------------------------------------------


def test_a_chunk_that_takes_too_long_is_given_up() -> None:
    cluster = FakeCluster(1, seconds_per_token=10, batch_size=8)

    async def scenario(pool: WorkerPool) -> None:
        with pytest.raises(DeadlineError, match=r"not done after 60 s \(chunk_timeout\) on worker"):
            await pool.generate((5,), 200, Sampling(seed=0))
        await asyncio.sleep(1)
        assert not cluster.now(0).in_flight
        traces = await roll_out(pool)
        late = [trace for trace in traces if trace.stop is TraceStop.ABORTED]
        assert late
        for trace in late:
            assert trace.error is not None
            assert "chunk_timeout" in trace.error
            assert trace.chunks[-1].output_ids == ()
        assert [worker.restarts for worker in pool.workers] == [0]

    run(cluster, scenario, chunk_timeout=60)


def test_a_step_that_takes_too_long_keeps_what_it_has() -> None:
    cluster = FakeCluster(1, seconds_per_token=1)

    async def scenario(pool: WorkerPool) -> list[Trace]:
        loop = asyncio.get_running_loop()
        started = loop.time()
        traces = await roll_out(pool, timeout=100)
        assert loop.time() - started < 110
        await asyncio.sleep(1)
        assert not cluster.now(0).in_flight
        assert pool.num_waiting == 0
        return traces

    traces = run(cluster, scenario)
    late = [trace for trace in traces if trace.stop is TraceStop.ABORTED]
    assert 0 < len(late) < len(traces)
    assert {trace.error for trace in late} == {"the step was over after 100 s"}
    assert any(len(trace.chunks) > 1 for trace in late)
    for trace, whole in zip(traces, undisturbed(), strict=True):
        whole_chunks = whole.chunks[: len(trace.chunks)]
        kept = trace.chunks[:-1] if trace.stop is TraceStop.ABORTED else trace.chunks
        assert kept == whole_chunks[: len(kept)]


@pytest.mark.parametrize(("chunks", "most"), [(20, [10, 10]), (200, [20, 20])])
def test_a_worker_has_a_quarter_more_than_its_batch_where_many_wait(
    chunks: int, most: list[int]
) -> None:
    cluster = FakeCluster(2, batch_size=16)
    run(cluster, lambda pool: sample(pool, *range(chunks)))
    assert [cluster.now(i).most_in_flight for i in range(2)] == most


def test_what_is_not_waited_for_any_more_is_taken_back() -> None:
    cluster = FakeCluster(1, seconds_per_token=10)

    async def scenario(pool: WorkerPool) -> None:
        tasks = [
            asyncio.ensure_future(pool.generate((5,), 200, Sampling(seed=i))) for i in range(20)
        ]
        await asyncio.sleep(30)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(1)
        assert not cluster.now(0).in_flight
        assert (pool.num_waiting, len(pool.workers[0].chunks)) == (0, 0)
        await pool.update_weights("b", 1)

    run(cluster, scenario)


def test_sleep_frees_all_workers_until_the_next_chunk() -> None:
    cluster = FakeCluster(2)

    async def scenario(pool: WorkerPool) -> None:
        early = asyncio.ensure_future(sample(pool, *range(8)))
        await asyncio.sleep(0.05)
        await pool.sleep()
        assert early.done() or not any(cluster.now(i).in_flight for i in range(2))
        assert all(cluster.now(i).asleep for i in range(2))
        assert len(await sample(pool, *range(8))) == 8
        assert not any(cluster.now(i).asleep for i in range(2))
        await early
        await pool.sleep()
        await pool.update_weights("b", 1)
        assert [c.policy_version for c in await sample(pool, 1)] == [1]

    run(cluster, scenario)


def test_ranks() -> None:
    def of(order: Any = "breadth", **fields: Any) -> Any:
        return rank(SchedulingHint(max_chunks=12, **fields), order)

    assert of(num_chunks=0) < of(num_chunks=3)
    assert of("depth", num_chunks=3) < of("depth", num_chunks=0)
    assert of(batch=1, num_chunks=9) < of(batch=2, num_chunks=0)
    assert of(expected_chunks=9.0, num_chunks=1) < of(expected_chunks=4.0, num_chunks=0)


# -- start and settings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "kind", "said"),
    [
        (MissingExtraError("vllm", "vllm"), MissingExtraError, "pip install"),
        (RuntimeError("no such model"), ConfigError, "worker 0 did not start: no such model"),
    ],
)
def test_a_pool_that_does_not_start_says_why(problem: Exception, kind: Any, said: str) -> None:
    with pytest.raises(kind, match=said):
        run(FakeCluster(2, start_error=problem), roll_out)


def test_who_waits_when_a_pool_is_closed_is_told_so() -> None:
    cluster = FakeCluster(1, seconds_per_token=100)

    async def scenario(pool: WorkerPool) -> Any:
        waiting = asyncio.ensure_future(sample(pool, 1))
        await asyncio.sleep(1)
        return waiting

    async def all_of_it() -> None:
        pool = make_pool(cluster)
        await pool.start()
        waiting = await scenario(pool)
        await pool.close()
        with pytest.raises(PolicyError, match="the pool is closed"):
            await waiting

    run_in_virtual_time(all_of_it())


def test_a_pool_that_is_closed_at_work_leaves_no_task() -> None:
    cluster = FakeCluster(2, seconds_per_token=100)

    async def all_of_it() -> None:
        pool = make_pool(cluster)
        await pool.start()
        waiting = [asyncio.ensure_future(sample(pool, seed)) for seed in range(30)]
        await asyncio.sleep(1)
        await pool.close()
        own = [str(task.get_coro()) for task in asyncio.all_tasks()]
        assert not [name for name in own if "WorkerPool." in name]
        await asyncio.gather(*waiting, return_exceptions=True)

    run_in_virtual_time(all_of_it())
