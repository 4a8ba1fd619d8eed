"""Low-rank changes: what PEFT merges, what an engine adds, and when whole weights go instead."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from tiny_models import make_qwen2  # noqa: E402

from delethink.config import EngineConfig  # noqa: E402
from delethink.engines.low_rank import (  # noqa: E402
    LowRankChange,
    merge_changes,
    narrow,
    pack_changes,
    unpack_changes,
)
from delethink.engines.weight_sync import pack, read, write  # noqa: E402
from delethink.training.metrics import StepMetrics  # noqa: E402
from delethink.training.run_state import EngineWeights  # noqa: E402
from delethink.training.weights import (  # noqa: E402
    RankWeights,
    low_rank_changes,
    merge_obstacle,
    merged_state_dict,
)

SIZES = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32}


def adapted_model(tied: bool = False, **settings: Any) -> Any:
    """Return a base model whose layers have trained adapters."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    model = make_qwen2(0, **SIZES, tie_word_embeddings=tied)
    torch.manual_seed(0)
    peft.get_peft_model(model, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


def through_a_file(weights: Any) -> dict[str, torch.Tensor]:
    file, slots = write(weights)
    try:
        return {n: t.clone() for n, t in read(f"/proc/{os.getpid()}/fd/{file}", slots).items()}
    finally:
        os.close(file)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj"]}])
def test_an_engine_merges_what_the_trainer_would_bit_for_bit(settings: dict[str, Any]) -> None:
    base = make_qwen2(0, **SIZES, tie_word_embeddings=False).state_dict()
    model = adapted_model(**settings)
    assert merge_obstacle(model) is None
    packed = pack_changes(low_rank_changes(model))
    changes = unpack_changes(through_a_file(packed.matrices), packed.scales)
    merged = dict(merge_changes(base, changes, torch.device("cpu")))
    expected = merged_state_dict(model)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert {name for name in base if not torch.equal(merged[name], base[name])} == set(changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_weights_are_kept_narrow_where_that_loses_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = {
        "exact": torch.randn(5, 7).bfloat16().to(dtype),
        "not": torch.randn(5, 7).to(dtype),
        "vector": torch.ones(3, dtype=dtype),
    }
    kept = through_a_file(narrow(pack(weights)))
    assert kept["exact"].dtype == kept["vector"].dtype == torch.bfloat16
    assert kept["not"].dtype == dtype
    for name, tensor in weights.items():
        assert torch.equal(kept[name].to(dtype), tensor)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "does more than add a product"),
        ({"lora_bias": True, "bias": "none"}, "does more than add a product"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens.* is trained too"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "another adapter than one of a linear"),
        ({"target_modules": ["lm_head"], "tied": True}, "shares its weight with another"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_adapters_of_other_kinds_go_merged(settings: dict[str, Any], reason: str) -> None:
    import re

    found = merge_obstacle(adapted_model(**settings))
    assert found is not None
    assert re.search(reason, found)


class Engine:
    """Records updates."""

    def __init__(self, obstacle: str | None = None) -> None:
        self.updates: list[tuple[str, int, Any]] = []
        self._obstacle = obstacle

    def update_weights(self, weights: Any, version: int) -> None:
        self.updates.append(("whole", version, set(weights)))

    def merge_obstacle(self) -> str | None:
        return self._obstacle

    def merge_weights(self, changes: dict[str, LowRankChange], version: int) -> None:
        self.updates.append(("changes", version, set(changes)))


def train(engine: Any) -> tuple[str | None, list[tuple[str, int, Any]]]:
    """Update before training, and after a step with adapters."""
    model = make_qwen2(0, **SIZES, tie_word_embeddings=False)
    ranks = RankWeights(model, EngineConfig())
    weights = EngineWeights(engine, model, StepMetrics(), ranks)
    weights.update()
    peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    said = weights.choose_updates()
    trainer: Any = SimpleNamespace(state=SimpleNamespace(global_step=1))
    ranks.trainer = trainer
    weights.update()
    return said, engine.updates


def test_the_base_goes_whole_and_then_the_adapters_alone() -> None:
    said, updates = train(Engine())
    assert said is not None
    assert "the adapters alone" in said
    (first, second) = updates
    assert first[:2] == ("whole", 0)
    assert second[:2] == ("changes", 1)
    assert second[2] < first[2]
    assert all("_proj" in name for name in second[2])


def test_an_engine_that_needs_whole_weights_gets_them_and_the_reason_is_said() -> None:
    said, updates = train(Engine("it moves whole weights"))
    assert said is not None
    assert said.startswith("weight updates: whole merged weights, ")
    assert said.endswith("MB: it moves whole weights")
    assert [update[:2] for update in updates] == [("whole", 0), ("whole", 1)]
    assert updates[0][2] == updates[1][2]


def test_an_engine_with_the_trainers_own_model_gets_nothing() -> None:
    engine: Any = Engine()
    engine.shares_weights = True
    said, updates = train(engine)
    assert said is None
    assert updates == [("whole", 0, set()), ("whole", 1, set())]
