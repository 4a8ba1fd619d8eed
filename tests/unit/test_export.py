"""The trained model as a folder: whole weights, each once, in the data type of the base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from delethink.engines.loading import load_model  # noqa: E402
from delethink.training.export import export_weights  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("is_tied", [False, True], ids=["own head", "tied head"])
def test_every_weight_is_saved_once_and_loads(tmp_path: Path, dtype: object, is_tied: bool) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=is_tied))
    export_weights(model, model.state_dict(), dtype, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {dtype}
    assert ("lm_head.weight" in names) is not is_tied
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] in str(dtype)
    loaded = load_model(str(tmp_path), "float32").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor.to(dtype).float()), name
