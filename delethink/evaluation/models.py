"""Models under evaluation: engines and servers to sample from, and limits of their windows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from delethink.carryover import Boundary, Carryover
from delethink.chunking import ChunkSpec, start
from delethink.config import EngineConfig
from delethink.cost.memory import cache_bytes
from delethink.cost.models import shape_of_config
from delethink.engines.factory import choose_engine, make_engine
from delethink.engines.loading import (
    check_checkpoint,
    engine_window,
    eos_ids,
    load_shell,
    load_tokenizer,
    longest_sequence,
)
from delethink.errors import ConfigError, MissingExtraError, ModelError
from delethink.evaluation.settings import SamplingPlan, Setting, make_settings
from delethink.policy import Policy
from delethink.thinking_marks import AUTO, ThinkingMarks, marks_of
from delethink.tokenization import (
    Tokenizer,
    bind_marks,
    check_thinking_is_open,
    encode,
    query_ids,
)
from delethink.types import Problem

_BYTES_PER_GIB = 2**30
_BATCH_SIZE = 128  # chunks sampled at once by the transformers engine, unless set by the user


class LoadedModel(NamedTuple):
    """A model ready for sampling."""

    policy: Policy
    tokenizer: Tokenizer
    max_model_tokens: int | None  # longest sequence in tokens; ``None`` if unknown


ModelOpener = Callable[[str], AbstractContextManager[LoadedModel]]
"""Loads a model by its name, and releases it at the end of the ``with`` block."""


def open_tokenizer(
    model: str,
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    end_of_thinking: str | None = AUTO,
) -> Any:
    """Load the tokenizer of a model, with variables of its template and its marks of thinking.

    ``end_of_thinking`` is the setting of ``find_thinking_marks``.

    Raises:
        UserError: the tokenizer cannot be used, or a setting does not fit it.
    """
    tokenizer = load_tokenizer(model, trust_remote_code, chat_template_kwargs)
    bind_marks(tokenizer, end_of_thinking)
    return tokenizer


def marks_of_model(
    model: str,
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    end_of_thinking: str | None = AUTO,
) -> ThinkingMarks:
    """Return the marks of thinking of a model; the arguments are those of ``open_tokenizer``."""
    return marks_of(open_tokenizer(model, trust_remote_code, chat_template_kwargs, end_of_thinking))


def check_local_model(model: str, trust_remote_code: bool = False, **options: Any) -> None:
    """Check the files of a model without loading its weights, before another one is sampled.

    ``options`` are further arguments of ``open_tokenizer``.

    Raises:
        ModelError: its weights, settings and tokenizer do not fit together.
    """
    tokenizer = open_tokenizer(model, trust_remote_code, **options)
    eos_ids(load_shell(model, trust_remote_code), tokenizer)
    check_checkpoint(model, trust_remote_code)


def check_cache(engine: EngineConfig, model: str, trust_remote_code: bool = False) -> None:
    """Check that the cache of vLLM on the CPU has room for a sequence, before vLLM starts.

    Raises:
        ConfigError: it has not, or the sequence exceeds the window; the text has both sizes.
    """
    longest = engine.max_model_tokens
    if longest is None or engine.gpus_per_engine or choose_engine(engine.name) != "vllm":
        return
    shell = load_shell(model, trust_remote_code)
    engine_window(shell, longest)
    try:
        shape = shape_of_config(shell.config.to_dict(), model)
    except ModelError:  # a kind of model whose sizes are not known here
        return
    size = 4 if engine.engine_dtype == "float32" else 2
    needed = float(cache_bytes(shape, longest, size, block=16)) / _BYTES_PER_GIB
    if needed > engine.kv_cache_gib:
        raise ConfigError(
            f"a sequence of {longest} tokens needs {needed:.3g} GiB of KV cache, and "
            f"engine.kv_cache_gib={engine.kv_cache_gib:g}: raise it, or lower the context size or "
            "engine.max_model_tokens"
        )


def local_models(
    engine: EngineConfig | None = None,
    *,
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    end_of_thinking: str | None = AUTO,
    seed: int = 0,
    longest: Callable[[str, Tokenizer], int] | None = None,
) -> ModelOpener:
    """Return an opener for models in engines of this machine or its Ray cluster.

    Args:
        engine: settings of the engine.
        trust_remote_code: run code from the models' repositories.
        chat_template_kwargs: variables of the chat template.
        end_of_thinking: mark of the end of thinking, ``"auto"``, or ``None`` for no mark.
        seed: seed of requests without a seed of their own.
        longest: returns the longest sequence asked of a model; by default the engine has room for
            the model's window.
    """
    config = engine or EngineConfig()
    if config.max_batch_size is None and choose_engine(config.name) == "transformers":
        config = config.model_copy(update={"max_batch_size": _BATCH_SIZE})

    @contextlib.contextmanager
    def open_model(model: str) -> Iterator[LoadedModel]:
        tokenizer = open_tokenizer(model, trust_remote_code, chat_template_kwargs, end_of_thinking)
        settings = config
        if longest is not None and config.max_model_tokens is None:
            settings = config.model_copy(update={"max_model_tokens": longest(model, tokenizer)})
        check_cache(settings, model, trust_remote_code)
        opened = make_engine(
            settings,
            model,
            None,  # only the engine loads the weights
            tokenizer,
            trust_remote_code=trust_remote_code,
            seed=seed,
            is_trained=False,
        )
        with contextlib.closing(opened):
            yield LoadedModel(opened, tokenizer, opened.max_model_tokens)

    return open_model


def served_model(
    base_url: str,
    served_name: str | None = None,
    *,
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    end_of_thinking: str | None = AUTO,
    **options: Any,
) -> ModelOpener:
    """Return an opener for a model on an OpenAI-compatible server.

    The opener takes the name of the tokenizer and the configuration. ``served_name`` is the model's
    name on the server, and ``options`` are further arguments of ``OpenAIServer``.

    Raises:
        MissingExtraError: the ``openai`` package is not installed.
    """
    try:
        from delethink.engines.openai import OpenAIServer
    except ImportError:
        raise MissingExtraError("openai", "eval") from None

    @contextlib.contextmanager
    def open_model(model: str) -> Iterator[LoadedModel]:
        tokenizer = open_tokenizer(model, trust_remote_code, chat_template_kwargs, end_of_thinking)
        shell = load_shell(model, trust_remote_code)
        ends = eos_ids(shell, tokenizer)
        server = OpenAIServer(base_url, served_name, tokenizer, eos_ids=ends, **options)
        window = longest_sequence(shell)
        yield LoadedModel(server, tokenizer, min(window, server.max_model_tokens or window))

    return open_model


def settings_for_model(
    model: str,
    modes: Sequence[str],
    context_sizes: Sequence[int],
    problems: Sequence[Problem],
    plan: SamplingPlan,
    *,
    carryover: Carryover | None = None,
    boundary: Boundary | None = None,
    cap_longcot: bool = False,
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    end_of_thinking: str | None = AUTO,
    **sizes: Any,
) -> list[Setting]:
    """Return the settings of a model, checked against its window before the weights load.

    The window also needs room for the longest query and a forced answer. ``cap_longcot`` limits
    LongCoT's budgets to the window, and ``sizes`` are further arguments of ``make_settings``.

    Raises:
        ConfigError: a context is longer than the window.
        ModelError: the chat template fails, or closes the thinking.
        QueryTooLongError: with ``cap_longcot``, no token of thinking fits.
    """
    tokenizer = open_tokenizer(model, trust_remote_code, chat_template_kwargs, end_of_thinking)
    if plan.forced_answer_tokens and marks_of(tokenizer).end is None:
        raise ConfigError(
            "--force-answer closes the thinking with its mark, and --end-of-thinking null says "
            "that there is none: leave one of them out"
        )
    check_thinking_is_open(tokenizer, problems[0])
    window = longest_sequence(load_shell(model, trust_remote_code))
    longest, answer = longest_query(tokenizer, problems), answer_room(tokenizer, plan)
    cap = None
    if cap_longcot:
        cap = window - longest - answer
        # Raises an error if no token of thinking fits.
        start(ChunkSpec.longcot(max(cap, 1)), (0,) * longest, window - answer)
    settings = make_settings(
        [model],
        modes,
        context_sizes,
        carryover=carryover and carryover.bind(tokenizer),
        boundary=boundary and boundary.bind(tokenizer),
        longcot_cap=cap,
        **sizes,
    )
    for setting in settings:
        check_window(setting, longest, window, answer)
    return settings


def needed_context(
    settings: Sequence[Setting],
    problems: Sequence[Problem],
    plan: SamplingPlan,
    tokenizer: Tokenizer,
) -> int:
    """Return the longest sequence of settings of one model: query, thinking, forced answer."""
    thinking = max(setting.spec.max_thinking_context for setting in settings)
    return longest_query(tokenizer, problems) + thinking + answer_room(tokenizer, plan)


def check_window(
    setting: Setting, query_tokens: int, max_model_tokens: int | None, answer_tokens: int = 0
) -> None:
    """Refuse a setting with longer contexts than the model's window, unless that is ``None``.

    Raises:
        ConfigError: a context is longer than the window.
    """
    if max_model_tokens is None:
        return
    room = max_model_tokens - query_tokens - answer_tokens
    needed = setting.spec.max_thinking_context
    if needed <= room:
        return
    answer = f" + {answer_tokens} for an answer" if answer_tokens else ""
    sizes = f"query of up to {query_tokens} + {needed} of thinking{answer}"
    advice = (
        f"lower the budget, or pass --cap-longcot to limit it to {room}"
        if setting.mode == "longcot"
        else f"lower -C to {max(room, 0)} or less"
    )
    raise ConfigError(
        f"{setting.key}: a context needs {needed + query_tokens + answer_tokens} tokens "
        f"({sizes}) and the model takes {max_model_tokens}; {advice}"
    )


def longest_query(tokenizer: Tokenizer, problems: Sequence[Problem]) -> int:
    """Return the number of tokens of the longest query."""
    return max(len(query_ids(tokenizer, problem)) for problem in problems)


def answer_room(tokenizer: Tokenizer, plan: SamplingPlan) -> int:
    """Return the number of tokens added to a context by a forced answer."""
    if not plan.forced_answer_tokens:
        return 0
    return plan.forced_answer_tokens + len(encode(tokenizer, marks_of(tokenizer).forced))
