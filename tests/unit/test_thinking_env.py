"""The environment: Gymnasium's contract, and the same prompts as a rollout."""

import asyncio
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

from delethink.chunking import ChunkSpec
from delethink.envs.automaton import AutomatonTask
from delethink.envs.spaces import CharacterTokenizer as EnvCharacters
from delethink.envs.thinking import ThinkingEnv, TokenSequence
from delethink.errors import ActionError, QueryTooLongError, RolloutError
from delethink.policy import Sampling, ScriptedPolicy
from delethink.rewards.match import exact_match
from delethink.rollout import replay_trace, run_rollout
from delethink.types import Problem, Trace

EOS = 1


class CharacterTokenizer:
    """One token a character, as the toy reasoner's; 0 and 1 are left to padding and EOS."""

    alphabet = "</think>0123456789:\n"
    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [2 + self.alphabet.index(c) for c in text]}

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        raise AssertionError("there is no chat template")

    def decode(self, token_ids: Any, **options: Any) -> str:
        return "".join(self.alphabet[i - 2] for i in token_ids if i > EOS)


def make(spec: ChunkSpec = ChunkSpec(16, 8, 4, 0), **options: Any) -> ThinkingEnv:
    tokenizer = CharacterTokenizer()
    return ThinkingEnv(
        AutomatonTask(1, 3, width=5),
        exact_match,
        tokenizer,
        spec,
        eos_ids=[EOS],
        vocabulary=2 + len(tokenizer.alphabet),
        **options,
    )


def ids(text: str) -> list[int]:
    return CharacterTokenizer()(text)["input_ids"]


def test_gymnasium_finds_no_fault() -> None:
    check_env(make(), skip_render_check=True)


def test_an_episode_by_hand() -> None:
    env = make(ChunkSpec(6, 2, 3, 0))
    problem = Problem("01:00000", "11111")
    observation, info = env.reset(options={"problem": problem})
    assert env.tokenizer.decode(observation) == "01:00000"
    assert info["max_new_tokens"] == 6

    observation, reward, terminated, truncated, info = env.step(ids("00:111"))
    assert env.tokenizer.decode(observation) == "01:00000" + "11"
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info["max_new_tokens"] == 4
    assert info["carried"] == 2
    assert info["budget_left"] == 14 - 6

    env.step(ids("11</"))
    _, reward, terminated, truncated, info = env.step([*ids("k>1"), EOS])
    assert (terminated, truncated, info["stop"]) == (True, False, "completed")
    assert reward == 0.0


def test_an_answer_split_over_a_boundary_is_found() -> None:
    env = make(ChunkSpec(16, 4, 3, 0))
    env.reset(options={"problem": Problem("01:00000", "11111")})
    env.step(ids("00:11111</think>"))
    _, reward, terminated, *_ = env.step([*ids("11111"), EOS])
    assert (reward, terminated) == (1.0, True)
    env.reset(options={"problem": Problem("01:00000", "11111")})
    env.step(ids("0000:11111</thin"))
    _, reward, terminated, *_ = env.step([*ids("k>11111"), EOS])
    assert (reward, terminated) == (1.0, True)


def test_the_end_of_the_budget_truncates() -> None:
    env = make(ChunkSpec(4, 2, 2, 0))
    env.reset(seed=1)
    *_, terminated, truncated, _ = env.step(ids("0000"))
    assert (terminated, truncated) == (False, False)
    *_, terminated, truncated, info = env.step(ids("00"))
    assert (terminated, truncated, info["budget_left"]) == (False, True, 0)
    with pytest.raises(ActionError, match=r"has ended \(budget\); call reset"):
        env.step(ids("0"))


class OnAnotherDevice:
    """Raises in NumPy conversions, like a torch tensor on another device."""

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


@pytest.mark.parametrize(
    ("action", "text"),
    [
        ([], "1 to 6 token ids"),
        ([999], "below 22"),
        ([-1], "token ids"),
        ([0.5], "token ids"),
        ("0000", "token ids"),
        (ids("0") * 7, "1 to 6"),
        (np.array([-(2**63)]), "token ids"),
        (np.array([2**64 - 1], np.uint64), "below 22"),
        (np.array([[1, 2]]), "token ids"),
        (np.array([True]), "token ids"),
        (OnAnotherDevice(), "token ids"),
    ],
)
def test_illegal_actions_say_what_is_allowed(action: Any, text: str) -> None:
    env = make(ChunkSpec(6, 2, 3, 0))
    env.reset(seed=0)
    with pytest.raises(ActionError, match=text):
        env.step(action)


def test_a_later_chunk_is_shorter_than_the_action_space() -> None:
    env = make(ChunkSpec(6, 2, 3, 0))
    env.reset(seed=0)
    env.step(ids("000000"))
    with pytest.raises(ActionError, match="may have at most 4 tokens, got 5"):
        env.step(ids("00000"))


def test_a_step_before_the_first_reset_is_refused() -> None:
    with pytest.raises(ActionError, match="call reset"):
        make().step(ids("0"))


def test_a_query_that_does_not_fit_is_refused() -> None:
    with pytest.raises(QueryTooLongError, match="may have at most 4"):
        make(max_query_tokens=4).reset(seed=0)


def test_render_shows_query_carryover_and_sampled_tokens_apart() -> None:
    env = make(ChunkSpec(6, 2, 3, 0), render_mode="ansi")
    env.reset(options={"problem": Problem("01:00000", "11111")})
    env.step(ids("00:111"))
    assert env.render() == "[query]\n01:00000\n[carried]\n11\n[sampled so far]\n00:111"


def test_the_seed_decides_the_problem() -> None:
    env, other = make(), make()
    assert np.array_equal(env.reset(seed=5)[0], other.reset(seed=5)[0])


chunk_sizes = st.tuples(st.integers(2, 8), st.integers(0, 7), st.integers(1, 5))


@given(chunk_sizes, st.lists(st.integers(2, 20), min_size=40, max_size=40), st.integers(1, 40))
def test_the_environment_and_a_rollout_show_the_same_prompts(
    sizes: tuple[int, int, int], stream: list[int], end: int
) -> None:
    context, carryover, chunks = sizes
    spec = ChunkSpec(context, min(carryover, context - 1), chunks, min(1, carryover, context - 1))
    said = iter([*stream[: end - 1], EOS, *stream])

    def speak(prompt: tuple[int, ...], limit: int) -> tuple[int, ...]:
        output: list[int] = []
        while len(output) < limit and EOS not in output:
            output.append(next(said))
        return tuple(output)

    policy = ScriptedPolicy(speak)
    env = make(spec)
    observation, _ = env.reset(seed=0)
    trace = asyncio.run(run_rollout(policy, spec, tuple(observation.tolist()), Sampling()))
    for chunk in trace.chunks:
        assert tuple(observation.tolist()) == chunk.prompt_ids
        observation, _, terminated, truncated, info = env.step(list(chunk.output_ids))
    assert terminated or truncated
    assert info["stop"] == trace.stop.value


def played(spec: ChunkSpec, *said: list[int]) -> Trace:
    policy = ScriptedPolicy([tuple(s) for s in said])
    return asyncio.run(run_rollout(policy, spec, tuple(ids("01:00000")), Sampling()))


def test_a_trace_replayed_through_the_environment_earns_its_reward() -> None:
    spec = ChunkSpec(16, 8, 4, 0)
    trace = played(spec, ids("0000:11111</thin"), [*ids("k>11111"), EOS])
    assert replay_trace(make(spec), Problem("01:00000", "11111"), trace) == 1.0
    assert replay_trace(make(spec), Problem("01:00000", "11110"), trace) == 0.0


def test_replay_refuses_an_environment_with_other_chunking() -> None:
    trace = played(ChunkSpec(16, 8, 4, 0), ids("0000:11111</thin"), [*ids("k>11111"), EOS])
    with pytest.raises(RolloutError, match="prompt differs from the prompt of chunk 1"):
        replay_trace(make(ChunkSpec(16, 7, 4, 0)), Problem("01:00000", "11111"), trace)


def test_replay_refuses_an_environment_with_another_end() -> None:
    spec, problem = ChunkSpec(16, 8, 4, 0), Problem("01:00000", "11111")
    trace = played(spec, ids("0000:11111</thin"), [*ids("k>11111"), EOS])
    deaf = make(spec)
    deaf.eos_ids = frozenset()
    with pytest.raises(RolloutError, match="has not ended after the last chunk"):
        replay_trace(deaf, problem, trace)
    with pytest.raises(RolloutError, match="ended before chunk 1 of 2"):
        replay_trace(make(ChunkSpec(16, 8, 1, 0)), problem, trace)


def text_env(spec: ChunkSpec, tokenizer: Any = None) -> Any:
    return gymnasium.make(
        "delethink.envs:delethink/TextThinking-v0",
        chunk_spec=spec,
        tokenizer=tokenizer,
        carryover_size=spec.carryover_size,
    )


def test_a_trace_replayed_as_text_earns_its_reward() -> None:
    spec, problem = ChunkSpec(16, 8, 4, 0), Problem("01:00000", "11111")
    env = text_env(spec)
    tokenizer = env.unwrapped.tokenizer
    query = tuple(tokenizer("01:00000<think>")["input_ids"])
    said = ["0000:11111", "</think>", "11111<eos>"]
    policy = ScriptedPolicy([tuple(tokenizer(text)["input_ids"]) for text in said])
    trace = asyncio.run(run_rollout(policy, spec, query, Sampling()))
    assert replay_trace(env, problem, trace) == 1.0
    assert env.unwrapped.trace.output_ids == trace.output_ids
    with pytest.raises(RolloutError, match="prompt differs from the prompt of chunk 1"):
        replay_trace(text_env(ChunkSpec(16, 7, 4, 0)), problem, trace)


class Splits(EnvCharacters):
    """The mark of thinking may also be sampled character by character."""

    def __init__(self) -> None:
        super().__init__("<>/think\n:01")


def test_a_text_with_other_tokens_than_the_sampled_ones_is_told() -> None:
    spec, tokenizer = ChunkSpec(16, 8, 4, 0), Splits()
    query = tuple(tokenizer("01:0<think>")["input_ids"])
    sampled = [tokenizer._ids[c] for c in "</think>"]
    policy = ScriptedPolicy([(*sampled, tokenizer.eos_token_id)])
    trace = asyncio.run(run_rollout(policy, spec, query, Sampling()))
    with pytest.raises(RolloutError, match="text of chunk 0 is encoded to other tokens"):
        replay_trace(text_env(spec, tokenizer), Problem("01:0", "1"), trace)


def test_what_cannot_be_replayed_says_why() -> None:
    spec, problem = ChunkSpec(16, 8, 4, 0), Problem("01:00000", "11111")
    trace = played(spec, [*ids("11111"), EOS])
    with pytest.raises(RolloutError, match="query differs from the query of the trace"):
        replay_trace(make(spec), Problem("01:00001", "11111"), trace)
    by_token = gymnasium.make("delethink.envs:delethink/TokenThinking-v0")
    with pytest.raises(RolloutError, match="an observation must be a sequence of token ids"):
        replay_trace(by_token, problem, trace)

    def fails(prompt: tuple[int, ...], limit: int) -> tuple[int, ...]:
        raise RuntimeError("no engine")

    failed = asyncio.run(
        run_rollout(ScriptedPolicy(fails), spec, tuple(ids("01:00000")), Sampling())
    )
    with pytest.raises(RolloutError, match=r"chunk 0 failed \(.*no engine\).*cut_trace"):
        replay_trace(make(spec), problem, failed)


def test_gymnasium_makes_it_by_name() -> None:
    env = gymnasium.make(
        "delethink.envs:delethink/Thinking-v0",
        task=AutomatonTask(1, 3, width=5),
        reward=exact_match,
        tokenizer=CharacterTokenizer(),
        chunk_spec=ChunkSpec(6, 2, 3, 0),
        eos_ids=[EOS],
        vocabulary=22,
    )
    _, info = env.reset(seed=0)
    assert info["max_new_tokens"] == 6


def test_token_sequences_know_their_own() -> None:
    space = TokenSequence(10, max_length=4, min_length=1)
    space.seed(0)
    assert all(space.contains(space.sample()) for _ in range(100))
    assert space == TokenSequence(10, 4, 1)
    assert space != TokenSequence(11, 4, 1)
    for wrong in ([], [10], [-1], [1.5], [[1]], [[1], [1, 2]], [1] * 5):
        assert wrong not in space
