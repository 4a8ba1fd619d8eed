"""Throughput of the in-process engine relative to ``generate`` of transformers.

    python benchmarks/bench_engine.py --model FOLDER
    python benchmarks/bench_engine.py            # random weights, vocabulary of 262,144

Both sample the same batch from the same model in turns, at temperature 1 from all tokens. The
engine also returns log-probs, and every request has a seed of its own. The other work of a machine
slows both, so ratios are medians over pairs of neighbours, of wall time and of processor time.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

from delethink.cli.process import set_up_process

set_up_process()

import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from delethink.engines.transformers import TransformersEngine  # noqa: E402
from delethink.policy import Sampling  # noqa: E402

SHAPE = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "vocab_size": 262_144,
    "tie_word_embeddings": True,
}


def load(folder: str | None, device: str) -> Any:
    """Return a model in evaluation mode, in float32 on a CPU and bfloat16 elsewhere."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if folder is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).to(dtype)
    return model.to(device).eval()


def run_engine(model: Any, prompts: list[tuple[int, ...]], max_new_tokens: int) -> None:
    """Sample with the engine; no token ends an output."""
    engine = TransformersEngine(model, [], pad_id=0, max_batch_size=len(prompts))

    async def all_at_once() -> None:
        calls = [
            engine.generate(prompt, max_new_tokens, Sampling(1.0, seed=i))
            for i, prompt in enumerate(prompts)
        ]
        await asyncio.gather(*calls)

    asyncio.run(all_at_once())


def run_generate(model: Any, prompts: list[tuple[int, ...]], max_new_tokens: int) -> None:
    """Sample with ``generate``."""
    ids = torch.tensor(prompts, device=model.device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=[]
    )
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)


def measure(call: Callable[[], None]) -> tuple[float, float]:
    """Return wall seconds and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="FOLDER")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    model = load(options.model, options.device)
    model.generation_config = GenerationConfig()
    prompts = [tuple(range(100 + i, 100 + i + options.prompt_tokens)) for i in range(options.batch)]
    calls = {
        "engine": lambda: run_engine(model, prompts, options.new_tokens),
        "generate": lambda: run_generate(model, prompts, options.new_tokens),
    }
    tokens, ratios = options.batch * options.new_tokens, []
    for turn in range(options.rounds + 1):
        order = list(calls) if turn % 2 else list(calls)[::-1]
        took = {name: measure(calls[name]) for name in order}
        if turn:  # round 0 is a warm-up
            (wall, cpu), (own_wall, own_cpu) = took["generate"], took["engine"]
            ratios.append((wall / own_wall, cpu / own_cpu))
            print(
                f"engine {tokens / own_wall:8.1f} tokens/s   generate {tokens / wall:8.1f} "
                f"tokens/s   ratio {wall / own_wall:.2f}, by processor time {cpu / own_cpu:.2f}",
                flush=True,
            )
    walls, cpus = (sorted(column) for column in zip(*ratios, strict=True))
    print(
        f"engine / generate: {statistics.median(walls):.2f} ({walls[0]:.2f} to {walls[-1]:.2f}), "
        f"by processor time {statistics.median(cpus):.2f} ({cpus[0]:.2f} to {cpus[-1]:.2f})"
    )


if __name__ == "__main__":
    main()
