"""Two steps of TRL's ``AsyncGRPOTrainer`` without a GPU; runs in an environment of its own.

    python trl_async_train.py SETTINGS.json OUT.json

Two parts of the trainer need a GPU, and each has an equivalent here behind a public interface. Its
attention is a CUDA kernel from the hub; ``AttentionInterface`` takes the same sums in PyTorch. Its
weights travel by NCCL; ``WeightTransferProtocol`` takes a folder, which vLLM reads again.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AttentionInterface
from trl.experimental.async_grpo import AsyncGRPOTrainer
from trl_async_rows import config

from delethink.engines.loading import locate
from delethink.integrations.trl_async import (
    DelethinkSessionFactory,
    prompt_rows,
    rollout_worker,
)

ATTENTION = "tree_fa3"  # the name that the trainer gives to every model
TIMEOUT_S = 300


def tree_attention(
    module: Any,
    query: torch.Tensor,  # [1, heads, tokens, channels]
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    tree_kv_index: torch.Tensor,
    tree_cu_seqlens_q: torch.Tensor,
    tree_cu_seqlens_k: torch.Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Let each segment of the trie see its path from the root, as the CUDA kernel does."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    starts, paths = tree_cu_seqlens_q.tolist(), tree_cu_seqlens_k.tolist()
    parts = []
    for i in range(len(starts) - 1):
        own = query[:, :, starts[i] : starts[i + 1]]
        path = tree_kv_index[paths[i] : paths[i + 1]]
        new, seen = own.shape[2], len(path)
        mask = torch.ones(new, seen, dtype=torch.bool).tril(seen - new)
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                own, key[:, :, path], value[:, :, path], attn_mask=mask, scale=scaling
            )
        )
    return torch.cat(parts, 2).transpose(1, 2), None


class FolderTransfer:
    """Weights by a folder that the server of vLLM reads again."""

    def __init__(self, address: str, model: Path, folder: Path) -> None:
        self.address, self.folder, self.sent = address, folder, 0
        shutil.copytree(model, folder)

    def init_weight_transfer(self) -> None:
        self._post("/pause?mode=keep")  # fails before the first step, without the server's dev mode
        self._post("/resume")

    def pause(self) -> None:
        self._post("/pause?mode=keep")

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        weights = {name: tensor.contiguous().clone() for name, tensor in iterator}
        save_file(weights, self.folder / "model.safetensors", {"format": "pt"})
        options = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
        self._post("/collective_rpc", options)
        self.sent += 1

    def resume(self) -> None:
        self._post("/resume")

    def destroy(self) -> None:
        pass

    def _post(self, route: str, body: Any = None) -> None:
        response = requests.post(self.address + route, json=body, timeout=TIMEOUT_S)
        assert response.ok, f"{route}: {response.status_code} {response.text[:500]}"


def main(settings: dict[str, Any], out: Path) -> None:
    recipe, overrides, options = settings["recipe"], settings["overrides"], settings["options"]
    address, model = settings["address"], Path(locate("toy"))
    is_modified = settings["modified"]
    own = {"use_cpu": True} if is_modified else {"use_cpu": False}
    args = config(str(out.parent), address, **own, **settings["args"])
    rows = prompt_rows(recipe, settings["num_problems"], "train", overrides)
    dataset = Dataset.from_list(rows)
    transfer = FolderTransfer(address, model, out.parent / "sent")
    trainer = AsyncGRPOTrainer(
        model=str(model),
        args=args,
        train_dataset=dataset,
        rollout_worker=rollout_worker(recipe, args, dataset, overrides, **options),
        weight_transfer=transfer if is_modified else None,
    )
    if is_modified:
        AttentionInterface.register(ATTENTION, tree_attention)  # after the trainer's own
    trainer.train()
    trained = out.parent / "trained"
    shutil.copytree(transfer.folder, trained)
    weights = {n: p.detach().cpu().clone() for n, p in trainer.model.named_parameters()}
    save_file(weights, trained / "model.safetensors", {"format": "pt"})

    factory = DelethinkSessionFactory(
        recipe, address, overrides, sampling={"temperature": args.temperature}, **options
    )
    session = factory.create(rows[0]["prompt"], seed=0)
    session.wait_for_completion()
    turns = [turn.model_dump() for turn in session.fetch_training_trace().turns]
    factory.close()
    logs = trainer.state.log_history
    out.write_text(json.dumps({"logs": logs, "sent": transfer.sent, "turns": turns}, default=str))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
