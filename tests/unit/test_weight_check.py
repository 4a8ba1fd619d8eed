"""The check tells loaded from stale weights, whichever rows and columns a rank holds.

The modules have the attributes of vLLM's, which the check reads; vLLM itself is in the integration
tests.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from delethink.engines.weight_check import (  # noqa: E402
    Columns,
    check_weights,
    is_loaded,
    needed_together,
    pair_weights,
)

WIDTH = 40  # more than the columns that are compared


class Held(torch.nn.Module):
    """A module with one weight and vLLM's description of its share."""

    def __init__(self, weight: torch.Tensor, **share: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        for name, value in share.items():
            setattr(self, name, value)


class Model(torch.nn.Module):
    packed_modules_mapping = {  # noqa: RUF012 - vLLM's
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, **modules: Held) -> None:
        super().__init__()
        self.layer = torch.nn.ModuleDict(modules)


def random(rows: int, columns: int = WIDTH) -> torch.Tensor:
    return torch.randn(rows, columns)


def linear(parts: list[torch.Tensor], rank: int, ranks: int, replicas: int = 1) -> Held:
    """A layer spread by its rows; ``replicas`` ranks hold the same of all but the first part."""
    repeats = [1, *[replicas] * (len(parts) - 1)]
    own = [
        part.chunk(ranks // times)[rank // times]
        for part, times in zip(parts, repeats, strict=True)
    ]
    sizes = [len(part) for part in own]
    share: dict[str, Any] = {"num_kv_head_replicas": replicas} if len(parts) == 3 else {}
    return Held(
        torch.cat(own),
        output_partition_sizes=sizes,
        output_size=sum(sizes) * ranks,
        output_size_per_partition=sum(sizes),
        input_size=WIDTH,
        input_size_per_partition=WIDTH,
        tp_rank=rank,
        tp_size=ranks,
        **share,
    )


def by_columns(whole: torch.Tensor, rank: int, ranks: int) -> Held:
    return Held(
        whole.chunk(ranks, 1)[rank],
        output_partition_sizes=[len(whole)],
        output_size=len(whole),
        output_size_per_partition=len(whole),
        input_size=WIDTH,
        input_size_per_partition=WIDTH // ranks,
        tp_rank=rank,
        tp_size=ranks,
    )


def vocabulary(whole: torch.Tensor, rank: int, ranks: int) -> Held:
    """Rows are filled up to equal shares."""
    share = -(-len(whole) // ranks)
    first, end = min(rank * share, len(whole)), min((rank + 1) * share, len(whole))
    held = torch.zeros(share, WIDTH)
    held[: end - first] = whole[first:end]
    rows = SimpleNamespace(org_vocab_start_index=first, org_vocab_end_index=end)
    return Held(held, shard_indices=rows, org_vocab_size=len(whole))


def model_of(sent: dict[str, torch.Tensor], rank: int, ranks: int, replicas: int) -> Model:
    weights = {name.split(".")[1]: tensor for name, tensor in sent.items()}
    return Model(
        qkv_proj=linear([weights[f"{x}_proj"] for x in "qkv"], rank, ranks, replicas),
        gate_up_proj=linear([weights["gate_proj"], weights["up_proj"]], rank, ranks),
        down_proj=by_columns(weights["down_proj"], rank, ranks),
        embed=vocabulary(weights["embed"], rank, ranks),
        norm=Held(weights["norm"]),
    )


def recorded(sent: dict[str, torch.Tensor]) -> dict[str, Columns]:
    return {name: Columns.of(tensor) for name, tensor in sent.items()}


@given(data=st.data(), seed=st.integers(0, 2**16))
def test_each_rank_knows_its_share_and_every_change_of_it(data: st.DataObject, seed: int) -> None:
    ranks = data.draw(st.sampled_from([1, 2, 4]))
    replicas = data.draw(st.sampled_from([n for n in (1, 2, 4) if n <= ranks]))
    torch.manual_seed(seed)
    sent = {
        "layer.q_proj.weight": random(8),
        "layer.k_proj.weight": random(4),
        "layer.v_proj.weight": random(4),
        "layer.gate_proj.weight": random(12),
        "layer.up_proj.weight": random(12),
        "layer.down_proj.weight": random(5),
        "layer.embed.weight": random(data.draw(st.integers(ranks, 9))),
        "layer.norm.weight": torch.randn(WIDTH),
    }
    models = [model_of(sent, rank, ranks, replicas) for rank in range(ranks)]
    for model in models:
        check_weights(pair_weights(model, recorded(sent)))
    name = data.draw(st.sampled_from(sorted(sent)))
    changed = sent[name].clone()
    changed.view(len(changed), -1)[data.draw(st.integers(0, len(changed) - 1))] += 1.0
    resent = recorded({**sent, name: changed})
    stale = [sum(not is_loaded(pair) for pair in pair_weights(model, resent)) for model in models]
    assert max(stale) == 1


def test_a_changed_weight_needs_its_whole_layer_and_no_other() -> None:
    names = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "embed", "norm"]
    sent = {f"layer.{name}.weight": random(4) for name in names}
    sent["layer.norm.weight"] = torch.randn(WIDTH)
    for part in "qkv":
        sent[f"layer.{part}_proj.bias"] = torch.randn(4)
    model = model_of({n: t for n, t in sent.items() if n.endswith("weight")}, 0, 1, 1)
    fused: Any = model.layer["qkv_proj"]
    fused.bias = torch.nn.Parameter(torch.cat([sent[f"layer.{p}_proj.bias"] for p in "qkv"]))
    columns = recorded(sent)
    pairs = pair_weights(model, columns)
    needed = needed_together(pairs, columns, ["layer.q_proj.weight", "layer.down_proj.weight"])
    attention = {f"layer.{part}_proj.{leaf}" for part in "qkv" for leaf in ("weight", "bias")}
    assert set(needed) == attention | {"layer.down_proj.weight"}
    with pytest.raises(ValueError, match=r"no weight called 'layer\.z\.weight'"):
        needed_together(pairs, columns, ["layer.z.weight"])


def test_a_checkpoint_that_is_fused_already() -> None:
    gate, up = random(12), random(12)
    for rank in range(2):
        model = Model(gate_up_proj=linear([gate, up], rank, 2))
        check_weights(
            pair_weights(model, recorded({"layer.gate_up_proj.weight": torch.cat([gate, up])}))
        )
        with pytest.raises(ValueError, match="1 of 1 differ"):
            check_weights(
                pair_weights(model, recorded({"layer.gate_up_proj.weight": torch.cat([up, gate])}))
            )


def test_biases_are_spread_with_rows_and_whole_otherwise() -> None:
    bias = torch.randn(8)
    for rank in range(2):
        rows = linear([random(8)], rank, 2)
        columns = by_columns(random(8), rank, 2)
        rows.bias = torch.nn.Parameter(bias.chunk(2)[rank])
        columns.bias = torch.nn.Parameter(bias)
        for module in (rows, columns):
            del module.weight
            model = Model(some_proj=module)
            check_weights(pair_weights(model, recorded({"layer.some_proj.bias": bias})))
            with pytest.raises(ValueError, match="1 of 1 differ"):
                check_weights(pair_weights(model, recorded({"layer.some_proj.bias": bias + 1})))


def test_a_model_that_vllm_packs_otherwise_is_refused_with_a_sentence() -> None:
    held = linear([random(4), random(4), random(4)], 0, 1)
    sent = {"layer.gate_proj.weight": (8, WIDTH), "layer.up_proj.weight": (4, WIDTH)}
    announced = {name: Columns(shape) for name, shape in sent.items()}
    with pytest.raises(ValueError, match="in 3 parts and the checkpoint in 2: weight updates"):
        pair_weights(Model(gate_up_proj=held), announced)


def test_the_digest_tells_every_bit_of_what_is_compared() -> None:
    tensor = torch.randn(3, WIDTH, dtype=torch.bfloat16)
    same, other = Columns.of(tensor.clone()), Columns.of(-tensor)
    assert Columns.of(tensor).digest() == same.digest() != other.digest()


def test_a_share_of_another_rank_is_told() -> None:
    sent = {"layer.down_proj.weight": random(5)}
    held = by_columns(sent["layer.down_proj.weight"], 0, 2)
    held.tp_rank = 1
    with pytest.raises(ValueError, match=r"1 of 1 differ, the first is 'layer.down_proj.weight'"):
        check_weights(pair_weights(Model(down_proj=held), recorded(sent)))


def test_weights_that_have_not_come_are_told() -> None:
    sent = {"layer.norm.weight": torch.randn(WIDTH)}
    announced = {name: Columns(tuple(tensor.shape)) for name, tensor in sent.items()}
    pairs = pair_weights(Model(norm=Held(sent["layer.norm.weight"])), announced)
    with pytest.raises(ValueError, match="1 of 1 differ"):
        check_weights(pairs)
    announced["layer.norm.weight"].record(sent["layer.norm.weight"])
    check_weights(pairs)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({}, "the weights have no 'layer.norm.weight'"),
        ({"layer.norm.weight": (3,)}, r"expects the shape \[40\], got \[3\]"),
        ({"layer.norm.weight": (40,), "more": (1,)}, "no weight called 'more'"),
    ],
)
def test_what_does_not_fit_is_found_before_it_comes(
    sent: dict[str, tuple[int, ...]], said: str
) -> None:
    announced = {name: Columns(shape) for name, shape in sent.items()}
    with pytest.raises(ValueError, match=said):
        pair_weights(Model(norm=Held(torch.randn(WIDTH))), announced)
