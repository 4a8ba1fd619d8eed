"""Mistakes in settings, files and options end before heavy imports, in one sentence of ours."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from mistakes import EVAL, RECIPE, Mistake, assert_refused, recipe, train

from delethink.config import EngineConfig
from delethink.engines.cluster import check_cluster_address
from delethink.engines.engine_faults import explain_start
from delethink.errors import ConfigError

OBJECT = "model: !!python/object/apply:os.system ['id']"
MISTAKES = {
    # YAML
    "tab": recipe("name: r\n\tmodel: toy\n", "line 2, column 1", "a tab", "spaces"),
    "repeated key": recipe(RECIPE + "name: s\n", "the key 'name' a second time"),
    "undefined alias": recipe("name: r\nmodel: *toy\n", "line 2, column 8", "no such anchor"),
    "python object": recipe(f"name: r\n{OBJECT}\n", "line 2", "the tag", "is not allowed"),
    "two documents": recipe(RECIPE + "---\nname: b\n", "line 10", "a second document"),
    "empty recipe": recipe(" \n", "is empty", "recipes/quickstart"),
    "list as recipe": recipe("- a\n- b\n", "must be a mapping"),
    "binary recipe": recipe(b"\xff\xfe\x00", "no UTF-8 text", "save it as UTF-8"),
    "NUL in recipe": recipe("name: \0\n", "the character", "does not allow"),
    "unclosed mapping": recipe("a: {b: 1\nc: 2\n", "line 2", "began in line 1"),
    "no such recipe": Mistake(("train", "nope.yaml"), ("nope.yaml", "No such file")),
    "empty folder as recipe": Mistake(
        ("train", "d"), ("d is a directory without a run",), files={"d": None}
    ),
    # names and values of settings
    "name of vLLM": train("engine.max_num_seqs=9", words=("called engine.max_batch_size here",)),
    "window of vLLM": train(
        "engine.max_model_len=9", words=("called engine.max_model_tokens here",), never=("Allowed",)
    ),
    "name of TRL": train("training.num_train_epochs=1", words=("called training.max_steps here",)),
    "name of PEFT": train("training.lora.rank=1", words=("called training.lora.r here",)),
    "optimizer": train("training.optim=foo", words=("the optimizer is AdamW", "leave it out")),
    "mistyped key": train("training.max_step=1", words=("Did you mean 'max_steps'?",)),
    "schedule": train(
        "training.lr_scheduler_type=constantly",
        words=("'constantly'; it must be one of", "linear", "Did you mean 'constant'?"),
    ),
    "NaN": train("training.learning_rate=.nan", words=("it must be a finite number",)),
    "negative": train("training.learning_rate=-1", words=("is -1; it must be at least 0",)),
    "word for a number": train("training.learning_rate=fast", words=("it must be a number",)),
    "fraction": train("training.max_steps=1.5", words=("it must be a whole number",)),
    "zero": train("engine.max_batch_size=0", words=("is 0; it must be at least 1",)),
    "above one": train("engine.gpu_memory_utilization=2", words=("it must be at most 1",)),
    "flag": train("training.bf16=2", words=("it must be true or false",)),
    "section": train("training=3", words=("it must be a section of keys and values",)),
    "list for a mapping": train("task.args=[1]", words=("it must be a mapping of names",)),
    "null for a text": train("model=", words=("'model' is None; it must be a text",)),
    "list for a path": train("output=[a]", words=("it must be a path",)),
    "one of two types": train("training.lora={target_modules: 7}", words=("a text or a list",)),
    "rank of adapters": train("training.lora={r: -1}", words=("is -1; it must be more than 0",)),
    "groups": train("training.num_generations=3", words=("must hold whole groups",)),
    "tracker": train("training.report_to=[foo]", words=("one of wandb, tensorboard",)),
    "data type": train("engine.dtype=int8", words=("one of float32, bfloat16, float16",)),
    "engine": train("engine=vlm", words=("unknown engine 'vlm'. Did you mean 'vllm'?",)),
    "weight": train("rewards={exact: .inf}", words=("it must be a finite number",)),
    "reward as text": train("rewards={exact: heavy}", words=("a reward is a weight",)),
    "carryover": train("thinking.carryover=tial", words=("Did you mean 'tail'?",)),
    "override": train("nothing", words=("is written dotted.key=value",)),
    # problems
    "no such file": Mistake(("tasks", "p.jsonl"), ("p.jsonl does not exist",)),
    "empty file": Mistake(("tasks", "p.jsonl"), ("no rows",), files={"p.jsonl": ""}),
    "folder": Mistake(("tasks", "p.jsonl"), ("has no file of the split",), files={"p.jsonl": None}),
    "no JSON": Mistake(("tasks", "p.jsonl"), ("line 1 is not JSON",), files={"p.jsonl": "a,b\n"}),
    "half a line": Mistake(
        ("tasks", "p.jsonl"), ("line 1", "the line is incomplete"), files={"p.jsonl": '{"a": 1'}
    ),
    "no Parquet": Mistake(
        ("tasks", "p.parquet"),
        ("p.parquet is not Parquet", "download it again"),
        files={"p.parquet": b"PAR1xxxxxxxx"},
    ),
    "damaged gzip": Mistake(
        ("tasks", "p.jsonl.gz"), ("gzip data are damaged",), files={"p.jsonl.gz": b"\x1f\x8b\x08"}
    ),
    "no name of a data set": Mistake(
        ("tasks", "dataset", "--dataset", "bad name!"), ("bad name! does not exist",)
    ),
    # options
    "samples": Mistake((*EVAL, "-m", "toy", "-n", "0"), ("--samples must be at least 1",)),
    "engine of vLLM": Mistake(
        (*EVAL, "-m", "toy", "engine.max_num_seqs=1"), ("called engine.max_batch_size here",)
    ),
    "GPU": Mistake((*EVAL, "-m", "toy", "--gpu", "zzz"), ("unknown GPU 'zzz'",)),
    "NUL in a path": Mistake((*EVAL, "-m", "toy", "-o", "a\0b"), ("has a NUL character",)),
    "lengths": Mistake(("cost", "--lengths", "no"), ("cannot read no",)),
    "lengths in bytes": Mistake(
        ("cost", "--lengths", "l"), ("no UTF-8 text",), files={"l": b"\xff\xfe"}
    ),
    "keys": Mistake(("serve", "-m", "toy", "--keys-file", "no"), ("--keys-file no cannot be",)),
    "port": Mistake(
        ("serve", "-m", "toy", "--port", "99999"), ("--port must be 0 (a free one) to 65535",)
    ),
    "no traces": Mistake(("view", "no"), ("no does not exist",)),
    "compare": Mistake(("eval", "compare", "a", "b"), ("there is no folder a",)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name: str, tmp_path: Path) -> None:
    assert_refused(MISTAKES[name], tmp_path)


CPU, GPU = EngineConfig(), EngineConfig(gpus_per_engine=1)
# Texts of vLLM 0.32: v1/core/kv_cache_utils.py, v1/worker/, config/, model_executor/.
STARTS = {
    "window": (
        "ValueError: To serve at least one request with the model's max seq len (32768), (3.5 GiB "
        "KV cache is needed, which is larger than the available KV cache memory (1.0 GiB). Based "
        "on the available memory, the estimated maximum model length is 9360. Try increasing "
        "`gpu_memory_utilization` (which also controls CPU memory on the CPU backend) or "
        "decreasing `max_model_len` when initializing the engine.",
        CPU,
        "a sequence of 32768 tokens needs 3.5 GiB of KV cache, and the engine has 1.0 GiB: raise "
        "engine.kv_cache_gib, or lower engine.max_model_tokens",
    ),
    "no cache": (
        "ValueError: No available memory for the cache blocks. Try increasing "
        "`gpu_memory_utilization` when initializing the engine.",
        GPU,
        "no memory is left for the KV cache beside the weights: raise "
        "engine.gpu_memory_utilization",
    ),
    "cache of the CPU": (
        "ValueError: Available memory on node 0 (19.7/23.5 GiB) on kv cache allocation is less "
        "than requested memory for kv (4000.0 GiB). Decrease --kv-cache-memory-bytes",
        CPU,
        "its KV cache of 4000.0 GiB does not fit in the memory, of which 19.7 of 23.5 GiB are "
        "free: lower engine.kv_cache_gib or engine.num_engines",
    ),
    "share of a GPU": (
        "ValueError: Free memory on device cuda:0 (10.1/79.2 GiB) on startup is less than desired "
        "GPU memory utilization (0.9, 71.3 GiB). Decrease GPU memory utilization",
        GPU,
        "the memory has 10.1 of 79.2 GiB free, less than its share: lower "
        "engine.gpu_memory_utilization, or end other programs",
    ),
    "heads": (
        "ValidationError: 1 validation error for ModelConfig Value error, Total number of "
        "attention heads (4) must be divisible by tensor parallel size (3).",
        CPU,
        "the model's 4 attention heads cannot be split over engine.tensor_parallel_size=3: take a "
        "divisor of 4",
    ),
    "size of heads": (
        "ValueError: Head size 16 is not supported by CPUAttentionBackend.",
        CPU,
        "vLLM does not support attention heads of 16 channels here: set engine=transformers",
    ),
    "architecture": (
        "ValidationError: Model architectures ['FooForCausalLM'] are not supported for now.",
        CPU,
        "vLLM does not know the model's architecture ['FooForCausalLM']: set engine=transformers",
    ),
    "memory of a GPU": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        GPU,
        "the memory is full: lower engine.gpu_memory_utilization or engine.max_batch_size",
    ),
    "another": (
        "ValueError: max_num_seqs and --max-model-len do not fit. See https://docs.vllm.ai/x",
        CPU,
        "ValueError: engine.max_batch_size and engine.max_model_tokens do not fit.",
    ),
}


@pytest.mark.parametrize("name", STARTS)
def test_reasons_of_vllm_name_settings_of_a_recipe(name: str) -> None:
    text, config, expected = STARTS[name]
    assert explain_start(text, config) == expected


@pytest.mark.parametrize("address", ["nonsense", "10.0.0.1", "host:port", "ray://host", ":6379"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"is no address of a Ray cluster.*unset it"):
        check_cluster_address(address)


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"nothing answers at RAY_ADDRESS={address}"):
            check_cluster_address(address)
        free.listen()
        check_cluster_address(address)
