"""Dialects of OpenAI-compatible servers: requests for them, and the tokens in their answers.

Servers share the route ``/completions`` and little else. A ``Dialect`` records how one of them is
asked, and how its answers are read (``openai_probe.py`` finds it). Answers that do not fit the
dialect are a ``ValueError``: a wrong reading would be a wrong score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from delethink.errors import ConfigError, PolicyError
from delethink.policy import Completion, Sampling
from delethink.redaction import redact
from delethink.tokenization import Tokenizer, encode
from delethink.types import END_OF_THINKING, StopReason, TokenIds

SHOWN_CHARACTERS = 200  # of a response, in an error text

_STOP_REASONS = {
    **dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "end_turn"), StopReason.EOS),
    **dict.fromkeys(("length", "max_tokens", "max_length", "model_length"), StopReason.LENGTH),
    **dict.fromkeys(("abort", "aborted", "cancelled", "canceled"), StopReason.ABORT),
}
_NO_REASONS = ("", "null", "none")
_TOKEN_ID = "token_id:"  # prefix of a token that older versions of vLLM return as its id
_REPLACEMENT = "\ufffd"  # stands for the first bytes of a character that is not complete
# Tokens by which another tokenization of a text prompt may differ, and share of the prompt.
_COUNT_SLACK_TOKENS, _COUNT_SLACK_SHARE = 4, 0.02


class RefusedError(ConfigError):
    """A request rejected by the server, perhaps only in this form; ``status`` is the HTTP one."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class UnfitAnswerError(PolicyError):
    """An answer that does not fit the dialect; the same request gives the same again."""


@dataclass(frozen=True)
class Dialect:
    """Form in which tokens travel to a server and back."""

    asks: Literal["ids", "text"] = "ids"  # prompts
    answers: Literal["ids", "logprobs", "text"] = "ids"  # source of the sampled token ids
    extends: bool = True  # the server takes fields beyond OpenAI's: top_k, skip_special_tokens, ...
    spells_bos: bool = False  # text prompts begin with the BOS token, as the server adds none
    plain_tokens: bool = False  # the server is told to add no special tokens to a text prompt
    counts_prompt: bool = False  # ``usage.prompt_tokens`` has proved right
    counts_sampled: bool = True  # ``usage.completion_tokens`` has not proved wrong
    names_finish: bool = True  # ``finish_reason`` has not proved wrong
    echoes: bool = False  # the text of an answer repeats the prompt first
    notes: tuple[str, ...] = ()  # limits of this server, one sentence each

    @property
    def is_exact(self) -> bool:
        """Return whether prompts and sampled tokens are exactly those of the model."""
        return self.asks == "ids" and self.answers != "text"

    def __str__(self) -> str:
        asks = {"ids": "asks in token ids", "text": "asks in text"}[self.asks]
        if self.answers == "text":
            gets = "gets text back, which is encoded again: chunk boundaries are as exact as text"
        elif self.asks == "text":
            gets = "gets token ids back: prompts are encoded again by the server"
        else:
            gets = "gets token ids back: chunk boundaries are exact"
        return "; ".join((f"{asks}, {gets}", *self.notes))


class CompletionRequest(NamedTuple):
    """A request for a completion."""

    body: dict[str, Any]
    prompt_text: str  # without the BOS token; empty in an exact dialect
    prompt_tokens: int  # number of tokens that the server should read


def make_request(
    dialect: Dialect,
    model: str,
    tokenizer: Tokenizer,
    eos_ids: Sequence[int],
    prompt_ids: TokenIds,
    max_new_tokens: int,
    sampling: Sampling,
) -> CompletionRequest:
    """Return the request for at most ``max_new_tokens`` tokens after ``prompt_ids``.

    Raises:
        ConfigError: the dialect has no top-k and min-p, and the sampling uses them.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt_ids),
        "max_tokens": max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if not dialect.extends and (sampling.top_k or sampling.min_p):
        raise ConfigError(
            "the server has no top-k and min-p, which the API of OpenAI does not have either: "
            "leave out --top-k and --min-p, or use a vLLM server"
        )
    if dialect.extends:
        # A server takes unset values from the checkpoint's generation config, which would change
        # the distribution.
        body |= {"top_k": sampling.top_k or -1, "min_p": sampling.min_p, "repetition_penalty": 1.0}
        body |= {"return_token_ids": True, "skip_special_tokens": False}
        body["stop_token_ids"] = list(eos_ids)
    if dialect.answers == "logprobs":
        body |= {"logprobs": 1, "return_tokens_as_token_ids": True}
    if dialect.is_exact:
        return CompletionRequest(body, "", len(prompt_ids))
    ids, has_bos = list(prompt_ids), begins_with_bos(tokenizer, prompt_ids)
    text = text_of(tokenizer, ids[has_bos:])
    if dialect.asks == "ids":
        return CompletionRequest(body, text, len(prompt_ids))
    body["prompt"] = text_of(tokenizer, ids) if dialect.spells_bos else text
    if dialect.plain_tokens:
        body["add_special_tokens"] = False
    return CompletionRequest(body, text, len(encode(tokenizer, text)) + has_bos)


def begins_with_bos(tokenizer: Tokenizer, ids: TokenIds) -> bool:
    """Return whether token ids begin with the BOS token."""
    bos_id = getattr(tokenizer, "bos_token_id", None)
    return bos_id is not None and len(ids) > 0 and ids[0] == bos_id


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of token ids with special tokens spelled out, spaces as they are."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(list(ids), **options))


class Answer(NamedTuple):
    """The first choice of a response, read without assumptions about the dialect."""

    text: str
    ids: tuple[int, ...] | None  # sampled tokens, from the field ``token_ids``
    logprob_ids: tuple[int, ...] | None  # sampled tokens, from the log-probs
    stop: StopReason | None  # ``None`` if the server names none
    matched: Any  # the token or string that ended the answer, if the server names it
    prompt_ids: tuple[int, ...] | None  # the prompt as the server read it
    prompt_tokens: int | None
    sampled_tokens: int | None
    separates: bool = False  # the thinking came in a field of its own
    logprobs: tuple[float, ...] | None = None  # of the sampled tokens
    best_logprob: float | None = None  # of the most probable first token

    def exact_ids(self, dialect: Dialect) -> tuple[int, ...] | None:
        """Return the sampled tokens from the source that the dialect names."""
        return {"ids": self.ids, "logprobs": self.logprob_ids, "text": None}[dialect.answers]


def read_answer(response: Any, end_of_thinking: str = END_OF_THINKING) -> Answer:
    """Read a response.

    Args:
        response: the body, parsed or as text.
        end_of_thinking: put after thinking that comes in a field of its own.

    Raises:
        ValueError: no completion in the response.
        RefusedError: the response reports an error of the request, with HTTP status 200.
    """
    if isinstance(response, str):  # not labelled as JSON
        response = json.loads(response)
    if isinstance(response, Mapping):
        _check_error(response)
    try:
        (choice,) = response["choices"]
        reason, text = choice.get("finish_reason"), choice.get("text")
        if text is None and isinstance(choice.get("message"), Mapping):
            choice = {**choice["message"], **choice}
            text = choice.get("content")
        usage = response.get("usage")
        prompt_ids = choice.get("prompt_token_ids") or response.get("prompt_token_ids")
        sources = choice.get("token_ids"), _logprob_ids(choice.get("logprobs"))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"no single completion in {response!r}") from None
    if text is None and sources[0] is not None:
        text = ""  # a server may return token ids alone
    fields = [choice.get(key) for key in ("reasoning", "reasoning_content")]
    thinking = next((field for field in fields if isinstance(field, str)), None)
    if thinking and (text is None or isinstance(text, str)):
        text = _rejoin(thinking, text or "", end_of_thinking)
    if not isinstance(text, str):
        raise ValueError(f"the text of a completion must be a string, got {type(text)}")
    matched, usage = choice.get("stop_reason"), usage if isinstance(usage, Mapping) else {}
    return Answer(
        text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
        _as_ids(sources[0]),
        _as_ids(sources[1]),
        _stop_reason(reason),
        choice.get("matched_stop") if matched is None else matched,
        _as_ids(prompt_ids),
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        thinking is not None,
        *_read_logprobs(choice.get("logprobs")),
    )


def _rejoin(thinking: str, text: str, end_of_thinking: str) -> str:
    """Return thinking and text, with the mark between them that the server has taken away."""
    if end_of_thinking and end_of_thinking in text:
        return text  # the text is whole
    return thinking + (end_of_thinking + text if text else "")


def _check_error(response: Mapping[str, Any]) -> None:
    """Raise the error that a response of status 200 reports in its body."""
    error = response.get("error") or (response if response.get("object") == "error" else None)
    if not error or response.get("choices"):
        return
    fields = error if isinstance(error, Mapping) else {"message": error}
    text, code = str(fields.get("message") or error), str(fields.get("code") or "")
    status = int(code) if code.isdecimal() else 500
    if 400 <= status < 500 and status not in (408, 409, 429):
        raise RefusedError(f"the server rejects the request: {text}", status)
    raise ValueError(f"the server reports an error: {text}")


def _logprob_ids(logprobs: Any) -> list[int] | None:
    """Return the ids of sampled tokens from log-probs, if they have any.

    llama.cpp lists objects with an ``id`` under ``content``; vLLM lists ``token_id:17`` under
    ``tokens``.
    """
    if not isinstance(logprobs, Mapping):
        return None
    entries = logprobs.get("content")
    if isinstance(entries, list) and entries:
        return [entry["id"] for entry in entries] if "id" in entries[0] else None
    tokens = logprobs.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        return None
    if not all(str(token).startswith(_TOKEN_ID) for token in tokens):
        return None
    return [int(token.removeprefix(_TOKEN_ID)) for token in tokens]


def _read_logprobs(logprobs: Any) -> tuple[tuple[float, ...] | None, float | None]:
    """Return the log-probs of the sampled tokens, and of the most probable first token."""
    if not isinstance(logprobs, Mapping):
        return None, None
    values, best = logprobs.get("token_logprobs"), logprobs.get("top_logprobs")
    entries = logprobs.get("content")
    if values is None and isinstance(entries, list):
        values = [entry.get("logprob") for entry in entries if isinstance(entry, Mapping)]
    if not isinstance(values, list) or not all(isinstance(v, int | float) for v in values):
        return None, None
    first = best[0] if isinstance(best, list) and best else None
    listed = list(first.values()) if isinstance(first, Mapping) else []
    known = [float(value) for value in listed if isinstance(value, int | float)]
    return tuple(map(float, values)), max(known, default=None)


def _as_ids(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise ValueError(f"token ids must be a list of whole numbers, got {value!r}")
    return tuple(value)


def _count(value: Any) -> int | None:
    """Return a number of tokens; some servers report 0 or null for numbers they do not know."""
    return value if type(value) is int and value > 0 else None


def _stop_reason(value: Any) -> StopReason | None:
    if isinstance(value, Mapping):  # of SGLang's own API: {"type": "stop", "matched": 2}
        value = value.get("type")
    name = "" if value is None else str(value).rpartition(".")[2].lower()
    if name in _NO_REASONS:
        return None
    if name not in _STOP_REASONS:
        known = ", ".join(_STOP_REASONS)
        raise ValueError(f"unknown finish_reason {str(value)!r}; known: {known}")
    return _STOP_REASONS[name]


def to_completion(
    dialect: Dialect,
    answer: Answer,
    request: CompletionRequest,
    tokenizer: Tokenizer,
    eos_ids: Sequence[int],
    max_new_tokens: int,
) -> Completion:
    """Return the tokens of an answer.

    Raises:
        ValueError: no token in the answer.
        UnfitAnswerError: the server has cut the prompt or the answer, or changed its dialect.
    """
    _check_prompt(dialect, answer, request)
    if answer.stop is StopReason.ABORT:
        return _completion(answer.exact_ids(dialect) or (), StopReason.ABORT)
    if dialect.answers == "text":
        return _from_text(dialect, answer, request, tokenizer, eos_ids, max_new_tokens)
    ids = answer.exact_ids(dialect)
    if ids is None:
        raise UnfitAnswerError("the server returns no token ids any more: its dialect has changed")
    if not ids and answer.sampled_tokens is None:
        raise ValueError("no token in the response")
    if len(ids) > max_new_tokens:
        raise UnfitAnswerError(f"the server returns {len(ids)} tokens, {max_new_tokens} were asked")
    ended = ids[-1:] != () and ids[-1] in eos_ids
    stop = StopReason.EOS if ended else _stop(dialect, answer, len(ids), max_new_tokens)
    is_final = ended or (answer.matched is not None and ids[-1:] == (answer.matched,))
    if stop is StopReason.EOS and not is_final and len(ids) < max_new_tokens:
        ids += tuple(eos_ids[:1])  # sampled, but not returned
    return _completion(ids, stop)


def _from_text(
    dialect: Dialect,
    answer: Answer,
    request: CompletionRequest,
    tokenizer: Tokenizer,
    eos_ids: Sequence[int],
    max_new_tokens: int,
) -> Completion:
    count = answer.sampled_tokens if dialect.counts_sampled else None
    stop, text = _stop(dialect, answer, count, max_new_tokens), answer.text
    if dialect.echoes:
        if not text.startswith(request.prompt_text):
            raise UnfitAnswerError("the text does not repeat the prompt any more, as it did before")
        text = text.removeprefix(request.prompt_text)
    if stop is StopReason.LENGTH:
        text = text.rstrip(_REPLACEMENT)
    # Tokens of a repeated key would be written to files.
    ids = encode_continuation(tokenizer, redact(text))
    if stop is StopReason.EOS:
        ids = ids[:-1] if ids[-1:] != () and ids[-1] in eos_ids else ids
        ids += tuple(eos_ids[:1])
    elif not ids:
        raise UnfitAnswerError(
            f"the text of {count or max_new_tokens} sampled tokens is empty: they are special "
            "tokens, which the server strips, or half a character"
        )
    # The tokens of the text may outnumber the sampled ones. An answer must not lose its end.
    most = max_new_tokens if stop is StopReason.EOS else max_new_tokens + _slack(max_new_tokens)
    if max(len(ids), count or 0) > most:
        raise UnfitAnswerError(
            f"the server returns a text of {max(len(ids), count or 0)} tokens, {max_new_tokens} "
            "were asked"
        )
    return _completion(ids[:max_new_tokens], stop)


def _completion(ids: tuple[int, ...], stop: StopReason) -> Completion:
    if not ids and stop is not StopReason.ABORT:
        raise ValueError("no token in the response")
    return Completion(ids, (0.0,) * len(ids), stop)


def _stop(dialect: Dialect, answer: Answer, count: int | None, limit: int) -> StopReason:
    """Return why an answer of ``count`` tokens without a visible EOS token ended."""
    stop = answer.stop if dialect.names_finish else None
    if stop is StopReason.LENGTH and count is not None and count < limit:
        raise UnfitAnswerError(
            f"the server ended a chunk after {count} of {limit} tokens: its context is smaller "
            "than the model's (start it with a larger one), or its finish_reason is wrong"
        )
    if stop is StopReason.EOS and count == limit and answer.matched is None:
        # Some servers name no other reason. With a visible EOS token it has been seen before.
        return StopReason.LENGTH if dialect.answers != "text" else stop
    if stop is not None:
        return stop
    if count is not None and count >= limit:
        return StopReason.LENGTH
    if count is not None and not dialect.names_finish:
        return StopReason.EOS  # such a server has no other sign of it
    raise UnfitAnswerError(
        "the response has no finish_reason, so that a complete answer cannot be told from a cut one"
    )


def _check_prompt(dialect: Dialect, answer: Answer, request: CompletionRequest) -> None:
    """Check that the server has read the whole prompt."""
    read, sent = answer.prompt_tokens, request.prompt_tokens
    if dialect.asks == "ids" and answer.prompt_ids not in (None, tuple(request.body["prompt"])):
        raise UnfitAnswerError("the server read another prompt than the one sent")
    if not dialect.counts_prompt or read is None:
        return
    slack = 0 if dialect.asks == "ids" else _slack(sent)
    if abs(read - sent) > slack:
        raise UnfitAnswerError(
            f"the server read {read} tokens of a prompt of {sent}: it cuts long prompts (start it "
            "with a larger context), or its dialect has changed"
        )


def _slack(tokens: int) -> int:
    """Return the number of tokens by which another tokenization of a text may differ."""
    return max(_COUNT_SLACK_TOKENS, int(_COUNT_SLACK_SHARE * tokens))


def encode_continuation(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Return the ids of a text that continues another one.

    Some tokenizers put a space before the first word of any text; after a line break they do not.
    """
    alone, line = tuple(encode(tokenizer, text)), tuple(encode(tokenizer, "\n"))
    after = tuple(encode(tokenizer, "\n" + text))
    return after[len(line) :] if line and after[: len(line)] == line else alone


def join_stream(pieces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the response that the pieces of a streamed one make, for ``read_answer``."""
    ids: list[Any] = []
    choice: dict[str, Any] = {"text": "", "token_ids": ids}
    joined: dict[str, Any] = {"choices": [choice]}
    for piece in pieces:
        ids += new_tokens(piece)
        joined["usage"] = piece.get("usage") or joined.get("usage")
        for part in piece.get("choices") or ():
            for key in ("finish_reason", "stop_reason", "matched_stop", "prompt_token_ids"):
                if part.get(key) not in (None, ""):
                    choice[key] = part[key]
    return joined


def new_tokens(piece: Mapping[str, Any]) -> list[int]:
    """Return the token ids in a piece of a streamed response; none are in its last ones."""
    parts = piece.get("choices") or ()
    return [token for part in parts for token in _as_ids(part.get("token_ids")) or ()]


def new_logprobs(
    piece: Mapping[str, Any], token_ids: Sequence[int], missing: float
) -> tuple[float, ...]:
    """Return the log-probs of the tokens in a piece of a streamed response, or ``missing``."""
    parts = piece.get("choices") or ()
    listed = [(part.get("logprobs") or {}).get("token_logprobs") or [] for part in parts]
    values = [value for part in listed for value in part]
    if len(values) != len(token_ids) or not all(isinstance(v, int | float) for v in values):
        return (missing,) * len(token_ids)
    return tuple(map(float, values))
