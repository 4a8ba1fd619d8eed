"""lm-eval over a server, with a task from a file on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Scored(NamedTuple):
    """The result of a task.

    Attributes:
        exact_match: share of right answers.
        responses: to the rows, in their order.
    """

    exact_match: float
    responses: list[str]


def run_lm_eval(
    folder: Path,
    url: str,
    model: str,
    rows: Sequence[Mapping[str, str]],
    server: Mapping[str, Any] | None = None,
    timeout_s: float = 900,
) -> Scored:
    """Runs lm-eval with the chat completions of a server over rows of question and answer."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 2000, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    }
    (folder / "questions.yaml").write_text(yaml.safe_dump(task))
    given = {"model": model, "base_url": f"{url}/chat/completions", "max_retries": 1}
    options = ",".join(f"{name}={value}" for name, value in {**given, **(server or {})}.items())
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-chat-completions"]
    command += ["--tasks", "questions", "--include_path", str(folder), "--apply_chat_template"]
    command += ["--model_args", options, "--output_path", str(folder / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    environment |= {"OPENAI_API_KEY": "any", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / "out").rglob("results_*.json")
    scored = json.loads(results.read_text())["results"]["questions"]["exact_match,none"]
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    answered = [json.loads(line) for line in samples.read_text().splitlines()]
    by_id = sorted(answered, key=lambda sample: sample["doc_id"])
    return Scored(scored, [sample["resps"][0][0] for sample in by_id])
