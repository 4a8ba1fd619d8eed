"""Work of a cell: makes a base, trains, evaluates or probes with the library's own functions."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import make_base
from cells import HERE, MAKING, Cell, Place
from families import FAMILIES

from delethink.chunking import ChunkSpec
from delethink.config import EngineConfig, ThinkingConfig
from delethink.engines.loading import digest
from delethink.errors import RolloutError
from delethink.evaluation.models import local_models, needed_context, open_tokenizer
from delethink.evaluation.probe import probe_model, sample_traces
from delethink.evaluation.run import Evaluation, ProblemSet, evaluate, load_problems
from delethink.evaluation.settings import SamplingPlan, Setting, make_settings
from delethink.evaluation.stored import read_evaluation
from delethink.json_io import read_json_lines
from delethink.registry import search_folder
from delethink.training.checkpointing import FINAL_CHECKPOINT

PIECE_S = 13 * 60  # length of one piece of a base model
TEMPERATURE = 1.0
IN_FLIGHT = 256
IN_FLIGHT_BEYOND = 64  # of long traces, whose keys and values fill the memory
_CURVE = (
    "step",
    "reward",
    "thinking_tokens",
    "sampled_tokens",
    "trained_tokens",
    "forward_tokens",
    "chunks",
    "budget_share",
    "entropy",
    "logprob_difference",
)
_ROW = ("budget", "thinking_tokens", "chunks", "out_of_budget", "pass_at", "maj_at", "flops")


def work_on(cell: Cell, place: Place) -> dict[str, Any] | None:
    """Do the work of a cell, and return its values; ``None`` if it needs another piece.

    Raises:
        UserError: the work cannot be done.
        OSError: a file cannot be written.
    """
    search_folder(HERE)  # tasks and rewards of the families are named module:object
    works = {"base": _make, "probe": _probe, "cost": _cost}
    works |= dict.fromkeys(("train", "ablate", "continue"), _train)
    return works.get(cell.kind, _evaluate)(cell, place)


def _make(cell: Cell, place: Place) -> dict[str, Any] | None:
    settings = {"family": cell.settings["family"], **cell.settings["base"]}
    folder = place.folder(cell.name)
    if not make_base.make_piece(settings, folder, PIECE_S, lambda line: print(line, flush=True)):
        return None
    return {"weights": digest(model_of(cell, place))}


def recipe_of(cell: Cell, place: Place) -> dict[str, Any]:
    """Return the recipe of a cell that trains."""
    settings = cell.settings
    task = FAMILIES[settings["family"]]
    low, high = settings["steps"]
    thinking = dict(settings["thinking"])
    if settings["method"] != "delethink":
        # LongCoT is one chunk: of the whole budget, or of the size of one context.
        spec = ChunkSpec(**thinking)
        size = spec.budget if settings["method"] == "longcot" else spec.context_size
        thinking |= {"context_size": size, "carryover_size": 0, "max_chunks": 1}
    return {
        "name": cell.name,
        "model": _weights(place.folder(cell.needs[0])),
        "seed": settings["seed"],
        "output": str(place.folder(cell.name)),
        "task": {
            "name": f"families:{task.__name__}",
            "args": {"min_steps": low, "max_steps": high},
        },
        "rewards": dict(task.rewards),
        "thinking": thinking,
        "training": dict(settings["training"]),
        "evaluation": {"num_problems": 0},
        "engine": "transformers",
    }


def model_of(cell: Cell, place: Place) -> str:
    """Return the folder of the weights that a base or training cell has made."""
    return _weights(place.folder(cell.name if cell.kind in MAKING else cell.needs[0]))


def _weights(folder: Path) -> str:
    """Return the folder of the last weights of a base or a run."""
    final = folder / "checkpoints" / FINAL_CHECKPOINT
    return str(final if final.is_dir() else folder)


def _train(cell: Cell, place: Place) -> dict[str, Any]:
    """Run ``delethink train``; a run that was stopped goes on from its last checkpoint."""
    recipe = place.work / f"{cell.name}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(json.dumps(recipe_of(cell, place), indent=1) + "\n", "utf-8")
    command = [sys.executable, "-m", "delethink.cli.main", "train", str(recipe)]
    # In the folder of the families, which the names of task and reward stand for.
    if code := subprocess.run(command, cwd=HERE, check=False).returncode:
        raise RolloutError(f"the training of {cell.name} ended with exit code {code}; see above")
    folder = place.folder(cell.name)
    lines = read_json_lines(folder / "metrics.jsonl", RolloutError)
    curve = [[_rounded(line.get(name)) for name in _CURVE] for _, line in lines]
    return {"weights": digest(model_of(cell, place)), "columns": list(_CURVE), "curve": curve}


def _problems(cell: Cell) -> ProblemSet:
    settings = cell.settings
    low, high = settings["steps_beyond" if cell.kind == "beyond" else "steps"]
    name = f"families:{FAMILIES[settings['family']].__name__}"
    return load_problems(name, {"min_steps": low, "max_steps": high}, settings["problems"])


def _evaluate(cell: Cell, place: Place) -> dict[str, Any]:
    """Evaluate a model; what was sampled before a stop is kept."""
    settings = cell.settings
    model, folder = model_of(cell, place), place.folder(cell.name)
    ways = _ways(cell, model)
    plan = SamplingPlan(settings["samples"], TEMPERATURE, settings["seed"])
    with contextlib.closing(_problems(cell)) as problems:
        evaluation = Evaluation(
            problems,
            ways,
            plan,
            in_flight=IN_FLIGHT_BEYOND if cell.kind == "beyond" else IN_FLIGHT,
            keep_tokens=False,
            weights={model: digest(model)},
        )
        opener = local_models(
            EngineConfig(name="transformers"),
            longest=lambda _, tokenizer: needed_context(ways, problems.problems, plan, tokenizer),
        )
        results = evaluate(evaluation, opener, folder, resume=folder.exists())
    if results.errors:
        raise RolloutError(f"traces of {cell.name} failed: {json.dumps(results.errors)}")
    scores = _scores(folder)
    return {
        "weights": digest(model),
        "ways": {
            (way.way if cell.kind == "grid" else way.mode): {
                "scores": {str(b): scores[way.key, b] for b in way.budgets},
                "rows": [
                    _rounded({name: asdict(row)[name] for name in _ROW})
                    for row in results.rows
                    if row.setting == way.key
                ],
            }
            for way in ways
        },
    }


def _ways(cell: Cell, model: str) -> list[Setting]:
    """Return the ways of thinking that a cell evaluates."""
    settings, thinking = cell.settings, cell.settings["thinking"]
    if cell.kind == "own":
        spec = ThinkingConfig(**thinking).spec().bind(open_tokenizer(model))
        return [Setting(model, "delethink", spec, (spec.budget,))]
    if cell.kind == "grid":
        budget = ChunkSpec(**thinking).budget
        specs = [_spec_of_budget(*sizes, budget) for sizes in settings["grid"]]
        ways = [Setting(model, "delethink", spec, (spec.budget,)) for spec in specs]
        return [*ways, Setting(model, "longcot", ChunkSpec.longcot(budget), (budget,))]
    is_beyond = cell.kind == "beyond"
    return make_settings(
        [model],
        [settings["method"]] if is_beyond else ["delethink", "longcot"],
        [thinking["context_size"]],
        [thinking["carryover_size"]],
        settings["max_chunks_beyond"] if is_beyond else [thinking["max_chunks"]],
        head_size=thinking["head_size"],
    )


def _spec_of_budget(context_size: int, carryover_size: int, budget: int) -> ChunkSpec:
    """Return the spec with the fewest chunks whose budget is at least ``budget``."""
    step = context_size - carryover_size
    max_chunks = 1 + max(1, math.ceil((budget - context_size) / step))
    return ChunkSpec(context_size, carryover_size, max_chunks, head_size=0)


def _scores(folder: Path) -> dict[tuple[str, int], list[str]]:
    """Return by setting and budget the scores: a string a sample, a sign a problem."""
    found: dict[tuple[str, int], dict[tuple[int, int], str]] = {}
    for record in read_evaluation(folder).records():
        for outcome in record.outcomes:
            own = found.setdefault((record.key.setting, outcome.budget), {})
            own[record.key.sample, record.key.problem] = str(int(outcome.score))
    return {key: _by_sample(values) for key, values in found.items()}


def _by_sample(values: Mapping[tuple[int, int], str]) -> list[str]:
    lines: dict[int, str] = {}
    for (sample, _), score in sorted(values.items()):
        lines[sample] = lines.get(sample, "") + score
    return list(lines.values())


def _probe(cell: Cell, place: Place) -> dict[str, Any]:
    thinking, model = cell.settings["thinking"], model_of(cell, place)
    spec = ChunkSpec(**thinking)
    with contextlib.closing(_problems(cell)) as problems:
        traces = sample_traces(model, problems.problems, spec.budget, temperature=TEMPERATURE)
    endless = ChunkSpec(**thinking | {"max_chunks": 10**6})
    findings = probe_model(model, traces, [endless])
    return {
        "weights": digest(model),
        "traces": findings.traces,
        "answers": findings.answers,
        "answers_lost": findings.answers_lost,
        "nats": [_rounded(asdict(line)) for line in findings.totals],
    }


def _cost(cell: Cell, place: Place) -> dict[str, Any] | None:
    from measuring import measure

    settings, model = cell.settings, model_of(cell, place)
    line_tokens = FAMILIES[settings["family"]].line_tokens  # a query has as many, with its mark
    done = place.folder(cell.name) / "rows.jsonl"
    sizes = settings["cost"]
    rows = measure(model, settings["context_size"], line_tokens, sizes, done, PIECE_S)
    return None if rows is None else {"weights": digest(model), "rows": rows}


def _rounded(value: Any) -> Any:
    """Return a value with at most six significant digits, for compact files."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value
