"""The environments with tokenizers of ``transformers``: byte-level pieces, Unicode, templates."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from delethink.carryover import StateBlock, Summary
from delethink.chunking import ChunkSpec, start
from delethink.engines.loading import TOY, load_tokenizer
from delethink.envs.thinking import ThinkingEnv
from delethink.envs.token_thinking import TokenThinkingEnv
from delethink.errors import ModelError
from delethink.testing import check_boundary, check_carryover, check_thinking_env
from delethink.tokenization import encode, retokenized_at
from delethink.types import Problem, StopReason

pytestmark = pytest.mark.integration


class Greetings:
    def problem(self, split: str, index: int) -> Problem:
        return Problem(f"Wie geht es dir, {index % 7}? 你好 🙂", "gut")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level pieces, trained on a few lines, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = ["<state>\nx = 3\n</state>\n", "Let me sum up the reasoning so far", "你好 🙂 gut"] * 9
    own.train_from_iterator(lines, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = "{% for m in messages %}user: {{ m['content'] }}\nassistant: {% endfor %}"
    return fast


@pytest.mark.parametrize("interface", ["tokens", "text"])
@pytest.mark.parametrize(
    "carryover",
    [
        "tail",
        "state_block",
        {"name": "summary", "args": {"instruction": "\nSum up: ", "before": "So far: "}},
    ],
    ids=str,
)
def test_they_think_as_the_rule_says(tokenizer: Any, interface: str, carryover: Any) -> None:
    env = ThinkingEnv(
        task=Greetings(),
        tokenizer=tokenizer,
        interface=interface,
        context_size=40,
        carryover_size=24,
        max_chunks=3,
        carryover=carryover,
        boundary={"name": "line_break", "args": {"within": 8}},
    )
    check_thinking_env(env, episodes=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Not able to test alternative render modes")
        warnings.filterwarnings("ignore", ".*Not able to test alternative")
        check_env(env)


def test_token_by_token(tokenizer: Any) -> None:
    check_thinking_env(TokenThinkingEnv(task=Greetings(), tokenizer=tokenizer), episodes=4)


def test_the_shipped_toy_acts_in_the_default_environment() -> None:
    check_thinking_env(ThinkingEnv(tokenizer=load_tokenizer(TOY)), episodes=4)


def test_policies_that_read_text_keep_their_promises(tokenizer: Any) -> None:
    check_carryover(StateBlock(), tokenizer=tokenizer)
    check_carryover(Summary("\nSum up: ", "So far: "), sizes=(16, 64), tokenizer=tokenizer)
    from delethink.carryover import LineBreak

    check_boundary(LineBreak(), tokenizer, ["a\n", "\n\n", "b"])


@settings(max_examples=50, deadline=None, database=None)
@given(st.text("x=3 你\n>", max_size=12), st.text("x=3 你\n<", max_size=12))
def test_a_state_is_found_however_its_tags_are_cut_into_tokens(
    tokenizer: Any, state: str, around: str
) -> None:
    """A tag may share a token with its neighbours, so that a little more than it is carried."""
    block = f"<state>{state}</state>"
    written = encode(tokenizer, around + block + around)
    spec = ChunkSpec(200, 100, 3, carryover=StateBlock()).bind(tokenizer)
    after = start(spec, (5, 6)).advance(written, StopReason.LENGTH)
    carried = tokenizer.decode(list(after.carried))
    assert block in carried
    assert len(after.carried) <= len(encode(tokenizer, block)) + 2


@settings(max_examples=50, deadline=None, database=None)
@given(st.text(max_size=12))
def test_text_comes_back_and_is_the_same_tokens_again(tokenizer: Any, text: str) -> None:
    ids = encode(tokenizer, text)
    assert tokenizer.decode(list(ids)) == text
    assert retokenized_at(tokenizer, ids) is None


def test_where_sampled_ids_are_not_those_of_their_text_is_told(tokenizer: Any) -> None:
    whole = encode(tokenizer, "<state>")
    single = [i for letter in "<state>" for i in encode(tokenizer, letter)]
    assert len(whole) < len(single)
    place = retokenized_at(tokenizer, single)
    assert place is not None
    assert single[:place] == list(whole[:place])
    assert single[place] != whole[place]
    assert retokenized_at(tokenizer, [*whole, *encode(tokenizer, "!")]) is None
    assert retokenized_at(tokenizer, [*encode(tokenizer, "!"), *single]) == 1 + place


# -- given by name ---------------------------------------------------------------------------------


def test_a_tokenizer_is_given_by_name_or_folder(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)  # without the config.json of a model
    made = [gymnasium.make("delethink.envs:delethink/Thinking-v0", tokenizer=tmp_path)]
    for named in (tmp_path, str(tmp_path)):
        env: Any = gymnasium.make("delethink.envs:delethink/Thinking-v0", tokenizer=named).unwrapped
        assert env.vocabulary == len(tokenizer)
        assert env.tokenizer is made[0].unwrapped.tokenizer, "one is loaded for all"  # type: ignore[attr-defined]
        assert tuple(env.reset(options={"problem": Problem("gut", "")})[0]) == tuple(
            tokenizer.apply_chat_template([{"role": "user", "content": "gut"}])["input_ids"]
        )
    toy: Any = gymnasium.make("delethink/TextThinking-v0", tokenizer=TOY)
    own: Any = gymnasium.make("delethink/TextThinking-v0")
    assert toy.reset(seed=0)[0] == own.reset(seed=0)[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("/nowhere/at/all", "does not exist; give a folder"),
        (Path("tests"), "tests has no config.json or tokenizer_config.json, so no tokenizer can"),
        ("no-such/model", "A tokenizer is a folder, the Hugging Face id of a model"),
        ("toy ", "it is no Hugging Face id, which has the form OWNER/NAME"),
    ],
)
def test_a_wrong_name_says_what_is_allowed(
    name: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as caught:
        gymnasium.make("delethink.envs:delethink/Thinking-v0", tokenizer=name)
    assert text in str(caught.value)
