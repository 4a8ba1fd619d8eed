"""Policy that samples through the interception endpoint of a rollout.

Every request is a chat completion, as the endpoint has no other route for text. Sampled ids come
from the server's answer, or in training from the trace itself. Where the server names no ids, its
text is encoded again, and a line says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import openai
import verifiers.v1 as vf

from delethink.engines.openai_dialect import (
    SHOWN_CHARACTERS,
    Answer,
    Dialect,
    UnfitAnswerError,
    make_request,
    read_answer,
    to_completion,
)
from delethink.errors import ConfigError, PolicyError
from delethink.output import safe_text
from delethink.policy import Completion, Sampling
from delethink.thinking_marks import marks_of
from delethink.types import TokenIds
from delethink_verifiers.prompts import ChatPrompts

RENDERER = "delethink_verifiers.renderer.OpenPromptRenderer"
_RETRIED_STATUSES = {408, 409, 429}  # the openai client has retried these, and 500 and above
_NO_IDS = (
    "the server returns no token ids, so its text is encoded again: chunk boundaries are as exact "
    "as text (vLLM returns ids)"
)
_OTHER_IDS = (
    "the text of carried tokens is encoded to other ids than the sampled ones: such chunks begin "
    "with another tokenization (metric inexact_chunks)"
)


class EndpointPolicy:
    """Policy of one rollout.

    Args:
        client: client of the endpoint, with the secret of the rollout.
        ctx: model and sampling settings of the rollout.
        trace: the trace that the endpoint records.
        prompts: messages for prompts.
        tokenizer: tokenizer of the model.
        eos_ids: token ids that end an answer.
        say: called with a sentence about what is not exact.
        must_be_exact: fail where the server is known to have read other ids.

    Attributes:
        nodes: index of the sampled node of each chunk.
        prompt_is_exact: whether each prompt was read as meant; ``None`` if the server does not say.
    """

    def __init__(
        self,
        client: openai.AsyncOpenAI,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        prompts: ChatPrompts,
        tokenizer: Any,
        eos_ids: Sequence[int],
        say: Callable[[str], None],
        must_be_exact: bool,
    ) -> None:
        self._client, self._ctx, self._trace = client, ctx, trace
        self._prompts, self._tokenizer, self._eos_ids = prompts, tokenizer, list(eos_ids)
        self._say, self._must_be_exact = say, must_be_exact
        self._trains = isinstance(ctx.client, vf.TrainClientConfig)
        self._dialect = Dialect(asks="text", answers="ids")
        self.nodes: list[int] = []
        self.prompt_is_exact: list[bool | None] = []

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """Sample at most ``max_new_tokens`` tokens after ``prompt_ids``.

        Raises:
            ConfigError: the server rejects the request, or reads the question differently.
            PolicyError: the request failed after its retries, or its answer cannot be used.
        """
        own = self._ctx.model, self._tokenizer, self._eos_ids
        request = make_request(self._dialect, *own, prompt_ids, max_new_tokens, sampling)
        body = {key: value for key, value in request.body.items() if key != "prompt"}
        body |= self._prompts.body(prompt_ids)
        with self._room(max_new_tokens):
            response = await self._post(body)
        call = self._trace.calls[-1]
        if call.node is None:
            raise PolicyError("the endpoint answered and recorded no turn")
        answer = self._read(response, call.node)
        if self._trains and call.finish_reason is None:
            raise PolicyError("the engine cancelled the request")
        is_first = not self.nodes
        exact = self._check_prompt(answer, prompt_ids, is_first)
        if is_first:
            self._settle(answer, request.prompt_tokens)
        given = self._tokenizer, self._eos_ids, max_new_tokens
        try:
            done = to_completion(self._dialect, answer, request, *given)
        except ValueError as error:
            raise PolicyError(f"malformed response: {error}") from None
        self.nodes.append(call.node)
        self.prompt_is_exact.append(exact)
        logprobs = self._trace.nodes[call.node].logprobs
        if len(logprobs) == len(done.token_ids):
            done = replace(done, logprobs=tuple(logprobs))
        return done

    @contextlib.contextmanager
    def _room(self, max_new_tokens: int) -> Iterator[None]:
        """Give one request its own limit, as the run's settings override those of a request."""
        settings = self._ctx.sampling
        before = settings.max_tokens
        settings.max_tokens = max_new_tokens
        try:
            yield
        finally:
            settings.max_tokens = before

    async def _post(self, body: dict[str, Any]) -> Any:
        try:
            return await self._client.post("/chat/completions", cast_to=object, body=body)
        except openai.APIStatusError as error:
            text = " ".join(error.response.text.split())[:SHOWN_CHARACTERS]
            reason = safe_text(f"HTTP {error.status_code}: {text}", lines=False)
            if error.status_code < 500 and error.status_code not in _RETRIED_STATUSES:
                raise ConfigError(_advised(f"the request is rejected: {reason}")) from None
            raise PolicyError(f"the request failed, also after retries: {reason}") from None
        except openai.APIError as error:
            reason = safe_text(str(error.__cause__ or error), lines=False)
            raise PolicyError(f"the request failed, also after retries: {reason}") from None

    def _read(self, response: Any, index: int) -> Answer:
        """Return the answer; in training, its ids are those of the trace."""
        node = self._trace.nodes[index]
        if node.token_ids and isinstance(response, dict) and response.get("choices"):
            pairs = zip(node.token_ids, node.mask, strict=True)
            sampled = [token for token, is_sampled in pairs if is_sampled]
            choice = {**response["choices"][0], "token_ids": sampled}
            read = [token for one in path_to(self._trace, index) for token in one.token_ids]
            prompt = read[: len(read) - len(sampled)]
            response = {**response, "choices": [choice], "prompt_token_ids": prompt}
        try:
            return read_answer(response, marks_of(self._tokenizer).end or "")
        except ValueError as error:
            raise PolicyError(f"malformed response: {safe_text(str(error))[:200]}") from None

    def _check_prompt(self, answer: Answer, prompt_ids: TokenIds, is_first: bool) -> bool | None:
        """Return whether the prompt was read as meant; ``None`` if the server does not say."""
        read, meant = answer.prompt_ids, tuple(map(int, prompt_ids))
        if read is None or read == meant:
            return None if read is None else True
        if self._trains:
            raise UnfitAnswerError(
                f"the renderer made {len(read)} other tokens of a prompt of {len(meant)}: set "
                f"--client.renderer.name custom --client.renderer.import-path {RENDERER}"
            )
        if is_first:
            raise ConfigError(
                f"the server reads {len(read)} tokens of a question that has {len(meant)} here, or "
                "other ones: name the tokenizer of the served model with "
                "--env.agent.harness.tokenizer, and the same chat_template_kwargs"
            )
        if self._must_be_exact:
            raise UnfitAnswerError(f"{_OTHER_IDS}; require_exact does not allow it")
        self._say(_OTHER_IDS)
        return False

    def _settle(self, answer: Answer, prompt_tokens: int) -> None:
        """Keep what the first answer shows of the server for the rest of the trace."""
        if answer.ids is None:
            self._say(_NO_IDS)
            self._dialect = replace(self._dialect, answers="text")
        # A server that does not continue the carried text reads more tokens than were meant.
        counts = answer.prompt_tokens == prompt_tokens
        self._dialect = replace(self._dialect, counts_prompt=counts)


def _advised(text: str) -> str:
    """Return an error text with advice for the refusals of vLLM."""
    if "chat template" in text.lower() and "trust" in text.lower():
        return (
            f"{text}. The chat template of this model cannot continue a message exactly: start "
            "vLLM with --trust-request-chat-template"
        )
    return text


def path_to(trace: vf.Trace, index: int) -> list[vf.MessageNode]:
    """Return the nodes from a root to a node."""
    path: list[vf.MessageNode] = []
    at: int | None = index
    while at is not None:
        path.append(trace.nodes[at])
        at = trace.nodes[at].parent
    return path[::-1]
