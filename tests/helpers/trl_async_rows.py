"""Rows of TRL's real rollout worker, as JSON; runs in an environment with TRL and OpenEnv.

python trl_async_rows.py SETTINGS.json OUT.json
"""

from __future__ import annotations

import json
import queue
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl.experimental.async_grpo import AsyncGRPOConfig

from delethink.integrations.trl_async import prompt_rows, rollout_worker

TIMEOUT_S = 900  # the machine may be busy


def config(folder: str, address: str, use_cpu: bool = True, **options: Any) -> AsyncGRPOConfig:
    return AsyncGRPOConfig(
        output_dir=folder,
        vllm_server_base_url=address,
        use_cpu=use_cpu,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )


def main(settings: dict[str, Any], out: Path) -> None:
    args = config(str(out.parent), settings["address"], **settings["args"])
    recipe, overrides = settings["recipe"], settings["overrides"]
    dataset = Dataset.from_list(prompt_rows(recipe, settings["num_problems"], "train", overrides))
    options = settings["options"]
    worker = rollout_worker(recipe, args, dataset, overrides, TIMEOUT_S, **options)
    said: dict[str, Any] = {"rows": [], "fault": None, "metrics": []}
    worker.start()
    try:
        deadline = time.monotonic() + TIMEOUT_S
        groups: set[int] = set()
        # A later group shows that the wanted ones are whole: they are scored in order of their end.
        while len(groups) < settings["num_groups"] and time.monotonic() < deadline:
            try:
                sample = worker.rollout_buffer.get(timeout=1)
            except queue.Empty:
                try:
                    worker.check_health(TIMEOUT_S)
                except RuntimeError as error:
                    said["fault"] = str(error.__cause__)
                    break
                if settings.get("unscored"):
                    said["metrics"].append(drained(worker))
                    if any("rollout/turns_max" in part for part in said["metrics"][-1]):
                        break
                continue
            groups.add(sample.group_id)
            said["rows"].append(
                {
                    "group": sample.group_id,
                    "ids": sample.input_ids.tolist(),
                    "mask": sample.completion_mask.tolist(),
                    "logprobs": sample.old_log_probs.tolist(),
                    "advantage": sample.advantage,
                    "reward": sample.metrics["reward"],
                    "prompt": sample.prompt,
                    "completion": sample.completion,
                }
            )
    finally:
        worker.stop()
    out.write_text(json.dumps(said))


def drained(worker: Any) -> list[dict[str, Any]]:
    parts = []
    while True:
        try:
            parts.append(worker.metrics_queue.get_nowait())
        except queue.Empty:
            return parts


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
