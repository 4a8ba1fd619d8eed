"""Harness that thinks in chunks: the library's own rollout, sampled through the endpoint."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import openai
import verifiers.v1 as vf
from pydantic import Field, model_validator

from delethink.chunking import ChunkSpec, ThinkingState, start
from delethink.config import load_recipe
from delethink.engines.loading import eos_ids, load_shell, load_tokenizer
from delethink.engines.openai_models import list_models
from delethink.errors import ConfigError, ModelError, UserError
from delethink.output import get_logger
from delethink.policy import Sampling
from delethink.registry import make
from delethink.rollout import sample_next
from delethink.thinking_marks import AUTO
from delethink.tokenization import (
    bind_marks,
    check_thinking_is_open,
    end_tokens,
    message_ids,
)
from delethink.types import Chunk, Problem, Trace, TraceStop
from delethink_verifiers.endpoint import EndpointPolicy
from delethink_verifiers.prompts import ChatPrompts
from delethink_verifiers.record import (
    KEY,
    begin_record,
    end_record,
    stamp_ids,
    stamp_weights,
)

_logger = get_logger(__name__)
_CHUNK_KEYS = ("context_size", "carryover_size", "max_chunks", "head_size", "head_outside")
_POLICIES = {"carryover": "delethink.carryovers", "boundary": "delethink.boundaries"}
_REMEMBERED = 256  # finished traces whose mean length is known


class ChunkHarnessConfig(vf.HarnessConfig):
    """Chunk sizes, under ``--env.agent.harness.*``; the names are those of recipes."""

    recipe: Path | None = None
    """Recipe whose section thinking, model and chat_template_kwargs are taken where not set."""
    context_size: int = Field(8192, gt=0)
    """Thinking tokens in one context, carried and new ones together (C)."""
    carryover_size: int = Field(4096, ge=0)
    """Maximum thinking tokens carried over a boundary (m)."""
    max_chunks: int = Field(5, ge=1)
    """Maximum chunks of a trace (I); 1 is ordinary chain of thought."""
    head_size: int | None = Field(None, ge=0)
    """Carried tokens from the start of the trace; unset, min(100, carryover_size // 4)."""
    head_outside: bool = False
    """Add the head on top of carryover_size."""
    carryover: str | dict[str, Any] | None = None
    """Registered carryover policy, or a mapping with name and args."""
    boundary: str | dict[str, Any] | None = None
    """Registered boundary policy, or a mapping with name and args."""
    tokenizer: str | None = None
    """Folder or Hugging Face id of the model's tokenizer; unset, the name of the model."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, sent with each request."""
    end_of_thinking: str | None = AUTO
    """Mark between thinking and answer; "auto": as the chat template and the tokens show it."""
    mean_length: float | None = Field(None, gt=0)
    """Numerator of the loss weights; unset, the mean length of the latest traces."""
    require_exact: bool = False
    """Fail a trace if the server read other ids than the sampled ones."""
    trust_remote_code: bool = False
    """Allow code from the tokenizer's repository to run."""
    retries: int = Field(4, ge=0)
    """Retries of a failed request."""

    @model_validator(mode="after")
    def _check(self) -> ChunkHarnessConfig:
        if self.recipe is not None:
            self._fill()
        self.spec()
        return self

    def _fill(self) -> None:
        recipe = load_recipe(str(self.recipe))
        values = recipe.thinking.model_dump(exclude_none=True)
        values |= {"tokenizer": recipe.model, "end_of_thinking": recipe.task.end_of_thinking}
        values["chat_template_kwargs"] = dict(recipe.chat_template_kwargs)
        for name, value in values.items():
            if name not in self.model_fields_set:
                setattr(self, name, value)

    def spec(self) -> ChunkSpec:
        """Return the chunk spec; policies that read text still need ``bind``."""
        values = {name: getattr(self, name) for name in _CHUNK_KEYS}
        for name, group in _POLICIES.items():
            values[name] = make(group, getattr(self, name))
        return ChunkSpec(**values)


class _Model(NamedTuple):
    """The tokenizer of a model, and what is known of the model."""

    tokenizer: Any
    eos_ids: tuple[int, ...]


class ChunkHarness(vf.Harness[ChunkHarnessConfig]):
    """Runs in the process of verifiers; every model call goes through the endpoint."""

    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    def __init__(self, config: ChunkHarnessConfig) -> None:
        super().__init__(config)
        # Before any thread: two that import transformers at once find it half loaded, and the
        # client for training loads a tokenizer of its own.
        from transformers import AutoTokenizer  # noqa: F401

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        """Think until the end of the trace, and store the thinking on the trace of verifiers.

        Raises:
            UserError: a setting, the model or the task cannot be used.
        """
        begin_record(trace)
        if mcp_urls:
            raise ConfigError(f"thinking in chunks has no tools, and the task has {min(mcp_urls)}")
        model = await asyncio.to_thread(self._model, ctx)
        messages = _messages(*self.resolve_prompt(data))
        problem = Problem(messages[-1]["content"], "", before=tuple(messages[:-1]))
        check_thinking_is_open(model.tokenizer, problem)
        query = message_ids(model.tokenizer, messages)
        spec = self.config.spec().bind(model.tokenizer)
        _check_limit(ctx.sampling, spec)
        window = await asyncio.to_thread(_window, endpoint, secret, ctx)
        trains = isinstance(ctx.client, vf.TrainClientConfig)
        prompts = ChatPrompts(model.tokenizer, messages, query, trains)
        options = {"max_retries": self.config.retries, "timeout": openai.Timeout(None, connect=20)}
        async with openai.AsyncOpenAI(base_url=endpoint, api_key=secret, **options) as client:
            policy = EndpointPolicy(
                client,
                ctx,
                trace,
                prompts,
                model.tokenizer,
                model.eos_ids,
                _say_once,
                self.config.require_exact,
            )
            state = start(spec, query, window)
            thinking = await self._think(policy, state, ctx.sampling, trace, problem, model)
        if thinking.stop.is_failure:
            return vf.ProgramResult(exit_code=1, stdout="", stderr=thinking.error or "")
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")

    async def _think(
        self,
        policy: EndpointPolicy,
        state: ThinkingState,
        settings: vf.SamplingConfig,
        trace: vf.Trace,
        problem: Problem,
        model: _Model,
    ) -> Trace:
        """Sample all chunks, and store what there is of them also after an error."""
        temperature = 1.0 if settings.temperature is None else settings.temperature
        chunks: list[Chunk] = []
        refusal: str | None = None
        try:
            while state.stop is None:
                chunk, state = await sample_next(policy, state, Sampling(temperature))
                chunks.append(chunk)
        except UserError as error:
            refusal = str(error)  # verifiers records the server's own words instead
            _say_once(refusal)
            raise
        finally:
            thinking = Trace(state.query_ids, tuple(chunks), state.stop or TraceStop.CUT)
            end_record(
                trace, thinking, problem, model.tokenizer, state.spec, policy.prompt_is_exact
            )
            trace.info[KEY]["error"] = refusal or thinking.error
            stamp_ids(trace, chunks, policy.nodes, policy.prompt_is_exact)
            if thinking.length and not thinking.stop.is_failure:
                weight = _mean_length(thinking.length, self.config.mean_length) / thinking.length
                stamp_weights(trace, policy.nodes, weight)
                trace.info[KEY]["loss_weight"] = weight
        return thinking

    @vf.metric
    async def thinking(self, trace: vf.Trace) -> Mapping[str, float]:
        """Return the size of the trace, and how many chunks began with other ids than meant."""
        stored = trace.info.get(KEY) or {}
        exact = [chunk["prompt_is_exact"] for chunk in stored.get("chunks", ())]
        return {
            "chunks": stored.get("num_chunks", 0),
            "thinking_tokens": stored.get("length", 0),
            "inexact_chunks": exact.count(False),
            "unchecked_chunks": exact.count(None),
        }

    def _model(self, ctx: vf.ModelContext) -> _Model:
        given = (getattr(ctx.sampling, "model_extra", None) or {}).get("chat_template_kwargs")
        variables = json.dumps({**self.config.chat_template_kwargs, **(given or {})})
        name = self.config.tokenizer or ctx.model
        with _loading:
            return _load(
                name, self.config.trust_remote_code, variables, self.config.end_of_thinking
            )


_loading = threading.Lock()  # rollouts begin at once, and a cache does not wait for its first call


@cache
def _load(name: str, trust_remote_code: bool, variables: str, mark: str | None) -> _Model:
    tokenizer = load_tokenizer(name, trust_remote_code, json.loads(variables))
    if tokenizer.chat_template is None:
        raise ModelError(
            f"the tokenizer of {name} has no chat template, and the endpoint of verifiers takes "
            "messages alone: add a chat_template.jinja, or evaluate with `delethink eval`"
        )
    bind_marks(tokenizer, mark)
    try:
        ends = eos_ids(load_shell(name, trust_remote_code), tokenizer)
    except ModelError:  # a tokenizer without the files of its model
        ends = tuple(end_tokens(tokenizer))
    return _Model(tokenizer, tuple(ends))


_windows: dict[tuple[str, str], int | None] = {}


def _window(endpoint: str, secret: str, ctx: vf.ModelContext) -> int | None:
    """Return the longest sequence of the model, if the server lists it."""

    def open_client(base_url: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=base_url, api_key=secret, max_retries=0, timeout=30)

    key = ctx.client.base_url, ctx.model
    if key not in _windows:
        try:
            _windows[key] = list_models(endpoint, open_client).window(ctx.model)
        except openai.APIError:
            return None  # the first request says more
    return _windows[key]


@cache
def _say_once(text: str) -> None:
    _logger.warning(text)


_lengths: deque[int] = deque(maxlen=_REMEMBERED)


def _mean_length(length: int, given: float | None) -> float:
    """Return the mean length of traces, as far as this process knows it."""
    _lengths.append(length)
    return sum(_lengths) / len(_lengths) if given is None else given


def _messages(system: str | None, prompt: Any) -> list[dict[str, str]]:
    """Return the conversation of a task as the chat template takes it."""
    listed = [{"role": "system", "content": system}] if system else []
    if isinstance(prompt, str):
        return [*listed, {"role": "user", "content": prompt}]
    for message in prompt or ():
        if not isinstance(message.content, str):
            raise ConfigError("thinking in chunks takes text alone, and the task has other content")
        listed.append({"role": message.role, "content": message.content})
    if not listed or listed[-1]["role"] != "user":
        raise ConfigError("the task must end with a message of the user, which asks the question")
    return listed


def _check_limit(settings: vf.SamplingConfig, spec: ChunkSpec) -> None:
    limit, longest = settings.max_tokens, spec.context_size
    if limit is not None and limit < longest:
        raise ConfigError(
            f"sampling.max_tokens={limit} would cut chunks of up to {longest} tokens: leave it "
            "out, and set --env.agent.harness.context-size"
        )
