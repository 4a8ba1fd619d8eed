"""Code inside vLLM's engine process: weight updates, and an end together with the worker.

vLLM loads ``WorkerExtension`` and ``Executor`` by name. Both arrange for the end of their process
together with the parent, because vLLM itself does not notice the loss of the parent:

    VllmWorker (Ray actor) -> engine process (Executor) -> ranks (WorkerExtension)
"""

from __future__ import annotations

import ctypes
import functools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from delethink.engines.low_rank import merge_changes, unpack_changes
from delethink.engines.weight_check import (
    Columns,
    Pair,
    check_weights,
    needed_together,
    pair_weights,
    parameter_names,
)
from delethink.engines.weight_sync import WeightSlot, read
from delethink.output import get_logger

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_RELOAD = "vllm.model_executor.model_loader.reload"  # package that loads new weights


def die_with_parent() -> None:
    """End this process together with its parent.

    The kernel's signal also ends a stopped process. The thread also notices a parent lost
    before this call.
    """
    if (parent := multiprocessing.parent_process()) is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Executor(MultiprocExecutor):  # type: ignore[misc]  # vLLM may not be installed for mypy
    """vLLM's executor of several ranks on one machine, which ends with its worker.

    To name an executor also keeps vLLM from taking Ray's, its default inside a placement group.
    """

    def _init_executor(self) -> None:
        die_with_parent()
        super()._init_executor()


def _return_errors(method: Callable[..., T]) -> Callable[..., T | str]:
    """Return an exception as text instead of raising.

    If one rank of several raises, vLLM leaves the answers of the others in their queues and takes
    them for the answers to its next call.
    """

    @functools.wraps(method)
    def call(*arguments: Any) -> T | str:
        try:
            return method(*arguments)
        except Exception as error:  # vLLM's loading can raise anything
            return str(error) or repr(error)

    return call


class WorkerExtension:
    """Methods mixed into vLLM's own worker class, in each rank.

    Weights come as shared memory (``delethink_load``), as low-rank changes of the base weights
    (``delethink_merge``), or by vLLM's own weight transfer between ``delethink_prepare`` and
    ``delethink_confirm``. Misfitting weights are refused before anything is touched. With
    ``verify``, the parameters of the running model are compared with those sent
    (``delethink.engines.weight_check``).
    """

    model_runner: Any
    reload_weights: Any
    _pairs: list[Pair]
    _sent: dict[str, Columns]
    _base_sent: dict[str, Columns]  # of the last whole weights, if they were verified

    def __new__(cls, *args: object, **kwargs: object) -> WorkerExtension:
        """Tie the process to its parent, before anything else of the worker runs."""
        die_with_parent()
        return super().__new__(cls)

    @_return_errors
    def delethink_load(
        self, place: str | bytes, slots: list[WeightSlot], version: int, verify: bool
    ) -> int:
        """Load the weights in a file, or in memory of the trainer's GPU; return the version."""
        self._prepare({name: shape for name, _, shape, _, _ in slots}, verify)
        self.reload_weights(weights_iterator=iter(read(place, slots).items()))
        if isinstance(place, bytes):
            torch.accelerator.synchronize()  # the trainer may free or overwrite it after the return
        return self._confirm(version, verify)

    @_return_errors
    def delethink_needed(
        self, shapes: Mapping[str, tuple[int, ...]], changed: list[str]
    ) -> list[str]:
        """Return the weights to load together if some of them change."""
        model = self.model_runner.get_model()
        sent = {name: Columns(shape) for name, shape in shapes.items()}
        return needed_together(pair_weights(model, sent), sent, changed)

    @_return_errors
    def delethink_merge(
        self,
        base: tuple[str, list[WeightSlot]],
        matrices: tuple[str, list[WeightSlot]],
        scales: dict[str, float],
        version: int,
        verify: bool,
    ) -> int:
        """Load base weights merged with low-rank changes; return the version.

        Args:
            base: file and slots of the weights of ``delethink_needed``; the others stay.
            matrices: file and slots of the matrices of ``pack_changes``.
            scales: scale of each changed weight, by name.
            version: number of the update.
            verify: compare the parameters of the running model with those sent.
        """
        model = self.model_runner.get_model()
        kept, changes = read(*base), unpack_changes(read(*matrices), scales)
        for name, change in changes.items():
            if (shape := list(kept[name].shape)) != change.shape:
                raise ValueError(f"{name!r} is {shape}, and its change {change.shape}")
        device = next(model.parameters()).device
        if verify:
            own = {name: tuple(tensor.shape) for name, tensor in kept.items()}
            self._prepare(own, verify, self._base_sent)
        else:
            self._pairs, self._sent = [], {}
        with _without_warnings(), torch.no_grad():
            self.reload_weights(weights_iterator=merge_changes(kept, changes, device))
        vars(model).pop("load_weights", None)
        pairs, self._pairs, self._sent = self._pairs, [], {}
        if not verify:
            self._base_sent = {}
        check_weights(pairs)
        return version

    @_return_errors
    def delethink_prepare(self, shapes: Mapping[str, tuple[int, ...]], verify: bool) -> int:
        """Get ready for weights of these names and shapes."""
        self._prepare(shapes, verify)
        return 0

    @_return_errors
    def delethink_confirm(self, version: int, digests: Mapping[str, str] | None) -> int:
        """End the update begun by ``delethink_prepare``; return the version.

        With digests of the sent weights, the update is verified.
        """
        for name, digest in (digests or {}).items():
            sent = self._sent[name]
            if sent.values is None or sent.digest() != digest:
                raise ValueError(f"{name!r} arrived with other values than those sent")
        return self._confirm(version, verify=digests is not None)

    def _prepare(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        verify: bool,
        others: Mapping[str, Columns] | None = None,
    ) -> None:
        """Get ready for weights of these shapes, and for checking ``others`` that stay."""
        model = self.model_runner.get_model()
        self._sent = {
            **(others or {}),
            **{name: Columns(shape) for name, shape in shapes.items()},
        }
        self._pairs = pair_weights(model, self._sent)
        vars(model).pop("load_weights", None)  # left over from an interrupted update
        if verify:
            load = model.load_weights
            model.load_weights = lambda weights: load(self._record(weights))

    def _record(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self._sent[name].record(tensor)
            yield name, tensor

    def _confirm(self, version: int, verify: bool) -> int:
        model = self.model_runner.get_model()
        vars(model).pop("load_weights", None)
        _repack_tied_layers(model)
        pairs, self._pairs = self._pairs, []
        self._base_sent, self._sent = self._sent if verify else {}, {}
        if verify:
            check_weights(pairs)
        return version


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep vLLM from warning of each layer without new weights."""
    loggers = [get_logger(f"{_RELOAD}.{name}") for name in ("layerwise", "inplace")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _repack_tied_layers(model: torch.nn.Module) -> None:
    """Renew the packed copy of a tied output layer, which vLLM does not update on the CPU."""
    names = parameter_names(model)
    module: Any
    for module in model.modules():
        is_tied = any(len(names[p]) > 1 for p in module.parameters(recurse=False))
        if is_tied and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)
