"""Copies of the toy reasoner whose tokens around the thinking have other names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

TOY = Path(__file__).parents[2] / "delethink" / "assets" / "toy_reasoner"


def make_marked_toy(folder: Path, start: str, end: str, template: str | None = None) -> str:
    """Copy the toy reasoner to ``folder`` with other marks of thinking, and return its path.

    The weights are the same, so it writes ``end`` where the toy writes ``</think>``.

    Args:
        folder: a folder that does not exist.
        start: name of the token that opens the thinking, in the template.
        end: name of the token that ends it.
        template: the chat template; by default it opens the thinking with ``start``.
    """
    shutil.copytree(TOY, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    names = {"<think>": start, "</think>": end}
    for token in tokenizer["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocabulary = {names.get(name, name): i for name, i in tokenizer["model"]["vocab"].items()}
    # Loading asks that </think> can be written at all, letter by letter too.
    vocabulary |= {letter: len(vocabulary) + i for i, letter in enumerate("</think>")}
    tokenizer["model"]["vocab"] = {name: i for i, name in enumerate(vocabulary)}
    path.write_text(json.dumps(tokenizer))
    opening = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}" + start + "{% endif %}"
    (folder / "chat_template.jinja").write_text(opening if template is None else template)
    return str(folder)
