"""The longest sequence of a model, with its RoPE scaling, and of the engine of a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")

from chat_tokenizers import make_chat_tokenizer
from tiny_models import make_qwen2
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    Phi3Config,
    Qwen2Config,
)

from delethink.chunking import ChunkSpec
from delethink.config import EngineConfig
from delethink.engines.loading import engine_window, longest_sequence, scaled_window
from delethink.engines.transformers import TransformersEngine
from delethink.errors import ConfigError, ModelError
from delethink.evaluation import models
from delethink.evaluation.models import local_models, needed_context
from delethink.evaluation.settings import SamplingPlan, Setting
from delethink.training.preflight import Inputs
from delethink.types import Problem


def shell(config: Any) -> Any:
    return SimpleNamespace(config=config, generation_config=None)


def rope(kind: str, factor: float | None = None, **more: Any) -> dict[str, Any]:
    found = {"rope_type": kind, "rope_theta": 10000.0, **more}
    return found if factor is None else found | {"factor": factor}


YARN = rope("yarn", 4.0, original_max_position_embeddings=4096)


@pytest.mark.parametrize(
    ("config", "window", "scaled"),
    [
        (Qwen2Config(max_position_embeddings=4096), 4096, 4096),
        # The model cards of Qwen2.5 add the factor and leave the window; vLLM takes the window.
        (Qwen2Config(max_position_embeddings=4096, rope_parameters=YARN), 4096, 16384),
        (Qwen2Config(max_position_embeddings=16384, rope_parameters=YARN), 16384, 16384),
        (
            LlamaConfig(max_position_embeddings=4096, rope_parameters=rope("linear", 2.0)),
            8192,
            8192,
        ),
        (
            LlamaConfig(max_position_embeddings=4096, rope_parameters=rope("dynamic", 2.0)),
            8192,
            8192,
        ),
        (
            LlamaConfig(
                max_position_embeddings=131072,
                rope_parameters=rope(
                    "llama3",
                    8.0,
                    original_max_position_embeddings=8192,
                    low_freq_factor=1.0,
                    high_freq_factor=4.0,
                ),
            ),
            131072,
            131072,
        ),
        (
            Gemma3TextConfig(
                max_position_embeddings=131072,
                rope_parameters={
                    "full_attention": rope("linear", 8.0),
                    "sliding_attention": rope("default"),
                },
            ),
            131072,
            131072,
        ),
        (Phi3Config(max_position_embeddings=4096), 4096, 4096),
        (GPT2Config(n_positions=512), 512, 512),
        (MptConfig(max_seq_len=256), 256, 256),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_window_is_that_of_vllm(config: Any, window: int, scaled: int) -> None:
    assert longest_sequence(shell(config)) == window
    assert scaled_window(shell(config)) == scaled


def test_a_configuration_without_a_window() -> None:
    from transformers import MambaConfig

    with pytest.raises(ModelError, match="has no max_position_embeddings"):
        longest_sequence(shell(MambaConfig()))


def test_an_engine_takes_the_window_or_less() -> None:
    model = make_qwen2(0, vocab_size=8)
    assert engine_window(model, None) == 256
    assert TransformersEngine(model, (1,), 0).max_model_tokens == 256
    assert TransformersEngine(model, (1,), 0, max_model_tokens=99).max_model_tokens == 99
    with pytest.raises(ConfigError, match="max_model_tokens=257 is more than the 256 tokens"):
        engine_window(model, 257)


@pytest.mark.parametrize(
    ("window", "longest"),
    [
        (32768, 20 + 450),  # LongCoT of the table fits, and needs the whole budget
        (400, 30 + 90),  # it does not, and Delethink needs a context only
    ],
)
def test_the_engine_of_training_has_room_for_the_longest_context(window: int, longest: int) -> None:
    spec = ChunkSpec(90, 0, 5, head_size=0)
    model = shell(Qwen2Config(max_position_embeddings=window))
    inputs = Inputs(None, model, spec, {}, {"train": 30, "heldout": 20})
    assert inputs.engine_config(EngineConfig()).max_model_tokens == longest
    own = EngineConfig(max_model_tokens=1000)
    assert inputs.engine_config(own) is own


def test_the_engine_of_an_evaluation_has_room_for_its_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer, seen = make_chat_tokenizer(), []

    def make_engine(config: EngineConfig, *arguments: Any, **options: Any) -> Any:
        seen.append(config.max_model_tokens)
        return SimpleNamespace(max_model_tokens=config.max_model_tokens, close=lambda: None)

    monkeypatch.setattr(models, "make_engine", make_engine)
    monkeypatch.setattr(models, "check_cache", lambda *arguments: None)  # there is no model m
    monkeypatch.setattr(models, "load_tokenizer", lambda *arguments: tokenizer)
    problems = [Problem("12", "x"), Problem("12345", "x")]
    settings = [
        Setting("m", "delethink", ChunkSpec(90, 45, 3, head_size=0), (90, 135, 180)),
        Setting("m", "longcot", ChunkSpec.longcot(180), (180,)),
    ]
    plan = SamplingPlan(forced_answer_tokens=10)

    def longest(model: str, tokenizer: Any) -> int:
        return needed_context(settings, problems, plan, tokenizer)

    for config in (EngineConfig(name="transformers"), EngineConfig(max_model_tokens=500)):
        with local_models(config, longest=longest)("m") as loaded:
            assert loaded.max_model_tokens == seen[-1]
    with local_models()("m"):
        pass
    assert seen == [5 + 180 + len("</think>") + 10, 500, None]
