"""New weights on their way into vLLM: from the driver into an engine, and the proof of arrival.

    pack (driver)  ──►  Ray's object store  ──►  write (actor)  ──►  WeightUpdates (engine process)

vLLM fuses and packs what a checkpoint holds apart (q, k and v become one layer), and not all that
is sent to it is bound to arrive: on the CPU a tied output layer keeps its old weights. So each
update ends with a comparison of what every layer computes with and what was sent.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import numpy as np

Packed = Mapping[str, "tuple[np.ndarray, str, tuple[int, ...]]"]  # bytes, dtype and shape of each
Slot = tuple[str, str, tuple[int, ...], int, int]  # name, dtype, shape, first byte, number of bytes

_ALIGNMENT = 64  # bytes; a view of another dtype must start at a multiple of its size
_PROBED_COLUMNS = 16
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def pack(weights: Mapping[str, torch.Tensor]) -> Packed:
    """As bytes: Ray's object store shares arrays of NumPy without a copy, but not tensors."""
    return {
        name: (
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(),
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
        )
        for name, tensor in weights.items()
    }


def write(weights: Packed) -> tuple[int, list[Slot]]:
    """Puts weights into an anonymous file in memory.

    The engine process reads it without a copy, and it is gone with the last process that holds it.

    Returns:
        The file's descriptor, for the caller to close, and where each weight lies in it.
    """
    slots = []
    descriptor = os.memfd_create("delethink-weights")
    with os.fdopen(descriptor, "wb", closefd=False) as file:
        for name, (data, dtype, shape) in weights.items():
            file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
            slots.append((name, dtype, shape, file.tell(), data.nbytes))
            file.write(data.data)
    return descriptor, slots


def read(path: str, slots: list[Slot]) -> dict[str, torch.Tensor]:
    """The weights in a file that ``write`` made, as views of it."""
    everything = torch.from_file(path, size=os.path.getsize(path), dtype=torch.uint8)
    return {
        name: everything[first : first + size].view(getattr(torch, dtype)).reshape(shape)
        for name, dtype, shape, first, size in slots
    }


class WeightUpdates:
    """What is mixed into vLLM's own worker, in the engine process."""

    model_runner: Any

    def __new__(cls, *args: object, **kwargs: object) -> WeightUpdates:
        """The first thing of ours that runs in the engine process, before it loads the model."""
        _die_with_parent()
        return super().__new__(cls)

    def delethink_load(self, path: str, slots: list[Slot], version: int) -> int:
        """Takes up the weights in a file and checks that the model computes with them.

        Raises:
            ValueError: they do not fit the model, or it computes with others afterwards.
        """
        model = self.model_runner.get_model()
        sent = read(path, slots)
        pairs = list(pair_weights(model, sent))  # raises before anything is touched
        self.model_runner.reload_weights(weights_iterator=iter(sent.items()))
        _pack_tied(model)
        stale = [pair.name for pair in pairs if not runs(pair)]
        if stale:
            raise ValueError(
                f"the engine runs other weights than it was sent: {len(stale)} of {len(pairs)} "
                f"differ, the first is {stale[0]!r}"
            )
        return version


@dataclass(frozen=True)
class Pair:
    """A parameter of a vLLM model and what was sent for it."""

    name: str  # in vLLM
    module: Any  # that holds it
    parts: list[torch.Tensor]  # one under the other; several where vLLM fuses them

    @property
    def parameter(self) -> torch.Tensor:
        """What vLLM holds: on the CPU it may be empty, as linear layers keep a packed copy only."""
        held: torch.Tensor = getattr(self.module, self.name.rpartition(".")[2])
        return held


def pair_weights(model: torch.nn.Module, sent: Mapping[str, torch.Tensor]) -> Iterator[Pair]:
    """Finds what was sent for each parameter of a vLLM model.

    Raises:
        ValueError: a parameter for which nothing was sent, a name that the model does not have, or
            another shape than the model's.
    """
    unused = set(sent)
    for name, module, sources in _parameters(model):
        names = next((names for names in sources if sent.keys() >= set(names)), None)
        if names is None:
            raise ValueError(f"nothing was sent for {name!r}, which the engine has")
        pair = Pair(name, module, [sent[n] for n in names])
        _check_shape(pair, names)
        unused -= set(names)
        yield pair
    if unused:
        raise ValueError(f"the engine has no weight called {min(unused)!r}")


def runs(pair: Pair) -> bool:
    """Whether a module computes with the values that were sent for one of its parameters."""
    sent = torch.cat(pair.parts) if len(pair.parts) > 1 else pair.parts[0]
    held = pair.parameter
    if pair.name.endswith(".weight") and hasattr(pair.module, "cpu_linear"):
        return _multiplies_with(pair.module, sent.to(held.dtype))
    unpadded = held[: len(sent)] if sent.ndim else held
    return torch.equal(unpadded, sent.to(held.device, held.dtype))


def _multiplies_with(module: Any, weight: torch.Tensor) -> bool:
    """Asks a linear layer for columns of its weight, which one-hot inputs give back exactly."""
    columns = torch.linspace(0, weight.shape[1] - 1, _PROBED_COLUMNS).long()
    probe = torch.zeros(_PROBED_COLUMNS, weight.shape[1], dtype=weight.dtype)
    probe[range(_PROBED_COLUMNS), columns] = 1.0
    found = module.quant_method.apply(module, probe, bias=None)
    return torch.equal(found[:, : len(weight)], weight[:, columns].T)


def _parameters(model: torch.nn.Module) -> Iterator[tuple[str, Any, list[list[str]]]]:
    """Each parameter's name and module, and the names in a checkpoint that may make it up."""
    fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    tied = _names(model)
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


def _names(model: torch.nn.Module) -> dict[torch.nn.Parameter, list[str]]:
    """All names of each parameter: tied ones have several."""
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _check_shape(pair: Pair, names: list[str]) -> None:
    """A wrong shape must be found before vLLM starts to load, as it does not recover from one."""
    expected = _checkpoint_shape(pair)
    rows = sum(part.shape[0] for part in pair.parts if part.ndim)
    if any(([rows, *part.shape[1:]] if part.ndim else []) != expected for part in pair.parts):
        shapes = zip(names, pair.parts, strict=True)
        found = ", ".join(f"{list(part.shape)} for {name!r}" for name, part in shapes)
        raise ValueError(f"the engine expects the shape {expected} and was sent {found}")


def _checkpoint_shape(pair: Pair) -> list[int]:
    """A parameter's shape without vLLM's padding of vocabularies and emptying of packed layers."""
    shape = list(pair.parameter.shape)
    if hasattr(pair.module, "org_vocab_size"):
        return [int(pair.module.org_vocab_size), *shape[1:]]
    if pair.name.endswith(".weight") and hasattr(pair.module, "output_size"):
        return [int(pair.module.output_size), int(pair.module.input_size)]
    return shape


def _pack_tied(model: torch.nn.Module) -> None:
    """On the CPU, vLLM leaves the packed copy of a tied output layer as it was."""
    tied = _names(model)
    module: Any
    for module in model.modules():
        shared = any(len(tied[p]) > 1 for p in module.parameters(recurse=False))
        if shared and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


def _die_with_parent() -> None:
    """A killed worker leaves no engine behind: vLLM itself does not notice that it is gone.

    The kernel's signal also ends an engine that is stopped; the thread sees a parent that was gone
    before.
    """
    if (parent := multiprocessing.parent_process()) is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
