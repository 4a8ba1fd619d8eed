"""Any server that speaks OpenAI's completions protocol, as a policy.

    server = OpenAIServer("http://127.0.0.1:8000/v1", "my-model", tokenizer)
    trace = asyncio.run(run_rollout(server, spec, query, Sampling(0.6, seed=1)))

Token ids go in and come out where the server takes and returns them (vLLM and what follows it);
otherwise text does, and boundaries are then exact only as far as text survives the tokenizer.
Weights
cannot be replaced, and log-probs are not asked for: they are all 0, so nothing can be trained on
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import random
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from delethink.errors import ConfigError, MissingExtraError, PolicyError
from delethink.policy import Completion, Sampling
from delethink.tokenization import Tokenizer
from delethink.types import StopReason, TokenIds

Dialect = Literal["ids", "plain ids", "text"]

_logger = logging.getLogger(__name__)
_DIALECTS: tuple[Dialect, ...] = ("ids", "plain ids", "text")  # from exact to least exact
_STOP = {"stop": StopReason.EOS, "length": StopReason.LENGTH, "abort": StopReason.ABORT}
_TRANSIENT = {408, 409, 425, 429}  # and every status of 500 and more
_LONGEST_WAIT_S = 30.0


class _TransientError(Exception):
    """Something that may go well the next time."""

    def __init__(self, text: str, wait_s: float | None = None) -> None:
        super().__init__(text)
        self.wait_s = wait_s  # that the server asks for


class _RefusedError(Exception):
    """The server does not take the request as it is."""


class ServedModel(NamedTuple):
    """What a server says of a model."""

    name: str
    max_model_tokens: int | None  # None: it does not say


class OpenAIServer:
    """Implements the policy protocol over HTTP.

    Args:
        base_url: up to and with the version: ``http://127.0.0.1:8000/v1``.
        model: the name by which the server knows it; ``None`` where it serves one only.
        tokenizer: of the model; turns ids into text and back where the server takes text only.
        api_key: sent with each request and shown nowhere.
        eos_ids: tokens that end an answer.
        retries: how often a request that failed in passing is sent again.
        first_wait_s: before the first repetition; doubled for each later one.
        timeout_s: of a request without any answer.
        max_in_flight: connections.

    Raises:
        ConfigError: the server cannot be reached, refuses the key, or serves no such model.
        MissingExtraError: httpx is not installed.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None,
        tokenizer: Tokenizer,
        *,
        api_key: str | None = None,
        eos_ids: TokenIds = (),
        retries: int = 5,
        first_wait_s: float = 1.0,
        timeout_s: float = 600.0,
        max_in_flight: int = 256,
    ) -> None:
        if importlib.util.find_spec("httpx") is None:
            raise MissingExtraError("httpx", "eval")
        import httpx

        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(
                f"--base-url must start with http:// or https://, got {base_url!r}; for example "
                "http://127.0.0.1:8000/v1"
            )
        self.base_url = base_url.rstrip("/")
        self._tokenizer = tokenizer
        self._eos_ids = tuple(eos_ids)
        self._api_key = api_key
        self._retries = retries
        self._first_wait_s = first_wait_s
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, 20.0), pool=None)
        self._limits = httpx.Limits(max_connections=max_in_flight)
        self._clients: dict[asyncio.AbstractEventLoop, Any] = {}
        self._dialect: Dialect | None = None  # found with the first request
        self._finding = asyncio.Lock()
        served = self._find(model)
        self.model, self.max_model_tokens = served

    @property
    def dialect(self) -> Dialect | None:
        """How token ids travel; ``None`` before the first request."""
        return self._dialect

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """Samples at most ``max_new_tokens`` tokens after ``prompt_ids``.

        Raises:
            ConfigError: the server refuses the request, the key or the model: trying again is
                useless.
            PolicyError: it failed in passing, more often than ``retries``.
        """
        if self._dialect is None:
            async with self._finding:
                if self._dialect is None:
                    self._dialect = await self._find_dialect(prompt_ids)
        return await self._ask(self._dialect, prompt_ids, max_new_tokens, sampling)

    async def disconnect(self) -> None:
        """Closes the connections of the running event loop."""
        if client := self._clients.pop(asyncio.get_running_loop(), None):
            await client.aclose()

    def close(self) -> None:
        """Forgets all connections. Safe to call twice."""
        self._clients.clear()

    async def _find_dialect(self, prompt_ids: TokenIds) -> Dialect:
        """Asks for one token in each dialect, the most exact first."""
        refusals = []
        for dialect in _DIALECTS:
            try:
                await self._ask(dialect, prompt_ids, 1, Sampling(0.0))
            except ConfigError as error:
                if not isinstance(error.__cause__, _RefusedError):
                    raise
                refusals.append(error)
                continue
            if dialect != "ids":
                _logger.warning(
                    "the server does not return token ids: boundaries are as exact as text allows"
                )
            return dialect
        raise refusals[0]

    async def _ask(
        self, dialect: Dialect, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        body = self._body(dialect, prompt_ids, max_new_tokens, sampling)
        wait = self._first_wait_s
        for attempt in range(self._retries + 1):
            try:
                return self._completion(dialect, await self._post(body), max_new_tokens)
            except _RefusedError as error:
                raise ConfigError(f"the server at {self.base_url} refuses: {error}") from error
            except _TransientError as error:
                if attempt == self._retries:
                    raise PolicyError(f"after {attempt + 1} attempts: {error}") from None
                # Not all at once again: a crowd that comes back together fails together.
                spread = wait * random.uniform(0.5, 1.5)
                await asyncio.sleep(min(_LONGEST_WAIT_S, max(spread, error.wait_s or 0.0)))
                wait = min(2 * wait, _LONGEST_WAIT_S)
        raise AssertionError("unreachable")

    def _body(
        self, dialect: Dialect, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(prompt_ids),
            "max_tokens": max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0,
            "stream": False,
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if dialect == "text":
            begin = getattr(self._tokenizer, "bos_token_id", None)  # the server puts it there
            ids = prompt_ids[1:] if begin is not None and prompt_ids[0] == begin else prompt_ids
            body["prompt"] = str(self._tokenizer.decode(list(ids), skip_special_tokens=False))
        if dialect == "ids":
            # Else a server takes these from the checkpoint, and another distribution is measured.
            body |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
            body |= {"return_token_ids": True, "skip_special_tokens": False}
            body |= {"stop_token_ids": list(self._eos_ids)}
        return body

    async def _post(self, body: Mapping[str, Any]) -> Any:
        """One request.

        Raises:
            _TransientError: no answer, half an answer, or one that asks for patience.
            _RefusedError: the request is not to the server's liking.
            ConfigError: the key is not.
        """
        import httpx

        try:
            answer = await self._client().post(f"{self.base_url}/completions", json=dict(body))
        except (httpx.HTTPError, OSError) as error:
            raise _TransientError(f"no whole answer ({_said(error)})") from None
        if answer.status_code in _TRANSIENT or answer.status_code >= 500:
            raise _TransientError(self._status(answer), _retry_after(answer))
        if answer.status_code in (401, 403):
            raise self._refused_key(answer)
        if answer.status_code != 200:
            raise _RefusedError(self._status(answer))
        try:
            return answer.json()
        except ValueError:
            raise _TransientError(f"an answer that is no JSON: {self._status(answer)}") from None

    def _completion(self, dialect: Dialect, answer: Any, max_new_tokens: int) -> Completion:
        """What the server said, held against what was asked of it."""
        try:
            choice = answer["choices"][0]
            reason, text = choice["finish_reason"], choice["text"]
            ids = choice.get("token_ids")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _TransientError(f"an answer without a completion: {str(answer)[:80]!r}") from None
        if reason not in _STOP:
            raise _TransientError(f"an answer that ended with {reason!r}")
        stop = _STOP[reason]
        if ids is None:
            if dialect == "ids":
                raise _RefusedError("it returns no token ids")
            ids = self._ids_of(text, stop, max_new_tokens)
        if not ids:
            raise _TransientError("an answer without a token")
        if len(ids) > max_new_tokens or not all(isinstance(token, int) for token in ids):
            raise _TransientError(
                f"{len(ids)} tokens where at most {max_new_tokens} were asked for"
            )
        return Completion(tuple(ids), (0.0,) * len(ids), stop)

    def _ids_of(self, text: str, stop: StopReason, max_new_tokens: int) -> list[int]:
        """Text back to tokens; there may be another number of them than the server sampled."""
        encode: Any = self._tokenizer
        ids = list(encode(text, add_special_tokens=False)["input_ids"])
        if stop is StopReason.EOS:
            return ids[: max_new_tokens - 1] + list(self._eos_ids[:1])
        return ids[:max_new_tokens]

    def _client(self) -> Any:
        """Of the running loop: connections belong to one."""
        import httpx

        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients[loop] = httpx.AsyncClient(
                headers=self._headers, timeout=self._timeout, limits=self._limits
            )
        return self._clients[loop]

    def _refused_key(self, answer: Any) -> ConfigError:
        return ConfigError(
            f"the server at {self.base_url} refuses the key ({self._status(answer)}); it is read "
            "from the environment variable that --api-key-env names"
        )

    def _status(self, answer: Any) -> str:
        """What the server said, without the key, which some servers repeat."""
        said = " ".join(answer.text.split()) or "no text"
        said = said.replace(self._api_key, "***") if self._api_key else said
        return f"HTTP {answer.status_code}: {said[:200]}"

    def _find(self, model: str | None) -> ServedModel:
        """The model among those that the server lists.

        A server that lists none is taken at the user's word.
        """
        import httpx

        try:
            answer = httpx.get(
                f"{self.base_url}/models", headers=self._headers, timeout=self._timeout
            )
        except (httpx.HTTPError, OSError, UnicodeError) as error:
            raise ConfigError(
                f"the server at {self.base_url} cannot be reached: {_said(error)}"
            ) from None
        if answer.status_code in (401, 403):
            raise self._refused_key(answer)
        listed: dict[str, Any] = {}
        with contextlib.suppress(ValueError, KeyError, TypeError):
            listed = {str(one["id"]): one for one in answer.json()["data"]}
        if model is None and len(listed) == 1:
            model = next(iter(listed))
        if model is None or (listed and model not in listed):
            raise ConfigError(
                f"the server at {self.base_url} serves {', '.join(listed) or 'no model it names'}"
                f", not {model!r}; name one with --served-model"
            )
        longest = listed.get(model, {}).get("max_model_len")
        return ServedModel(model, longest if isinstance(longest, int) else None)


def _said(problem: Exception) -> str:
    text = str(problem).strip()
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__


def _retry_after(answer: Any) -> float | None:
    with contextlib.suppress(ValueError):
        return float(answer.headers.get("retry-after", ""))
    return None
