"""Every registered id: made by its name alone, conformant, vectorised, and the same everywhere."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
import tokenizers
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import delethink.envs  # noqa: F401 - registers the ids
from delethink.envs.automaton import AutomatonTask
from delethink.envs.spaces import CharacterTokenizer
from delethink.errors import ActionError, ConfigError, ModelError, QueryTooLongError
from delethink.testing import check_thinking_env
from delethink.types import Problem

IDS = [name for name in gymnasium.registry if name.startswith("delethink/")]
CARRYOVERS: list[Any] = [
    "tail",
    "none",
    "full",
    "sink_window",
    {"name": "head_tail", "args": {"head_size": 3, "head_outside": True}},
    {"name": "state_block", "args": {"opening": "1", "closing": "0"}},
    {"name": "summary", "args": {"instruction": "\n", "before": ":", "after": "\n"}},
]
SMALL = {"context_size": 12, "carryover_size": 6, "max_chunks": 4}


def make(name: str, **options: Any) -> Any:
    return gymnasium.make(name, **options).unwrapped


def test_there_are_three() -> None:
    kinds = ("Thinking", "TextThinking", "TokenThinking")
    assert sorted(IDS) == sorted(f"delethink/{kind}-v0" for kind in kinds)


@pytest.mark.parametrize("name", IDS)
def test_gymnasium_finds_no_fault(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(name))
        check_env(make(name, **SMALL))


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("carryover", CARRYOVERS, ids=str)
def test_they_think_as_the_rule_says(name: str, carryover: Any) -> None:
    check_thinking_env(gymnasium.make(name, carryover=carryover, **SMALL), episodes=4)


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_chunks": 1},
        {"keep_trace": False},
        {"boundary": {"name": "line_break", "args": {"within": 6}}},
    ],
    ids=str,
)
def test_they_think_with_other_settings_too(name: str, options: dict[str, Any]) -> None:
    check_thinking_env(gymnasium.make(name, **{**SMALL, **options}), episodes=4)


@pytest.mark.parametrize("name", IDS)
def test_random_actions_are_legal_to_the_end(name: str) -> None:
    for carryover in ["tail", "none", CARRYOVERS[-1]]:
        env = make(name, carryover=carryover, **SMALL)
        env.action_space.seed(0)
        for seed in range(20):
            env.reset(seed=seed)
            while not any(env.step(env.action_space.sample())[2:4]):
                pass


# -- errors name what is near ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"contex_size": 4}, "has no parameter 'contex_size'. Did you mean 'context_size'?"),
        ({"rewards": "exact"}, "has no parameter 'rewards'. Did you mean 'reward'?"),
        ({"interfac": "text"}, "has no parameter 'interfac'. Did you mean 'interface'?"),
        ({"interface": "txt"}, "unknown interface 'txt'. Did you mean 'text'?"),
        ({"carryover": "tial"}, "unknown carryover 'tial'. Did you mean 'tail'?"),
        ({"boundary": "line_brake"}, "unknown boundary 'line_brake'. Did you mean 'line_break'?"),
        ({"task": "automatn"}, "unknown task 'automatn'. Did you mean 'automaton'?"),
        ({"task": {"name": "automaton"}}, "needs 'min_steps'"),
        ({"reward": "exakt"}, "unknown reward 'exakt'. Did you mean 'exact'?"),
        ({"carryover_size": 64}, "carryover_size=64 and context_size=64"),
        ({"eos_ids": [99]}, "at least one token below vocabulary=16"),
        ({"eos_ids": []}, "or no answer can end"),
        ({"vocabulary": 0}, "vocabulary must be at least 1"),
        ({"context_size": "64"}, "context_size must be a whole number, got '64'"),
        ({"context_size": 64.5}, "context_size must be a whole number, got 64.5"),
        ({"chunk_spec": {"context_size": 64}}, "chunk_spec must be a delethink.ChunkSpec"),
        ({"task": None}, "a task must be an object with problem(split, index), got None"),
        (
            {"task": AutomatonTask},
            "a task must be an object with problem(split, index), got <class",
        ),
        ({"tokenizer": CharacterTokenizer}, "a tokenizer must be a folder, a Hugging Face id, or"),
        ({"reward": 3}, "mapping with name and args, or a function; got 3"),
        ({"tokenizer": 3}, "a tokenizer must be a folder, a Hugging Face id, or an object"),
        (
            {"carryover": ["tail"]},
            "carryover must be an instance of a subclass of delethink.Carryover",
        ),
        ({"max_query_tokens": 0}, "max_query_tokens must be at least 1"),
        ({"max_query_tokens": "3"}, "max_query_tokens must be a whole number, got '3'"),
        ({"max_query_tokens": None}, "max_query_tokens must be a whole number, got None"),
        ({"max_query_tokens": True}, "max_query_tokens must be a whole number, got True"),
        ({"vocabulary": 2.5}, "vocabulary must be a whole number, got 2.5"),
        ({"vocabulary": 2**31}, "vocabulary must be at least 1 and at most 2147483647"),
        ({"eos_ids": 1}, "eos_ids must be a sequence of token ids, got 1"),
        ({"eos_ids": "1"}, "eos_ids must be a sequence of token ids, got '1'"),
        ({"eos_ids": [1.5]}, "eos_ids must be a sequence of token ids, got [1.5]"),
        ({"eos_ids": [None]}, "eos_ids must be a sequence of token ids, got [None]"),
        ({"keep_trace": "no"}, "keep_trace must be True or False, got 'no'"),
        ({"trust_remote_code": "yes"}, "trust_remote_code must be True or False, got 'yes'"),
        ({"max_chunks": 10**20}, "tokens does not fit into 64 bits"),
        ({"split": "tset"}, "split must be 'train' or 'heldout', got 'tset'"),
        (
            {"task": {"name": "automaton", "args": {"min_steps": "1", "max_steps": 2}}},
            "must be whole numbers",
        ),
    ],
)
def test_wrong_settings_are_explained(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        gymnasium.make("delethink/Thinking-v0", **options)
    assert text in str(caught.value)


def test_a_window_that_fits_no_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="a window of 1000000000064 tokens"):
        gymnasium.make("delethink/TokenThinking-v0", max_query_tokens=10**12)


def test_a_wrong_render_mode_names_the_nearest() -> None:
    from delethink.envs.thinking import ThinkingEnv

    with pytest.raises(ConfigError, match="unknown render_mode 'htm'. Did you mean 'html'?"):
        ThinkingEnv(render_mode="htm")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"problm": 1}, "no option 'problm'. Did you mean 'problem'?"),
        ({"problem": 3}, "must be a delethink.Problem, got 3"),
        ({"problem": {"prompt": "1"}}, "needs a prompt and an answer"),
        ({"problem": Problem("what?", "1")}, "the character 'w' of 'what?"),
        ({3: 4}, "no option 3"),
        ("problem", "options must be a mapping such as {'problem': ...}, got 'problem'"),
        (3, "options must be a mapping such as {'problem': ...}, got 3"),
        ({"problem": Problem(3, "1")}, "prompt and answer must be texts, got 3 and '1'"),  # type: ignore[arg-type]
        ({"problem": {"prompt": "1", "answer": 5}}, "must be texts, got '1' and 5"),
        ({"problem": Problem("1", "1", 3)}, "metadata must be a mapping, got 3"),  # type: ignore[arg-type]
        ({"problem": {"prompt": "1", "answer": "", "before": "x"}}, "before must be messages"),
        (
            {"problem": {"prompt": "1", "answer": "", "before": [{"role": "user"}]}},
            "before must be messages",
        ),
    ],
)
def test_wrong_options_of_reset_are_explained(options: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(IDS[0]).reset(options=options)
    assert text in str(caught.value)


@pytest.mark.parametrize("name", IDS)
def test_no_step_follows_a_reset_that_failed(name: str) -> None:
    """The old episode would be scored against the new answer."""
    env = make(name)
    env.reset(seed=0)
    with pytest.raises(QueryTooLongError):
        env.reset(options={"problem": Problem("0" * 3000, "1")})
    with pytest.raises(ActionError, match="call reset"):
        env.step({"delethink/TokenThinking-v0": 6, "delethink/Thinking-v0": [6]}.get(name, "0"))


class OwnTask:
    def __init__(self, given: Any) -> None:
        self.given = given

    def problem(self, split: str, index: int) -> Any:
        return self.given


@pytest.mark.parametrize("given", [None, ("1", "2"), {"prompt": "1"}, Problem("1", 2)])  # type: ignore[arg-type]
def test_what_a_task_gives_is_checked(given: Any) -> None:
    env = make("delethink/Thinking-v0", task=OwnTask(given))
    with pytest.raises(ConfigError, match="task of this environment"):
        env.reset(seed=0)


@pytest.mark.parametrize(
    "encoded", [[1, 2], {"ids": [1]}, {"input_ids": [[1, 2]]}, {"input_ids": [-1]}]
)
def test_what_a_tokenizer_returns_is_checked(encoded: Any) -> None:
    class Own(CharacterTokenizer):
        def __call__(self, text: str, **options: Any) -> Any:
            return encoded

    with pytest.raises(ConfigError, match="tokenizer must return a .*list of ids"):
        make("delethink/Thinking-v0", tokenizer=Own()).reset(seed=0)


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    """Models have more ids than their tokenizers."""
    env = make("delethink/Thinking-v0", vocabulary=99, render_mode="ansi")
    env.reset(options={"problem": Problem("1", "0")})
    *_, reward, terminated, _, _ = env.step([50, *env.tokenizer("</think>0")["input_ids"], 98, 1])
    assert (reward, terminated) == (1.0, True)
    assert env.render().endswith("[sampled so far]\n</think>0<eos>")


def test_a_template_that_closes_the_thinking_is_refused() -> None:
    closed = CharacterTokenizer(before_thinking="<think></think>")
    with pytest.raises(ModelError, match="it closes the thinking"):
        make("delethink/Thinking-v0", tokenizer=closed).reset(seed=0)


def test_a_problem_may_be_plain_values() -> None:
    env = make("delethink/TextThinking-v0")
    given = {"problem": {"prompt": "01:00000000000", "answer": "11111111111"}}
    observation, _ = env.reset(options=given)
    assert observation == "01:00000000000<think>"
    *_, reward, terminated, _, _ = env.step("00:11111111111\n</think>11111111111<eos>")
    assert (reward, terminated) == (1.0, True)


def test_the_text_interface_refuses_what_the_tokenizer_does_not_know() -> None:
    env = make("delethink/TextThinking-v0")
    env.reset(seed=0)
    for wrong in ("", "hello", "<eo", "\ud800", 7, None, ["1"]):
        with pytest.raises(ActionError, match="characters known to the tokenizer"):
            env.step(wrong)
    with pytest.raises(ActionError, match="may have at most 64 tokens, got 65"):
        env.step("0" * 65)


def test_a_text_without_tokens_says_what_the_tokenizer_makes_of_it() -> None:
    class Drops(CharacterTokenizer):
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return super().__call__("".join(c for c in text if c in "01:<think>"))

    env = make("delethink/TextThinking-v0", tokenizer=Drops("\n:0123456789é"))
    env.reset(seed=0)
    with pytest.raises(ActionError, match=r"the tokenizer encodes 'é' as \[\]"):
        env.step("é")


@pytest.mark.parametrize("action", [-1, 16, 1.0, "1", None, True, [1], np.ones(2), 10**30])
def test_the_token_interface_refuses_what_is_no_token(action: Any) -> None:
    env = make("delethink/TokenThinking-v0")
    env.reset(seed=0)
    with pytest.raises(ActionError, match="a whole number from 0 to 15"):
        env.step(action)


def test_what_an_action_holds_beyond_the_end_is_left_out_and_counted() -> None:
    env = make("delethink/Thinking-v0")
    env.reset(seed=0)
    *_, terminated, _, info = env.step([6, 7, 1, 9, 9, 9])
    assert (terminated, info["output_ids"], info["ignored"]) == (True, (6, 7, 1), 3)
    assert info["num_sampled"] == 3


# -- vectors ---------------------------------------------------------------------------------------


def actions_of(name: str, step: int, count: int) -> Any:
    """Actions that are legal at any time, with ends among them, the same for every kind of run."""
    drawn = np.random.default_rng(step).integers(0, 16, (count, 3))
    if step % 5 == 4:
        drawn[:, -1] = 1  # the end
    if name == "delethink/TokenThinking-v0":
        return drawn[:, -1]
    if name == "delethink/Thinking-v0":
        return tuple(drawn)
    return tuple(CharacterTokenizer().decode(row) for row in drawn)


def plain(value: Any) -> Any:
    """Arrays, dictionaries and token blocks as what compares with ``==``."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if not key.startswith("_")}
    if isinstance(value, np.ndarray):
        return [plain(inner) for inner in value] if value.dtype == object else value.tolist()
    rows = isinstance(value, list | tuple) or type(value).__name__ == "_Rows"
    return [plain(inner) for inner in value] if rows else value


def run(name: str, mode: str, autoreset: AutoresetMode, **vector: Any) -> list[Any]:
    envs = gymnasium.make_vec(
        name,
        num_envs=3,
        vectorization_mode=mode,
        vector_kwargs={"autoreset_mode": autoreset, **vector},
        **SMALL,
    )
    try:
        seen = [plain(envs.reset(seed=7))]
        done = np.zeros(3, dtype=bool)
        for step in range(25):
            if autoreset is AutoresetMode.DISABLED and done.any():
                seen.append(plain(envs.reset(options={"reset_mask": done})))
            *parts, infos = envs.step(actions_of(name, step, 3))
            if not isinstance(parts[0], dict | tuple):  # read from shared memory when asked
                parts[0] = tuple(parts[0])
            assert parts[0] in envs.observation_space
            done = parts[2] | parts[3]
            seen.append(plain([*parts, infos]))
        return seen
    finally:
        envs.close()


@pytest.mark.parametrize("autoreset", list(AutoresetMode), ids=lambda mode: mode.name)
@pytest.mark.parametrize("name", IDS)
def test_sync_and_async_vectors_are_the_same(name: str, autoreset: AutoresetMode) -> None:
    sync = run(name, "sync", autoreset)
    assert run(name, "async", autoreset) == sync
    if autoreset is AutoresetMode.NEXT_STEP:
        assert run(name, "async", autoreset, shared_memory=False) == sync
        assert run(name, "async", autoreset, copy=False) == sync
    ends = [step for step in sync[1:] if len(step) == 5 and any(step[2] + step[3])]
    assert ends, "no episode ended, so that nothing was seen of autoreset"


@pytest.mark.parametrize("name", IDS)
def test_a_vector_is_its_environments(name: str) -> None:
    """By hand, next to the vector: reset where an episode ended, in the step after it."""
    envs = [make(name, **SMALL) for _ in range(3)]
    seen = run(name, "sync", AutoresetMode.NEXT_STEP)
    now = [env.reset(seed=7 + i) for i, env in enumerate(envs)]
    done = [False] * 3
    for step in range(25):
        actions = actions_of(name, step, 3)
        for i, env in enumerate(envs):
            if done[i]:
                observation, info = env.reset()
                reward, ends = 0.0, (False, False)
            else:
                observation, reward, *ends, info = env.step(actions[i])
            done[i] = any(ends)
            batch, rewards, terminated, truncated, infos = seen[step + 1]
            one = plain(observation)
            mine = {k: v[i] for k, v in batch.items()} if isinstance(batch, dict) else batch[i]
            assert (mine, rewards[i], terminated[i], truncated[i]) == (one, reward, *ends)
            assert infos["num_sampled"][i] == info["num_sampled"]
            assert infos["stop"][i] == info["stop"]
    assert now


def test_the_last_observation_of_an_episode_is_kept_in_the_same_step() -> None:
    envs = gymnasium.make_vec(
        "delethink/Thinking-v0",
        num_envs=2,
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
    )
    first, _ = envs.reset(seed=0)
    observations, _, terminated, _, infos = envs.step(([6, 7], [6, 1]))
    assert terminated.tolist() == [False, True]
    assert np.array_equal(infos["final_obs"][1], first[1])
    assert infos["final_info"]["stop"][1] == "completed"
    assert infos["stop"].tolist() == [None, None]
    assert not np.array_equal(observations[1], first[1]), "a new problem is drawn"


def test_random_actions_of_a_vector_are_legal() -> None:
    for name in IDS:
        envs = gymnasium.make_vec(name, num_envs=2, **SMALL)
        envs.reset(seed=0)
        envs.action_space.seed(0)
        for _ in range(40):
            envs.step(envs.action_space.sample())


# -- copies ---------------------------------------------------------------------------------------


class Words:
    """A tokenizer of 262,144 words. Copying the words takes a second."""

    chat_template = None
    eos_token_id = 1

    def __init__(self) -> None:
        words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 2**18)}
        self.inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
        self.inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()

    def __len__(self) -> int:
        return int(self.inner.get_vocab_size())

    def get_vocab(self) -> Any:
        self.times_read = getattr(self, "times_read", 0) + 1
        return self.inner.get_vocab()

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": self.inner.encode(text).ids}

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        raise AssertionError("there is no chat template")

    def decode(self, token_ids: Any, **options: Any) -> str:
        return str(self.inner.decode(list(token_ids), skip_special_tokens=False))

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the tokenizer is copied")


@pytest.fixture(scope="module")
def words() -> Words:
    return Words()


@pytest.mark.parametrize("name", IDS)
def test_copies_share_the_tokenizer_and_the_task(name: str, words: Words) -> None:
    task = AutomatonTask(1, 2)
    env = gymnasium.make(name, tokenizer=words, task=task)
    spec: Any = copy.deepcopy(env.spec)
    for other in (copy.deepcopy(env), spec.make(), gymnasium.make(spec), copy.copy(env)):
        assert other.unwrapped.tokenizer is words
        assert other.unwrapped.task is task
    assert pickle.loads(pickle.dumps(copy.deepcopy(make(name, task=task)))).task == task


@pytest.mark.parametrize("name", IDS)
def test_gymnasium_checks_a_large_tokenizer_without_a_copy(name: str, words: Words) -> None:
    check_env(make(name, tokenizer=words, max_query_tokens=8))
    assert getattr(words, "times_read", 1) == 1, "the vocabulary is read once"


@pytest.mark.parametrize("name", IDS)
def test_a_copy_goes_on_by_itself(name: str) -> None:
    env = gymnasium.make(name, **SMALL)
    env.reset(seed=0)
    action = {"Text": "00", "Token": 6}.get(name.split("/")[1].split("Thinking")[0], [6, 6])
    env.step(action)
    other = copy.deepcopy(env)
    assert other.unwrapped.trace == env.unwrapped.trace  # type: ignore[attr-defined]
    first, second = plain(env.step(action)), plain(other.step(action))
    assert first == second
    assert plain(env.reset()[0]) == plain(other.reset()[0]), "the copy draws the same problems"


# -- elsewhere -------------------------------------------------------------------------------------

FINGERPRINT = """
import hashlib, gymnasium, numpy as np
env = gymnasium.make("delethink.envs:{name}", context_size=12, carryover_size=6, max_chunks=4)
env.action_space.seed(3)
seen = []
for seed in range(5):
    result = env.reset(seed=seed)
    while True:
        seen.append(repr(result))
        if len(result) == 5 and (result[2] or result[3]):
            break
        result = env.step(env.action_space.sample())
print(hashlib.sha256(repr(seen).encode()).hexdigest())
"""


@pytest.mark.parametrize("name", IDS)
def test_a_seed_gives_the_same_in_every_process(name: str) -> None:
    printed = set()
    for salt in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": salt, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", FINGERPRINT.format(name=name)]
        printed.add(subprocess.check_output(command, env=environment, text=True))
    assert len(printed) == 1


@pytest.mark.parametrize(("text", "pays"), [("1:0</think>1", 1.0), ("1:0", 0.0)])
def test_a_reward_by_name_is_asked_with_what_it_wants_to_see(text: str, pays: float) -> None:
    env = gymnasium.make("delethink/Thinking-v0", reward="closes_thinking")
    env.reset(seed=0)
    tokenizer: Any = env.unwrapped.tokenizer  # type: ignore[attr-defined]
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    _, reward, terminated, _, _ = env.step(np.array(ids))
    assert (reward, terminated) == (pays, True)


@pytest.mark.parametrize("name", ["cosine", "overlong"])
def test_a_reward_that_needs_more_than_a_trace_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        gymnasium.make("delethink/Thinking-v0", reward=name)
