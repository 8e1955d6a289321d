"""The teacher on the processes of the student."""

from __future__ import annotations

from typing import Any

from torch import nn


def shard_like_student(teacher: nn.Module, accelerator: Any) -> nn.Module:
    """The frozen teacher on this process's device; sharded over the processes as accelerate's FSDP shards the student."""
    if accelerator.distributed_type != "FSDP":
        return teacher.to(accelerator.device)
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, teacher)
    from torch.distributed.fsdp import FullyShardedDataParallel

    plugin.set_auto_wrap_policy(teacher)
    return FullyShardedDataParallel(
        teacher, sharding_strategy=plugin.sharding_strategy or plugin.reshard_after_forward, cpu_offload=plugin.cpu_offload,
        auto_wrap_policy=plugin.auto_wrap_policy, mixed_precision=plugin.mixed_precision_policy,
        sync_module_states=plugin.sync_module_states, use_orig_params=plugin.use_orig_params,
        limit_all_gathers=plugin.limit_all_gathers, device_id=accelerator.device if accelerator.device.type != "cpu" else None,
    )  # fmt: skip
