"""Makes the base model of a family, in pieces that can be stopped and continued.

    python recipes/replication/make_base.py hitting --out models/hitting --minutes 14

Repeat the command until it says that the model is made. The corpus is noisy on purpose, and every
chain is in one context, as for the shipped toy: see ``scripts/make_toy.py``, whose model and update
these are. Sizes stand in ``sizes.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES

from delethink.errors import ConfigError, UserError
from delethink.json_io import read_json

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "scripts"))
from make_toy import (  # noqa: E402 - of the folder added above
    EOS,
    SHORT_STEPS,
    THINK,
    learning_rate,
    make_model,
    make_optimizer,
    make_tokenizer,
    update,
)

STATE = "making.pt"  # weights, optimizer and number of updates of an unfinished model
SAVE_EVERY_S = 120
IGNORED = -100  # label of a token without loss


def read_sizes() -> dict[str, Any]:
    """Return the sizes of the study."""
    sizes: dict[str, Any] = read_json(HERE / "sizes.json", ConfigError)
    return sizes


def base_settings(family: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return everything that decides the weights of the base model of a family."""
    return {"family": family, **sizes["base"], **sizes["families"][family]["base"]}


def make_batch(tokenizer, settings: dict[str, Any], number: int) -> tuple[Any, Any]:
    """Return ids and labels [rows, tokens] of one update, the same for the same number.

    Every other batch is of short chains, as for the toy. Rows are padded at their ends.
    """
    rng = random.Random(f"{settings['seed']}/{number}")
    family = FAMILIES[settings["family"]]
    num_lines = rng.randint(1, rng.choice((SHORT_STEPS, settings["max_lines"])))
    length = family.line_tokens * (num_lines + 2)  # the query and the answer are a line each
    rows, query_tokens = [], 0
    for _ in range(max(1, round(settings["tokens"] / length))):
        query, text, ended = family.write_trace(rng, num_lines, settings["slip"])
        query_tokens = len(query) + 1
        rows.append(tokenizer(query + THINK + text + (EOS if ended else ""))["input_ids"])
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, query_tokens : len(row)] = torch.tensor(row[query_tokens:])
    return ids, labels


def load_state(folder: Path, settings: dict[str, Any], model, optimizer) -> int:
    """Load an unfinished model, and return its number of updates; 0 if there is none.

    Raises:
        ConfigError: it was begun with other sizes.
    """
    if not (folder / STATE).exists():
        return 0
    state = torch.load(folder / STATE, weights_only=True)
    begun = json.loads(state["settings"])
    if changed := sorted(k for k in settings | begun if settings.get(k) != begun.get(k)):
        raise ConfigError(
            f"{folder} holds a model begun with {changed[0]}={begun.get(changed[0])}, and now it "
            f"is {settings.get(changed[0])}; move the folder away or set it back"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    done: int = state["done"]
    return done


def save_state(folder: Path, settings: dict[str, Any], model, optimizer, done: int) -> None:
    """Write an unfinished model in one step, so that a kill leaves the one before."""
    state = {
        "settings": json.dumps(settings),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "done": done,
    }
    torch.save(state, folder / f"{STATE}.new")
    os.replace(folder / f"{STATE}.new", folder / STATE)


def make_piece(settings: dict[str, Any], folder: Path, seconds: float, report) -> bool:
    """Go on making a model for at most ``seconds``; return whether it is made.

    Raises:
        ConfigError: the folder holds another model.
    """
    making = folder / "making.json"
    if making.exists():
        if read_json(making, ConfigError) != settings:
            raise ConfigError(f"{folder} holds a model of other sizes (making.json); move it away")
        return True
    folder.mkdir(parents=True, exist_ok=True)
    # One thread: sums are then always added in the same order.
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    shape = [settings[name] for name in ("seed", "layers", "width")]
    model = make_model(*shape, len(tokenizer), settings["positions"])
    optimizer = make_optimizer(model)
    done = load_state(folder, settings, model, optimizer)
    started = saved = time.monotonic()
    while done < settings["updates"] and time.monotonic() - started < seconds:
        ids, labels = make_batch(tokenizer, settings, done)
        rate = learning_rate(done / settings["updates"], settings["lr"])
        loss = update(model, optimizer, ids, labels, rate)
        done += 1
        if done % 50 == 0:
            report(f"update {done:5d} of {settings['updates']}  loss {loss:.4f}")
        if time.monotonic() - saved > SAVE_EVERY_S:
            save_state(folder, settings, model, optimizer, done)
            saved = time.monotonic()
    if done < settings["updates"]:
        save_state(folder, settings, model, optimizer, done)
        return False
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    making.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")  # last: the model is made
    (folder / STATE).unlink(missing_ok=True)
    return True


def main() -> None:
    """Make one piece of the base model named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=14.0, help="length of this piece")
    args = parser.parse_args()
    settings = base_settings(args.family, read_sizes())

    def report(line: str) -> None:
        print(line, flush=True)

    try:
        is_made = make_piece(settings, args.out, 60 * args.minutes, report)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: cannot write {args.out}: {error.strerror or error}")
    report(f"{args.out} is made" if is_made else "not made yet: run this again to go on")


if __name__ == "__main__":
    main()
