"""Policy that samples from an OpenAI-compatible completions server.

    server = OpenAIServer("http://127.0.0.1:8000/v1", "my-model", tokenizer)
    trace = asyncio.run(run_rollout(server, spec, query, Sampling(0.6, seed=1)))

The first request finds the server's dialect (``openai_probe.py``) and says it in one line: whether
token ids or text travel, and what is lost. Options that the server provably ignores are refused.
Log-probs are not kept: all of them are 0, so the traces cannot be trained on
(``openai_logprobs.py`` keeps them).

The ``openai`` client handles connections, timeouts, keys and retries. Its waits between retries
grow to 8 seconds at most, and a ``Retry-After`` above two minutes is an error. A cancelled call
closes its request.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import openai

from delethink.engines.engine_settings import check_base_url
from delethink.engines.openai_dialect import (
    SHOWN_CHARACTERS,
    Answer,
    CompletionRequest,
    Dialect,
    RefusedError,
    join_stream,
    make_request,
    new_logprobs,
    new_tokens,
    read_answer,
    to_completion,
)
from delethink.engines.openai_models import addresses, choose_model, list_models
from delethink.engines.openai_probe import (
    NO_ROUTE,
    SampleTokens,
    find_dialect,
    ignored_options,
)
from delethink.errors import ConfigError, PolicyError
from delethink.output import get_logger, safe_text
from delethink.policy import Completion, Sampling, TokenListener
from delethink.redaction import HIDDEN, register_secret, register_url
from delethink.thinking_marks import marks_of
from delethink.tokenization import Tokenizer
from delethink.types import TokenIds

_logger = get_logger(__name__)
_RETRIED_STATUSES = {408, 409, 429}  # and 500 and above; the openai client retries these
# A server may crash over a form of request that it does not know.
_CRASHES = {500, 501}
_CRASH_RETRIES = 1
_KEY_ERRORS = (openai.AuthenticationError, openai.PermissionDeniedError)
_CONNECT_TIMEOUT_S = 20.0
_HEALTH_TIMEOUT_S = 5.0
_SHOWN_MALFORMED = 100  # characters of a malformed response
_TAGS = re.compile(r"<(?:style|script)\b.*?</(?:style|script)>|<[^>]*>", re.DOTALL | re.IGNORECASE)


class OpenAIServer:
    """Policy over HTTP.

    Args:
        base_url: address of the server, ``http://127.0.0.1:8000/v1``; without a version, ``/v1`` is
            tried too.
        model: name of the model on the server; ``None`` takes the only model served.
        tokenizer: tokenizer of the model, for servers that accept text only.
        api_key: key sent with each request; it is redacted in every text of this process.
        eos_ids: token ids that end an answer.
        timeout_s: seconds to wait for a response.
        announce: prints a line about the dialect; by default it is logged, as a warning if chunk
            boundaries are not exact.
        checks_options: whether a few tokens are sampled, at the first use of a sampling option, to
            see that the server heeds it.

    Attributes:
        dialect: form in which tokens travel; ``None`` before the first request.
        base_url: the address in use.
        max_model_tokens: longest sequence in tokens; ``None`` if the server does not list it.

    Raises:
        ConfigError: the server cannot be reached, rejects the key, or does not serve the model.
    """

    _missing_logprob = 0.0  # where the server gives none

    def __init__(
        self,
        base_url: str,
        model: str | None,
        tokenizer: Tokenizer,
        *,
        api_key: str | None = None,
        eos_ids: TokenIds = (),
        retries: int = 8,
        timeout_s: float = 600.0,
        announce: Callable[[str], None] | None = None,
        checks_options: bool = True,
    ) -> None:
        register_secret(api_key)
        register_url(base_url)
        self._api_key, self._retries = api_key, retries
        check_base_url(base_url)
        self.dialect: Dialect | None = None
        self._announce, self._said = announce, set[str]()
        self._failure: PolicyError | None = None  # of the last search for the dialect
        self._checked: set[tuple[object, ...]] | None = set() if checks_options else None
        self._tokenizer: Any = tokenizer
        self._eos_ids = list(eos_ids)
        self._end_of_thinking = marks_of(tokenizer).end or ""
        connect_s = min(timeout_s, _CONNECT_TIMEOUT_S)
        self._options: dict[str, Any] = {
            # Without a value here, the client sends OPENAI_API_KEY to any server.
            "api_key": api_key or "EMPTY",
            # No limit on the wait for a free connection, of which there are 1,000.
            "timeout": openai.Timeout(timeout_s, connect=connect_s, pool=None),
        }
        self._clients: dict[asyncio.AbstractEventLoop, openai.AsyncOpenAI] = {}
        self._negotiations: dict[asyncio.AbstractEventLoop, asyncio.Lock] = {}
        self.base_url, self._address = base_url, self._clean(base_url)  # the latter for error texts
        self.model, self.max_model_tokens = self._find_model(model)

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """Sample at most ``max_new_tokens`` tokens after ``prompt_ids``.

        Raises:
            ConfigError: the server rejects the request, the key, the model or an option; a retry is
                useless.
            PolicyError: the request failed, and so did its retries; or the answer does not fit the
                dialect, as when the server was replaced.
        """
        dialect = await self.negotiate(prompt_ids, sampling)
        return await self._complete(dialect, prompt_ids, max_new_tokens, sampling)

    async def stream(
        self,
        prompt_ids: TokenIds,
        max_new_tokens: int,
        sampling: Sampling,
        on_tokens: TokenListener,
    ) -> Completion:
        """Sample as ``generate`` does, and pass on tokens as they arrive.

        Servers that do not return token ids give all tokens at the end. After the first tokens
        nothing is retried.
        """
        dialect = await self.negotiate(prompt_ids, sampling)
        if dialect.answers != "ids":
            done = await self._complete(dialect, prompt_ids, max_new_tokens, sampling)
            on_tokens(done.token_ids, done.logprobs)
            return done
        request = self._request(dialect, prompt_ids, max_new_tokens, sampling)
        body = {**request.body, "stream": True, "stream_options": {"include_usage": True}}
        pieces: list[Mapping[str, Any]] = []
        given = 0
        try:
            async with await self._client().post(
                "/completions",
                cast_to=object,
                body=body,
                stream=True,
                stream_cls=openai.AsyncStream[object],
            ) as events:
                async for event in events:
                    if not isinstance(event, Mapping):
                        raise ValueError(f"no piece of a completion: {event!r}")
                    pieces.append(event)
                    ids = tuple(new_tokens(event))
                    if ids:
                        on_tokens(ids, new_logprobs(event, ids, self._missing_logprob))
                    given += len(ids)
            answer = read_answer(join_stream(pieces), self._end_of_thinking)
            done = to_completion(
                dialect, answer, request, self._tokenizer, self._eos_ids, max_new_tokens
            )
        except openai.APIError as error:
            if _is_refusal(status := _status(error)):
                raise self._refusal(error, status) from None
            raise PolicyError(f"the stream broke off: {self._describe(error)}") from None
        except ConfigError:
            raise
        except ValueError as error:
            text = self._clean(str(error))[:_SHOWN_MALFORMED]
            raise PolicyError(f"malformed stream: {text}") from None
        if len(done.token_ids) > given:  # an EOS token that the server keeps
            on_tokens(done.token_ids[given:], done.logprobs[given:])
        return done

    async def negotiate(self, prompt_ids: TokenIds, sampling: Sampling | None = None) -> Dialect:
        """Return the dialect, found with a prompt at the first call, and check sampling options.

        Raises:
            ConfigError, PolicyError: see ``generate``.
        """
        used = sampling or Sampling(0.0)
        if self.dialect is None or self._is_unchecked(used):
            known = self._failure
            # A lock belongs to one loop, like a connection.
            lock = self._negotiations.setdefault(asyncio.get_running_loop(), asyncio.Lock())
            async with lock:
                if self.dialect is None:
                    if self._failure is not known:  # while this call waited; a retry would be late
                        raise PolicyError(str(self._failure))
                    self.dialect = await self._find_dialect(prompt_ids)
                    self._say(str(self.dialect), is_limit=not self.dialect.is_exact)
                if self._is_unchecked(used):
                    await self._check_options(self.dialect, prompt_ids, used)
        return self.dialect

    async def is_healthy(self) -> bool:
        """Return whether the server answers."""
        client = self._client().with_options(max_retries=0, timeout=_HEALTH_TIMEOUT_S)
        try:
            await client.get("/models", cast_to=object)
        except openai.APIStatusError as error:
            return bool(error.status_code < 500)
        except (openai.APIError, ConfigError, ValueError):
            return False
        return True

    async def disconnect(self) -> None:
        """Close the connections of the running event loop."""
        self._negotiations.pop(asyncio.get_running_loop(), None)
        if client := self._clients.pop(asyncio.get_running_loop(), None):
            await client.close()

    async def _find_dialect(self, prompt_ids: TokenIds) -> Dialect:
        async def ask(
            dialect: Dialect, number: int, sampling: Sampling, **fields: Any
        ) -> tuple[CompletionRequest, Answer]:
            request = self._request(dialect, prompt_ids, number, sampling)
            request.body.update(fields)
            return request, await self._answer(request, is_probe=True)

        try:
            return await find_dialect(ask, self._tokenizer, prompt_ids)
        except RefusedError as error:
            if error.status == NO_ROUTE and len(addresses(self.base_url)) > 1:
                await self._move(addresses(self.base_url)[1])
                return await self._find_dialect(prompt_ids)
            raise RefusedError(self._clean(str(error)), error.status) from None
        except ConfigError as error:
            raise ConfigError(self._clean(str(error))) from None
        except PolicyError as error:
            self._failure = error
            raise

    async def _move(self, base_url: str) -> None:
        """Use another address from now on."""
        await self.disconnect()
        self.base_url, self._address = base_url, self._clean(base_url)

    def _is_unchecked(self, sampling: Sampling) -> bool:
        return self._checked is not None and _options_of(sampling) not in self._checked

    async def _check_options(
        self, dialect: Dialect, prompt_ids: TokenIds, sampling: Sampling
    ) -> None:
        """Refuse options that the server ignores, and say which others it does not heed."""
        assert self._checked is not None
        if sampling.temperature:
            sample = self._sampler(dialect, prompt_ids)
            for limit in await ignored_options(sample, sampling):
                self._say(limit, is_limit=True)
        self._checked.add(_options_of(sampling))

    def _sampler(self, dialect: Dialect, prompt_ids: TokenIds) -> SampleTokens:
        """Return a function that samples tokens, to see the effect of options."""
        short_ids = prompt_ids[:2]  # after little text a model is less sure of the next token

        async def sample(number: int, other: Sampling) -> tuple[int, ...]:
            done = await self._complete(dialect, short_ids, number, other)
            return tuple(map(int, done.token_ids))

        return sample

    def _say(self, text: str, *, is_limit: bool) -> None:
        """Print or log a line about the server."""
        line = self._clean(f"server at {self._address}: {text}")
        if line in self._said:
            return
        self._said.add(line)
        if self._announce is not None:
            self._announce(line)
        else:
            (_logger.warning if is_limit else _logger.info)(line)

    async def _complete(
        self, dialect: Dialect, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """Send one request, again if the response is malformed."""
        request = self._request(dialect, prompt_ids, max_new_tokens, sampling)
        own = self._tokenizer, self._eos_ids, max_new_tokens
        completion: Completion = await self._answer(
            request, lambda answer: to_completion(dialect, answer, request, *own)
        )
        return completion

    def _request(
        self, dialect: Dialect, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> CompletionRequest:
        own = self.model, self._tokenizer, self._eos_ids
        return make_request(dialect, *own, prompt_ids, max_new_tokens, sampling)

    async def _answer(
        self,
        request: CompletionRequest,
        read: Callable[[Answer], Any] = lambda a: a,
        is_probe: bool = False,
    ) -> Any:
        """Return the answer to a request, as read; a malformed one is asked for again.

        To a probe, a server that crashes or answers nonsense has refused this form of request.
        """
        reason, failures = "", 0
        while failures <= self._retries:
            failures += 1
            try:
                response = await self._post(request.body, is_probe)
                return read(read_answer(response, self._end_of_thinking))
            except openai.APIError as error:
                status = _status(error)
                if _is_refusal(status) or (is_probe and status in _CRASHES):
                    raise self._refusal(error, status) from None
                reason, is_probe = self._describe(error), False
                break
            except RefusedError as error:
                raise RefusedError(self._clean(str(error)), error.status) from None
            except ConfigError:
                raise
            except ValueError as error:  # not JSON, or not a completion
                text = self._clean(str(error))  # before it is cut, since half a key is a key too
                reason = f"malformed response: {text[:_SHOWN_MALFORMED]}"
        text = f"the request failed, also after {self._retries} retries: {reason}"
        raise RefusedError(text, 500) if is_probe else PolicyError(text)

    async def _post(self, body: dict[str, Any], is_probe: bool) -> Any:
        """Return the body of the response to a request; a probe does not wait for crashes."""
        client = self._client()
        if is_probe:
            brief = client.with_options(max_retries=min(_CRASH_RETRIES, self._retries))
            try:
                return await brief.post("/completions", cast_to=object, body=body)
            except openai.APIError as error:
                status = _status(error)
                if _is_refusal(status) or status in _CRASHES:
                    raise
        return await client.post("/completions", cast_to=object, body=body)

    def _client(self) -> openai.AsyncOpenAI:
        """Return the client of the running event loop, to which its connections belong."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients[loop] = openai.AsyncOpenAI(
                base_url=self.base_url, max_retries=self._retries, **self._options
            )
        return self._clients[loop]

    def _find_model(self, model: str | None) -> tuple[str, int | None]:
        """Return the name and longest sequence of ``model``; a server need not list its models."""

        def open_client(base_url: str) -> openai.OpenAI:
            return openai.OpenAI(base_url=base_url, max_retries=0, **self._options)

        try:
            models = list_models(self.base_url, open_client)
        except (openai.APIConnectionError, UnicodeError) as error:
            raise ConfigError(
                f"the server at {self._address} cannot be reached: {self._describe(error)}. Start "
                "it, or correct --base-url"
            ) from None
        except _KEY_ERRORS as error:
            raise self._refusal(error, error.status_code) from None
        except Exception as error:  # of httpx or httpx2, by the version of the client
            raise ConfigError(
                f"--base-url is no address of a server: {self._describe(error)}"
            ) from None
        self.base_url, self._address = models.base_url, self._clean(models.base_url)
        name = choose_model(models, model, self._clean)
        return name, models.window(name)

    def _refusal(self, error: openai.APIError, status: int) -> ConfigError:
        reason = self._describe(error)
        if not isinstance(error, _KEY_ERRORS):
            text = f"the server at {self._address} rejects the request: {reason}"
            return RefusedError(text, status)
        return ConfigError(
            f"the server at {self._address} rejects the API key ({reason}); set the key in the "
            "environment variable that --api-key-env names"
        )

    def _describe(self, error: Exception) -> str:
        """Return status and text of an error response, or the cause of a missing one."""
        if not isinstance(error, openai.APIStatusError):
            cause = error.__cause__ or error
            return self._clean(f"{type(cause).__name__}: {cause}".strip(": "))
        page = error.response.text
        if page.lstrip()[:1] == "<":  # of a proxy
            page = _TAGS.sub(" ", page)
        text = self._clean(" ".join(page.split())) or "no text"
        return f"HTTP {error.status_code}: {text[:SHOWN_CHARACTERS]}"

    def _clean(self, text: str) -> str:
        """Return a text of the server that is safe to show; also a short key is redacted."""
        if self._api_key:
            text = text.replace(self._api_key, HIDDEN)
        return safe_text(text, lines=False)


async def examine(server: OpenAIServer, prompt_ids: TokenIds) -> list[str]:
    """Find the dialect of a server, and return a sentence for each option that has no effect.

    Raises:
        ConfigError: the server cannot be used.
        PolicyError: the server fails.
    """
    faults = []
    try:
        await server.negotiate(prompt_ids, Sampling(1.0, 1))
        for cut in ({"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}):
            try:
                await server.negotiate(prompt_ids, Sampling(1.0, 1, **cut))
            except ConfigError as error:
                faults.append(str(error))
    finally:
        await server.disconnect()
    return list(dict.fromkeys(faults))


def _status(error: openai.APIError) -> int:
    """Return the HTTP status of an error; 0 without a response."""
    return getattr(error, "status_code", None) or 0


def _is_refusal(status: int) -> bool:
    """Return whether a request of this status would fail again."""
    return 0 < status < 500 and status not in _RETRIED_STATUSES


def _options_of(sampling: Sampling) -> tuple[object, ...]:
    """Return the options in use, whatever their values."""
    if not sampling.temperature:
        return ()
    cut = replace(sampling, seed=None, hint=None)
    return (
        sampling.seed is not None,
        *(getattr(cut, name) != getattr(Sampling(), name) for name in ("top_p", "top_k", "min_p")),
    )
