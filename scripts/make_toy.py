"""Makes the toy reasoner from scratch: a small Qwen2-shaped model of the automaton family.

    python scripts/make_toy.py --out toy --seed 0

It is trained on plain long chains of thought, each in one context and never on a reset. The corpus
is noisy on purpose, as written reasoning is: a line is wrong in one cell with probability
``--slip``, and what follows builds on it. So the base imitates slips: it knows the rule, it is
sound on short problems, and it fails on long ones as often as somebody slipped on the way.
Reinforcement learning is told only whether the last state is right.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from delethink.envs.automaton import automaton_step, is_held_out, solution_line

THINK, END_THINK, EOS, PAD = "<think>", "</think>", "<eos>", "<pad>"
TEMPLATE = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}<think>{% endif %}"
RULE, WIDTH = 45, 11
SHORT_STEPS = 4


def make_tokenizer() -> Qwen2Tokenizer:
    """One token a character, and one each for the marks of thinking.

    It is byte-level, as the class that ``AutoTokenizer`` takes for this model type: the line break
    is written as the class writes that byte.
    """
    line_break = "\u010a"
    vocab = {token: i for i, token in enumerate([PAD, EOS, THINK, END_THINK, line_break, ":"])}
    vocab |= {sign: len(vocab) + i for i, sign in enumerate("0123456789")}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], unk_token=None, eos_token=EOS, pad_token=PAD)
    # Not special: rewards read text without special tokens and look for the end of thinking.
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in (THINK, END_THINK)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(
    seed: int, layers: int, width: int, vocab_size: int, positions: int = 1024
) -> Qwen2ForCausalLM:
    """Random weights of the Qwen2 shape, for sequences of up to ``positions`` tokens."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=positions,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def write_trace(rng: random.Random, steps: int, slip: float) -> tuple[str, str]:
    """A problem of the training split and a solution as somebody who slips would write it."""
    state = "held out"
    while state == "held out" or is_held_out(state):
        state = format(rng.getrandbits(WIDTH), f"0{WIDTH}b")
    query = f"{steps:02d}:{state}{THINK}"
    lines = []
    for left in range(steps - 1, -1, -1):
        state = automaton_step(state, RULE)
        if rng.random() < slip:
            i = rng.randrange(WIDTH)
            state = state[:i] + "10"[int(state[i])] + state[i + 1 :]
        lines.append(solution_line(left, state))
    return query, "\n".join(lines) + END_THINK + state + EOS


def batches(tokenizer, seed: int, max_steps: int, slip: float, tokens: int):
    """Endless batches of about ``tokens`` tokens, each of traces of one length.

    Every other one is of short traces: in long ones the answer is a small part of the tokens, and
    copying the last state into it would hardly be learnt.
    """
    rng = random.Random(seed)
    while True:
        steps = rng.randint(1, rng.choice((SHORT_STEPS, max_steps)))
        rows = max(1, round(tokens / (15 * steps + 26)))
        texts = [write_trace(rng, steps, slip) for _ in range(rows)]
        ids = torch.tensor([tokenizer(q + s)["input_ids"] for q, s in texts])
        labels = ids.clone()
        labels[:, : len(tokenizer(texts[0][0])["input_ids"])] = -100
        yield ids, labels


def learning_rate(spent: float, peak: float) -> float:
    """Warm-up over the first 3 %, constant, then linear to nothing over the last 40 %."""
    return peak * min(1.0, spent / 0.03, max(0.0, (1 - spent) / 0.4))


def make_optimizer(model) -> torch.optim.AdamW:
    """AdamW with a short memory of squared gradients."""
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)


def update(model, optimizer, ids, labels, rate: float) -> float:
    """One update of next-token prediction at a learning rate; returns the loss in nats."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(model, stream, steps: int, peak: float, report) -> None:
    """Next-token prediction on the solutions for a fixed number of updates."""
    optimizer = make_optimizer(model)
    started, smooth = time.monotonic(), None
    for step in range(steps):
        ids, labels = next(stream)
        value = update(model, optimizer, ids, labels, learning_rate(step / steps, peak))
        smooth = value if smooth is None else 0.95 * smooth + 0.05 * value
        if step % 50 == 0 or step + 1 == steps:
            report(step, smooth, time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=2400)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--max-steps", type=int, default=28)
    parser.add_argument("--slip", type=float, default=0.03)
    parser.add_argument("--tokens", type=int, default=3072, help="tokens in a batch")
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()

    # One thread: sums are then always added in the same order, and the same seed on the same kind
    # of machine gives the same model.
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = make_model(args.seed, args.layers, args.width, len(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    stream = batches(tokenizer, args.seed, args.max_steps, args.slip, args.tokens)

    def report(step: int, loss: float, seconds: float) -> None:
        print(f"update {step:5d}  loss {loss:.4f}  {seconds:6.0f} s", flush=True)

    train(model, stream, args.updates, args.lr, report)
    model.save_pretrained(args.out, safe_serialization=True)
    tokenizer.save_pretrained(args.out)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    (args.out / "making.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main()
