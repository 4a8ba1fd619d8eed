"""Refuses settings of the section ``engine:`` that are set and have no effect.

Every setting of a registered engine either changes what it does, or is named in an error. A test
holds this table against all keys of ``EngineConfig``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from delethink.config import EngineConfig
from delethink.engines.factory import choose_engine, engine_class
from delethink.errors import ConfigError
from delethink.output import safe_text

# Settings of "transformers", the engine without workers.
IN_PROCESS = frozenset({"name", "dtype", "max_batch_size", "max_model_tokens", "rollout_timeout"})
# Settings about new weights, and about rollouts of a training step.
TRAINING_ONLY = frozenset(
    {
        "placement",
        "rollout_timeout",
        "sleep",
        "verify_weights",
        "weight_sync_timeout",
        "weight_transfer",
    }
)
_ON_GPUS, _ON_CPUS = "gpu_memory_utilization", "kv_cache_gib"  # settings of vLLM's cache


def check_base_url(base_url: str) -> None:
    """Refuse an address that names no protocol, before anything is loaded.

    Raises:
        ConfigError: the address begins with neither http:// nor https://.
    """
    if not base_url.startswith(("http://", "https://")):
        raise ConfigError(
            f"--base-url must start with http:// or https://, got {safe_text(base_url)!r}; for "
            "example http://127.0.0.1:8000/v1"
        )


def check_engine_settings(
    config: EngineConfig, *, trains: bool, sends_weights: Callable[[], bool] = lambda: False
) -> None:
    """Refuse settings without effect on the chosen engine.

    Args:
        config: the section ``engine:``; a setting counts as set if it differs from its default.
        trains: for a training run, not an evaluation.
        sends_weights: says whether an evaluation sends weights to the engines, as of an adapter.

    Raises:
        ConfigError: a setting has no effect; the text names it. Or a user's engine is none.
    """
    if ":" in config.name:
        engine_class(config.name)
    fields = type(config).model_fields
    given = [key for key in fields if getattr(config, key) != fields[key].default]
    for key, reason in _without_effect(config, trains):
        if key not in given or (key == "weight_sync_timeout" and not trains and sends_weights()):
            continue
        raise ConfigError(f"engine.{key}={getattr(config, key)} {reason}")


def _without_effect(config: EngineConfig, trains: bool) -> Iterator[tuple[str, str]]:
    """Yield each setting without effect, and the reason with advice."""
    name = choose_engine(config.name)
    if not trains:
        for key in sorted(TRAINING_ONLY):
            yield key, "has an effect in training only: leave it out"
    if name == "transformers":
        place = "the trainer's process from its float32 weights" if trains else "this process"
        own = IN_PROCESS - {"dtype"} if trains else IN_PROCESS
        # placement=colocated brings others with it
        for key in sorted(type(config).model_fields, key=lambda key: key != "placement"):
            if key not in own:
                yield (
                    key,
                    "applies to engines in Ray workers, and engine=transformers samples in "
                    f"{place}: leave it out, or set engine=vllm",
                )
    elif name == "vllm" and config.gpus_per_engine:
        yield _ON_CPUS, f"sizes the cache on CPUs: leave it out, or set engine.{_ON_GPUS}"
    elif name == "vllm":
        yield (
            _ON_GPUS,
            "sizes the cache on GPUs, and engine.gpus_per_engine is 0: leave it out, or set "
            f"engine.{_ON_CPUS}",
        )
