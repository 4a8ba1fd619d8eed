"""A tokenizer of single characters and whole marks, which needs no other package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from delethink.envs.spaces import piece_pattern
from delethink.errors import ConfigError
from delethink.types import END_OF_THINKING

PAD, EOS, THINK = "<pad>", "<eos>", "<think>"
MARKS = (PAD, EOS, THINK, END_OF_THINKING)


class CharacterTokenizer:
    """One token for each character of an alphabet, and one for each mark.

    Ids count the marks first: 0 is the padding, 1 the end of an answer. With its defaults the ids
    and the query are those of the shipped toy reasoner.

    Args:
        alphabet: the characters, each once.
        before_thinking: put after the prompt to make the query.
    """

    pad_token_id = MARKS.index(PAD)
    eos_token_id = MARKS.index(EOS)

    def __init__(self, alphabet: str = "\n:0123456789", before_thinking: str = THINK) -> None:
        if len(set(alphabet)) < len(alphabet):
            raise ConfigError(f"the alphabet {alphabet!r} has a character more than once")
        self.pieces = (*MARKS, *alphabet)
        self.chat_template = before_thinking or None
        self._ids = {piece: i for i, piece in enumerate(self.pieces)}
        self._pattern = piece_pattern(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """The ids of ``text`` under ``"input_ids"``.

        Raises:
            ConfigError: a character that is not in the alphabet.
        """
        found = self._pattern.findall(text)
        if len("".join(found)) < len(text):
            known = set("".join(self.pieces))
            wrong = next((c for c in text if c not in known), "<")
            raise ConfigError(
                f"the character {wrong!r} of {text!r:.80} is not in the alphabet: "
                f"{''.join(self.pieces[len(MARKS) :])!r}"
            )
        return {"input_ids": [self._ids[piece] for piece in found]}

    def apply_chat_template(self, conversation: Any, **options: Any) -> dict[str, list[int]]:
        """The ids of the last message and what opens the thinking after it."""
        return self(conversation[-1]["content"] + (self.chat_template or ""))

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        """The text of ids; ``skip_special_tokens`` leaves padding and end out."""
        skipped = {self.pad_token_id, self.eos_token_id}
        left_out = skipped if options.get("skip_special_tokens") else set()
        return "".join(self.pieces[i] for i in token_ids if i not in left_out)
