"""The matrices that can be trained through cores, and the finder of LoRA's. The one file that knows how PEFT names things.

A pair is any module with `lora_A` and `lora_B` that are `nn.Linear` (our `OverParamAdapter`, or a layer of one's own), or
`nn.ModuleDict` of them by adapter name (PEFT). What is LoRA but cannot be expanded is listed with the reason.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tnadapt.factorizations import Factorization

__all__ = ["Skipped", "TrainedMatrix", "canonical_name", "compiled", "default_group", "find_lora_matrices", "group_of"]

#: Wrappers that put a component into parameter names without being part of the model.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_SIDES = ("A", "B")


class _Weight(NamedTuple):
    path: str  # canonical module path
    adapter: str  # "" for the default adapter
    active: bool
    side: str
    linear: nn.Module
    weight: Any  # a Parameter, but for one that is computed from others
    obstacle: str | None  # why it is not a matrix of a linear layer
    factorization: Factorization | None = None  # of the adapter's own


@dataclass(eq=False)
class TrainedMatrix:
    """A matrix that stays an ordinary parameter of the model, such as LoRA's `A` [r, d_in] or `B` [d_out, r].

    A parameter of more than two dimensions is the matrix of its first one by all others, row-major.

    Attributes:
        name: canonical module path and side, such as `model.layers.0.self_attn.q_proj.A`; for PEFT adapters that are not
            called `default`, the adapter's name stands before the side.
        kind: `"A"` or `"B"`.
        group: matrices that are ranked against each other; by default those whose paths differ in numbers only.
        module: canonical path of the module that owns the pair.
        layer: first number in the path, None where there is none.
        owner: the module that has the parameter.
        attribute: the name of the parameter in that module.
        parameter: the parameter itself, looked up anew after a wrapper has replaced it.
        factorization: how it becomes cores: the one that `LoraOver` was given, or that of its adapter; None before either.
    """

    name: str
    kind: str
    group: str
    module: str
    layer: int | None
    owner: nn.Module = field(repr=False)
    attribute: str = field(repr=False)
    parameter: nn.Parameter = field(repr=False)
    factorization: Factorization | None = field(default=None, repr=False)
    grad_scale: Tensor | None = field(default=None, repr=False)
    #: gives the names of all expanded matrices; set by whoever expands them
    roster: Callable[[], AbstractSet[str]] | None = field(default=None, repr=False)

    @property
    def expanded(self) -> bool:
        """Whether tensor-network cores train it now, or will from the next step on."""
        return self.roster is not None and self.name in self.roster()

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, cols)`."""
        rows, *others = self.parameter.shape
        return rows, math.prod(others)

    @property
    def added_parameters(self) -> int:
        """Numbers that expanding it adds (LoRA-Over, Eq. 6); 0 while it has no factorization."""
        return 0 if self.factorization is None else self.factorization.added_parameters(self.shape)

    @property
    def value(self) -> Tensor:
        """The matrix, detached."""
        return self.parameter.detach()

    @property
    def gradient(self) -> Tensor | None:
        """Gradient of the loss, None where there is none; with the scale of a GradScaler taken out."""
        grad = self.parameter.grad
        if grad is None or self.grad_scale is None:
            return grad
        return grad / self.grad_scale.to(grad.device)


@dataclass(frozen=True)
class Skipped:
    """A LoRA weight that cannot be expanded, and why.

    Attributes:
        is_left_out: whether it is trained as plain LoRA because nothing can expand it; false for weights that are frozen or
            inactive.
        parameter: the weight, for as long as the model has it; None afterwards, and in a plan.
    """

    name: str
    reason: str
    is_left_out: bool = False
    _weight: weakref.ref[nn.Parameter] | None = field(default=None, repr=False, compare=False)

    @property
    def parameter(self) -> nn.Parameter | None:
        return None if self._weight is None else self._weight()


def canonical_name(name: str) -> str:
    """`name` without the parts that DDP, FSDP, `torch.compile`, checkpoint wrappers and PEFT's outer models add.

    >>> canonical_name("module.base_model.model.model.layers.0.mlp")
    'model.layers.0.mlp'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[:1] == ["module"]:
        parts = parts[1:]
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    return ".".join(parts)


def default_group(matrix: TrainedMatrix) -> str:
    """The name of the matrix with its numbers replaced by `*`: matrices of one kind of module and one side are a group. T5's
    encoder, decoder self-attention and cross-attention are different groups, as in the paper."""
    return ".".join("*" if part.isdigit() else part for part in matrix.name.split("."))


def compiled(pattern: str, told: str) -> re.Pattern[str]:
    """A regular expression that a user has given.

    Args:
        told: what is said where it is none.

    Raises:
        ValueError: it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{told} ({error})") from error


def group_of(matrix: TrainedMatrix, groups: Callable[[TrainedMatrix], str] | None) -> str:
    """The group that a user's function gives a matrix; `default_group` without one.

    Raises:
        TypeError: it is no function, or gives something else than a string.
    """
    if groups is None:
        return default_group(matrix)
    if not callable(groups):
        raise TypeError(f"groups={groups!r}: give a function from a TrainedMatrix to the name of its group")
    group = groups(matrix)
    if not isinstance(group, str):
        raise TypeError(f"groups gave {group!r} for {matrix.name}; a group is a string")
    return group


def find_lora_matrices(
    model: nn.Module, groups: Callable[[TrainedMatrix], str] | None = None
) -> tuple[dict[str, TrainedMatrix], list[Skipped]]:
    """All LoRA matrices of `model` that can be expanded, by name and in the order of the model, and those that cannot.

    Args:
        model: any module; PEFT models and `torch.compile`d or DDP-wrapped ones included; the meta device is fine.
        groups: gives each matrix its group, instead of `default_group`.

    Raises:
        TypeError: the model is in the hands of an engine that does not keep parameters whole (FSDP1, DeepSpeed); `groups` is no
            function that gives strings.
    """
    _refuse_engines(model)
    found: dict[str, TrainedMatrix] = {}
    skipped: list[Skipped] = []
    owners: dict[int, str] = {}
    shared = _shared_storage(model)
    for path, adapter, active, side, linear, weight, obstacle, own in _lora_weights(model):
        name = ".".join(part for part in (path, adapter, side) if part)
        reason = None
        if not active:
            reason = f"adapter {adapter or 'default'!r} is not active"
        elif obstacle is not None:
            reason = obstacle
        elif not weight.requires_grad:
            reason = "it is frozen (requires_grad is False)"
        elif weight.dim() != 2:
            reason = f"its parameter has shape {tuple(weight.shape)}, not rows x cols"
        elif id(weight) in owners:
            reason = f"it is the same parameter as {owners[id(weight)]}"
        elif id(weight) in shared:
            reason = f"it shares storage with {shared[id(weight)]} (tied adapters)"
        elif name in found:
            reason = (
                "another matrix has the same name, without what wrappers put into it; rename one of the two modules"
            )
        if reason is not None:
            left_out = active and weight.requires_grad and id(weight) not in owners
            skipped.append(Skipped(name, reason, left_out, weakref.ref(weight)))
            continue
        owners[id(weight)] = name
        layer = next((int(part) for part in path.split(".") if part.isdigit()), None)
        matrix = TrainedMatrix(name, side, "", path, layer, linear, "weight", weight, own)
        matrix.group = group_of(matrix, groups)
        found[name] = matrix
    return found, skipped


def _refuse_engines(model: nn.Module) -> None:
    """Raise TypeError where an engine has flattened parameters, or has taken them over."""
    for module in model.modules():
        names = {base.__name__ for base in type(module).__mro__}
        if "DeepSpeedEngine" in names:
            raise TypeError(
                "the model is a DeepSpeed engine, which flattens and partitions parameters, so LoRA matrices are not whole; "
                "use DistributedDataParallel, or fully_shard (FSDP2)"
            )
        if "FullyShardedDataParallel" in names:
            whole = str(getattr(module, "sharding_strategy", "")).endswith("NO_SHARD")
            if not (whole and getattr(module, "_use_orig_params", False)):
                raise TypeError(
                    "the model is wrapped in FullyShardedDataParallel (FSDP1), which flattens parameters, so LoRA matrices "
                    "are not whole; use torch.distributed.fsdp.fully_shard (FSDP2; fsdp_version 2 in accelerate). With "
                    "ShardingStrategy.NO_SHARD, use_orig_params=True is enough"
                )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise TypeError(
                f"{name} is partitioned by DeepSpeed ZeRO, so LoRA matrices are not whole; use DistributedDataParallel, or "
                "fully_shard (FSDP2)"
            )
        if getattr(parameter, "_is_flat_param", False):
            raise TypeError(
                f"{name} is a FlatParameter of FSDP1, into which LoRA matrices were flattened; use "
                "torch.distributed.fsdp.fully_shard (FSDP2)"
            )


def _lora_weights(model: nn.Module) -> Iterator[_Weight]:
    """Every LoRA weight of the model, expandable or not."""
    for raw_path, module in model.named_modules(remove_duplicate=False):
        path = canonical_name(raw_path)
        pair: tuple[Any, Any] = (getattr(module, "lora_A", None), getattr(module, "lora_B", None))
        if all(isinstance(half, nn.Module) and not isinstance(half, nn.ModuleDict) for half in pair):
            own = getattr(module, "factorization", None)
            for side, half in zip(_SIDES, pair, strict=True):
                for weight in _weight_of(path, "", True, side, half):
                    yield weight._replace(factorization=own.get(side)) if isinstance(own, Mapping) else weight
        elif all(isinstance(half, nn.Parameter) for half in pair):
            for side, half in zip(_SIDES, pair, strict=True):
                obstacle = "it is a bare parameter, not the weight of an nn.Linear called lora_A or lora_B"
                yield _Weight(path, "", True, side, module, half, obstacle)
        elif all(isinstance(half, nn.ModuleDict) for half in pair):
            active = getattr(module, "active_adapters", None)
            for adapter in pair[0]:
                shown = "" if adapter == "default" else adapter
                for side, half in zip(_SIDES, pair, strict=True):
                    if adapter in half:
                        yield from _weight_of(path, shown, active is None or adapter in active, side, half[adapter])
            for side in _SIDES:
                for adapter, weight in (getattr(module, f"lora_embedding_{side}", None) or {}).items():
                    shown = "" if adapter == "default" else adapter
                    reason = "it belongs to an embedding; only linear layers are expanded"
                    yield _Weight(path, shown, active is None or adapter in active, side, module, weight, reason)


def _weight_of(path: str, adapter: str, active: bool, side: str, layer: nn.Module) -> Iterator[_Weight]:
    weight = getattr(layer, "weight", None)
    if isinstance(weight, nn.Parameter):
        reason = None if isinstance(layer, nn.Linear) else f"it belongs to a {type(layer).__name__}, not a linear layer"
        yield _Weight(path, adapter, active, side, layer, weight, reason)
    elif isinstance(weight, Tensor):
        reason = "it is computed from other parameters (a parametrization, a weight norm, pruning)"
        yield _Weight(path, adapter, active, side, layer, weight, reason)


def _shared_storage(model: nn.Module) -> dict[int, str]:
    """id of every parameter whose memory another parameter object uses too -> name of that other one."""
    by_storage: dict[tuple[torch.device, int], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta or type(parameter) is not nn.Parameter or parameter.numel() == 0:
            continue
        by_storage.setdefault((parameter.device, parameter.untyped_storage().data_ptr()), []).append((name, parameter))
    shared: dict[int, str] = {}
    for members in by_storage.values():
        if len(members) > 1:
            for k, (_, parameter) in enumerate(members):
                others = [
                    (name, other) for m, (name, other) in enumerate(members) if m != k and _overlap(parameter, other)
                ]
                if others:
                    shared[id(parameter)] = canonical_name(others[0][0])
    return shared


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage touch the same memory (parameters flattened into one buffer do not)."""

    def span(t: Tensor) -> tuple[int, int]:
        start = int(t.storage_offset())
        return start, start + sum(
            (int(size) - 1) * int(stride) for size, stride in zip(t.shape, t.stride(), strict=True)
        )

    (a, b), (c, d) = span(one), span(other)
    return a <= d and c <= b
