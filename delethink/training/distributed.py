"""Starts the processes that train together, under Ray Train, and listens to the first of them.

Only the processes load torch. Where a cluster can be joined (``RAY_ADDRESS``, ``ray start``, or a
submitted job) they run there, else on this machine alone. They are gone when this process is.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from transformers import set_seed

from delethink.config import Recipe
from delethink.engines.factory import choose_engine
from delethink.engines.loading import load_model, load_tokenizer
from delethink.errors import ConfigError, DelethinkError, MissingExtraError
from delethink.training.data_parallel import Processes
from delethink.training.grpo_config import trl_config
from delethink.training.preflight import Place, Prepared, prepare
from delethink.training.run_directory import RunDirectory
from delethink.training.run_state import FINAL, fit_together, make_trainer
from delethink.training.weights import WholeWeights


def follow(recipe: Recipe, checkpoints: Path, processes: Processes) -> None:
    """Trains until the first process has."""
    set_seed(recipe.seed)
    tokenizer = load_tokenizer(recipe.model, recipe.trust_remote_code)
    model: Any = load_model(recipe.model, "float32", recipe.trust_remote_code)
    settings = trl_config(recipe, recipe.thinking.spec().bind(tokenizer), checkpoints)

    def measure(logs: Any) -> dict[str, float]:
        """What the first process gathers from all."""
        trainer.take_statistics()
        trainer.take_work()
        return {}

    trainer = make_trainer(
        recipe,
        processes,
        model=model,
        processing_class=tokenizer,
        args=settings,
        train_dataset=[],
        reward_funcs=[_not_here],
        play=_not_here,
        on_sampled=_not_here,
        job_state=_not_here,
        on_nonfinite=lambda found: None,  # the first one says what becomes of the run
        measure=measure,
        callbacks=[WholeWeights()],
    )
    fit_together(trainer, processes)
    trainer.save_weights(FINAL)


def _not_here(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("the first process alone plays, pays and records")


_START_TIMEOUT_S = 300
_POLL_S = 0.2
# Ray Train would change to a folder of its own, where a recipe's relative paths lead nowhere.
_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_START_TIMEOUT_S),
}


class _Order(NamedTuple):
    """What each process is to do."""

    recipe: Recipe
    run: Path
    begun: bool  # there is something to go on from
    changed: dict[str, list[Any]]  # in the recipe since then
    folder: str  # where the command was given
    set_up_process: Callable[[], None]
    events: Any  # a Ray queue, to the reporter


class Messenger:
    """Stands for the reporter in another process: every call goes over a queue."""

    def __init__(self, events: Any) -> None:
        self._events = events

    def __getattr__(self, name: str) -> Callable[..., None]:
        def tell(*args: Any) -> None:
            self._events.put((name, args))

        return tell


def train_together(
    prepared: Prepared, place: Place, reporter: Any, set_up_process: Callable[[], None]
) -> Path:
    """Runs a recipe in ``trainer.num_ranks`` processes and returns the path of its run.

    Args:
        prepared: the recipe.
        place: where it writes, on storage that all machines share.
        reporter: told the course of the run, here.
        set_up_process: called first in each process.

    Raises:
        UserError: something the user can mend, a cluster that is too small among it.
        RolloutError, WeightSyncError: the run broke; what was written stays whole.
    """
    try:
        with _cluster(prepared.recipe), tempfile.TemporaryDirectory() as storage:
            _fit(prepared.recipe, place, reporter, set_up_process, storage)
    except BaseException:
        place.run.discard_if_empty()
        raise
    finally:
        place.run.release()
    return place.run.path


def _fit(
    recipe: Recipe,
    place: Place,
    reporter: Any,
    set_up_process: Callable[[], None],
    storage: str,
) -> None:
    from ray.util.queue import Queue

    number, strategy = recipe.trainer.num_ranks, recipe.trainer.strategy
    reporter.say(f"starting {number} processes that train together: {strategy}")
    events = Queue(actor_options={"num_cpus": 0})
    order = _Order(
        recipe,
        place.run.path.absolute(),
        place.begun,
        place.changed,
        str(Path.cwd()),
        set_up_process,
        events,
    )
    trainer = _make_trainer(order, storage)
    is_over = threading.Event()
    # Beside this thread, which must be the one that waits: Ctrl-C comes to it.
    teller = threading.Thread(target=_tell, args=(events, reporter, is_over), daemon=True)
    teller.start()
    try:
        trainer.fit()
    except Exception as error:  # whatever Ray Train makes of what went wrong
        raise cause(error) from None
    finally:
        is_over.set()
        teller.join()
        reporter.stop_steps()


def _tell(events: Any, reporter: Any, is_over: threading.Event) -> None:
    """Passes on what the first process has to say, until all of it is said."""
    from ray.util.queue import Empty

    while True:
        done = is_over.is_set()
        try:
            name, args = events.get(timeout=_POLL_S)
        except Empty:
            if done:
                return
            continue
        getattr(reporter, name)(*args)


def _make_trainer(order: _Order, storage: str) -> Any:
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise MissingExtraError(error.name or "ray[train]", "train") from None
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)

    class Trainer(TorchTrainer):  # type: ignore[misc]  # Ray is untyped
        """Leaves Ctrl-C to the program, which ends a run on SIGTERM in the same way."""

        def _register_sigint_handler(self, controller: Any) -> None:
            pass

    trainer = order.recipe.trainer
    resources = {"CPU": trainer.cpus_per_rank, "GPU": trainer.gpus_per_rank}
    use_gpu = trainer.gpus_per_rank > 0
    return Trainer(
        _train_in_process,
        train_loop_config={"order": order},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=trainer.num_ranks, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="delethink",
            storage_path=storage,
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )


def _train_in_process(config: dict[str, Any]) -> None:
    """What each process runs."""
    order: _Order = config["order"]
    with contextlib.suppress(OSError):  # another machine need not have the folder
        os.chdir(order.folder)
    order.set_up_process()
    from delethink.training.data_parallel import Processes

    processes = Processes()
    if not processes.is_first:
        follow(order.recipe, order.run / "checkpoints", processes)
        return
    if not (order.run / "config.yaml").exists():
        raise ConfigError(
            f"the first process, on another machine, does not see the run directory {order.run}: "
            "choose one on storage that all machines share with output=PATH"
        )
    from delethink.training.trainer import train

    reporter: Any = Messenger(order.events)
    place = Place(RunDirectory(order.run), order.begun, order.changed)
    train(prepare(order.recipe), place, reporter, processes)


@contextlib.contextmanager
def _cluster(recipe: Recipe) -> Iterator[None]:
    """A Ray cluster with room for the recipe.

    Raises:
        ConfigError: the cluster is too small.
    """
    import ray

    from delethink.engines.cluster import connect

    # Engine and trainer take turns, so on one machine they may have the same cores.
    is_ours = connect(num_cpus=math.ceil(_num_cores() + _asked(recipe)["CPU"].engine))
    try:
        check_room(recipe, ray.cluster_resources())
        yield
    finally:
        if is_ours:
            ray.shutdown()


class _Asked(NamedTuple):
    """How much of something the parts of a run ask Ray for."""

    trainer: float
    engine: float


def _asked(recipe: Recipe) -> dict[str, _Asked]:
    trainer, number = recipe.trainer, recipe.engine.num_engines
    engine = {"CPU": 0.0, "GPU": 0.0}
    if choose_engine(recipe.engine.name) == "vllm":
        on_gpu = recipe.engine.gpus_per_engine > 0
        cpus = 1 if on_gpu else max(1, (_num_cores() - 1) // number)
        engine = {"CPU": number * cpus, "GPU": number * recipe.engine.gpus_per_engine}
    each = {"CPU": trainer.cpus_per_rank, "GPU": float(trainer.gpus_per_rank)}
    return {unit: _Asked(trainer.num_ranks * each[unit], engine[unit]) for unit in each}


def check_room(recipe: Recipe, resources: Mapping[str, float]) -> None:
    """Compares what a recipe asks of Ray with what a cluster has, busy or not.

    Raises:
        ConfigError: it has less; Ray would wait for ever.
    """
    for unit, asked in _asked(recipe).items():
        there = resources.get(unit, 0.0)
        if asked.trainer + asked.engine > there:
            besides = f" and the engine's workers for {asked.engine:g}" if asked.engine else ""
            raise ConfigError(
                f"trainer.num_ranks={recipe.trainer.num_ranks} processes ask for "
                f"{asked.trainer:g} {unit}s{besides}, and the Ray cluster has {there:g}: ask for "
                f"fewer, or join a larger cluster with RAY_ADDRESS"
            )


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def cause(problem: Exception) -> Exception:
    """What went wrong in a process, without Ray's account of it.

    Where one process fails the others often fail for want of it, so what was raised on purpose
    comes first.
    """
    failures = getattr(problem, "worker_failures", {})
    raised = [getattr(error, "_base_exc", error) for _, error in sorted(failures.items())]
    for error in raised:
        if isinstance(error, DelethinkError):
            return error
    failure = getattr(problem, "controller_failure", None)
    if failure is not None:
        first = " ".join(str(failure).split())
        return ConfigError(f"Ray Train did not start the processes: {first}")
    return problem
