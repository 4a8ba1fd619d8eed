"""Weights in memory that processes share: exact, cast once, and given back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from delethink.engines import weight_sync  # noqa: E402
from delethink.engines.weight_sync import SharedWeights, read  # noqa: E402

CPU = torch.device("cpu")


def make_weights() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "odd": torch.randn(7, 3, generator=generator),
        "transposed": torch.randn(5, 4, generator=generator).T,
        "scalar": torch.tensor(0.1),
        "counts": torch.arange(5),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_reader_finds_the_weights_in_the_data_type_of_the_engine(dtype: Any) -> None:
    weights = make_weights()
    shared = SharedWeights(weights, CPU, dtype)
    found = read(shared.handle.place, shared.handle.slots)
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        wanted = weight.to(dtype) if weight.is_floating_point() else weight
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name], wanted)
    weights["odd"].zero_()  # as training changes them
    assert found["odd"].abs().sum() > 0
    shared.close()


def test_the_memory_is_no_file_of_dev_shm_and_ends_with_its_owner() -> None:
    """Containers have little of it, and a killed process would leave a file there."""
    before = set(Path("/dev/shm").iterdir())
    shared = SharedWeights({"large": torch.ones(2**20)}, CPU, torch.float32)
    assert set(Path("/dev/shm").iterdir()) <= before
    assert isinstance(shared.handle.place, str)
    assert Path(shared.handle.place).exists()
    shared.close()
    shared.close()
    assert not os.path.lexists(shared.handle.place)


def test_another_process_reads_the_same_memory() -> None:
    shared = SharedWeights(make_weights(), CPU, torch.float32)
    program = (
        "import torch\n"
        "from delethink.engines.weight_sync import read\n"
        f"found = read({shared.handle.place!r}, {shared.handle.slots!r})\n"
        "print(found['odd'].sum().item(), found['counts'].tolist())\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    wanted = make_weights()["odd"].sum().item()
    assert answer.stdout.split()[0] == str(wanted)
    assert "[0, 1, 2, 3, 4]" in answer.stdout
    shared.close()


def test_weights_on_a_gpu_are_shared_by_one_handle_of_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only CUDA's own part is a stand-in, as there is no GPU: its memory is that of the CPU."""
    opened, collected, exported = list[Any](), list[bool](), dict[bytes, Any]()
    synchronized = list[bool]()
    empty = torch.empty

    def reduce_tensor(tensor: Any) -> Any:
        exported[b"handle"] = tensor
        layout = (torch.Tensor, tensor.size(), tensor.stride(), 0, torch.UntypedStorage)
        return None, (*layout, tensor.dtype, 3, b"handle", len(tensor), 0, False)

    def rebuild_cuda_tensor(*arguments: Any) -> Any:
        opened.append(arguments)
        return exported[arguments[7]]

    monkeypatch.setattr(weight_sync, "reduce_tensor", reduce_tensor)
    monkeypatch.setattr(weight_sync, "rebuild_cuda_tensor", rebuild_cuda_tensor)
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **kw: empty(*size, **kw))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    stream = SimpleNamespace(synchronize=lambda: synchronized.append(True))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: collected.append(True))
    weights = make_weights()
    shared = SharedWeights(weights, torch.device("cuda", 3), torch.bfloat16)
    assert isinstance(shared.handle.place, bytes)
    assert len(shared.handle.place) < 2000  # no weights in it
    assert synchronized == [True]  # readers use other streams
    found = read(shared.handle.place, shared.handle.slots)
    for name, weight in weights.items():
        wanted = weight.to(torch.bfloat16) if weight.is_floating_point() else weight
        assert torch.equal(found[name], wanted)
    ((*_, device, _, _, _, _),) = opened
    assert device == 1  # the reader's name of the same GPU
    shared.close()
    assert collected == [True]
