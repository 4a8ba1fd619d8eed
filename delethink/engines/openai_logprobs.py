"""Policy over HTTP that keeps the log-probs of the server, so that its traces can be trained on.

    server = LogprobServer("http://127.0.0.1:8000/v1", "my-model", tokenizer)

Nothing is made up: a server without token ids or without log-probs is refused, and so is one whose
log-probs are not those of the sampling temperature.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from delethink.engines.openai import OpenAIServer
from delethink.engines.openai_dialect import Answer, CompletionRequest, Dialect, to_completion
from delethink.errors import ConfigError
from delethink.policy import Completion, Sampling, TokenListener
from delethink.types import StopReason, TokenIds

_SURE = -1e-5  # log-prob of a first token that rounding hides
_SAME_SHARE = 1e-3  # of a log-prob, by which it may differ between two equal temperatures
_NEAR = 0.02  # distance from temperature 1 at which log-probs are too similar to tell


class LogprobServer(OpenAIServer):
    """A server whose completions have the log-prob of each sampled token.

    The arguments are those of ``OpenAIServer``. The server must give token ids, as vLLM does, and
    log-probs after the temperature: vLLM started with ``--logprobs-mode processed_logprobs``. At
    temperature 1 every mode will do.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._temperatures = {0.0, 1.0}  # at which the log-probs are known to be the right ones

    async def stream(
        self,
        prompt_ids: TokenIds,
        max_new_tokens: int,
        sampling: Sampling,
        on_tokens: TokenListener,
    ) -> Completion:
        """Sample as ``generate`` does, and pass on all tokens at the end."""
        done = await self.generate(prompt_ids, max_new_tokens, sampling)
        on_tokens(done.token_ids, done.logprobs)
        return done

    async def _find_dialect(self, prompt_ids: TokenIds) -> Dialect:
        dialect = await super()._find_dialect(prompt_ids)
        if not dialect.is_exact:
            raise ConfigError(
                f"the server at {self._address} returns no token ids ({dialect}), so its answers "
                "cannot be trained on; use a vLLM server"
            )
        return dialect

    def _is_unchecked(self, sampling: Sampling) -> bool:
        known = sampling.temperature in self._temperatures
        return not known or super()._is_unchecked(sampling)

    async def _check_options(
        self, dialect: Dialect, prompt_ids: TokenIds, sampling: Sampling
    ) -> None:
        if super()._is_unchecked(sampling):
            await super()._check_options(dialect, prompt_ids, sampling)
        if sampling.temperature not in self._temperatures:
            await self._check_temperature(dialect, prompt_ids, sampling)
            self._temperatures.add(sampling.temperature)

    async def _check_temperature(
        self, dialect: Dialect, prompt_ids: TokenIds, sampling: Sampling
    ) -> None:
        """Refuse a server that takes the log-probs before it divides by the temperature.

        The most probable first token is the same at every temperature, and its log-prob is not.
        """
        half = len(prompt_ids) // 2
        for number in (len(prompt_ids), 2, 1, half):  # after little text a model is less sure
            ids = prompt_ids[: max(1, number)]
            plain = await self._first_logprob(dialect, ids, replace(sampling, temperature=1.0))
            own = await self._first_logprob(dialect, ids, sampling)
            if plain < _SURE and abs(sampling.temperature - 1.0) > _NEAR:
                break
        else:
            self._say("whether its log-probs heed the temperature is not known", is_limit=True)
            return
        if abs(plain - own) < _SAME_SHARE * abs(plain):
            raise ConfigError(
                f"the log-probs of the server at {self._address} do not depend on the temperature: "
                "they are those at 1, and tokens are sampled at "
                f"{sampling.temperature:g}. Start vLLM with --logprobs-mode processed_logprobs, or "
                "sample at temperature 1"
            )

    async def _first_logprob(
        self, dialect: Dialect, prompt_ids: TokenIds, sampling: Sampling
    ) -> float:
        """Return the log-prob of the most probable first token."""
        request = self._request(dialect, prompt_ids, 1, replace(sampling, seed=1))
        request.body["logprobs"] = 1
        answer: Answer = await self._answer(request)
        if answer.best_logprob is None:
            raise self._lacks_logprobs()
        return answer.best_logprob

    def _request(
        self, dialect: Dialect, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> CompletionRequest:
        request = super()._request(dialect, prompt_ids, max_new_tokens, sampling)
        request.body.setdefault("logprobs", 0)  # of the sampled token alone
        return request

    async def _complete(
        self, dialect: Dialect, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        request = self._request(dialect, prompt_ids, max_new_tokens, sampling)
        own = self._tokenizer, self._eos_ids, max_new_tokens

        def read(answer: Answer) -> Completion:
            return self._with_logprobs(to_completion(dialect, answer, request, *own), answer)

        completion: Completion = await self._answer(request, read)
        return completion

    def _with_logprobs(self, done: Completion, answer: Answer) -> Completion:
        values = answer.logprobs
        if done.stop is StopReason.ABORT:  # the trace ends here, and is not trained on
            return done
        if values is None or not all(map(math.isfinite, values)):
            raise self._lacks_logprobs()
        if len(values) != len(done.token_ids):
            raise ConfigError(
                f"the server at {self._address} returns {len(values)} log-probs for "
                f"{len(done.token_ids)} tokens: it leaves out the token that ends an answer; use a "
                "vLLM server"
            )
        return replace(done, logprobs=values)

    def _lacks_logprobs(self) -> ConfigError:
        return ConfigError(
            f"the server at {self._address} returns no log-probs, which training needs for every "
            "token; use a vLLM server"
        )
