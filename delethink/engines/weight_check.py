"""Whether a vLLM model computes with the weights that were sent to it.

vLLM fuses and packs what a checkpoint holds apart (q, k and v become one layer) and spreads it over
the ranks of a tensor-parallel engine, and not all that is sent to it is bound to arrive: on the CPU
a tied output layer keeps its old weights. So each update ends with a comparison, parameter by
parameter, of some columns of what was sent with what the model multiplies by.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_COLUMNS = 16  # of each matrix, evenly spaced; a training step changes all of them


class Sent:
    """A weight on its way: its shape in the checkpoint and, once it has come, some of its columns.

    Attributes:
        shape: of the whole tensor.
        rows: the chosen columns, (rows, chosen); a vector is one column. ``None`` before ``see``.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = tuple(shape)
        self.rows: torch.Tensor | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Sent:
        """Of a tensor that has come."""
        sent = cls(tuple(tensor.shape))
        sent.see(tensor)
        return sent

    def see(self, tensor: torch.Tensor) -> None:
        """Remembers the columns; the tensor may be overwritten afterwards."""
        self.rows = _as_matrix(tensor)[:, self.columns.to(tensor.device)].clone()

    def digest(self) -> str:
        """Of what is remembered, to the bit."""
        assert self.rows is not None
        memory = self.rows.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        return hashlib.blake2b(memory.tobytes(), digest_size=16).hexdigest()

    @property
    def columns(self) -> torch.Tensor:
        """Which are chosen."""
        width = _as_matrix(torch.empty(self.shape, device="meta")).shape[1]
        return torch.linspace(0, width - 1, min(_COLUMNS, width)).long()


@dataclass(frozen=True)
class Pair:
    """A parameter of a vLLM model and what was sent for it."""

    name: str  # in vLLM
    module: Any  # that holds it
    parts: list[Sent]  # one under the other; several where vLLM fuses them

    @property
    def parameter(self) -> torch.Tensor:
        """What vLLM holds: on the CPU it may be empty, as linear layers keep a packed copy only."""
        held: torch.Tensor = getattr(self.module, self.name.rpartition(".")[2])
        return held


def pair_weights(model: torch.nn.Module, sent: Mapping[str, Sent]) -> list[Pair]:
    """Finds what is sent for each parameter of a vLLM model.

    Raises:
        ValueError: a parameter for which nothing is sent, a name that the model does not have, or
            another shape than the model's.
    """
    unused, pairs = set(sent), []
    for name, module, sources in _parameters(model):
        names = next((names for names in sources if sent.keys() >= set(names)), None)
        if names is None:
            raise ValueError(f"nothing was sent for {name!r}, which the engine has")
        pair = Pair(name, module, [sent[n] for n in names])
        _check_shape(pair, names)
        unused -= set(names)
        pairs.append(pair)
    if unused:
        raise ValueError(f"the engine has no weight called {min(unused)!r}")
    return pairs


def check(pairs: list[Pair]) -> None:
    """Compares all parameters with what was sent.

    Raises:
        ValueError: the model computes with others; the text names the first.
    """
    stale = [pair.name for pair in pairs if not runs(pair)]
    if stale:
        raise ValueError(
            f"the engine runs other weights than it was sent: {len(stale)} of {len(pairs)} "
            f"differ, the first is {stale[0]!r}"
        )


def runs(pair: Pair) -> bool:
    """Whether a module computes with the values that were sent for one of its parameters."""
    if any(part.rows is None for part in pair.parts):
        return False
    rows, columns = _own(pair)
    held = pair.parameter
    if pair.name.endswith(".weight") and hasattr(pair.module, "cpu_linear"):
        return _multiplies_with(pair.module, rows.to(held.dtype), columns, _own_width(pair))
    found = _as_matrix(held)[: len(rows), columns.to(held.device)]  # below is padding
    return torch.equal(found, rows.to(held.device, held.dtype))


def _own(pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """What this rank should hold: its rows and its columns of those chosen, and which they are."""
    module, parts = pair.module, [part.rows for part in pair.parts if part.rows is not None]
    columns = pair.parts[0].columns
    if (vocabulary := getattr(module, "shard_indices", None)) is not None:
        first, end = vocabulary.org_vocab_start_index, vocabulary.org_vocab_end_index
        return parts[0][first:end], columns
    sizes = getattr(module, "output_partition_sizes", None)
    if sizes is None:
        return torch.cat(parts), columns
    if len(parts) == 1 and len(sizes) > 1:  # fused in the checkpoint, too
        parts = list(torch.split(parts[0], _whole_sizes(module)))
    owned = [_shard(part, size, module) for part, size in zip(parts, sizes, strict=True)]
    rows = torch.cat(owned)
    if len(pair.parts[0].shape) < 2:
        return rows, columns
    width = _own_width(pair)
    first = int(_shard(torch.arange(module.input_size), width, module)[0])
    mine = (columns >= first) & (columns < first + width)
    return rows[:, mine.to(rows.device)], columns[mine] - first


def _shard(whole: torch.Tensor, size: int, module: Any) -> torch.Tensor:
    """This rank's share; neighbours have the same one where there are fewer shards than ranks."""
    shards = len(whole) // size
    return whole.narrow(0, module.tp_rank * shards // module.tp_size * size, size)


def _own_width(pair: Pair) -> int:
    """The columns of this rank."""
    return int(getattr(pair.module, "input_size_per_partition", pair.parts[0].shape[1]))


def _multiplies_with(module: Any, rows: torch.Tensor, columns: torch.Tensor, width: int) -> bool:
    """Asks a linear layer for columns of its weight, which one-hot inputs give back exactly."""
    probe = torch.zeros(len(columns), width, dtype=rows.dtype)
    probe[range(len(columns)), columns] = 1.0
    found = module.quant_method.apply(module, probe, bias=None)
    return torch.equal(found[:, : len(rows)], rows.T)


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(len(tensor), -1) if tensor.ndim else tensor.reshape(1, 1)


def _parameters(model: torch.nn.Module) -> Iterator[tuple[str, Any, list[list[str]]]]:
    """Each parameter's name and module, and the names in a checkpoint that may make it up."""
    fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    tied = names(model)
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}".removeprefix(".")
            sources = [s for alias in [name, *tied[parameter]] for s in _sources(alias, fused)]
            yield name, module, sources


def _sources(name: str, fused: Mapping[str, list[str]]) -> Iterator[list[str]]:
    yield [name]
    for whole, parts in fused.items():
        if f".{whole}." in name:
            yield [name.replace(f".{whole}.", f".{part}.") for part in parts]


def names(model: torch.nn.Module) -> dict[torch.nn.Parameter, list[str]]:
    """All names of each parameter: tied ones have several."""
    found: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    return found


def _check_shape(pair: Pair, names: list[str]) -> None:
    """A wrong shape must be found before vLLM starts to load, as it does not recover from one."""
    expected = _checkpoint_shape(pair)
    held = len(getattr(pair.module, "output_partition_sizes", names))
    if len(names) not in (1, held):
        raise ValueError(
            f"the engine keeps {pair.name!r} in {held} parts, and a checkpoint in {len(names)}: "
            "such a model takes no new weights yet"
        )
    rows = sum(part.shape[0] for part in pair.parts if part.shape)
    shapes = [part.shape for part in pair.parts]
    if any(([rows, *shape[1:]] if shape else []) != expected for shape in shapes):
        found = ", ".join(f"{list(s)} for {n!r}" for n, s in zip(names, shapes, strict=True))
        raise ValueError(f"the engine expects the shape {expected} and was sent {found}")


def _checkpoint_shape(pair: Pair) -> list[int]:
    """A parameter's whole shape, without padding of vocabularies and emptying of packed layers."""
    shape, module = list(pair.parameter.shape), pair.module
    if hasattr(module, "org_vocab_size"):
        return [int(module.org_vocab_size), *shape[1:]]
    if hasattr(module, "output_partition_sizes"):
        rows = sum(_whole_sizes(module))
        return [rows, int(module.input_size)] if pair.name.endswith(".weight") else [rows]
    return shape


def _whole_sizes(module: Any) -> list[int]:
    """The rows of each part of a linear layer, over all ranks."""
    shards = module.output_size // getattr(module, "output_size_per_partition", module.output_size)
    first, *others = [int(size) * shards for size in module.output_partition_sizes]
    replicas = getattr(module, "num_kv_head_replicas", 1)  # k and v of several ranks are the same
    return [first, *(size // replicas for size in others)]
