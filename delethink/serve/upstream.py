"""The server behind this one: completions for chunks, and requests that it answers alone."""

from __future__ import annotations

import copy
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Self

import openai

from delethink.engines.openai import OpenAIServer
from delethink.engines.openai_dialect import CompletionRequest, Dialect
from delethink.engines.openai_probe import unheeded_options
from delethink.errors import ConfigError, PolicyError
from delethink.policy import Completion, Sampling, TokenListener
from delethink.serve.api_errors import ApiError
from delethink.tokens import Logprobs, TokenIds

_PASSED_HEADERS = ("content-type", "retry-after")


class UpstreamServer(OpenAIServer):
    """An OpenAI-compatible server with fields that a client adds to its requests."""

    _fields: Mapping[str, Any] = {}

    def with_fields(self, fields: Mapping[str, Any]) -> Self:
        """Return the same server, asked with further fields."""
        if not fields:
            return self
        other = copy.copy(self)
        other._fields = {**self._fields, **fields}
        other._missing_logprob = math.nan if "logprobs" in other._fields else 0.0
        return other

    async def stream(
        self,
        prompt_ids: TokenIds,
        max_new_tokens: int,
        sampling: Sampling,
        on_tokens: TokenListener,
    ) -> Completion:
        """See ``StreamingPolicy``.

        Raises:
            ConfigError: log-probs are asked for, and the server gives none.
        """
        if "logprobs" not in self._fields:
            return await super().stream(prompt_ids, max_new_tokens, sampling, on_tokens)

        def check(token_ids: TokenIds, logprobs: Logprobs) -> None:
            if any(map(math.isnan, logprobs)):
                raise ConfigError("the server behind this one gives no log-probs; leave them out")
            on_tokens(token_ids, logprobs)

        if (await self.negotiate(prompt_ids, sampling)).answers != "ids":
            check((0,), (math.nan,))
        return await super().stream(prompt_ids, max_new_tokens, sampling, check)

    def _request(
        self, dialect: Dialect, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> CompletionRequest:
        request = super()._request(dialect, prompt_ids, max_new_tokens, sampling)
        for name, value in self._fields.items():
            request.body.setdefault(name, value)  # what makes the chunks exact stays
        return request

    async def say_limits(self, prompt_ids: TokenIds) -> None:
        """Sample a few tokens, and say which sampling options have no effect.

        Raises:
            ConfigError, PolicyError: the server cannot complete the prompt at all.
        """
        dialect = await self.negotiate(prompt_ids)
        used = Sampling(1.0, 1, top_p=0.9)
        if dialect.extends:  # else the line about the dialect says that these are missing
            used = replace(used, top_k=20, min_p=0.05)
        try:
            limits, ignored = await unheeded_options(self._sampler(dialect, prompt_ids), used)
        except (ConfigError, PolicyError):  # it answered before, and will be asked again
            limits, ignored = ["which sampling options it heeds is not known"], []
        if ignored:
            names = " and ".join(ignored)
            limits = [f"it ignores {names}, so requests are sampled as if without", *limits]
        for limit in limits:
            self._say(limit, is_limit=True)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Ask the server at a path below its address, and return its JSON.

        Raises:
            ApiError: the server does not answer, or refuses; the text is its own.
        """
        try:
            return await self._client().post(path, cast_to=object, body=dict(body))
        except openai.APIStatusError as error:
            told = error.body if isinstance(error.body, dict) else {}
            status = error.status_code if error.status_code in (400, 404, 429) else 502
            message = f"the server behind this one refused: {told.get('message') or error}"
            raise ApiError(status, message) from None
        except (openai.APIError, ValueError) as error:
            raise ApiError(502, f"the server behind this one failed: {error}") from None

    @asynccontextmanager
    async def forward_chat(
        self, body: Mapping[str, Any]
    ) -> AsyncIterator[tuple[int, dict[str, str], AsyncIterator[bytes]]]:
        """Send a chat request on, and give status, headers and bytes of the response as they come.

        Raises:
            ApiError: the server does not answer.
        """
        client = self._client().with_options(max_retries=0)
        rest = {name: value for name, value in body.items() if name not in ("model", "messages")}
        chat = client.chat.completions.with_streaming_response
        try:
            async with chat.create(
                model=self.model, messages=body["messages"], extra_body=rest
            ) as response:
                headers = _passed(response.headers)
                yield response.status_code, headers, response.iter_bytes()
        except openai.APIStatusError as error:
            yield error.status_code, _passed(error.response.headers), _once(error.response.content)
        except openai.APIError as error:
            raise ApiError(502, f"the server behind this one failed: {error}") from None


def _passed(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: headers[name] for name in _PASSED_HEADERS if name in headers}


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content
