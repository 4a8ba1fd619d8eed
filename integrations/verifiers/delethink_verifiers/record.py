"""Thinking on a trace of verifiers: what rewards need of it, token ids, and weights of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import verifiers.v1 as vf

from delethink.chunking import ChunkSpec
from delethink.errors import RewardError
from delethink.scoring.rollouts import attempt_from_text, make_attempt
from delethink.thinking_marks import USUAL
from delethink.tokens import as_list
from delethink.types import Attempt, Chunk, Problem, Trace, TraceStop
from delethink_verifiers.endpoint import path_to

KEY = "delethink"  # of ``Trace.info``
WEIGHTS = "rl"  # stream of ``MessageNode.loss_weights`` that prime-rl multiplies its loss with


def begin_record(trace: vf.Trace) -> None:
    """Note on a trace that thinking in chunks has begun, so that a lost end is seen."""
    trace.info[KEY] = {"stop": None}


def end_record(
    trace: vf.Trace,
    thinking: Trace,
    problem: Problem,
    tokenizer: Any,
    spec: ChunkSpec,
    prompt_is_exact: Sequence[bool | None],
) -> None:
    """Store thinking on a trace, with all inputs of rewards, so that replays need no tokenizer."""
    attempt = make_attempt(problem, thinking, tokenizer, spec)
    exact = [*prompt_is_exact, *[None] * len(thinking.chunks)]
    trace.info[KEY] = {
        "stop": thinking.stop.value,
        "error": thinking.error,
        "length": attempt.length,
        "num_chunks": attempt.num_chunks,
        "budget": attempt.budget,
        "max_chunks": attempt.max_chunks,
        "text": attempt.text,
        "start_of_thinking": attempt.start_of_thinking,
        "end_of_thinking": attempt.end_of_thinking,
        "query_ids": as_list(thinking.query_ids),
        "chunks": [
            {
                "output_ids": as_list(chunk.output_ids),
                "carried": chunk.carried,
                "role": chunk.role.value,
                "stop": chunk.stop.value,
                "prompt_is_exact": is_exact,
            }
            for chunk, is_exact in zip(thinking.chunks, exact, strict=False)
        ],
    }


def attempt_of(trace: vf.Trace, problem: Problem) -> Attempt:
    """Return a trace as input of rewards.

    A trace of another harness is read as one chunk: the reasoning and the text of its last message.

    Raises:
        RewardError: the trace ended before its thinking did, or has no answer of the model.
    """
    stored = trace.info.get(KEY)
    if stored is None:
        return _attempt_of_text(trace, problem)
    stop = stored.get("stop")
    if stop is None or TraceStop(stop).is_failure or stop == TraceStop.CUT.value:
        reason = stored.get("error") or trace.stop_condition or "the session was closed"
        raise RewardError(f"the thinking did not end, so it has no reward: {reason}")
    thinking = [chunk for chunk in stored["chunks"] if chunk["role"] == "thinking"]
    return Attempt(
        problem=problem,
        text=stored["text"],
        stop=TraceStop(stop),
        length=stored["length"],
        num_chunks=stored["num_chunks"],
        budget=stored["budget"],
        max_chunks=stored["max_chunks"],
        output_ids=tuple(token for chunk in thinking for token in chunk["output_ids"]),
        start_of_thinking=stored.get("start_of_thinking"),
        end_of_thinking=stored.get("end_of_thinking"),
    )


def _attempt_of_text(trace: vf.Trace, problem: Problem) -> Attempt:
    messages = trace.assistant_messages
    if not messages:
        raise RewardError("the trace has no message of the model, so it has no reward")
    said, thought = messages[-1].content or "", messages[-1].reasoning_content
    text = said if thought is None else f"{thought}{USUAL.end}{said}"
    usage = trace.usage
    return attempt_from_text(problem, text, usage.completion_tokens if usage else None)


def stamp_ids(
    trace: vf.Trace,
    chunks: Sequence[Chunk],
    nodes: Sequence[int],
    prompt_is_exact: Sequence[bool | None],
) -> None:
    """Put the ids of chunks on the nodes of a trace, where the recording client has none.

    The path to each sampled node then has exactly its prompt and its output. Chunks whose ids are
    not known for certain get none. In training the nodes have them already, and lose tokens that an
    early boundary has cut off.
    """
    for chunk, index, is_exact in zip(chunks, nodes, prompt_is_exact, strict=False):
        path = path_to(trace, index)
        sampled = path[-1]
        if sampled.token_ids:
            _cut(sampled, len(chunk.output_ids))
        elif is_exact:
            _stamp(path, chunk)


def _stamp(path: Sequence[vf.MessageNode], chunk: Chunk) -> None:
    """Divide the prompt of a chunk among the nodes before its sampled one."""
    left = as_list(chunk.prompt_ids)
    query = left[: len(left) - chunk.carried]
    for position, node in enumerate(path[:-1]):
        if node.token_ids:
            left = left[len(node.token_ids) :]
            continue
        if position == len(path) - 2:
            own = left
        else:  # the query, on the last message before the carried tokens
            own = query if position == len(path) - 3 and chunk.carried else []
        node.token_ids, node.mask = own, [False] * len(own)
        left = left[len(own) :]
    output = as_list(chunk.output_ids)
    path[-1].token_ids, path[-1].mask = output, [True] * len(output)


def _cut(node: vf.MessageNode, kept: int) -> None:
    """Leave the first ``kept`` sampled tokens of a node."""
    excess = sum(node.mask) - kept
    if excess <= 0:
        return
    node.token_ids, node.mask = node.token_ids[:-excess], node.mask[:-excess]
    node.logprobs, node.is_content = node.logprobs[:kept], node.is_content[: len(node.mask)]
    node.renderer_token_ids = None
    node.routed_experts = node.sampling_mask = None  # they no longer fit


def stamp_weights(trace: vf.Trace, nodes: Sequence[int], weight: float) -> None:
    """Give each sampled token of a trace this weight in the loss, and all other tokens 0."""
    for index in nodes:
        node = trace.nodes[index]
        weights = [weight if is_sampled else 0.0 for is_sampled in node.mask]
        node.loss_weights = {**(node.loss_weights or {}), WEIGHTS: weights}
