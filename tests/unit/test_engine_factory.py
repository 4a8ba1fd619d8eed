"""Engines are made by name, and weight updates of a vLLM worker are verified as configured."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest

from delethink.config import EngineConfig
from delethink.engines import factory
from delethink.engines.base import WorkerSpec
from delethink.errors import ConfigError, MissingExtraError, PolicyError, WeightSyncError
from delethink.policy import Sampling
from delethink.registry import register


@register("delethink.engines", "made_up_for_a_test")
class MadeUpEngine:
    """An engine that only records how it was made."""

    @classmethod
    def create(cls, *arguments: Any, **options: Any) -> Any:
        return arguments, options


def test_a_further_engine_is_one_class_and_one_row() -> None:
    config = EngineConfig(name="made_up_for_a_test")
    made: Any = factory.make_engine(config, "a model", None, "a tokenizer", seed=3)  # type: ignore[arg-type]
    arguments, options = made
    assert arguments == (config, "a model", None, "a tokenizer")
    assert options == {"trust_remote_code": False, "seed": 3, "is_trained": True}


@pytest.mark.parametrize(
    ("name", "missing", "chosen"),
    [
        ("auto", (), "vllm"),
        ("auto", ("vllm",), "transformers"),
        ("auto", ("ray",), "transformers"),
        ("transformers", ("vllm", "ray"), "transformers"),
        ("made_up_for_a_test", ("vllm",), "made_up_for_a_test"),
    ],
)
def test_auto_takes_vllm_if_vllm_and_ray_are_installed(
    monkeypatch: pytest.MonkeyPatch, name: str, missing: tuple[str, ...], chosen: str
) -> None:
    monkeypatch.setattr(factory, "_is_installed", lambda package: package not in missing)
    assert factory.choose_engine(name) == chosen


def test_an_engine_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "_is_installed", lambda package: package != "ray")
    with pytest.raises(MissingExtraError, match="ray"):
        factory.choose_engine("vllm")


class FakeEngine:
    """The part of ``AsyncLLM`` that updates need; ``answers`` are those of its ranks."""

    errored = False

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.answers: list[Any] = []

    async def abort(self, request_ids: list[str]) -> None:
        self.calls.append(("abort", tuple(request_ids)))

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self.calls.append((method, args))
        return self.answers

    async def reset_prefix_cache(self) -> bool:
        return True


def make_worker(**settings: Any) -> Any:
    pytest.importorskip("torch")
    from delethink.engines.vllm import VllmWorker

    spec = WorkerSpec("x", EngineConfig(**settings), (1,), None, False, 0, 1)
    worker = VllmWorker(spec)
    worker._engine = FakeEngine()
    return worker


@pytest.mark.parametrize(
    ("setting", "verified"), [("first", [True, True, False]), ("every", [True] * 3)]
)
def test_the_first_updates_are_verified_or_every_one(setting: str, verified: list[bool]) -> None:
    worker = make_worker(verify_weights=setting)

    async def update() -> None:
        for version in range(3):
            worker._engine.answers = [version]
            assert await worker.update_weights({}, version) == version

    asyncio.run(update())
    loads = [args for method, args in worker._engine.calls if method == "delethink_load"]
    assert [verify for *_, verify in loads] == verified


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (["it does not fit"], "failed: it does not fit"),
        ([1, 2], r"its 2 ranks run different versions: \[1, 2\]"),
    ],
)
def test_a_worker_that_refuses_weights_samples_nothing_until_others_come(
    answers: list[Any], reason: str
) -> None:
    worker = make_worker()

    async def update() -> None:
        worker._engine.answers = answers
        with pytest.raises(WeightSyncError, match=reason):
            await worker.update_weights({}, 1)
        with pytest.raises(PolicyError, match=f"since an update of weights {reason}"):
            await worker.generate((5,), 1, Sampling())
        worker._engine.answers = [2]
        await worker.update_weights({}, 2)
        assert not worker._refused

    asyncio.run(update())


def test_a_restarted_worker_loads_the_base_before_the_changes_and_the_others_do_not() -> None:
    worker = make_worker()
    torch = pytest.importorskip("torch")
    from delethink.engines.low_rank import LowRankChange, pack_changes
    from delethink.engines.weight_sync import pack

    base = pack({"a": torch.ones(3, 2), "b": torch.ones(3)})
    changes = pack_changes({"a": LowRankChange(torch.ones(1, 2), torch.ones(3, 1), 2.0)})
    answers = {"delethink_load": [4], "delethink_needed": [["a"]]}

    class Reference:
        """Stands in for a reference to Ray's object store."""

        def __await__(self) -> Generator[None, None, Any]:
            yield
            return base

    async def rpc(method: str, args: tuple[Any, ...]) -> list[Any]:
        worker._engine.calls.append((method, args))
        return answers.get(method, [args[-2]])

    async def update() -> None:
        worker._engine.collective_rpc = rpc
        assert await worker.merge_weights([Reference()], 4, changes, 5) == 5
        assert await worker.merge_weights([Reference()], 4, changes, 6) == 6
        assert worker._version == 6
        await worker.update_weights(base, 4)  # whole weights: what lies beneath changes is new
        assert await worker.merge_weights([Reference()], 4, changes, 7) == 7

    asyncio.run(update())
    calls = [method for method, _ in worker._engine.calls if method.startswith("delethink")]
    needed = ["delethink_needed", "delethink_merge"]
    assert calls == ["delethink_load", *needed, "delethink_merge", "delethink_load", *needed]
    os.close(worker._kept[0])


def test_requests_in_flight_are_aborted_before_an_update() -> None:
    worker = make_worker()
    worker._in_flight = {"7"}
    worker._engine.answers = [1]
    asyncio.run(worker.update_weights({}, 1))
    assert worker._engine.calls[0] == ("abort", ("7",))


@pytest.mark.parametrize("temperature", [-1.0, 0.001])
def test_a_temperature_that_vllm_would_change_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature must be 0 or at least 0.01"):
        asyncio.run(make_worker().generate((5,), 1, Sampling(temperature)))


def test_health_of_a_lost_engine_is_a_connection_error() -> None:
    worker = make_worker()
    worker._engine = SimpleNamespace(errored=True)
    with pytest.raises(ConnectionError, match="has lost its vLLM engine process"):
        asyncio.run(worker.health())
