"""Checks the weights of a running vLLM model against the weights sent to the engine.

vLLM fuses and packs separate weights of a checkpoint (q, k and v become one layer), and spreads
them over the ranks of a tensor-parallel engine. Not all of them are sure to arrive: on the CPU, for
example, a tied output layer keeps its old weights. The check compares some columns of each weight
sent with the columns used in the model's multiplications.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_NUM_COLUMNS = 16  # columns to check, evenly spaced; a training step changes all


@dataclass(eq=False)
class Columns:
    """Shape of a weight in the checkpoint and, after its arrival, some of its columns."""

    shape: tuple[int, ...]  # size of the whole tensor
    values: torch.Tensor | None = None  # (rows, chosen columns); a vector has one column

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Columns:
        """Return the columns of a tensor."""
        columns = cls(tuple(tensor.shape))
        columns.record(tensor)
        return columns

    def record(self, tensor: torch.Tensor) -> None:
        """Copy the chosen columns; the tensor may be overwritten afterwards."""
        self.values = _as_matrix(tensor)[:, self.indices.to(tensor.device)].clone()

    def digest(self) -> str:
        """Return a digest of the recorded columns."""
        assert self.values is not None
        memory = self.values.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        return hashlib.blake2b(memory.tobytes(), digest_size=16).hexdigest()

    @property
    def indices(self) -> torch.Tensor:
        """Return the indices of the chosen columns."""
        width = math.prod(self.shape[1:])
        return torch.linspace(0, width - 1, min(_NUM_COLUMNS, width)).long()


@dataclass(frozen=True)
class Pair:
    """A parameter of a vLLM model and its weights in the checkpoint."""

    name: str  # in vLLM
    module: Any  # module of the parameter
    parts: list[Columns]  # in the order of their rows; several if vLLM fuses them

    @property
    def parameter(self) -> torch.Tensor:
        """Return vLLM's tensor, which may be empty on the CPU: layers keep a packed copy there."""
        tensor: torch.Tensor = getattr(self.module, self.name.rpartition(".")[2])
        return tensor


def pair_weights(model: torch.nn.Module, sent: Mapping[str, Columns]) -> list[Pair]:
    """Find the weights sent for each parameter of a vLLM model.

    Raises:
        ValueError: a parameter without weights, an unknown name, or another shape.
    """
    fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    aliases, unused, pairs = parameter_names(model), set(sent), []
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}".removeprefix(".")
            sources = [s for alias in [name, *aliases[parameter]] for s in _sources(alias, fused)]
            names = next((names for names in sources if sent.keys() >= set(names)), None)
            if names is None:
                raise ValueError(f"the weights have no {name!r}, which the engine needs")
            pair = Pair(name, module, [sent[n] for n in names])
            _check_shape(pair, names)
            unused -= set(names)
            pairs.append(pair)
    if unused:
        raise ValueError(f"the engine has no weight called {min(unused)!r}")
    return pairs


def needed_together(
    pairs: list[Pair], sent: Mapping[str, Columns], changed: Collection[str]
) -> list[str]:
    """Return the weights of all layers with a changed weight, as vLLM loads a layer whole.

    Args:
        pairs: result of ``pair_weights``.
        sent: the weights of all layers, by name.
        changed: names of changed weights.

    Raises:
        ValueError: an unknown name.
    """
    if unknown := set(changed) - sent.keys():
        raise ValueError(f"the engine has no weight called {min(unknown)!r}")
    changed_parts = {id(sent[name]) for name in changed}
    layers = {
        id(pair.module) for pair in pairs if any(id(part) in changed_parts for part in pair.parts)
    }
    parts = {id(part) for pair in pairs if id(pair.module) in layers for part in pair.parts}
    return [name for name, part in sent.items() if id(part) in parts]


def check_weights(pairs: list[Pair]) -> None:
    """Compare all parameters with the weights sent.

    Raises:
        ValueError: the model computes with other weights; the text names the first.
    """
    if stale := [pair.name for pair in pairs if not is_loaded(pair)]:
        raise ValueError(
            f"the engine computes with other weights than those sent: {len(stale)} of "
            f"{len(pairs)} differ, the first is {stale[0]!r}"
        )


def is_loaded(pair: Pair) -> bool:
    """Return whether a module computes with the weights sent for one of its parameters."""
    if any(part.values is None for part in pair.parts):
        return False
    rows, columns = _local_shard(pair)
    held = pair.parameter
    if pair.name.endswith(".weight") and hasattr(pair.module, "cpu_linear"):
        # The layer multiplies with a packed copy; one-hot inputs return its columns exactly.
        probe = torch.zeros(len(columns), _local_width(pair), dtype=held.dtype)
        probe[range(len(columns)), columns] = 1.0
        found = pair.module.quant_method.apply(pair.module, probe, bias=None)
        return torch.equal(found[:, : len(rows)], rows.to(held.dtype).T)
    found = _as_matrix(held)[: len(rows), columns.to(held.device)]  # below is padding
    return torch.equal(found, rows.to(held.device, held.dtype))


def _local_shard(pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the recorded values of this rank's rows and columns, and the column indices."""
    module, parts = pair.module, [part.values for part in pair.parts if part.values is not None]
    columns = pair.parts[0].indices
    if (vocabulary := getattr(module, "shard_indices", None)) is not None:
        first, end = vocabulary.org_vocab_start_index, vocabulary.org_vocab_end_index
        return parts[0][first:end], columns
    sizes = getattr(module, "output_partition_sizes", None)
    if sizes is None:
        return torch.cat(parts), columns
    if len(parts) == 1 and len(sizes) > 1:  # fused in the checkpoint too
        parts = list(torch.split(parts[0], _full_sizes(module)))
    rows = torch.cat([_shard(p, size, module) for p, size in zip(parts, sizes, strict=True)])
    if len(pair.parts[0].shape) < 2:
        return rows, columns
    width = _local_width(pair)
    first = int(_shard(torch.arange(module.input_size), width, module)[0])
    mine = (columns >= first) & (columns < first + width)
    return rows[:, mine.to(rows.device)], columns[mine] - first


def _shard(whole: torch.Tensor, size: int, module: Any) -> torch.Tensor:
    """Return this rank's shard; with fewer shards than ranks, neighbours have the same one."""
    shards = len(whole) // size
    return whole.narrow(0, module.tp_rank * shards // module.tp_size * size, size)


def _local_width(pair: Pair) -> int:
    """Return the number of columns of this rank."""
    return int(getattr(pair.module, "input_size_per_partition", pair.parts[0].shape[1]))


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(len(tensor), -1) if tensor.ndim else tensor.reshape(1, 1)


def _sources(name: str, fused: Mapping[str, list[str]]) -> Iterator[list[str]]:
    """Yield the possible names of a parameter's weights in the checkpoint."""
    yield [name]
    for whole, parts in fused.items():
        if f".{whole}." in name:
            yield [name.replace(f".{whole}.", f".{part}.") for part in parts]


def parameter_names(model: torch.nn.Module) -> dict[torch.nn.Parameter, list[str]]:
    """Return all names of each parameter; tied parameters have several."""
    found: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    return found


def _check_shape(pair: Pair, names: list[str]) -> None:
    """Find a wrong shape before vLLM loads any weight: vLLM does not recover from one."""
    module, expected = pair.module, list(pair.parameter.shape)
    # The shape in a checkpoint is without sharding, padding and packing.
    if hasattr(module, "org_vocab_size"):
        expected[0] = int(module.org_vocab_size)
    elif hasattr(module, "output_partition_sizes"):
        expected = [sum(_full_sizes(module))]
        if pair.name.endswith(".weight"):
            expected.append(int(module.input_size))
    held = len(getattr(module, "output_partition_sizes", names))
    if len(names) not in (1, held):
        raise ValueError(
            f"the engine keeps {pair.name!r} in {held} parts and the checkpoint in {len(names)}: "
            "weight updates of such a model are not supported"
        )
    shapes = [part.shape for part in pair.parts]
    rows = sum(shape[0] for shape in shapes if shape)
    if any(([rows, *shape[1:]] if shape else []) != expected for shape in shapes):
        found = ", ".join(f"{list(s)} for {n!r}" for n, s in zip(names, shapes, strict=True))
        raise ValueError(f"the engine expects the shape {expected}, got {found}")


def _full_sizes(module: Any) -> list[int]:
    """Return the rows of each part of a linear layer, summed over the ranks."""
    shards = module.output_size // getattr(module, "output_size_per_partition", module.output_size)
    first, *others = [int(size) * shards for size in module.output_partition_sizes]
    replicas = getattr(module, "num_kv_head_replicas", 1)  # several ranks have the same k and v
    return [first, *(size // replicas for size in others)]
