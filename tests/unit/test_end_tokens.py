"""Tokens that end an answer: the same ones by every way of loading, with the place of each."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import pytest

pytest.importorskip("transformers")

from chat_tokenizers import END, make_chat_tokenizer
from tiny_models import make_qwen2
from transformers import GenerationConfig, LlamaConfig, Qwen2Config

from delethink.engines.loading import eos_ids, load_shell, load_tokenizer
from delethink.tokenization import end_tokens

TOY = Path(__file__).parents[2] / "delethink" / "assets" / "toy_reasoner"


def turns(before: str, after: str) -> str:
    """Return a template with marks around the role and after the content of each message."""
    return (
        f"{{% for m in messages %}}{before}{{{{ m['role'] }}}}\n{{{{ m['content'] }}}}{after}"
        "{% endfor %}"
    )


CHATML = turns("<|im_start|>", "<|im_end|>\n")
GEMMA = turns("<start_of_turn>", "<end_of_turn>\n")
LLAMA3 = turns("<|start_header_id|>", "<|eot_id|>")
PHI3 = turns("<|user|>", "<|end_of_answer|>\n")
GLM4 = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
GPT_OSS = (
    "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}"
    "{{ '<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
)
MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|start_header_id|>",
    "<|eot_id|>",
    "<|user|>",
    "<|end_of_answer|>",
    "<|start|>",
    "<|return|>",
    "<|endoftext|>",
    "</think>",
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<|im_end|>"),  # Qwen2.5 base: its eos_token is <|endoftext|>
        (GEMMA, "<end_of_turn>"),
        (LLAMA3, "<|eot_id|>"),
        (PHI3, "<|end_of_answer|>"),
        (GLM4, "<|user|>"),  # nothing ends the last message: the next turn does
        (GPT_OSS, "<|return|>"),  # <|end|> ends a channel only
        (turns("", " <|eot_id|> "), "<|eot_id|>"),
        # No token of its own:
        (None, None),
        (turns("", "\n"), None),
        (turns("", "\n\nHuman:"), None),
        (turns("", "</think>"), None),
        ("{{ messages[-1]['content'] }}{% if add_generation_prompt %}<think>{% endif %}", None),
        ("{{ raise_exception('only users') }}", None),
        (turns("<|im_start|>", "{{ eos_token }}"), "<|endoftext|>"),
    ],
)
def test_the_template_shows_the_end_of_a_turn(template: Any, expected: str | None) -> None:
    tokenizer = make_chat_tokenizer(template, MARKS, eos="<|endoftext|>")
    found = end_tokens(tokenizer)
    names = tokenizer.convert_ids_to_tokens(list(found))
    assert names == list(dict.fromkeys(["<|endoftext|>", expected or "<|endoftext|>"]))
    if expected not in (None, "<|endoftext|>"):
        assert found[tokenizer.convert_tokens_to_ids(expected)] == "the chat template"


def shell(config: Any, generation: Any = None) -> Any:
    return SimpleNamespace(config=config, generation_config=generation)


def test_every_place_counts_once_in_their_order() -> None:
    tokenizer = make_chat_tokenizer(CHATML, MARKS)
    end = tokenizer.convert_tokens_to_ids(END)
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = shell(Qwen2Config(eos_token_id=[3, end]), GenerationConfig(eos_token_id=[4, 3]))
    assert end_tokens(tokenizer, model) == {
        end: "eos_token of the tokenizer and config.json",
        4: "generation_config.json",
        3: "generation_config.json and config.json",
        turn: "the chat template",
    }


@pytest.mark.parametrize("stated", [3, [3], [3, None], (3,)])
def test_any_form_of_an_eos_token_id(stated: Any) -> None:
    tokenizer = make_chat_tokenizer()
    found = end_tokens(tokenizer, shell(SimpleNamespace(eos_token_id=stated)))
    assert list(found) == [tokenizer.eos_token_id, 3]
    for none in (None, [], -1, [-1], True, "3"):
        assert list(end_tokens(tokenizer, shell(SimpleNamespace(eos_token_id=none)))) == [
            tokenizer.eos_token_id
        ]


def test_defaults_of_a_configuration_class_are_not_the_checkpoints() -> None:
    """A ``config.json`` without ``eos_token_id`` makes Llama's 2 of transformers."""
    tokenizer, config = make_chat_tokenizer(), LlamaConfig()
    assert config.eos_token_id == 2
    made = GenerationConfig.from_model_config(config)
    assert list(end_tokens(tokenizer, shell(config, made))) == [tokenizer.eos_token_id]
    stated = shell(config, GenerationConfig(eos_token_id=2))
    assert list(end_tokens(tokenizer, stated)) == [tokenizer.eos_token_id, 2]


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ([1, 4], None, (1, 4)),
        (1, [4, 1], (1, 4)),
        ([1, 4], 5, (1, 5, 4)),
        (4, None, (1, 4)),
        ([1, 99], None, (1,)),  # outside the vocabulary of 16: never sampled
    ],
)
def test_every_way_of_loading_gives_the_same(
    tmp_path: Path, config: Any, generation: Any, expected: tuple[int, ...]
) -> None:
    import shutil

    from delethink.engines.loading import load_model

    folder = Path(shutil.copytree(TOY, tmp_path / "model"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"eos_token_id": config}))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        file = folder / "generation_config.json"
        file.write_text(json.dumps({"eos_token_id": generation}))
    tokenizer = load_tokenizer(str(folder))
    model = load_model(str(folder), "float32")
    assert eos_ids(load_shell(str(folder)), tokenizer) == expected
    assert eos_ids(model, tokenizer) == expected
    env: Any = gymnasium.make("delethink.envs:delethink/Thinking-v0", tokenizer=folder).unwrapped
    assert env.eos_ids == set(expected)
    model.save_pretrained(tmp_path / "again")
    assert eos_ids(load_shell(str(tmp_path / "again")), tokenizer) == expected


def test_a_tokenizer_given_as_an_object_brings_its_templates_token() -> None:
    tokenizer = make_chat_tokenizer(CHATML, MARKS)
    env: Any = gymnasium.make("delethink.envs:delethink/Thinking-v0", tokenizer=tokenizer).unwrapped
    assert env.eos_ids == set(tokenizer.convert_tokens_to_ids([END, "<|im_end|>"]))


def test_a_model_in_memory_without_a_generation_file() -> None:
    tokenizer = make_chat_tokenizer(eos=None)
    tokenizer.eos_token_id = 1
    assert eos_ids(make_qwen2(0, vocab_size=300, eos_token_id=[1, 4]), tokenizer) == (1, 4)
