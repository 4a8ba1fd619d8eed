"""What several integration tests need: tiny models, and a Ray of their own."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import started


@dataclass(frozen=True)
class TinyModel:
    """Random weights, large enough that greedy choices are no ties; EOS is token 1."""

    folder: Path
    model: Any  # Qwen2ForCausalLM

    def forward(
        self, prompt: tuple[int, ...], output: tuple[int, ...], temperature: float = 1.0
    ) -> tuple[list[int], list[float]]:
        """A plain forward pass over ``prompt + output``.

        Returns:
            The greedy choice at each position of the output, and the log-probs of the output.
        """
        import torch

        with torch.no_grad():
            logits = self.model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        logprobs = (logits / temperature).log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(output)[:, None])[:, 0]
        return logits.argmax(-1).tolist(), chosen.tolist()


def make_tiny_model(folder: Path, seed: int) -> TinyModel:
    import torch
    from tiny_models import make_qwen2

    # Two heads of 32 channels: vLLM on the CPU takes none of 16.
    sizes = {"vocab_size": 24, "hidden_size": 64, "intermediate_size": 128}
    model = make_qwen2(seed, **sizes, max_position_embeddings=512, tie_word_embeddings=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    return TinyModel(folder, model)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyModel, TinyModel]:
    """Two models of one shape."""
    folder = tmp_path_factory.mktemp("tiny")
    return make_tiny_model(folder / "a", 0), make_tiny_model(folder / "b", 1)


@pytest.fixture(scope="module")
def others() -> set[psutil.Process]:
    """What other tests have left running, workers of verifiers that they share, say."""
    return started()


@pytest.fixture(scope="session")
def own_ray() -> Iterator[None]:
    """No cluster to join, and sessions and token in a folder that is removed.

    The folder's path is short, because Ray puts sockets into it.
    """
    folder = Path(tempfile.mkdtemp(prefix="delethink-"))
    (folder / "token").write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
        yield
    shutil.rmtree(folder, ignore_errors=True)
