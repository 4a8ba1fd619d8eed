"""An episode for other people's loops is the rollout of the library, chunk by chunk."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from delethink.chunking import ChunkSpec
from delethink.envs.automaton import AutomatonTask
from delethink.envs.spaces import CharacterTokenizer
from delethink.errors import ActionError, ConfigError, ModelError, QueryTooLongError
from delethink.integrations.calls import check_call_size, largest_call
from delethink.integrations.episodes import UNLIMITED, Episode, EpisodeSource
from delethink.integrations.releases import check_release
from delethink.policy import Completion, Sampling, ScriptedPolicy
from delethink.registry import make, resolve
from delethink.rollout import run_rollout
from delethink.scoring.reward import Reward
from delethink.scoring.rollouts import run_scored_rollouts
from delethink.scoring.scorer import Scorer, ScoringRules
from delethink.tokenization import query_ids
from delethink.types import Problem, StopReason, Trace, TraceStop

TASK = AutomatonTask(min_steps=1, max_steps=6, width=5)
TOKENIZER = CharacterTokenizer()
SPEC = ChunkSpec(context_size=24, carryover_size=12, max_chunks=4, head_size=0)
SPECS = {
    "head and tail": replace(SPEC, head_size=4),
    "one chunk": ChunkSpec.longcot(60),
    "early boundary": replace(SPEC, boundary=make("delethink.boundaries", "line_break")),
    "nothing carried": replace(SPEC, carryover=make("delethink.carryovers", "none")),
}


def made_scorer(**rules: object) -> Scorer:
    rewards = [
        Reward("exact", resolve("delethink.rewards", "exact")),
        Reward("chunks", resolve("delethink.rewards", "chunks"), weight=0.5),
    ]
    return Scorer(rewards, "exact", ScoringRules(**rules))  # type: ignore[arg-type]


def source_of(spec: ChunkSpec = SPEC, **values: object) -> EpisodeSource:
    eos = frozenset([TOKENIZER.eos_token_id])
    given = {"task": TASK, "tokenizer": TOKENIZER, "scorer": made_scorer(), **values}
    bound = spec.bind(TOKENIZER)
    return EpisodeSource(spec=bound, eos_ids=eos, vocabulary=len(TOKENIZER), **given)  # type: ignore[arg-type]


def random_policy(seed: int, answer: str) -> ScriptedPolicy:
    """A policy that fills chunks with random lines, and may answer in any of them."""
    stream = random.Random(seed)
    ends = TOKENIZER("</think>" + answer)["input_ids"] + [TOKENIZER.eos_token_id]

    def sample(prompt_ids: object, room: int) -> Completion:
        ids = [stream.randrange(3, len(TOKENIZER)) for _ in range(room)]
        if len(ends) <= room and stream.random() < 0.4:
            ids = ids[: stream.randint(0, room - len(ends))] + ends
        stop = StopReason.EOS if ids[-1] == TOKENIZER.eos_token_id else StopReason.LENGTH
        return Completion(tuple(ids), (-0.5,) * len(ids), stop)

    return ScriptedPolicy(sample)


def same(ours: Trace, theirs: Trace) -> bool:
    """Compare all but what only a policy knows."""
    blank = [replace(chunk, logprobs=(), policy_version=None) for chunk in theirs.chunks]
    return ours == replace(theirs, chunks=tuple(blank), query_ids=ours.query_ids)


@pytest.mark.parametrize("name", SPECS)
def test_chunks_and_rewards_are_those_of_a_rollout(name: str) -> None:
    source, stops = source_of(SPECS[name]), set()
    for index in range(20):
        problem = source.problem("train", index)
        query = query_ids(TOKENIZER, problem)
        policy = random_policy(index, problem.answer)
        rollout = run_scored_rollouts(
            policy, source.spec, [problem], [query], [Sampling()], TOKENIZER, source.scorer
        )
        (trace,), (score,), _ = asyncio.run(rollout)
        episode = source.begin(problem)
        for (prompt, room), chunk in zip(policy.calls, trace.chunks, strict=True):
            assert episode.prompt_ids == list(prompt)
            assert episode.max_new_tokens == room
            assert episode.stop is None
            episode.add(list(chunk.output_ids))
        assert same(episode.trace, trace)
        assert asyncio.run(episode.score()) == score
        stops.add(trace.stop)
    assert stops == {TraceStop.COMPLETED, TraceStop.BUDGET}
    source.close()


@pytest.mark.parametrize("max_tokens", [1, 4, 12])
def test_calls_of_one_size_give_the_same_chunks(max_tokens: int) -> None:
    source = source_of()
    assert largest_call(source.spec) == 12
    for index in range(8):
        problem = source.problem("train", index)
        policy = random_policy(index, problem.answer)
        running = run_rollout(policy, source.spec, query_ids(TOKENIZER, problem), Sampling())
        trace = asyncio.run(running)
        episode, calls = source.begin(problem), 0
        for chunk in trace.chunks:
            for start in range(0, len(chunk.output_ids), max_tokens):
                assert episode.prompt_ids == list(chunk.prompt_ids)
                assert episode.open_ids == list(chunk.output_ids[:start])
                episode.extend(list(chunk.output_ids[start : start + max_tokens]))
                calls += 1
        assert same(episode.trace, trace)
        assert calls >= len(trace.chunks)


def test_a_call_beyond_its_chunk_is_refused() -> None:
    episode = source_of().begin(TASK.problem("train", 0))
    assert episode.extend([5] * 20) is None
    with pytest.raises(ActionError, match=r"must give 1 to 4 tokens, .* got 5"):
        episode.extend([5] * 5)
    assert episode.extend([5], ended=True) == episode.chunks[0]
    assert episode.stop is TraceStop.COMPLETED
    with pytest.raises(ActionError, match=r"has ended \(completed\) and takes no chunk"):
        episode.extend([5])


def test_a_size_of_calls_that_passes_a_boundary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"it must divide 12; set max_tokens=12"):
        check_call_size(SPEC, 24)
    with pytest.raises(ConfigError, match="'line_break' gives chunks of different sizes"):
        check_call_size(SPECS["early boundary"].bind(TOKENIZER), 12)
    for name in ("head and tail", "nothing carried"):
        assert largest_call(SPECS[name]) == 12
    check_call_size(SPECS["one chunk"], 30)


def test_text_gives_the_same_chunk_and_may_end_without_the_token() -> None:
    source = source_of()
    problem = source.problem("heldout", 3)
    by_ids, by_text, spelled = (source.begin(problem) for _ in range(3))
    ids = TOKENIZER("01:11</think>01")["input_ids"]
    by_ids.add([*ids, TOKENIZER.eos_token_id])
    by_text.add_text("01:11</think>01", ended=True)
    spelled.add_text("01:11</think>01<eos>01")
    assert by_ids.trace == by_text.trace == spelled.trace
    assert by_ids.prompt == problem.prompt + "<think>"
    assert by_ids.retokenized_at() is None


def test_a_trace_before_its_end_is_cut_and_has_no_reward() -> None:
    episode = source_of().begin(TASK.problem("train", 0))
    episode.add([5] * 24)
    assert episode.trace.stop is TraceStop.CUT
    with pytest.raises(ActionError, match=r"has not ended and has no reward yet: 36 of 60 tokens"):
        asyncio.run(episode.score())


def ended() -> Episode:
    episode = source_of().begin(TASK.problem("train", 0))
    episode.add([TOKENIZER.eos_token_id])
    return episode


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        ([], "must have 1 to 24 tokens, got 0"),
        ([5] * 25, "must have 1 to 24 tokens, got 25"),
        ([5, 99], "a whole number from 0 to 15, got 99"),
        ([True], "got True"),
        ([1.0], "got 1.0"),
        ("0110", "a list of token ids, got '0110'"),
        (None, "a list of token ids, got None"),
    ],
)
def test_a_wrong_chunk_is_refused_and_changes_nothing(chunk: object, message: str) -> None:
    episode = source_of().begin(TASK.problem("train", 0))
    before = episode.state
    with pytest.raises(ActionError, match=message):
        episode.add(chunk)  # type: ignore[arg-type]
    assert episode.state is before
    assert not episode.chunks


def test_nothing_follows_the_end() -> None:
    with pytest.raises(ActionError, match=r"has ended \(completed\) and takes no chunk"):
        ended().add([5])


@pytest.mark.parametrize(
    ("split", "index", "message"),
    [
        ("test", 0, "unknown split 'test'. Allowed: heldout, train."),
        ("held_out", 0, "Did you mean 'heldout'?"),
        ("train", -1, f"from 0 to {UNLIMITED - 1}, the last problem of 'train', got -1"),
        ("train", "3", "got '3'"),
    ],
)
def test_an_unknown_problem_is_named(split: str, index: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        source_of().problem(split, index)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_seed_draws_a_problem_that_fits() -> None:
    source = source_of()
    index, problem = source.draw("train", 7)
    assert source.draw("train", 7) == (index, problem)
    assert problem == TASK.problem("train", index)
    short = source_of(max_query_tokens=3)
    with pytest.raises(ConfigError, match="none of 50 drawn problems of 'train'"):
        short.draw("train", 7)
    with pytest.raises(QueryTooLongError, match="may have at most 3, by task.max_query_tokens"):
        short.begin(problem)


def test_a_tokenizer_without_a_template_needs_leave() -> None:
    plain = CharacterTokenizer(before_thinking="")
    problem = TASK.problem("train", 0)
    with pytest.raises(ModelError, match="the tokenizer has no chat template"):
        source_of(tokenizer=plain).begin(problem)
    episode = source_of(tokenizer=plain, plain_prompts=True).begin(problem)
    assert episode.prompt == problem.prompt


def test_a_failed_reward_is_no_number() -> None:
    def fails(text: str) -> float:
        raise ValueError("no luck")

    scorer = Scorer([Reward("fails", fails, isolate=False)])
    episode = source_of(scorer=scorer).begin(Problem("01:01", "10"))
    episode.add([TOKENIZER.eos_token_id])
    score = asyncio.run(episode.score())
    assert score.total is None
    assert "no luck" in score.errors["fails"]


def test_a_release_outside_the_tried_ones_is_named() -> None:
    assert check_release("gymnasium", "1.0", "2")
    with pytest.raises(ConfigError, match=r"gymnasium 1\.\S+ is installed, and .* 2 to below 3: "):
        check_release("gymnasium", "2", "3")
    with pytest.raises(ConfigError, match="no-such-package is not installed: pip install"):
        check_release("no-such-package", "1", "2")
