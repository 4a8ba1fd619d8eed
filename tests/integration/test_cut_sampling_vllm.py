"""Top-p, top-k and min-p in vLLM: its requests have them, and the engine in process agrees."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

import torch

from delethink.engines.transformers import cut
from delethink.policy import Sampling

pytestmark = pytest.mark.integration


def test_it_is_vllms() -> None:
    """The same tokens as vLLM's own functions leave."""
    ops = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    torch.manual_seed(0)
    logits = torch.randn(16, 64) * 3
    pairs = [(1 + i, 0.05 + i / 17) for i in range(16)]
    k, p = torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs])
    theirs = ops.apply_top_k_top_p_pytorch(logits.clone(), k, p)
    ours = cut(logits, [Sampling(top_k=a, top_p=b) for a, b in pairs])
    assert torch.equal(ours.isfinite(), theirs.isfinite())


def test_a_request_of_vllm_has_them() -> None:
    from delethink.engines.vllm import _sampling_params

    params = _sampling_params(5, Sampling(0.6, 1, top_p=0.9, top_k=20, min_p=0.1), (1,))
    assert (params.top_p, params.top_k, params.min_p) == (0.9, 20, 0.1)
    plain = _sampling_params(5, Sampling(0.6, 1), (1,))
    assert (plain.top_p, plain.top_k, plain.min_p) == (1.0, 0, 0.0)
