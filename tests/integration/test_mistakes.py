"""Mistakes in models, templates, adapters, rewards and servers, through the commands."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mistakes import (
    EVAL,
    TOY,
    Mistake,
    assert_is_sentence,
    assert_refused,
    change,
    model,
    remove,
    train,
    write,
)

pytestmark = pytest.mark.integration

TEMPLATE = "chat_template.jinja"
OWN_CODE = {"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}
AGAIN = "download the model again"
SERVE = ("serve", "-m", "toy", "-C", "90", "--answer-tokens", "16", "--query-tokens", "64")


def reward(name: str, code: str, *words: str) -> Mistake:
    """A recipe with a reward of a module beside it; each test has a module of its own."""
    return train(f"rewards={{'{name}:f': 1}}", words=words, files={f"{name}.py": code})


def settings_alone(**values: Any) -> Callable[[Path], None]:
    return write("config.json", json.dumps(values))


def as_adapter(**values: Any) -> Callable[[Path], None]:
    """Turn the copy of the toy into an adapter of the toy, with these settings."""

    def damage(folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        for file in ("config.json", "generation_config.json", "model.safetensors"):
            (folder / file).unlink()
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(TOY),
            "r": 2,
            "lora_alpha": 2,
            "target_modules": ["q_proj"],
        }
        (folder / "adapter_config.json").write_text(json.dumps(settings | values))
        name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
        weights = {}
        for layer in range(3):
            weights[name.format(layer, "A")] = torch.zeros(2, 128)
            weights[name.format(layer, "B")] = torch.zeros(128, 2)
        save_file(weights, folder / "adapter_model.safetensors")

    return damage


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])


def rename(to: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.safetensors").rename(folder / to)


def shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}')(folder)


def own_code(folder: Path) -> None:
    change("config.json", model_type="foo9", auto_map=OWN_CODE)(folder)


MISTAKES = {
    # chat templates
    "template without an end": model(
        write(TEMPLATE, "{% for m in messages %}x"), "is no Jinja: line 1", "correct its"
    ),
    "undefined in a template": model(
        write(TEMPLATE, "{{ foo.bar }}"), "chat template fails", "'foo' is undefined; use another"
    ),
    "filter of a template": model(write(TEMPLATE, "{{ 1 | no }}"), "is no Jinja: line 1"),
    "template that raises": model(
        write(TEMPLATE, "{{ raise_exception('Only systems!') }}"),
        "chat template fails on messages of the roles user: Only systems!",
    ),
    "arithmetic of a template": model(write(TEMPLATE, "{{ 1 / 0 }}"), "chat template fails"),
    "empty template": model(write(TEMPLATE, ""), "writes nothing for a question"),
    "template in Latin-1": model(write(TEMPLATE, b"\xe9"), TEMPLATE, "no UTF-8 text"),
    "variable of a template": Mistake(
        (*EVAL, "-m", "toy", "engine=transformers", "--chat-template-kwargs", "foo=1"),
        ("names 'foo', which the tokenizer's chat template does not read",),
    ),
    "no file of a template": Mistake(
        (*SERVE, "engine=transformers", "--chat-template", "no"), ("--chat-template no cannot be",)
    ),
    # tokenizers
    "no tokenizer": model(
        remove("tokenizer.json", "tokenizer_config.json"), "has no tokenizer.json", "copy it"
    ),
    "broken tokenizer": model(write("tokenizer.json", "{"), "tokenizer.json is not JSON"),
    "another tokenizer": model(
        write("tokenizer.json", '{"a": 1}'), "cannot load the tokenizer", "tokenizer.json", AGAIN
    ),
    "no end of text": model(
        change("tokenizer_config.json", eos_token=None), "no end-of-sequence token", "set eos_token"
    ),
    # configurations
    "no configuration": model(remove("config.json"), "has no config.json"),
    "broken configuration": model(write("config.json", "{'a'}"), "config.json is not JSON"),
    "list as configuration": model(write("config.json", "[]"), "config.json must be a mapping"),
    "no type": model(change("config.json", model_type=...), "names no model_type", AGAIN),
    "unknown type": model(
        change("config.json", model_type="foo9"),
        "has the model_type 'foo9', which transformers",
        "does not know",
    ),
    "own code": model(own_code, "comes with code of its own", "allow it with --trust-remote-code"),
    "no file of own code": model(
        own_code, "names the file c.py, which is not there", more=("--trust-remote-code",)
    ),
    "model of images": model(
        settings_alone(model_type="vit"), "no vocabulary of tokens", "causal language model"
    ),
    "encoder": model(
        settings_alone(model_type="bert", vocab_size=16), "is an encoder", "causal language model"
    ),
    "encoder and decoder": model(
        settings_alone(model_type="t5", vocab_size=16), "reads a text and writes another one"
    ),
    "text for a size": model(
        change("config.json", hidden_size="many"), "hidden_size='many', expected int", AGAIN
    ),
    "layers": model(change("config.json", num_hidden_layers=4), "config.json contradicts itself"),
    "activation": model(change("config.json", hidden_act="foo"), "hidden_act='foo', which"),
    "data type": model(change("config.json", dtype="float3"), "float3", AGAIN),
    "smaller vocabulary": model(
        change("config.json", vocab_size=8), "the weights of model do not fit its config.json"
    ),
    "quantized": model(
        change("config.json", quantization_config={"quant_method": "awq", "bits": 4}),
        "weights are quantized with 'awq'",
        "before quantization",
    ),
    "end of generation": model(
        change("generation_config.json", eos_token_id="x"), "eos_token_id must be a token id"
    ),
    # weights
    "no weights": model(remove("model.safetensors"), "has no weights in safetensors"),
    "half of the weights": model(cut, "cannot be read as safetensors", "checkpoint again"),
    "weights in Git LFS": model(
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "run git lfs pull",
    ),
    "pickled weights": model(rename("pytorch_model.bin"), "a pickle can run any code"),
    "GGUF": model(rename("model.gguf"), "GGUF cannot be loaded"),
    "missing shard": model(shards, "names b.safetensors, missing in the folder"),
    "file for a folder": Mistake(
        (*EVAL, "-m", "model/model.safetensors", "engine=transformers"),
        ("is a file: name the folder",),
        damage=lambda folder: None,
    ),
    "no folder": Mistake((*EVAL, "-m", "./no", "engine=transformers"), ("folder no does not",)),
    "no name of a model": Mistake(
        (*EVAL, "-m", "bad name!", "engine=transformers"), ("it is no Hugging Face id",)
    ),
    # the first of two models is not sampled before the second is found to be broken
    "second model": Mistake(
        (*EVAL, "-m", "toy,model", "engine=transformers"),
        ("has no weights in safetensors",),
        damage=remove("model.safetensors"),
        never=("accuracy",),
    ),
    # vLLM does not start for a window beyond its cache
    "cache of vLLM": Mistake(
        (*EVAL, "-m", "toy", "engine=vllm", "engine.kv_cache_gib=0.0001"),
        ("needs", "GiB of KV cache", "engine.kv_cache_gib=0.0001: raise it"),
    ),
    # adapters
    "layers of an adapter": model(
        as_adapter(target_modules=["foo"]), "target_modules name foo, no layer of that model"
    ),
    "rank of an adapter": model(as_adapter(r=3), "do not fit adapter_config.json"),
    "kind of adapter": model(as_adapter(peft_type="FOO"), "only LORA"),
    "base of an adapter": model(
        as_adapter(base_model_name_or_path="/no/model"), "the base model of the adapter"
    ),
    "layers to train": train(
        "training.lora={target_modules: [foo]}",
        words=("names foo, which is no layer of the model", "q_proj", "or all-linear"),
    ),
    "no layers to train": train(
        "training.lora={target_modules: []}", words=("names no layer", "or all-linear")
    ),
    "expression of layers": train(
        "training.lora={target_modules: '(['}", words=("is no regular expression", "q_proj")
    ),
    "expression without layers": train(
        "training.lora={target_modules: foo}", words=("matches no layer as a whole",)
    ),
    # names and modules
    "tracker": train("training.report_to=wandb", words=("is not installed: pip install wandb",)),
    "engine that is none": train("engine.name=json:loads", words=("a class with a method create",)),
    "module of an engine": train("engine.name=no_such:X", words=("no module 'no_such'",)),
    "syntax of a reward": reward("mistaken_a", "def f(:\n", "cannot be imported", "line 1"),
    "import of a reward": reward("mistaken_b", "import no_such\n", "No module named 'no_such'"),
    "exit of a reward": reward("mistaken_c", "exit(3)\n", "cannot be imported: SystemExit"),
    "name of a reward": reward("mistaken_d", "x = 1\n", "has no 'f'"),
    "number for a reward": reward("mistaken_e", "f = 3\n", "must be a function or a class"),
    "reward with a fault": reward(
        "mistaken_f",
        "def f(text, answer):\n    return text.foo\n",
        "'str' object has no attribute 'foo' (mistaken_f.py, line 2, in f)",
    ),
    "text of a reward": reward(
        "mistaken_g", "def f(text, answer):\n    return 'yes'\n", "cannot score the right answer"
    ),
    # sizes and places
    "window": train(
        "thinking.context_size=4096",
        words=("4096 thinking tokens and the model takes 1024", "lower context_size"),
    ),
    "file for the results": Mistake(
        (*EVAL, "-m", "toy", "engine=transformers", "-o", "r.yaml/x"), ("cannot write r.yaml/x",)
    ),
    "server that is away": Mistake(
        (*EVAL, "-m", "toy", "--base-url", "http://127.0.0.1:9/v1", "--retries", "0"),
        ("the server at http://127.0.0.1:9/v1 cannot be reached",),
    ),
    "address without a protocol": Mistake(
        (*EVAL, "-m", "toy", "--base-url", "127.0.0.1:9"), ("must start with http://",)
    ),
    "address to listen on": Mistake(
        (*SERVE, "engine=transformers", "--port", "0", "--host", "192.0.2.1", "--no-keys"),
        ("cannot listen on 192.0.2.1", "choose another"),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # folders of recipes are added
    assert_refused(MISTAKES[name], tmp_path)


# -- vLLM and Ray, in processes of their own ------------------------------------------------------

VLLM = (*EVAL, "-m", "toy", "engine=vllm")
VLLM_SERVER = (*SERVE[1:], "--port", "0", "engine=vllm")
STARTS = {
    "cache": Mistake(
        ("serve", *VLLM_SERVER, "engine.kv_cache_gib=0.0001"),
        ("no memory is left for the KV cache", "raise engine.kv_cache_gib"),
    ),
    "cache beyond the memory": Mistake(
        (*VLLM, "engine.kv_cache_gib=90000"), ("engine.kv_cache_gib",)
    ),
    "architecture": Mistake(
        (*EVAL, "-m", "model", "engine=vllm"),
        ("FooForCausalLM", "engine=transformers"),
        damage=change("config.json", architectures=["FooForCausalLM"]),
    ),
    "tensor parallel": Mistake(
        (*VLLM, "engine.tensor_parallel_size=3"), ("engine.tensor_parallel_size=3",)
    ),
    "GPUs that are not there": Mistake(
        (*VLLM, "engine.gpus_per_engine=1", "engine.startup_timeout=20"),
        ("gave no answer within 20 s", "GPU"),
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("own_ray")
@pytest.mark.parametrize("name", STARTS)
def test_an_engine_that_does_not_start_says_why_in_our_settings(name: str, tmp_path: Path) -> None:
    _run_apart(STARTS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("own_ray")
def test_a_stale_address_of_ray_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    mistake = Mistake(VLLM, (f"nothing answers at RAY_ADDRESS={address}", "unset it"))
    _run_apart(mistake, tmp_path, RAY_ADDRESS=address)


def _run_apart(mistake: Mistake, folder: Path, **environment: str) -> None:
    mistake.prepare(folder)
    done = subprocess.run(
        [sys.executable, "-m", "delethink.cli.main", *mistake.arguments],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=900,
        stdin=subprocess.DEVNULL,
    )
    assert_is_sentence(mistake, done.returncode, done.stdout, done.stderr)
