"""Training on several ranks under Ray Train.

The driver starts one process per rank, on the Ray cluster it can connect to or on this machine,
and prints the progress of the main rank. Heavy imports are left to the ranks: the driver trains
nothing, and ranks set up their process before them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from delethink.config import Recipe, TrainerConfig
from delethink.engines.factory import choose_engine
from delethink.errors import ConfigError, DelethinkError, MissingExtraError
from delethink.training.checkpointing import RunLocation
from delethink.training.preflight import Prepared, prepare
from delethink.training.progress import TrainingProgress
from delethink.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from delethink.training.data_parallel import RankGroup

_START_TIMEOUT_S = 300
_POLL_INTERVAL_S = 0.2
_RAY_TRAIN_ENVIRONMENT = {
    # Relative paths of a recipe are relative to the directory of the command.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_START_TIMEOUT_S),
}


def train_distributed(
    prepared: Prepared,
    location: RunLocation,
    progress: TrainingProgress,
    set_up_process: Callable[[], None],
) -> Path:
    """Run a recipe on ``trainer.num_ranks`` ranks and return the run directory.

    The directory is on storage that all machines share. Each rank calls ``set_up_process`` first.

    Raises:
        UserError: A mistake of the user, or a cluster that is too small.
        RolloutError, WeightSyncError: The run failed; the files written so far are complete.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("ray", "ray")
    try:
        with _ray_cluster(prepared.recipe), tempfile.TemporaryDirectory() as storage:
            _fit(prepared.recipe, location, progress, set_up_process, storage)
    except BaseException:
        location.directory.discard_if_empty()
        raise
    finally:
        location.directory.release()
    return location.directory.path


def _fit(
    recipe: Recipe,
    location: RunLocation,
    progress: TrainingProgress,
    set_up_process: Callable[[], None],
    storage: str,
) -> None:
    from ray.util.queue import Queue

    progress.log(f"starting {recipe.trainer.num_ranks} ranks: {recipe.trainer.strategy}")
    events = Queue(actor_options={"num_cpus": 0})
    run_rank = partial(
        _run_rank,
        recipe,
        location.directory.path.absolute(),
        location.exists,
        location.changed,
        str(Path.cwd()),
        set_up_process,
        events,
    )
    trainer = _make_ray_trainer(run_rank, recipe.trainer, storage)
    finished = threading.Event()
    # The main thread waits for the ranks, because Ctrl-C arrives there.
    printer = threading.Thread(target=_print_events, args=(events, progress, finished), daemon=True)
    printer.start()
    try:
        trainer.fit()
    except Exception as error:  # Ray Train wraps the errors of ranks
        raise rank_error(error) from None
    finally:
        finished.set()
        printer.join()
        progress.stop_steps()


def _make_ray_trainer(run_rank: Callable[[], None], settings: TrainerConfig, storage: str) -> Any:
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise MissingExtraError(error.name or "ray[train]", "train") from None
    for name, value in _RAY_TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    class Trainer(TorchTrainer):  # type: ignore[misc]  # Ray is untyped
        """``TorchTrainer`` that leaves Ctrl-C to the program, which handles it like SIGTERM."""

        def _register_sigint_handler(self, controller: Any) -> None:
            pass

    use_gpu = settings.gpus_per_rank > 0
    return Trainer(
        run_rank,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.num_ranks,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": settings.cpus_per_rank, "GPU": settings.gpus_per_rank},
        ),
        run_config=RunConfig(
            name="delethink",
            storage_path=storage,
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )


# -- ranks -------------------------------------------------------------------------------------


def _run_rank(
    recipe: Recipe,
    path: Path,
    exists: bool,
    changed: dict[str, list[Any]],
    working_directory: str,
    set_up_process: Callable[[], None],
    events: Any,
) -> None:
    """Run one rank: the main rank runs the recipe, the other ranks only train."""
    with contextlib.suppress(OSError):  # the directory may not exist on another machine
        os.chdir(working_directory)
    set_up_process()
    from delethink.training.data_parallel import RankGroup

    ranks = RankGroup()
    if not ranks.is_main:
        _train_only(recipe, path / "checkpoints", ranks)
        return
    if not (path / "config.yaml").exists():
        raise ConfigError(
            f"the main rank runs on another machine and finds no run directory "
            f"{path}: choose one on storage that all machines share with output=PATH"
        )
    from delethink.training.startup import train

    location = RunLocation(RunDirectory(path), exists, changed)
    train(prepare(recipe), location, QueuedProgress(events), ranks)


def _train_only(recipe: Recipe, checkpoints: Path, ranks: RankGroup) -> None:
    """Train on this rank until the main rank is done."""
    from delethink.training.data_parallel import gather_places

    gather_places(recipe, ranks)  # first: the main rank starts the engines with them
    from transformers import set_seed

    from delethink.engines.loading import load_model, load_tokenizer
    from delethink.training.grpo_config import trl_config
    from delethink.training.trainer import fit_ranks, make_trainer
    from delethink.training.weights import RankWeights

    set_seed(recipe.seed)
    tokenizer = load_tokenizer(recipe.model, recipe.trust_remote_code, recipe.chat_template_kwargs)
    settings = trl_config(recipe, recipe.thinking.spec().bind(tokenizer), checkpoints)
    # The main rank reads all values.
    model: Any = load_model(recipe.model, "float32", recipe.trust_remote_code, values_checked=True)
    if recipe.engine.placement == "colocated" and recipe.trainer.strategy != "fsdp2":
        model = model.to(settings.device)  # its copy for the engine is made there
    weights = RankWeights(model, recipe.engine, ranks)
    weights.collect()
    trainer = make_trainer(
        recipe,
        ranks,
        model=model,
        processing_class=tokenizer,
        args=settings,
        train_dataset=[],
        reward_funcs=[_on_main_rank_only],
        run_rollouts=_on_main_rank_only,
        on_sampled=_on_main_rank_only,
        run_state=_on_main_rank_only,
        on_nonfinite=lambda found: None,  # the main rank skips the step or stops the run
        on_step=lambda metrics: metrics,
        weights=weights,
        callbacks=[],
    )
    fit_ranks(trainer, ranks)
    weights.close()


def _on_main_rank_only(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("only the main rank runs rollouts, computes rewards and writes files")


# -- progress ----------------------------------------------------------------------------------


class QueuedProgress(TrainingProgress):
    """Sends the calls on the main rank to the driver, over a Ray queue of (method, arguments)."""

    def __init__(self, events: Any) -> None:
        super().__init__()
        for method in ("log", "wait", "end_wait", "start_steps", "step", "stop_steps", "table"):
            setattr(self, method, lambda *args, method=method: events.put((method, args)))


def _print_events(events: Any, progress: TrainingProgress, finished: threading.Event) -> None:
    """Print events until the ranks have finished and the queue is empty."""
    from ray.util.queue import Empty

    while True:
        is_last = finished.is_set()
        try:
            method, args = events.get(timeout=_POLL_INTERVAL_S)
        except Empty:
            if is_last:
                return
            continue
        getattr(progress, method)(*args)


# -- resources and errors ----------------------------------------------------------------------


@contextlib.contextmanager
def _ray_cluster(recipe: Recipe) -> Iterator[None]:
    """Connect to a Ray cluster with enough resources, or start one."""
    import ray

    from delethink.engines.cluster import connect

    # Engine and trainer work in turn, so on one machine they may share the cores.
    cores = len(os.sched_getaffinity(0)) + math.ceil(_engine_resources(recipe)["CPU"])
    started = connect(num_cpus=cores)
    try:
        check_resources(recipe, ray.cluster_resources())
        yield
    finally:
        if started:
            ray.shutdown()


def _engine_resources(recipe: Recipe) -> dict[str, float]:
    engine = recipe.engine
    if choose_engine(engine.name) == "transformers":  # samples in the process of the main rank
        return {"CPU": 0.0, "GPU": 0.0}
    from delethink.engines.ray import cpus_per_engine

    number = engine.num_engines
    gpus = 0.0 if engine.placement == "colocated" else number * engine.gpus_per_engine
    return {"CPU": number * cpus_per_engine(engine), "GPU": gpus}


def check_resources(recipe: Recipe, available: Mapping[str, float]) -> None:
    """Compare the resources of a recipe with all those of a cluster, free or in use.

    Raises:
        ConfigError: The cluster has fewer. Ray would wait without end.
    """
    trainer, engines = recipe.trainer, _engine_resources(recipe)
    for unit, per_rank in (("CPU", trainer.cpus_per_rank), ("GPU", trainer.gpus_per_rank)):
        total, ranks = available.get(unit, 0.0), trainer.num_ranks * per_rank
        if ranks + engines[unit] > total:
            also = f" and the engines {engines[unit]:g}" if engines[unit] else ""
            raise ConfigError(
                f"trainer.num_ranks={trainer.num_ranks} ranks need {ranks:g} {unit}s{also}, and "
                f"the Ray cluster has {total:g}: use fewer ranks, or join a larger cluster with "
                "RAY_ADDRESS"
            )


def rank_error(error: Exception) -> Exception:
    """Return the error of a rank from the error of Ray Train.

    When one rank fails, the others often lose their connection. Therefore an error of this library
    is preferred.
    """
    failures = getattr(error, "worker_failures", {})
    for _, failure in sorted(failures.items()):
        original = getattr(failure, "_base_exc", failure)
        if isinstance(original, DelethinkError):
            return original
    if (failure := getattr(error, "controller_failure", None)) is not None:
        return ConfigError(f"Ray Train could not start the ranks: {' '.join(str(failure).split())}")
    return error
