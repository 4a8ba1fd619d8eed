"""Policy that samples from an OpenAI-compatible completions server.

    server = OpenAIServer("http://127.0.0.1:8000/v1", "my-model", tokenizer)
    trace = asyncio.run(run_rollout(server, spec, query, Sampling(0.6, seed=1)))

Token ids are sent and returned if the server supports them (vLLM does). Otherwise prompts and
outputs travel as text, and boundaries are only as exact as the tokenizer's round trip. Log-probs
are not requested: all of them are 0, so the traces cannot be trained on.

The ``openai`` client handles connections, timeouts, keys and retries. Its waits between retries
grow to 8 seconds at most, and a ``Retry-After`` above two minutes is an error.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import openai

from delethink.errors import ConfigError, PolicyError
from delethink.output import get_logger, safe_text
from delethink.policy import Completion, Sampling
from delethink.redaction import HIDDEN, redact, register_secret, register_url
from delethink.tokenization import Tokenizer
from delethink.types import StopReason, TokenIds

Dialect = Literal["ids", "plain ids", "text"]

_logger = get_logger(__name__)
_DIALECTS: tuple[Dialect, ...] = ("ids", "plain ids", "text")  # the most exact first
_STOP_REASONS = {"stop": StopReason.EOS, "length": StopReason.LENGTH, "abort": StopReason.ABORT}
_RETRIED_STATUSES = {408, 409, 429}  # and 500 and above; the openai client retries these
_KEY_ERRORS = (openai.AuthenticationError, openai.PermissionDeniedError)
_CONNECT_TIMEOUT_S = 20.0
_SHOWN_CHARACTERS = 80  # of a malformed response
_ERROR_CHARACTERS = 200  # of an error response


class _RefusedError(ConfigError):
    """A request rejected by the server, perhaps only in this dialect."""


class OpenAIServer:
    """Policy over HTTP.

    Args:
        base_url: address including the version, ``http://127.0.0.1:8000/v1``.
        model: name of the model on the server; ``None`` takes the only model served.
        tokenizer: tokenizer of the model, for servers that accept text only.
        api_key: key sent with each request; it is redacted in every text of this process.
        eos_ids: token ids that end an answer.
        timeout_s: seconds to wait for a response.

    Attributes:
        dialect: form in which tokens travel; ``None`` before the first request.
        max_model_tokens: longest sequence in tokens; ``None`` if the server does not list it.

    Raises:
        ConfigError: the server cannot be reached, rejects the key, or does not serve the model.
    """

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
    ) -> None:
        register_secret(api_key)
        register_url(base_url)
        self._api_key, self._retries = api_key, retries
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(
                f"--base-url must start with http:// or https://, got {safe_text(base_url)!r}; for "
                "example http://127.0.0.1:8000/v1"
            )
        self._address = safe_text(base_url, lines=False)  # for error texts
        self.dialect: Dialect | None = None
        self._tokenizer: Any = tokenizer
        self._eos_ids = list(eos_ids)
        connect_s = min(timeout_s, _CONNECT_TIMEOUT_S)
        self._options: dict[str, Any] = {
            "base_url": base_url,
            # Without a value here, the client sends OPENAI_API_KEY to any server.
            "api_key": api_key or "EMPTY",
            # No limit on the wait for a free connection, of which there are 1,000.
            "timeout": openai.Timeout(timeout_s, connect=connect_s, pool=None),
        }
        self._clients: dict[asyncio.AbstractEventLoop, openai.AsyncOpenAI] = {}
        self._negotiations: dict[asyncio.AbstractEventLoop, asyncio.Lock] = {}
        self.model, self.max_model_tokens = self._find_model(model)

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """Sample at most ``max_new_tokens`` tokens after ``prompt_ids``.

        Raises:
            ConfigError: the server rejects the request, the key or the model; a retry is useless.
            PolicyError: the request failed, and so did its retries.
        """
        if self.dialect is None:
            # A lock belongs to one loop, like a connection.
            lock = self._negotiations.setdefault(asyncio.get_running_loop(), asyncio.Lock())
            async with lock:
                self.dialect = self.dialect or await self._negotiate(prompt_ids)
        return await self._complete(self.dialect, prompt_ids, max_new_tokens, sampling)

    async def disconnect(self) -> None:
        """Close the connections of the running event loop."""
        self._negotiations.pop(asyncio.get_running_loop(), None)
        if client := self._clients.pop(asyncio.get_running_loop(), None):
            await client.close()

    async def _negotiate(self, prompt_ids: TokenIds) -> Dialect:
        """Return the most exact dialect in which the server samples one token."""
        refusals = []
        for dialect in _DIALECTS:
            try:
                await self._complete(dialect, prompt_ids, 1, Sampling(0.0))
            except _RefusedError as error:
                refusals.append(error)
                continue
            if dialect != "ids":
                _logger.warning(
                    "the server does not return token ids: boundaries are as exact as text allows"
                )
            return dialect
        raise refusals[0]

    async def _complete(
        self, dialect: Dialect, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """Send one request, again if the response is malformed."""
        request = self._request(dialect, prompt_ids, max_new_tokens, sampling)
        loop = asyncio.get_running_loop()
        if loop not in self._clients:  # connections belong to one loop
            self._clients[loop] = openai.AsyncOpenAI(max_retries=self._retries, **self._options)
        for _ in range(self._retries + 1):
            try:
                response = await self._clients[loop].completions.create(**request)
                return self._completion(dialect, response, max_new_tokens)
            except openai.APIError as error:
                status = getattr(error, "status_code", 500)  # 500 stands for no response
                if status < 500 and status not in _RETRIED_STATUSES:
                    raise self._refusal(error) from None
                reason = self._describe(error)
                break
            except ConfigError:
                raise
            except ValueError as error:  # not JSON, or not a completion
                reason = f"malformed response: {self._clean(str(error))}"
        raise PolicyError(f"the request failed, also after {self._retries} retries: {reason}")

    def _request(
        self, dialect: Dialect, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> dict[str, Any]:
        """Return the arguments of ``client.completions.create``."""
        request: dict[str, Any] = {
            "model": self.model,
            "prompt": list(prompt_ids),
            "max_tokens": max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        if dialect != "ids" and (sampling.top_k or sampling.min_p):
            raise ConfigError(
                f"the server at {self._address} has no top-k and min-p, which the API of OpenAI "
                "does not have either: leave out --top-k and --min-p, or use a vLLM server"
            )
        if dialect == "text":
            bos_id = getattr(self._tokenizer, "bos_token_id", None)  # the server adds this token
            ids = prompt_ids[1:] if bos_id is not None and prompt_ids[0] == bos_id else prompt_ids
            request["prompt"] = str(self._tokenizer.decode(list(ids), skip_special_tokens=False))
        if dialect == "ids":
            request["extra_body"] = {
                # A server takes unset values from the checkpoint's generation config, which would
                # change the distribution.
                "top_k": sampling.top_k or -1,
                "min_p": sampling.min_p,
                "repetition_penalty": 1.0,
                "return_token_ids": True,
                "skip_special_tokens": False,
                "stop_token_ids": self._eos_ids,
            }
        return request

    def _completion(self, dialect: Dialect, response: Any, max_new_tokens: int) -> Completion:
        """Convert a response; a malformed one is a ``ValueError``."""
        try:
            choice = response.choices[0]
            reason, text = choice.finish_reason, choice.text
            ids = choice.model_extra.get("token_ids")
        except (AttributeError, IndexError, TypeError):
            text = self._clean(str(response))  # before it is cut, since half a key is a key too
            raise ValueError(f"no completion in {text[:_SHOWN_CHARACTERS]!r}") from None
        if not isinstance(text, str):
            raise ValueError(f"the text of a completion must be a string, got {type(text)}")
        if not isinstance(reason, str) or reason not in _STOP_REASONS:
            text = self._clean(str(reason))[:_SHOWN_CHARACTERS]
            raise ValueError(f"unknown finish_reason {text!r}; known: {', '.join(_STOP_REASONS)}")
        stop = _STOP_REASONS[reason]
        if ids is None:
            if dialect == "ids":
                raise _RefusedError(f"the server at {self._address} returns no token ids")
            # The tokens of the text may outnumber the sampled ones.
            ends = self._eos_ids[:1] if stop is StopReason.EOS else []
            # Tokens of a repeated key would be written to files.
            ids = self._tokenizer(redact(text), add_special_tokens=False)["input_ids"]
            ids = ids[: max_new_tokens - len(ends)] + ends
        if not ids:
            raise ValueError("no token in the response")
        return Completion(tuple(ids), (0.0,) * len(ids), stop)

    def _find_model(self, model: str | None) -> tuple[str, int | None]:
        """Return the name and longest sequence of ``model``; a server need not list its models."""
        listed: dict[str, Any] = {}
        try:
            opened = openai.OpenAI(max_retries=0, **self._options)
        except Exception as error:  # of httpx or httpx2, by the version of the client
            raise ConfigError(
                f"--base-url is no address of a server: {self._describe(error)}"
            ) from None
        try:
            with opened as client:
                listed = {str(entry.id): entry for entry in client.models.list().data}
        except (openai.APIConnectionError, UnicodeError) as error:
            raise ConfigError(
                f"the server at {self._address} cannot be reached: {self._describe(error)}"
            ) from None
        except _KEY_ERRORS as error:
            raise self._refusal(error) from None
        except (openai.APIError, ValueError, TypeError, AttributeError):
            pass  # no list of models
        if model is None and len(listed) == 1:
            model = next(iter(listed))
        if model is None or (listed and model not in listed):
            names = self._clean(", ".join(listed)) or "no model"
            raise ConfigError(
                f"the server at {self._address} lists {names}, not {model!r}; name one with "
                "--served-model"
            )
        window = getattr(listed.get(model), "max_model_len", None)
        return model, window if isinstance(window, int) else None

    def _refusal(self, error: openai.APIError) -> ConfigError:
        reason = self._describe(error)
        if not isinstance(error, _KEY_ERRORS):
            return _RefusedError(f"the server at {self._address} rejects the request: {reason}")
        return ConfigError(
            f"the server at {self._address} rejects the API key ({reason}); set the key in the "
            "environment variable that --api-key-env names"
        )

    def _describe(self, error: Exception) -> str:
        """Return status and text of an error response, or the cause of a missing one."""
        if not isinstance(error, openai.APIStatusError):
            cause = error.__cause__ or error
            return self._clean(f"{type(cause).__name__}: {cause}".strip(": "))
        text = self._clean(" ".join(error.response.text.split())) or "no text"
        return f"HTTP {error.status_code}: {text[:_ERROR_CHARACTERS]}"

    def _clean(self, text: str) -> str:
        """Return a text of the server that is safe to show; also a short key is redacted."""
        if self._api_key:
            text = text.replace(self._api_key, HIDDEN)
        return safe_text(text, lines=False)
