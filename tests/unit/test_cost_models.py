"""Model shapes from configs, and error texts for configs that are not supported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_causal import SETTINGS, VARIANTS, settings_of

from delethink.cost.hardware import ACCELERATORS, accelerator
from delethink.cost.memory import cache_bytes
from delethink.cost.models import (
    known_model_types,
    known_models,
    model_shape,
    shape_of_config,
)
from delethink.errors import ConfigError, ModelError

# Published billions of parameters: total, and active if fewer.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": (0.494, None),
    "Qwen/Qwen2.5-1.5B": (1.544, None),
    "Qwen/Qwen2.5-7B": (7.616, None),
    "Qwen/Qwen2.5-72B": (72.71, None),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (1.777, None),
    "Qwen/Qwen3-8B": (8.19, None),
    "Qwen/Qwen3-30B-A3B": (30.53, 3.35),
    "Qwen/Qwen3-235B-A22B": (235.1, 22.2),
    "Qwen/Qwen3-Next-80B-A3B-Thinking": (79.67, 3.87),
    "meta-llama/Llama-3.1-8B": (8.03, None),
    "meta-llama/Llama-3.1-70B": (70.55, None),
    "mistralai/Mistral-7B-v0.1": (7.242, None),
    "mistralai/Mixtral-8x7B-v0.1": (46.70, 12.88),
    "google/gemma-3-1b-pt": (1.0, None),
    "google/gemma-3-27b-pt": (27.01, None),
    "openai/gpt-oss-20b": (20.91, None),
    "openai/gpt-oss-120b": (116.8, None),
    "deepseek-ai/DeepSeek-V3": (671.0, 37.55),
    "moonshotai/Kimi-Linear-48B-A3B-Instruct": (49.12, None),
}
DENSE = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    shape, (everything, active) = model_shape(name), PUBLISHED[name]
    assert shape.parameters / 1e9 == pytest.approx(everything, rel=2e-3)
    assert shape.active_parameters / 1e9 == pytest.approx(active or everything, rel=5e-3) or (
        active is None and shape.expert_weights
    )


def test_every_bundled_model_is_read() -> None:
    assert len(known_models()) >= 30
    for name in known_models():
        assert model_shape(name.upper()).name == name


@pytest.mark.parametrize(
    ("name", "unbounded"),
    [
        ("Qwen/Qwen2.5-1.5B", 28),
        ("mistralai/Mistral-7B-v0.1", 0),
        ("google/gemma-3-27b-pt", 10),
        ("openai/gpt-oss-120b", 18),
        ("Qwen/Qwen3-Next-80B-A3B-Thinking", 12),
        ("moonshotai/Kimi-Linear-48B-A3B-Instruct", 7),
    ],
)
def test_layers_with_full_attention(name: str, unbounded: int) -> None:
    assert model_shape(name).unbounded_layers == unbounded


def test_a_model_by_hand_in_a_file_and_in_a_folder(tmp_path: Path) -> None:
    by_hand = model_shape(",".join(f"{key}={value}" for key, value in DENSE.items()))
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    for path in (tmp_path, tmp_path / "config.json"):
        assert model_shape(str(path)).layers == by_hand.layers
    assert model_shape("toy").parameters == 645_120


def test_the_text_model_of_a_multimodal_one() -> None:
    outer = {"model_type": "gemma3", "text_config": {**DENSE}, "tie_word_embeddings": True}
    assert shape_of_config(outer, "both").tied_embeddings


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "mamba2"}, "model_type 'mamba2' is not supported"),
        ({"model_type": "qwen4"}, "the nearest known type is 'qwen"),
        ({"model_type": "olmo4"}, "the nearest known type is 'olmo"),
        ({"model_type": "xyz"}, "the nearest known type is '"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size must be a whole number >= 1, got 0"),
        ({"hidden_size": 64.5}, "hidden_size must be a whole number >= 1, got 64.5"),
        ({"hidden_size": "wide"}, "hidden_size must be a whole number >= 1, got 'wide'"),
        ({"num_attention_heads": 5}, "no multiple of num_attention_heads=5"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads=3"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
        ({"layer_types": ["mamba"] * 2}, "layer_types ['mamba'] are not supported"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "3 of 2"),
        ({"model_type": "deepseek_v3", "first_k_dense_replace": 5}, "first_k_dense_replace"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": "all"}, "mlp_only_layers must be a list"),
        ({"model_type": "kimi_linear"}, "full_attn_layers is missing"),
        ({"model_type": "olmo3"}, "sliding_window is missing"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window is missing"),
        ({"layer_types": 7}, "layer_types has 7 for 2 layers"),
        ({"layer_types": [["full_attention"]] * 2}, "are not supported for model_type 'llama'"),
        (
            {"model_type": "gemma3n", "num_kv_shared_layers": 0, "intermediate_size": [8]},
            "1 entries for 2 layers",
        ),
        ({"model_type": "gemma3n", "num_kv_shared_layers": 2}, "must be below num_hidden_layers=2"),
        (
            {"model_type": "gemma4", "sliding_window": 8, "per_layer_config": {"first": {}}},
            "per_layer_config must map the index of a layer",
        ),
        ({"model_type": "lfm2", "block_ffn_dim_multiplier": "x"}, "must be a number above 0"),
        (
            {"model_type": "glm4_moe", "moe_intermediate_size": 8, "n_shared_experts": -1},
            "n_shared_experts must be a whole number >= 0",
        ),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ModelError) as caught:
        shape_of_config({**DENSE, **change}, "mine")
    assert says in str(caught.value)
    assert str(caught.value).startswith("mine: ")


@pytest.mark.parametrize(
    ("came", "nearest"),
    [("olmo_3", "olmo3"), ("Qwen3_5_Text", "qwen3_5_text"), ("granite_moe", "granitemoe")],
)
def test_an_unknown_type_is_refused_with_the_nearest_known_one(came: str, nearest: str) -> None:
    with pytest.raises(ModelError) as caught:
        shape_of_config({**DENSE, "model_type": came}, "mine")
    text = str(caught.value)
    assert f"model_type {came!r} is not supported" in text
    assert f"the nearest known type is {nearest!r}" in text
    assert f"--model model_type={nearest}" in text
    assert ". " not in text  # one sentence


def test_the_guide_lists_the_known_types() -> None:
    guide = (Path(__file__).parents[2] / "docs/guide/cost.md").read_text(encoding="utf-8")
    rows = guide.split("| layers | model types |")[1].split("\n\n")[0].splitlines()[2:]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[2])]
    assert sorted(listed) == known_model_types()


def test_figures_of_one_value_a_layer() -> None:
    """Some configs list a figure for each layer, also where all layers are alike."""
    alike = {
        **DENSE,
        "model_type": "hunyuan_v1_moe",
        "num_experts": 4,
        "moe_topk": [2, 2],
    }
    shape = shape_of_config(alike, "mine")
    assert {layer.feed_forward.experts_per_token for layer in shape.layers} == {2}


def test_old_names_of_layer_types_of_granite_4() -> None:
    config = {
        **DENSE,
        "model_type": "granitemoehybrid",
        "num_local_experts": 0,
        "shared_intermediate_size": 128,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
    }
    state, full = shape_of_config(config, "mine").layers
    assert state.mixer.state_numbers
    assert not state.mixer.pair_flops
    assert full.mixer.pair_flops
    assert not full.mixer.state_numbers


def test_layers_of_exaone_from_a_pattern_of_letters() -> None:
    config = {
        **DENSE,
        "model_type": "exaone4",
        "num_hidden_layers": 4,
        "sliding_window": 8,
        "sliding_window_pattern": "LLG",
    }
    windows = [layer.mixer.window for layer in shape_of_config(config, "mine").layers]
    assert windows == [8, 8, None, 8]


def test_a_checkpoint_of_qwen_3_5() -> None:
    """27 billion parameters, a full layer in four, and states that do not grow."""
    text = {
        "model_type": "qwen3_5_text",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 64,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "mamba_ssm_dtype": "float32",
        "vocab_size": 248320,
    }
    shape = shape_of_config({"model_type": "qwen3_5", "text_config": text}, "mine")
    assert shape.parameters / 1e9 == pytest.approx(27, rel=0.01)
    assert (shape.unbounded_layers, len(shape.layers)) == (16, 64)
    state = 4 * 48 * 128 * 128 + 2 * 3 * (2 * 16 + 48) * 128  # float32; inputs of a convolution
    assert cache_bytes(shape, 0, 2) == 48 * state
    assert cache_bytes(shape, 1, 2) - cache_bytes(shape, 0, 2) == 16 * 2 * 2 * 4 * 256


ODD = [None, 0, -1, 1, 3, 1.5, "", "x", [], [1], [None, 1], [[1], [2]], {}, {"0": {"head_dim": 0}}]
ODD += [True, 10**30, float("nan"), float("inf"), ["full_attention", "x"]]
LISTS = ["layer_types", "mlp_layer_types", "mlp_only_layers", "moe_layers", "no_rope_layers"]
LISTS += ["full_attn_idxs", "linear_attn_config", "per_layer_config", "sliding_window_pattern"]


@given(st.data())
def test_any_value_in_a_config_gives_a_shape_or_one_sentence(data: st.DataObject) -> None:
    config = settings_of(data.draw(st.sampled_from([*SETTINGS, *VARIANTS])))
    for key in data.draw(st.lists(st.sampled_from([*config, *LISTS]), min_size=1, max_size=2)):
        config[key] = data.draw(st.sampled_from(ODD))
    text = "mine: a shape"
    try:
        parameters = shape_of_config(config, "mine").parameters
    except ModelError as error:
        parameters, text = 1, str(error)
    assert parameters > 0
    assert text.startswith("mine: ")


def test_files_without_a_config(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    for name, says in (("broken.json", "not JSON"), ("list.json", "no config"), ("empty", "read")):
        with pytest.raises(ModelError, match=says):
            model_shape(str(tmp_path / name))
    with pytest.raises(ModelError, match="key=value"):
        model_shape("hidden_size=8,layers")


def test_an_unknown_name_names_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"owner/name"):
        model_shape("qwen2.5-1.5b")
    pytest.importorskip("huggingface_hub")
    with pytest.raises(ModelError, match=r"Did you mean 'qwen/qwen2.5-1.5b'") as caught:
        model_shape("Qwen/Qwen2.5-1.6B")
    assert "could not be downloaded" in str(caught.value)


def test_accelerators() -> None:
    assert accelerator("RTX 4090") is ACCELERATORS["rtx4090"]
    assert accelerator("H100").memory == 80e9
    with pytest.raises(ConfigError, match=r"unknown GPU 'h10'.* Did you mean 'h100'"):
        accelerator("h10")
    for device in ACCELERATORS.values():
        assert device.source
        assert min(device.peak_flops, device.bandwidth, device.memory, device.link) > 0
