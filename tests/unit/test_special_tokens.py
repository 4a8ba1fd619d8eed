"""Tokenizers that add BOS or EOS by themselves, or lose spaces, and templates that miss a token."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

from chat_tokenizers import END, PAD, make_chat_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from delethink.tokenization import (
    changed_spaces,
    encode,
    end_tokens,
    loses_spaces,
    query_ids,
    tokenizer_faults,
)
from delethink.types import Problem

START = "<|start|>"
PROBLEM = Problem("1 + 1?", "2")


def adding(single: str, template: str | None = None, always: bool = False) -> Any:
    """Return a tokenizer with a post-processor, such as ``"<|start|> $A <|end|>"``.

    With ``always``, it adds the tokens although it is told not to.
    """
    kind: Any = type("Always", (PreTrainedTokenizerFast,), {}) if always else None
    made = make_chat_tokenizer(template, [START], bos_token=START)
    ids = made.convert_tokens_to_ids
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(START, ids(START)), (END, ids(END))]
    )
    if kind is not None:

        def call(self: Any, text: str, **options: Any) -> Any:
            return PreTrainedTokenizerFast.__call__(
                self, text, **options | {"add_special_tokens": True}
            )

        kind.__call__ = call
        made.__class__ = kind
    return made


def text_of(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(list(ids)))


@pytest.mark.parametrize(
    ("single", "query"),
    [
        ("$A", "1 + 1?"),
        (f"$A {END}", "1 + 1?"),  # add_eos_token of Llama and Mistral tokenizers
        (f"{START} $A", f"{START}1 + 1?"),
        (f"{START} $A {END}", f"{START}1 + 1?"),
    ],
)
@pytest.mark.parametrize("always", [False, True])
def test_a_query_never_ends_with_the_end(single: str, query: str, always: bool) -> None:
    tokenizer = adding(single, always=always)
    assert text_of(tokenizer, query_ids(tokenizer, PROBLEM)) == query
    for text in ("</think>", "", "a b", f"{START}a", f"a{END}", END, START):
        assert text_of(tokenizer, encode(tokenizer, text)) == text, text


def faults(tokenizer: Any) -> str:
    ends = list(end_tokens(tokenizer))
    return "; ".join(
        fault for fault, _ in tokenizer_faults(tokenizer, query_ids(tokenizer, PROBLEM), ends)
    )


TURN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("single", "template", "expected"),
    [
        ("$A", None, f"a query has no {START}, the start token, and no chat template"),
        (f"{START} $A", None, ""),
        (f"{START} $A {END}", None, ""),
        (f"{START} $A", "{{ bos_token }}" + TURN, ""),
        ("$A", "{{ bos_token }}" + TURN, ""),
        ("$A", TURN, ""),
        (f"{START} $A", TURN, f"a query has no {START}, which the tokenizer adds to any text"),
        ("$A", "{{ bos_token }}{{ bos_token }}" + TURN, f"a query begins with two {START}"),
        ("$A", TURN + "{{ eos_token }}", f"a query ends with {END}, which ends an answer"),
    ],
)
def test_special_tokens_of_a_query(single: str, template: str | None, expected: str) -> None:
    assert faults(adding(single, template)) == expected


def word_level(decoder: Any, pre_tokenizer: Any, words: list[str]) -> Any:
    own = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    own.pre_tokenizer, own.decoder = pre_tokenizer, decoder
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="?", eos_token=END)


WORDS = ["?", "Let", "x", "be", "3", "and", "y", "4", ":"]
METASPACE = ["?", *("\u2581" + word for word in WORDS[1:]), "\u2581"]


def broken(decoder: Any) -> Any:
    tokenizer = make_chat_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoder
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "loses"),
    [
        (make_chat_tokenizer(), False),
        # Spaces vanish between encoding and decoding.
        (word_level(decoders.Fuse(), pre_tokenizers.WhitespaceSplit(), WORDS), True),
        # Decoded as the vocabulary writes them.
        (broken(decoders.Fuse()), True),
        # Tokens are joined with spaces: the words come back, all other spaces do not.
        (word_level(None, pre_tokenizers.WhitespaceSplit(), WORDS), False),
        (word_level(decoders.Metaspace(), pre_tokenizers.Metaspace(), METASPACE), False),
    ],
    ids=["bytes", "lost", "raw", "joined", "metaspace"],
)
def test_spaces_between_words(tokenizer: Any, loses: bool) -> None:
    assert loses_spaces(tokenizer) == loses


def test_other_spaces_are_told_too() -> None:
    joined = word_level(None, pre_tokenizers.WhitespaceSplit(), [*WORDS, "x:"])
    assert changed_spaces(joined, "Let x:\n\ty  be 4") == "Let x: y be 4"
    assert "encoding and decoding makes 'Let x:\\n" in faults(joined)
    assert changed_spaces(joined, "2 + 2 is unknown to it") is None


def test_padding_is_not_a_fault() -> None:
    assert PAD not in faults(make_chat_tokenizer(TURN))
