"""What all processes but the first do: they train on what they are given, and know no more.

Everything that is a collective in the first process has its counterpart here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from transformers import set_seed

from delethink.config import Recipe
from delethink.serving.checkpoint import load_model, load_tokenizer
from delethink.training.job import FINAL, fit_together, make_trainer
from delethink.training.processes import Processes
from delethink.training.trl_config import trl_config
from delethink.training.whole_weights import WholeWeights


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
