"""Whole matrices from parameters that may be sharded over ranks (FSDP2), and agreement between ranks.

A sharded parameter is a DTensor: a local shard, a mesh of ranks and a placement per dimension of the mesh. Matrices of one
layout and shape are stacked as shards and gathered by one collective, however many they are. Shards that are offloaded to the
CPU travel over the devices of their mesh, and what is made of them is on the CPU.
Matrices of one size are handled as rows: [n, numel], each matrix row-major.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors

__all__ = [
    "agree_any",
    "broadcast_from_first",
    "choice_of_first",
    "exchange_bytes",
    "gather_objects",
    "is_distributed",
    "is_sharded",
    "local",
    "local_parts",
    "object_of",
    "obstacle_to_gathering",
    "position",
    "require_agreement",
    "stack_rows",
    "whole",
    "write_all",
    "write_rows",
]

_Layout = tuple[Any, tuple[Any, ...]]  # mesh and placements


# -- sharded parameters -----------------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor (one that is replicated on all ranks included)."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of it, or its shard, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def obstacle_to_gathering(tensor: Tensor) -> str | None:
    """Why a parameter cannot be gathered and written back, None where it can."""
    if not is_sharded(tensor):
        return None
    mesh, placements = _layout(tensor)
    unknown = [p for p in placements if not (p.is_replicate() or type(p).__name__ == "Shard")]
    if unknown:
        return (
            f"its DTensor placement {unknown[0]} is neither Shard nor Replicate (tensor parallelism and FSDP2 over the "
            "same dimension, say); shard matrices with fully_shard alone, or keep them replicated"
        )
    if mesh.get_coordinate() is None:
        return (
            f"it is sharded over {mesh}, which this rank is not part of; make the optimizer of this rank's parameters"
        )
    return None


def stack_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one size copied to rows [n, numel], gathered where they are DTensors: one collective per layout and shape."""
    if not any(is_sharded(t) for t in tensors):
        if len(tensors) == 1:  # of one tensor it gives a view
            return tensors[0].reshape(1, -1).clone()
        flat: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
        return flat.view(len(tensors), -1)
    rows: dict[int, Tensor] = {}
    for layout, indices in _alike(tensors):
        if layout is None:
            stacked = torch.stack([tensors[k] for k in indices])
        else:
            stacked = _gather([tensors[k] for k in indices], layout)
        rows.update(zip(indices, stacked.reshape(len(indices), -1).unbind(0), strict=True))
    return torch.stack([rows[k] for k in range(len(tensors))])


def whole(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of any sizes, each gathered where it is a DTensor: one collective per layout and shape. Others are given back."""
    if not any(is_sharded(t) for t in tensors):
        return list(tensors)
    found: dict[int, Tensor] = {}
    for layout, indices in _alike(tensors):
        chosen = [tensors[k] for k in indices]
        found.update(zip(indices, chosen if layout is None else _gather(chosen, layout).unbind(0), strict=True))
    return [found[k] for k in range(len(tensors))]


def local_parts(parameters: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """`rows` [n, numel] in the shapes of the parameters they belong to, each cut to what this rank holds of its parameter."""
    parts: dict[int, Tensor] = {}
    for layout, indices in _alike(parameters):
        chosen = torch.stack([rows[k] for k in indices]).view(-1, *parameters[indices[0]].shape)
        if layout is not None:
            chosen = _shard(chosen, layout)
        parts.update(zip(indices, chosen.unbind(0), strict=True))
    return [parts[k] for k in range(len(parameters))]


def write_rows(parameters: Sequence[Tensor], rows: Tensor) -> None:
    """Write `rows` [n, numel] into the parameters in place, or each rank's shard of them where they are sharded."""
    torch._foreach_copy_([local(p) for p in parameters], local_parts(parameters, rows))


def write_all(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values [numel], each row-major, into parameters of any sizes, or each rank's shard of them."""
    if not any(is_sharded(p) for p in parameters):
        if parameters:
            torch._foreach_copy_(list(parameters), [v.view(p.shape) for p, v in zip(parameters, values, strict=True)])
        return
    by_size: dict[int, list[int]] = {}
    for k, parameter in enumerate(parameters):
        by_size.setdefault(parameter.numel(), []).append(k)
    for indices in by_size.values():
        write_rows([parameters[k] for k in indices], torch.stack([values[k] for k in indices]))


def _layout(tensor: Tensor) -> _Layout:
    return tensor.device_mesh, tuple(tensor.placements)  # type: ignore[attr-defined]


def _alike(tensors: Sequence[Tensor]) -> list[tuple[_Layout | None, list[int]]]:
    """Indices of the tensors that have one shape and are sharded alike (None: not at all)."""
    found: dict[tuple[_Layout | None, torch.Size], list[int]] = {}
    for k, tensor in enumerate(tensors):
        found.setdefault((_layout(tensor) if is_sharded(tensor) else None, tensor.shape), []).append(k)
    return [(layout, indices) for (layout, _), indices in found.items()]


def _stacked_placements(placements: Sequence[Any]) -> list[Any]:
    """Placements of matrices stacked along a new first dimension."""
    from torch.distributed.tensor import Shard

    return [Shard(p.dim + 1) if p.is_shard() else p for p in placements]


def _gather(tensors: Sequence[Tensor], layout: _Layout) -> Tensor:
    from torch.distributed.tensor import DTensor

    mesh, placements = layout
    # shards of uneven size: the shape of the whole must be told
    whole = torch.empty((len(tensors), *tensors[0].shape), device="meta")
    shards = torch.stack([local(t) for t in tensors])
    stacked = DTensor.from_local(
        shards, mesh, _stacked_placements(placements), run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return stacked.full_tensor().to(shards.device)


def _shard(values: Tensor, layout: _Layout) -> Tensor:
    """This rank's shard of values that every rank has: cut out, nothing is sent to other ranks."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = layout
    everywhere = DTensor.from_local(values, mesh, [Replicate()] * len(placements), run_check=False)
    return everywhere.redistribute(mesh, _stacked_placements(placements)).to_local().to(values.device)


# -- agreement --------------------------------------------------------------------------------------------------------


def is_distributed(group: Any = None) -> bool:
    """Whether several ranks train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def position(group: Any = None) -> tuple[int, int]:
    """This rank's number in `group`, and how many there are."""
    return (dist.get_rank(group), dist.get_world_size(group)) if is_distributed(group) else (0, 1)


def broadcast_from_first(tensors: Sequence[Tensor], group: Any = None) -> None:
    """Give every rank of `group` the tensors of its first rank, in place and in one piece."""
    if not is_distributed(group):
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    flat = flat.to(_carrier(flat.device, group))
    dist.broadcast(flat, dist.get_global_rank(group, 0) if group is not None else 0, group=group)
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def agree_any(flags: Tensor, group: Any = None) -> Tensor:
    """Booleans that are true where they are on any rank of `group`."""
    if not is_distributed(group):
        return flags
    counts = flags.to(_carrier(flags.device, group), torch.int32)
    dist.all_reduce(counts, dist.ReduceOp.MAX, group=group)
    return counts.to(flags.device, torch.bool)


def exchange_bytes(mine: Tensor, sizes: Sequence[int], group: Any = None) -> list[Tensor]:
    """The message of every rank of `group`, whose lengths are known: one collective of messages that are filled up to the
    longest."""
    longest, device = max(sizes), _carrier(mine.device, group)
    message = mine.new_zeros(longest, device=device)
    message[: mine.numel()].copy_(mine)
    everyone = [torch.empty_like(message) for _ in sizes]
    dist.all_gather(everyone, message, group=group)
    return [one[:size].to(mine.device) for one, size in zip(everyone, sizes, strict=True)]


def _carrier(device: torch.device, group: Any = None) -> torch.device:
    """`device` where the backend of `group` sends from there, and what it sends from otherwise: NCCL has no CPU tensors."""
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    return device if device.type in kinds else torch.device(kinds[0])


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """The `value` of every rank of `group`, in the order of its ranks."""
    if not is_distributed(group):
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def object_of(rank: int, value: Any, group: Any = None) -> Any:
    """The `value` of one rank of `group`, on all of them."""
    holder = [value]
    dist.broadcast_object_list(holder, dist.get_global_rank(group, rank) if group is not None else rank, group=group)
    return holder[0]


def require_agreement(facts: Mapping[str, Any], group: Any = None) -> None:
    """Raise RuntimeError on every rank of `group` where the `facts` of ranks differ."""
    everyone = gather_objects(dict(facts), group)
    for what, first in everyone[0].items():
        for rank, others in enumerate(everyone):
            if others[what] != first:
                raise RuntimeError(
                    f"ranks 0 and {rank} differ in {what}: {_first_difference(first, others[what])}. All ranks of process_group "
                    "must attach LoraOver to the same model in the same way, and load its state on every rank; where ranks train "
                    "different models or parts of one (pipelines, several jobs in one world), give each the ranks that train "
                    "the same matrices as process_group="
                )


def choice_of_first(choose: Callable[[], Any], who: str, step: int, group: Any = None) -> Any:
    """What the first rank chooses, on every rank of `group`; an error on every rank where choosing fails on any."""
    choice: Any = None
    failure: Exception | None = None
    try:
        choice = choose()
    except Exception as error:
        failure = error
    outcomes = gather_objects((choice, None if failure is None else repr(failure)), group)
    if failure is not None:
        raise failure
    for rank, (_, problem) in enumerate(outcomes):
        if problem is not None:
            raise RuntimeError(f"{who} failed on rank {rank} at step {step}: {problem}")
    return outcomes[0][0]


def _first_difference(one: Any, other: Any) -> str:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        for a, b in zip_longest(one, other, fillvalue="nothing"):
            if a != b:
                return f"{a} and {b}"
    return f"{one} and {other}"
