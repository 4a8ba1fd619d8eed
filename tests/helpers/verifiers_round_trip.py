"""Sends carried ids through the messages of verifiers, for random traces and tokenizers.

Runs in the environment of verifiers.
"""

from __future__ import annotations

import random

import verifiers.v1 as vf
from chat_tokenizers import make_chat_tokenizer
from delethink_verifiers.prompts import ChatPrompts
from renderers import CustomRendererConfig, create_renderer
from verifiers.v1.dialects.chat import ChatDialect, message_to_wire

from delethink.engines.loading import load_tokenizer
from delethink.tokenization import message_ids

PATH = "delethink_verifiers.renderer.OpenPromptRenderer"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Changes the last message, so that text could not be continued.
TRIMS = CHATML.replace("m['content'] }}", "m['content'] | trim }}").replace(
    "assistant\n{% endif", "assistant\n<think>\n{% endif"
)
MARKS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
TRACES_EACH = 60


def main() -> None:
    tokenizers = {
        "toy": load_tokenizer("toy"),
        "chatml": make_chat_tokenizer(CHATML, MARKS),
        "trims": make_chat_tokenizer(TRIMS, MARKS),
        "bos": make_chat_tokenizer("{{ bos_token }}" + TRIMS, ("<s>", *MARKS), bos_token="<s>"),
    }
    rng, tried, retokenized = random.Random(7), 0, 0
    for tokenizer in tokenizers.values():
        renderer = create_renderer(tokenizer, CustomRendererConfig(import_path=PATH))
        size = len(tokenizer)
        for _ in range(TRACES_EACH):
            system = [{"role": "system", "content": "Be brief."}] if rng.random() < 0.5 else []
            messages = [*system, {"role": "user", "content": f"{rng.randrange(99)}:01 "}]
            query = message_ids(tokenizer, messages)
            carried = tuple(rng.randrange(size) for _ in range(rng.randrange(1, 40)))
            prompts = ChatPrompts(tokenizer, messages, query, sends_ids=True)
            assert _rendered(renderer, prompts.body(query)) == list(query)
            assert _rendered(renderer, prompts.body((*query, *carried))) == [*query, *carried]
            text = tokenizer.decode(list(carried))
            again = tokenizer(text, add_special_tokens=False)["input_ids"]
            retokenized += tuple(again) != carried
            tried += 1
    assert retokenized > 0, "no trace needed its ids"
    print(f"{tried} traces, {retokenized} of them with a text that is encoded to other ids")


def _rendered(renderer: object, body: dict) -> list[int]:
    """Return the prompt that verifiers' client for training makes of a request."""
    parsed = ChatDialect().parse_request(body)
    assert isinstance(parsed, vf.Request)
    wire = [message_to_wire(message) for message in parsed.messages]
    return renderer.render(wire, add_generation_prompt=True).token_ids


if __name__ == "__main__":
    main()
