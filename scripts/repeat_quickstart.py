"""Runs a recipe over several seeds and prints the table of all of them.

    python scripts/repeat_quickstart.py --out runs/seeds --seeds 0,1,2 [key=value ...]

Each seed is a run of its own under ``--out``; one that is there already is read, not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def run(recipe: str, seed: int, folder: Path, overrides: list[str]) -> None:
    if folder.exists():
        sys.exit(f"{folder} holds a run that did not end: move it away and run this again")
    command = [sys.executable, "-m", "delethink.cli.main", "train", recipe]
    started = time.monotonic()
    subprocess.run([*command, f"seed={seed}", f"output={folder}", *overrides], check=True)
    (folder / "seconds.txt").write_text(f"{time.monotonic() - started:.0f}\n")


def describe(row: dict[str, Any]) -> str:
    low, high = row["accuracy_interval"]
    return (
        f"{row['accuracy']:.3f} ({low:.3f}-{high:.3f}) | {row['thinking_tokens']:.0f} | "
        f"{row['chunks']:.1f} | {row['budget_share']:.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="recipes/quickstart/recipe.yaml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    lines = []
    for seed in map(int, args.seeds.split(",")):
        folder = args.out / f"seed{seed}"
        if not (folder / "seconds.txt").exists():
            run(args.recipe, seed, folder, args.overrides)
        metrics = [json.loads(m) for m in (folder / "metrics.jsonl").read_text().splitlines()]
        gap = max(m["logprob_difference"] for m in metrics)
        seconds = (folder / "seconds.txt").read_text().strip()
        for row in json.loads((folder / "table.json").read_text()):
            lines.append(f"| {seed} | {row['setting']} | {describe(row)} |")
        lines.append(f"| {seed} | *{seconds} s; log-prob difference at most {gap:.1e}* | | | | |")
    print("| seed | setting | accuracy | thinking tokens | chunks | out of budget |")
    print("| --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
