"""Whole matrices from parameters that may be sharded over ranks (FSDP2), and agreement between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["broadcast_from_first", "broadcast_object", "is_distributed", "whole", "write_whole"]


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of it gathered where it is a DTensor."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def write_whole(parameters: Sequence[Tensor], values: Tensor) -> None:
    """Write `values` [n, rows, cols] into the parameters in place, or each rank's shard of them where they are sharded."""
    sharded = [hasattr(p, "full_tensor") for p in parameters]
    if not any(sharded):
        torch._foreach_copy_(list(parameters), list(values.unbind(0)))
        return
    from torch.distributed.tensor import distribute_tensor

    for parameter, value in zip(parameters, values.unbind(0), strict=True):
        if not hasattr(parameter, "full_tensor"):
            parameter.copy_(value)
            continue
        shard = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)  # type: ignore[attr-defined]
        parameter.to_local().copy_(shard.to_local())  # type: ignore[attr-defined]


def is_distributed(group: Any = None) -> bool:
    """Whether several ranks train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def broadcast_from_first(tensors: Sequence[Tensor], group: Any = None) -> None:
    """Give every rank of `group` the tensors of its first rank."""
    if is_distributed(group):
        source = dist.get_global_rank(group, 0) if group is not None else 0
        for tensor in tensors:
            dist.broadcast(tensor, source, group=group)


def broadcast_object(value: Any, group: Any = None) -> Any:
    """The first rank's `value` on every rank of `group`."""
    if not is_distributed(group):
        return value
    box = [value]
    source = dist.get_global_rank(group, 0) if group is not None else 0
    dist.broadcast_object_list(box, source, group=group)
    return box[0]
