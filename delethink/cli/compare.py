"""``delethink eval compare``: evaluations of the same problems in one table."""

from __future__ import annotations

import argparse
from pathlib import Path

from delethink.cli.process import require_packages
from delethink.cost.hardware import accelerator
from delethink.evaluation.comparison import compare_evaluations, differences
from delethink.evaluation.results import AnalysisSettings
from delethink.output import echo_json


def run(arguments: argparse.Namespace, folders: list[str]) -> int:
    """Print the results of all folders and their paired comparisons, baseline first."""
    require_packages("eval", "transformers", "rich", "scipy")
    from delethink.evaluation.report import EvaluationProgress

    analysis = AnalysisSettings(
        margin=arguments.margin,
        bootstrap_k=arguments.bootstrap,
        resamples=arguments.resamples,
        seed=arguments.seed,
        device=accelerator(arguments.gpu),
        cost_model=arguments.cost_model,
    )
    stored, results = compare_evaluations([Path(folder) for folder in folders], analysis)
    notes = differences(stored)
    if arguments.json:
        echo_json(results.as_dict() | {"timing": results.timing, "differences": notes})
        return 0
    progress = EvaluationProgress()
    progress.table(results)
    for note in notes:
        progress.print(note)
    return 0
