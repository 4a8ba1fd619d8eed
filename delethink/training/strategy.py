"""What TRL's settings have to say where several processes train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from delethink.config import TrainerConfig, TrainingConfig

if TYPE_CHECKING:
    import torch


def micro_batches(training: TrainingConfig, num_processes: int) -> tuple[int, int]:
    """How a process cuts its share of an optimizer step: traces of a micro-batch, and how many.

    A micro-batch is as large as the recipe has it where that divides the share, else the next
    smaller size that does. The traces of the step stay the same, whatever the number of processes.
    """
    share = training.traces_per_step // num_processes
    most = min(training.per_device_train_batch_size, share)
    size = next(n for n in range(most, 0, -1) if share % n == 0)
    return size, share // size


def process_settings(trainer: TrainerConfig, layers: list[str]) -> dict[str, Any]:
    """Settings of ``GRPOConfig`` for the processes of a recipe.

    Args:
        trainer: the recipe's.
        layers: classes of the model's layers, which FSDP2 shards one by one.
    """
    if trainer.num_workers == 1:
        return {}
    settings: dict[str, Any] = {"use_cpu": trainer.gpus_per_worker == 0}
    if trainer.strategy == "fsdp2":
        wrapped = {"version": 2, "transformer_layer_cls_to_wrap": layers}
        return settings | {"fsdp": True, "fsdp_config": wrapped}
    # Both would be looked at in every forward pass, of which a micro-batch has many. Buffers never
    # differ, and each parameter has a part in each pass.
    return settings | {"ddp_broadcast_buffers": False, "ddp_find_unused_parameters": False}


def shard_on_cpu(trainer: Any) -> None:
    """Has accelerate shard also where there is no GPU; it would take DDP there without a word."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    if trainer.args.fsdp_plugin_args is None or state.distributed_type is DistributedType.FSDP:
        return
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    trainer.is_fsdp_enabled = True


def whole_weights(trainer: Any) -> Mapping[str, torch.Tensor]:
    """The whole state of the model, under the names of its checkpoint.

    Sharded weights are gathered on the CPU of the first process, the others get nothing; all must
    call it.
    """
    if trainer.is_fsdp_enabled:
        gathered: Mapping[str, torch.Tensor] = trainer.accelerator.get_state_dict(trainer.model)
        return gathered
    state: Mapping[str, torch.Tensor] = trainer.model.state_dict()
    return state
