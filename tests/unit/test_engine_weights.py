"""Weights on their way to the engine: once a batch, in the background, and memory given back."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from delethink.config import EngineConfig  # noqa: E402
from delethink.engines.weight_sync import read  # noqa: E402
from delethink.errors import RolloutError, WeightSyncError  # noqa: E402
from delethink.training.metrics import StepMetrics, overlap  # noqa: E402
from delethink.training.rollouts import Batch, Group  # noqa: E402
from delethink.training.run_state import EngineWeights, ResultsTable, RunState  # noqa: E402
from delethink.training.weights import RankWeights  # noqa: E402
from delethink.types import Chunk, Problem, Score, StopReason, Trace, TraceStop  # noqa: E402

ON_A_GPU = EngineConfig(gpus_per_engine=0.5, sleep=True)
BESIDE = EngineConfig(placement="colocated", weight_transfer="ipc")


class Engine:
    """Loads weights in the background, as slowly as a test says."""

    def __init__(self, events: list[Any] | None = None) -> None:
        self.events = [] if events is None else events
        self.updates: list[Future[None]] = []

    def begin_update(self, weights: Any, version: int) -> Future[None]:
        self.events.append(("update", version))
        self.updates.append(Future())
        return self.updates[-1]

    def read_weights(self, handles: Any, version: int) -> None:
        found = [read(handle.place, handle.slots)["weight"].clone() for handle in handles]
        self.events.append(("read", version, found))

    def sleep(self) -> None:
        self.events.append("sleep")

    def take_metrics(self) -> dict[str, float]:
        return {}


def at_step(ranks: RankWeights, step: int) -> None:
    trainer: Any = SimpleNamespace(state=SimpleNamespace(global_step=step), is_fsdp_enabled=False)
    ranks.trainer = trainer


def test_the_trainer_waits_for_an_update_only_before_the_next_one() -> None:
    engine, model = Engine(), torch.nn.Linear(2, 2)
    ranks = RankWeights(model, EngineConfig())
    weights = EngineWeights(engine, model, StepMetrics(), ranks)  # type: ignore[arg-type]
    weights.update(wait=False)
    assert weights.version == 0
    assert not engine.updates[0].done()  # a chunk in flight holds it up, and not this thread
    engine.updates[0].set_result(None)
    at_step(ranks, 2)  # two optimizer steps on the batch
    weights.update(wait=False)
    assert engine.events == [("update", 0), ("update", 2)]
    engine.updates[1].set_exception(WeightSyncError("all refused"))
    at_step(ranks, 4)
    with pytest.raises(WeightSyncError, match="all refused"):
        weights.update(wait=False)


def make_state(engine: Any, max_staleness: int) -> RunState:
    """Return what the sampling of a batch uses of the state of a run; its batch took days."""
    chunk = Chunk((5,), (6, 1), (-1.0, -1.0), StopReason.EOS)
    trace = Trace((5,), (chunk,), TraceStop.COMPLETED)
    batch = Batch([Group(0, [trace], [Score(1.0, {}, {})])], seconds_sampling=1e6)

    def next_batch(step: int) -> Batch:
        engine.events.append(("batch", step))
        return batch

    model, metrics = torch.nn.Linear(2, 2), StepMetrics()
    ranks = RankWeights(model, EngineConfig())
    at_step(ranks, 4)
    training = SimpleNamespace(max_staleness=max_staleness, max_failed_share=0.1)
    state: Any = object.__new__(RunState)
    state.recipe = SimpleNamespace(training=training)
    state.weights = EngineWeights(engine, model, metrics, ranks)
    state.metrics, state.problems = metrics, [Problem("1 + 1", "2")]
    state.prefetch = SimpleNamespace(next=next_batch)
    made: RunState = state
    return made


def test_a_slow_chunk_holds_up_an_update_and_not_the_trainer() -> None:
    engine = Engine()
    state = make_state(engine, max_staleness=2)
    (trace,) = state.sample_batch([]).traces
    assert trace.length == 2
    # The update comes first, so that the chunks of the batch that is begun now have its weights.
    assert engine.events == [("update", 4), ("batch", 4)]
    assert not engine.updates[0].done()
    assert state.policy_version == 4
    assert state.metrics.values["overlap"] > 0.9


def test_without_prefetching_a_batch_comes_after_the_update_and_then_the_engine_sleeps() -> None:
    class Loads(Engine):
        def begin_update(self, weights: Any, version: int) -> Future[None]:
            update = super().begin_update(weights, version)
            update.add_done_callback(lambda _: self.events.append("loaded"))
            update.set_result(None)
            return update

    engine = Loads()
    make_state(engine, max_staleness=0).sample_batch([])
    assert engine.events == [("update", 4), "loaded", ("batch", 4), "sleep"]


def test_overlap_is_the_share_of_a_batch_that_nobody_waited_for() -> None:
    assert overlap(waited=10.0, lasted=10.0) == 0
    assert overlap(waited=2.5, lasted=10.0) == 0.75
    assert overlap(waited=0.0, lasted=10.0) == 1
    assert overlap(waited=0.1, lasted=0.0) == 0
    metrics = StepMetrics()
    metrics.start_step()
    prefetched = {"seconds_sampling": 1000.0, "seconds_scoring": 1.0, "seconds_waiting": 0.0}
    metrics.values |= {**prefetched, "sampled_tokens": 10}
    metrics.stop_step()
    assert metrics.values["seconds_training"] >= 0  # the batch began long before the step


def test_each_rank_shares_its_weights_and_takes_them_back_for_training() -> None:
    """Without a GPU, the memory stays shared; engines of a GPU sleep, and it is freed."""
    for config, freed in ((BESIDE, False), (BESIDE.model_copy(update={"sleep": True}), True)):
        engine, model = Engine(), torch.nn.Linear(2, 2)
        ranks = RankWeights(model, config)
        weights = EngineWeights(engine, model, StepMetrics(), ranks)  # type: ignore[arg-type]
        ranks.collect()
        weights.update()
        first = model.weight.detach().clone()
        ranks.release()
        assert (ranks.handles is None) == freed
        with torch.no_grad():
            model.weight += 1
        at_step(ranks, 1)
        ranks.collect()
        weights.update()
        ranks.collect()  # an evaluation after the same step
        weights.update()
        (_, _, (before,)), (_, version, (after,)) = engine.events
        assert version == 1
        assert torch.equal(before, first)
        assert torch.equal(after, first + 1)
        ranks.release()
        ranks.collect()  # after the release, the next batch has no step in between
        weights.update()
        assert len(engine.events) == (3 if freed else 2)
        ranks.close()


@pytest.mark.parametrize(("config", "number"), [(ON_A_GPU, 1), (EngineConfig(), 0)], ids=str)
def test_cached_memory_goes_back_before_the_engine_wakes(
    monkeypatch: pytest.MonkeyPatch, config: EngineConfig, number: int
) -> None:
    """Without a GPU, only the call can be seen."""
    events: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("given back"))
    model = torch.nn.Linear(2, 2)
    ranks = RankWeights(model, config)
    weights = EngineWeights(Engine(events), model, StepMetrics(), ranks)  # type: ignore[arg-type]
    ranks.collect()
    weights.update(wait=False)
    assert events == ["given back"] * number + [("update", 0)]


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("failure", [None, RolloutError("too many failed")], ids=["ok", "failed"])
def test_the_engine_sleeps_again_after_an_evaluation_between_two_steps_on_a_batch(
    max_staleness: int, failure: Exception | None
) -> None:
    engine, said = Engine(), list[str]()
    run: Any = SimpleNamespace(
        recipe=SimpleNamespace(
            evaluation=SimpleNamespace(num_problems=8, num_problems_at_intervals=4, every=1),
            training=SimpleNamespace(max_steps=4, max_staleness=max_staleness),
        ),
        weights=SimpleNamespace(engine=engine),
        progress=SimpleNamespace(log=said.append),
        spec=None,
    )

    class Table(ResultsTable):
        def __init__(self) -> None:
            self._run = run

        def evaluate(self, *args: Any) -> Any:
            engine.events.append("evaluate")
            if failure is not None:
                raise failure
            return SimpleNamespace(accuracy=0.5)

    assert Table().accuracy_at(1) == (None if failure else 0.5)
    assert engine.events == ["evaluate", *([] if max_staleness else ["sleep"])]
    assert len(said) == (failure is not None)
