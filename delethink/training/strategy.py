"""What TRL's settings have to say where several processes train."""

from __future__ import annotations

from typing import Any

from delethink.config import TrainerConfig, TrainingConfig


def batch_settings(training: TrainingConfig, num_processes: int) -> dict[str, int]:
    """How a process cuts its share of an optimizer step and of a batch, as ``GRPOConfig`` has it.

    A micro-batch is as large as the recipe has it where that divides the share, else the next
    smaller size that does. The traces of the step stay the same, whatever the number of processes.
    """
    share = training.traces_per_step // num_processes
    most = min(training.per_device_train_batch_size, share)
    size = next(n for n in range(most, 0, -1) if share % n == 0)
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": share // size,
        "steps_per_generation": training.traces_per_batch // num_processes // size,
    }


def process_settings(trainer: TrainerConfig) -> dict[str, Any]:
    """What ``GRPOConfig`` has to say of several processes."""
    if trainer.num_workers == 1:
        return {}
    settings: dict[str, Any] = {"use_cpu": trainer.gpus_per_worker == 0}
    if trainer.strategy == "fsdp2":
        return settings | {"fsdp": True, "fsdp_config": {"version": 2}}
    # A micro-batch has many forward passes, and DDP would talk or search in each. Buffers never
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
