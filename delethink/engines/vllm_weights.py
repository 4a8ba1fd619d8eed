"""New weights in an engine process, by whichever way they come, and the proof that it runs them.

Through Ray's object store, to engines anywhere:

    pack (driver)  ──►  object store  ──►  write (actor)  ──►  WeightUpdates.delethink_load

From GPU to GPU, by vLLM's own weight transfer (``weight_transfer``):

    delethink_expect  ──►  vLLM's start, update and finish  ──►  delethink_confirm

Either ends with a comparison of what the model computes with and what was sent (``weight_check``).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from delethink.engines.vllm_process import die_with_parent
from delethink.engines.weight_check import Pair, Sent, check, names, pair_weights

if TYPE_CHECKING:
    import numpy as np

Packed = Mapping[str, "tuple[np.ndarray, str, tuple[int, ...]]"]  # bytes, dtype and shape of each
Slot = tuple[str, str, tuple[int, ...], int, int]  # name, dtype, shape, first byte, number of bytes

_ALIGNMENT = 64  # bytes; a view of another dtype must start at a multiple of its size


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


def _answers(method: Callable[..., int]) -> Callable[..., int | str]:
    """What goes wrong is an answer too, as text, and not raised.

    Where a rank of several raises, vLLM leaves what the others say in their queues, and takes it
    for the answers to its next call.
    """

    @functools.wraps(method)
    def answer(*arguments: Any) -> int | str:
        try:
            return method(*arguments)
        except Exception as error:  # ours, or whatever vLLM's loading says
            return str(error) or repr(error)

    return answer


class WeightUpdates:
    """What is mixed into vLLM's own worker, in the engine process."""

    model_runner: Any
    reload_weights: Any
    _pairs: list[Pair]
    _sent: dict[str, Sent]

    def __new__(cls, *args: object, **kwargs: object) -> WeightUpdates:
        """The first thing of ours that runs in the engine process, before it loads the model."""
        die_with_parent()
        return super().__new__(cls)

    @_answers
    def delethink_load(self, path: str, slots: list[Slot], version: int) -> int:
        """Takes up the weights in a file and checks that the model computes with them.

        Returns:
            The version; or as text, that they do not fit, or that it computes with others.
        """
        self._expect({name: shape for name, _, shape, _, _ in slots})
        self.reload_weights(weights_iterator=iter(read(path, slots).items()))
        return self._confirm(version)

    @_answers
    def delethink_expect(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Gets ready for weights of these names and shapes, which the model is given next.

        Returns:
            0; or as text, that they do not fit the model, of which nothing has been touched.
        """
        self._expect(shapes)
        return 0

    @_answers
    def delethink_confirm(self, version: int, digests: Mapping[str, str]) -> int:
        """Checks that what was sent has come since ``delethink_expect``, and is computed with.

        Returns:
            The version, as what this process runs from now on; or as text, what is otherwise.
        """
        for name, sent in self._sent.items():
            if sent.rows is None or sent.digest() != digests[name]:
                raise ValueError(f"{name!r} did not come as it was sent")
        return self._confirm(version)

    def _expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        model = self.model_runner.get_model()
        self._sent = {name: Sent(shape) for name, shape in shapes.items()}
        self._pairs = pair_weights(model, self._sent)
        vars(model).pop("load_weights", None)  # of an update that was broken off
        load = model.load_weights
        model.load_weights = lambda weights: load(self._seen(weights))

    def _seen(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self._sent[name].see(tensor)
            yield name, tensor

    def _confirm(self, version: int) -> int:
        model = self.model_runner.get_model()
        vars(model).pop("load_weights", None)
        _pack_tied(model)
        pairs, self._pairs, self._sent = self._pairs, [], {}
        check(pairs)
        return version


def _pack_tied(model: torch.nn.Module) -> None:
    """On the CPU, vLLM leaves the packed copy of a tied output layer as it was."""
    tied = names(model)
    module: Any
    for module in model.modules():
        shared = any(len(tied[p]) > 1 for p in module.parameters(recurse=False))
        if shared and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)
