"""Detection of the dialect of an OpenAI-compatible server, and of options that it ignores.

The server is asked for two tokens after the first prompt, in the most exact form first. A form
counts only with evidence that the prompt was read as it was meant: the same ids in the response,
the right number of prompt tokens, or token ids back. A status of 500 refuses a form too, as some
servers crash over token ids; such a form is asked again before a less exact one is taken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from delethink.engines.openai_dialect import (
    Answer,
    CompletionRequest,
    Dialect,
    RefusedError,
    begins_with_bos,
    text_of,
)
from delethink.errors import ConfigError, PolicyError
from delethink.policy import Sampling
from delethink.thinking_marks import marks_of
from delethink.tokenization import Tokenizer, encode
from delethink.types import StopReason, TokenIds

AskServer = Callable[..., Awaitable[tuple[CompletionRequest, Answer]]]
"""Sends a request: (dialect, number of tokens, sampling, further fields)."""

PROBE_TOKENS = 2
NO_ROUTE = 404
_CONFIRM_DELAY_S = 1.0
_MIN_ECHO_CHARACTERS = 4
_TEMPLATE_TOKENS = 3  # more tokens than this beyond the prompt are a chat template
_PLAIN = Sampling(1.0, 1)  # some servers refuse a temperature of 0
_FORCED = 100  # the highest logit bias of the API
_REPLACEMENT = "\ufffd"
_SPACES = (" ", "\u0120", "\u2581")  # a space at the start of a token, as vocabularies write it


async def find_dialect(ask: AskServer, tokenizer: Tokenizer, prompt_ids: TokenIds) -> Dialect:
    """Return the most exact dialect of a server.

    Raises:
        RefusedError: the server rejects every form.
        ConfigError: the server cannot be used: it strips the end of thinking, puts a chat template
            around prompts, or has another tokenizer.
        PolicyError: the server fails.
    """
    detection = _Detection(ask, tokenizer, prompt_ids)
    found = await detection.by_ids() or await detection.by_text()
    if found is None:
        raise detection.refusal()
    if found.asks == "text" and detection.has_crashed:
        await asyncio.sleep(_CONFIRM_DELAY_S)
        found = await detection.by_ids() or found
    return found


class _Detection:
    """Search for the dialect with one prompt."""

    def __init__(self, ask: AskServer, tokenizer: Tokenizer, prompt_ids: TokenIds) -> None:
        self._ask, self._tokenizer, self._prompt_ids = ask, tokenizer, prompt_ids
        self._refusals: list[RefusedError] = []

    @property
    def has_crashed(self) -> bool:
        """Return whether a form was refused with a server error, which may pass."""
        return any(error.status >= 500 for error in self._refusals)

    def refusal(self) -> Exception:
        """Return the error of a server that takes no form."""
        refused = [error for error in self._refusals if error.status < 500]
        if not refused:
            return PolicyError(str(self._refusals[-1]))
        if all(error.status in (404, 405) for error in refused):
            return RefusedError(
                f"{refused[-1]}; has the server the route /completions? One with chat alone cannot "
                "be used",
                NO_ROUTE,
            )
        return refused[-1]

    async def by_ids(self) -> Dialect | None:
        """Return the dialect for prompts of token ids, or ``None``."""
        dialect = Dialect()
        found = await self._accepted(dialect)
        if found is None:
            dialect = Dialect(answers="text", extends=False)
            found = await self._accepted(dialect)
            return await self._with_limits(dialect, *found) if found else None
        if found[1].ids is not None:
            return await self._with_limits(dialect, *found)
        dialect = Dialect(answers="logprobs")
        again = await self._accepted(dialect)
        if again is not None and again[1].logprob_ids is not None:
            return await self._with_limits(dialect, *again)
        return await self._with_limits(Dialect(answers="text"), *found)

    async def by_text(self) -> Dialect | None:
        """Return the dialect for prompts of text, or ``None``."""
        for extends in (True, False):
            dialect = Dialect(asks="text", answers="text", extends=extends)
            found = await self._accepted(dialect)
            if found is None:
                continue
            if extends and found[1].ids is not None:
                dialect = replace(dialect, answers="ids")
            elif extends:
                again = await self._accepted(replace(dialect, answers="logprobs"))
                if again is not None and again[1].logprob_ids is not None:
                    dialect, found = replace(dialect, answers="logprobs"), again
            dialect, found = await self._fit_bos(dialect, *found)
            return await self._with_limits(dialect, *found)
        return None

    async def _accepted(self, dialect: Dialect) -> tuple[CompletionRequest, Answer] | None:
        """Return request and answer if the server takes the form, and reads the prompt as meant."""
        try:
            request, answer = await self._ask(dialect, PROBE_TOKENS, _PLAIN)
        except RefusedError as error:
            self._refusals.append(error)
            return None
        if dialect.asks == "text" or self._is_proved(request, answer):
            return request, answer
        read = answer.prompt_tokens
        count = "an unknown number of" if read is None else str(read)
        text = f"it reads {count} tokens where {request.prompt_tokens} token ids were sent"
        self._refusals.append(RefusedError(text))
        return None

    @staticmethod
    def _is_proved(request: CompletionRequest, answer: Answer) -> bool:
        """Return whether a prompt of token ids was read as token ids."""
        if answer.prompt_ids is not None:
            return answer.prompt_ids == tuple(request.body["prompt"])
        if answer.prompt_tokens is not None:
            return answer.prompt_tokens == request.prompt_tokens
        return answer.ids is not None

    async def _fit_bos(
        self, dialect: Dialect, request: CompletionRequest, answer: Answer
    ) -> tuple[Dialect, tuple[CompletionRequest, Answer]]:
        """Return the dialect in which a text prompt begins with as many BOS tokens as it should."""
        found, bos = (request, answer), getattr(self._tokenizer, "bos_token", None)
        if answer.prompt_tokens is None:
            note = "it does not count the tokens of a prompt, so one that it cuts is not noticed"
            if bos:
                note += f", nor whether it adds {bos}"
            return replace(dialect, notes=(*dialect.notes, note)), found
        excess = answer.prompt_tokens - request.prompt_tokens
        if excess > _TEMPLATE_TOKENS:
            raise ConfigError(
                f"the server reads {answer.prompt_tokens} tokens of a prompt of "
                f"{request.prompt_tokens}: it puts a chat template around each prompt, or reads "
                "special tokens as letters. Set its template to the prompt alone (Ollama: TEMPLATE "
                "{{ .Prompt }} in the Modelfile), or use a server with plain completions"
            )
        if not excess or not bos:
            return self._counted(dialect, excess), found
        has_bos = begins_with_bos(self._tokenizer, self._prompt_ids)
        others = [replace(dialect, spells_bos=True)] if has_bos else []
        if dialect.extends:
            others.append(replace(dialect, spells_bos=has_bos, plain_tokens=True))
        for other in others:
            tried = await self._accepted(other)
            if tried is not None and tried[1].prompt_tokens == tried[0].prompt_tokens:
                return self._counted(other, 0), tried
        if excess == 1:
            note = f"it begins each prompt with one {bos} too many"
        elif excess == -1 and has_bos:
            note = f"it begins no prompt with {bos}, and reads none that is spelled"
        else:
            return self._counted(dialect, excess), found
        return replace(dialect, notes=(*dialect.notes, note)), found

    @staticmethod
    def _counted(dialect: Dialect, excess: int) -> Dialect:
        """Return the dialect with what is known of the count of prompt tokens."""
        if not excess:
            return replace(dialect, counts_prompt=True)
        note = f"it counts {excess:+d} tokens of a prompt, so one that it cuts is not noticed"
        return replace(dialect, notes=(*dialect.notes, note))

    async def _with_limits(
        self, dialect: Dialect, request: CompletionRequest, answer: Answer
    ) -> Dialect:
        """Return the dialect with what else the answer shows, and what forced tokens show."""
        self._check_tokenizer(dialect, answer)
        notes = list(dialect.notes)
        counted, full = answer.sampled_tokens, PROBE_TOKENS
        if dialect.asks == "ids":
            dialect = replace(dialect, counts_prompt=answer.prompt_tokens == request.prompt_tokens)
        if dialect.answers != "text":
            return dialect
        if answer.stop is StopReason.LENGTH and counted not in (None, full):
            dialect, counted = replace(dialect, counts_sampled=False), None
        text = answer.text
        if len(request.prompt_text) >= _MIN_ECHO_CHARACTERS and text.startswith(
            request.prompt_text
        ):
            dialect, text = replace(dialect, echoes=True), text.removeprefix(request.prompt_text)
            notes.append("it repeats the prompt, which is removed")
        tokens = len(encode(self._tokenizer, text))
        if answer.stop is None or (
            answer.stop is StopReason.EOS and counted == full and tokens >= full
        ):
            if counted is None:
                raise ConfigError(
                    "the server says neither why an answer ended (finish_reason) nor how many "
                    "tokens it has (usage), so a complete answer cannot be told from a cut one"
                )
            dialect = replace(dialect, names_finish=False)
            notes.append("it does not say why an answer ended, which its length has to show")
        if not dialect.extends:
            notes.append("it has no top-k and min-p, and its own defaults may cut the distribution")
        notes += await self._lost_text(dialect)
        return replace(dialect, notes=tuple(notes))

    def _check_tokenizer(self, dialect: Dialect, answer: Answer) -> None:
        """Raise a ``ConfigError`` if the server's ids have another text in this tokenizer."""
        ids = answer.exact_ids(dialect)
        theirs = answer.text.strip()
        if not ids or not theirs or _REPLACEMENT in theirs or answer.separates:
            return
        own = text_of(self._tokenizer, ids).strip()
        is_same = theirs in own or (own and own in theirs)
        if not is_same and _REPLACEMENT not in own:
            raise ConfigError(
                f"the server's tokens {list(ids)} are {theirs!r} and in the tokenizer of -m "
                f"{own!r}: name the model that is served"
            )

    async def _lost_text(self, dialect: Dialect) -> list[str]:
        """Return what is lost in the text of single tokens, which a logit bias forces.

        Raises:
            ConfigError: the mark of the end of thinking is lost, so that every answer would be too.
        """
        mark = self._mark()
        if mark is not None:
            answer = await self._forced(dialect, mark)
            text = text_of(self._tokenizer, [mark])
            if answer is not None and not answer.text.strip() and not answer.separates:
                raise ConfigError(
                    f"the server strips {text} from its text, so that no answer would be found: "
                    "let it return special tokens (llama.cpp: --special), or use a vLLM server"
                )
            if answer is None or (answer.text.strip() and text.strip() not in answer.text):
                hidden = not self._tokenizer.decode([mark], skip_special_tokens=True)
                return [f"whether it strips {text} is not known"] if hidden else []
        word = self._spaced_word()
        if word is None:
            return []
        answer = await self._forced(dialect, word)
        expected = text_of(self._tokenizer, [word]).strip()
        if answer is not None and answer.text.strip() == expected == answer.text:
            return ["it strips the space at the start of each chunk"]
        return []

    async def _forced(self, dialect: Dialect, token: int) -> Answer | None:
        """Return the answer to a request that allows one token alone."""
        try:
            bias = {str(token): _FORCED}
            _, answer = await self._ask(dialect, 1, _PLAIN, logit_bias=bias)
        except (RefusedError, ValueError):
            return None
        return answer

    def _mark(self) -> int | None:
        """Return the token that ends the thinking, if it is a single one."""
        end = marks_of(self._tokenizer).end
        ids = () if end is None else encode(self._tokenizer, end)
        return int(ids[0]) if len(ids) == 1 else None

    def _spaced_word(self) -> int | None:
        """Return a token that begins with a space, if the vocabulary has such tokens."""
        names: Any = getattr(self._tokenizer, "convert_ids_to_tokens", None)
        if names is None:
            return None
        token = next(reversed(encode(self._tokenizer, "a b")), None)
        name = None if token is None else names(int(token))
        is_word = isinstance(name, str) and name.startswith(_SPACES) and len(name) > 1
        return int(token) if is_word and token is not None else None


# -- options that a server ignores ---------------------------------------------------------------

_HOT = (100.0, 2.0)  # nearly uniform, and the highest temperature of the API, and of vLLM
_COMPARED_TOKENS = 16
_ATTEMPTS = 3
_STRICTEST: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 1e-6},
    "top_k": {"top_k": 1},
    "min_p": {"min_p": 1.0},
}

SampleTokens = Callable[[int, Sampling], Awaitable[tuple[int, ...]]]
"""Samples tokens after a short prompt: (number of tokens, sampling)."""


async def ignored_options(sample: SampleTokens, used: Sampling) -> list[str]:
    """Check by their effect that a server heeds the options in use, and return its limits.

    Raises:
        ConfigError: the server ignores top-p, top-k or min-p.
    """
    limits, ignored = await unheeded_options(sample, used)
    if ignored:
        option = f"--{ignored[0].replace('_', '-')}"
        raise ConfigError(
            f"the server ignores {option}: with the strictest value a hot request does not give "
            f"the most probable tokens. Leave out {option}, or use a vLLM server"
        )
    return limits


async def unheeded_options(sample: SampleTokens, used: Sampling) -> tuple[list[str], list[str]]:
    """Return the limits of a server, and those of the cuts in use that have no effect.

    A hot request with the strictest cut must give the greedy tokens, and without a cut others.
    """
    if not used.temperature:
        return [], []
    try:
        greedy = await sample(_COMPARED_TOKENS, Sampling(0.0))
        hot, one = await _sample_hot(sample)
        other = await sample(_COMPARED_TOKENS, replace(hot, seed=2))
        again = one if used.seed is None else await sample(_COMPARED_TOKENS, hot)
    except (PolicyError, RefusedError):
        return ["whether it heeds temperature and seed is not known"], []
    if one == greedy and other == greedy:
        text = f"its answers at temperature 0 and {hot.temperature:g} are the same"
        return [f"{text}, so whether it heeds sampling options is not known"], []
    ignored = [
        name
        for name, strictest in _STRICTEST.items()
        if getattr(used, name) != getattr(Sampling(), name)
        and not await _is_heeded(sample, replace(hot, **strictest))
    ]
    if one == other:
        return ["its answers do not depend on the seed, or they are cached"], ignored
    if one != again:
        return ["the same seed gives other answers, so nothing can be repeated"], ignored
    return [], ignored


async def _is_heeded(sample: SampleTokens, strictest: Sampling) -> bool:
    """Return whether a hot request with the strictest cut is greedy."""
    for _ in range(_ATTEMPTS):  # near-ties may differ with the batch
        greedy = await sample(_COMPARED_TOKENS, Sampling(0.0))
        if greedy == await sample(_COMPARED_TOKENS, strictest):
            return True
    return False


async def _sample_hot(sample: SampleTokens) -> tuple[Sampling, tuple[int, ...]]:
    """Return the hottest sampling that the server allows, and its tokens."""
    for temperature in _HOT[:-1]:
        try:
            hot = Sampling(temperature, 1)
            return hot, await sample(_COMPARED_TOKENS, hot)
        except RefusedError:
            continue
    hot = Sampling(_HOT[-1], 1)
    return hot, await sample(_COMPARED_TOKENS, hot)
