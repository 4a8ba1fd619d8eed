"""The start of a run: inputs and checks, then the engine, while the trainer's libraries load.

An engine in Ray workers imports its own libraries in their processes, for as long as TRL takes to
import here. So Ray is connected while the inputs are read, and the workers start before TRL.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delethink.engines.base import Engine
from delethink.engines.factory import choose_engine, engine_class
from delethink.errors import ConfigError
from delethink.redaction import register_settings
from delethink.training.checkpointing import RunLocation
from delethink.training.preflight import Inputs, Prepared, read_inputs, run_checks
from delethink.training.progress import TrainingProgress

if TYPE_CHECKING:
    from delethink.training.data_parallel import RankGroup


@dataclasses.dataclass
class Started:
    """Inputs of a run, and its engine unless that needs the trainer's model."""

    inputs: Inputs
    engine: Any  # StartingEngine, or None

    def close(self) -> None:
        """Close the engine."""
        if self.engine is not None:
            self.engine.close()

    def finish(self, make: Callable[[], Engine]) -> Engine:
        """Wait for the engine, or make it."""
        if self.engine is None:
            return make()
        self.engine.wait()
        engine: Engine = self.engine
        return engine


def train(
    prepared: Prepared,
    location: RunLocation,
    progress: TrainingProgress,
    ranks: RankGroup | None = None,
) -> Path:
    """Run a recipe, or resume its run, and return the run directory.

    This is the main rank of ``ranks``.

    Raises:
        UserError: a mistake of the user, found before the first rollout.
        RolloutError, WeightSyncError: the run failed; the files written so far are complete.
    """
    try:
        with closing(begin(prepared, location, progress, ranks)) as started:
            progress.wait("loading the libraries of the trainer")
            from delethink.training.trainer import run  # loads TRL

            return run(prepared, started.inputs, started.finish, location, progress, ranks)
    except BaseException:
        location.directory.discard_if_empty()
        raise
    finally:
        progress.end_wait()
        prepared.close()
        location.directory.release()


def begin(
    prepared: Prepared,
    location: RunLocation,
    progress: TrainingProgress,
    ranks: RankGroup | None = None,
) -> Started:
    """Read the inputs, run the checks, and begin to start the engine."""
    recipe = prepared.recipe
    register_settings(recipe.model_dump(mode="json"))  # a rank has not read the recipe itself
    progress.wait("reading model and problems")
    chosen: Any = engine_class(recipe.engine.name)
    if not hasattr(chosen, "begin"):
        return Started(_check(prepared, location, progress), None)
    connection = chosen.connect_early(recipe.engine)
    try:
        inputs = _check(prepared, location, progress)
        progress.log(f"starting the engine: {choose_engine(recipe.engine.name)}")
        beside: dict[str, Any] = {}
        if recipe.engine.placement == "colocated":
            from delethink.training.data_parallel import RankGroup, gather_places

            connection.wait()
            beside = {"places": gather_places(recipe, ranks or RankGroup())}
        engine = chosen.begin(
            inputs.engine_config(recipe.engine),
            recipe.model,
            inputs.shell,
            inputs.tokenizer,
            trust_remote_code=recipe.trust_remote_code,
            seed=recipe.seed,
            connection=connection,
            **beside,
        )
    except BaseException:
        connection.close()
        raise
    return Started(inputs, engine)


def _check(prepared: Prepared, location: RunLocation, progress: TrainingProgress) -> Inputs:
    """Read the inputs, and report checks that do not pass."""
    recipe, directory = prepared.recipe, location.directory
    inputs = read_inputs(prepared)
    progress.log(f"run directory: {directory.path}")
    checks = run_checks(prepared, inputs, directory.path)
    problems = [f"{c.name}: {c.found}; {c.advice}" for c in checks if c.status == "problem"]
    if problems and recipe.preflight == "refuse":
        raise ConfigError(f"preflight: {'; '.join(problems)}; preflight=warn starts the run anyway")
    for check in checks:
        if check.status != "ok":
            progress.log(f"{check.status}: {check.name}: {check.found}; {check.advice}")
    return inputs
