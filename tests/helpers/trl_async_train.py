"""Two steps of TRL's ``AsyncGRPOTrainer`` without a GPU; runs in an environment of its own.

    python trl_async_train.py SETTINGS.json OUT.json

Two parts of the trainer need a GPU, and each has an equivalent here behind a public interface. Its
attention is a CUDA kernel from the hub; ``AttentionInterface`` takes the same sums in PyTorch. Its
weights travel by NCCL; ``WeightTransferProtocol`` takes a folder, which vLLM reads again. It also
asks CUDA for the name of the device, for a metric of speed alone.
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
from safetensors.torch import save_file
from transformers import AttentionInterface

from delethink.engines.loading import locate
from delethink.integrations.trl_async import DelethinkSessionFactory

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


def register() -> None:
    """Replace the attention that the trainer has registered when it was made."""
    AttentionInterface.register(ATTENTION, tree_attention)


def main(settings: dict[str, Any], out: Path) -> None:
    """Run the code of the guide, and sample a trace from the trained server."""
    address = settings["address"]
    transfer = FolderTransfer(address, Path(locate("toy")), out.parent / "sent")
    names: dict[str, Any] = {"transfer": transfer, "register": register}
    if not torch.cuda.is_available():
        torch.cuda.get_device_name = lambda device=None: "a processor"
    exec(settings["code"], names)  # the guide's
    trainer, trained = names["trainer"], out.parent / "trained"
    shutil.copytree(transfer.folder, trained)
    weights = {n: p.detach().cpu().clone() for n, p in trainer.model.named_parameters()}
    save_file(weights, trained / "model.safetensors", {"format": "pt"})

    recipe, overrides, options = settings["recipe"], settings["overrides"], settings["options"]
    sampling = {"temperature": settings["temperature"]}
    factory = DelethinkSessionFactory(recipe, address, overrides, sampling=sampling, **options)
    session = factory.create(factory.problem("train", 0), seed=0)
    session.wait_for_completion()
    turns = [turn.model_dump() for turn in session.fetch_training_trace().turns]
    factory.close()
    logs = trainer.state.log_history
    out.write_text(json.dumps({"logs": logs, "sent": transfer.sent, "turns": turns}, default=str))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
