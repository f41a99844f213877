"""What is refused, and with which words: arguments, optimizers that cannot step cores, and matrices that cannot be trained
through them."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.engine.ranks import local, obstacle_to_gathering
from tnadapt.factorizations import Factorization
from tnadapt.matrices import Skipped, TrainedMatrix
from tnadapt.schedulers import Scheduler

__all__ = [
    "ELEMENTWISE",
    "REFUSED",
    "check_factorization",
    "check_matrices",
    "check_model",
    "check_rates",
    "check_scheduler",
    "check_switches",
    "checked_choice",
    "checked_names",
    "checked_release",
    "is_elementwise",
    "lost",
    "plain_number",
    "require_same_place",
    "shown",
    "unwrap",
]

_STATE_IN_GROUPS = (
    "it keeps its step size in the parameter groups, which cores enter for the step only; use AdamW with a tuned rate"
)
_PARTITIONED = "ZeRO flattens and partitions parameters, so no matrix is whole; use FSDP2 or DDP"
_IN_BACKWARD = "it updates parameters during backward, before there is a step to follow; use AdamW"

#: class name (of any base of the optimizer's class) -> why it is refused and the way out
REFUSED: dict[str, str] = {
    "LBFGS": "it evaluates the loss several times in one step, and the cores would follow only the first; use AdamW or SGD",
    "SAM": "it steps to a perturbed point and back inside one step; use its base optimizer",
    "ZeroRedundancyOptimizer": "it steps a private copy of the groups, where cores would never move; use FSDP2, or AdamW under DDP",
    "DeepSpeedOptimizerWrapper": "DeepSpeed flattens and partitions parameters, so no matrix is whole; use FSDP2 or DDP",
    "DeepSpeedZeroOptimizer": _PARTITIONED,
    "DeepSpeedZeroOptimizer_Stage3": _PARTITIONED,
    "Prodigy": _STATE_IN_GROUPS,
    **{f"DAdapt{kind}": _STATE_IN_GROUPS for kind in ("AdaGrad", "Adam", "AdamPreprint", "Adan", "Lion", "SGD")},
    "LoraFAOptimizer": "it steps pairs by position in its groups and freezes A; use AdamW",
    "RiemannianPreconditionedOptimizer": "it preconditions the gradients of A and B inside its step, after they were pulled back; use its base class",
    "Lomo": _IN_BACKWARD,
    "AdaLomo": _IN_BACKWARD,
}
if torch.__version__ < "2.12":
    REFUSED["Adagrad"] = (
        "before torch 2.12 it makes the state of its parameters in its constructor alone, and cores come later; "
        "update torch, or use AdamW"
    )

#: Exact classes (not their subclasses) whose update of an element depends on that element alone, so that stacked cores
#: train as separate ones do.
ELEMENTWISE: frozenset[type[torch.optim.Optimizer]] = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.ASGD,
    }
)

#: wrappers of trainers around the optimizer that steps, which is their attribute `optimizer`
_WRAPPERS = ("AcceleratedOptimizer", "LightningOptimizer")


def shown(names: Iterable[str], limit: int = 3) -> str:
    """The first of `names` and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return (", ".join(listed[:limit]) or "nothing") + more


# -- arguments --------------------------------------------------------------------------------------------------------


def _described(value: object) -> str:
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    return repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"


def check_model(model: object) -> None:
    """Raise TypeError for anything but a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {_described(model)}; pass the torch.nn.Module that has the adapters")


def check_factorization(factorization: object) -> None:
    """Raise TypeError for anything but a factorization, a mapping to factorizations, a function that gives them, or None."""
    if isinstance(factorization, Mapping):
        for key, entry in factorization.items():
            if not isinstance(key, str):
                raise TypeError(f"factorization has the key {key!r}; keys are groups, or patterns of names")
            if not isinstance(entry, Factorization):
                raise TypeError(
                    f"factorization[{key!r}] is {_described(entry)}; pass one, such as MPO(order=9) or SVD()"
                )
        return
    if factorization is None or isinstance(factorization, Factorization):
        return
    if callable(factorization) and not inspect.isclass(factorization) and not isinstance(factorization, Scheduler):
        return
    if isinstance(factorization, Scheduler):
        hint = "that is a scheduler, which comes after it: LoraOver(model, optimizer, factorization, scheduler)"
    elif inspect.isclass(factorization) and issubclass(factorization, Factorization):
        hint = f"make one, such as {factorization.__name__}({'' if factorization.__name__ == 'SVD' else 'order=…'})"
    else:
        hint = "pass one, such as MPO(order=9) or SVD()"
    raise TypeError(f"factorization is {_described(factorization)}; {hint}")


def check_scheduler(scheduler: object) -> None:
    """Raise TypeError for anything but an instance of a scheduler."""
    if isinstance(scheduler, Scheduler):
        return
    if isinstance(scheduler, Factorization):
        hint = "that is a factorization, which comes before it: LoraOver(model, optimizer, factorization, scheduler)"
    elif inspect.isclass(scheduler) and issubclass(scheduler, Scheduler):
        hint = f"make one, such as {scheduler.__name__}(…)"
    else:
        hint = "pass one, such as Static() or TaylorRuntime(top_n=9, split=8, every=5)"
    raise TypeError(f"scheduler is {_described(scheduler)}; {hint}")


def check_switches(**switches: object) -> None:
    """Raise TypeError for a switch that is not True or False: a text such as "no" would switch it on."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {_described(value)}; pass True or False")


def plain_number(name: str, value: Any) -> float | None:
    """A hyper-parameter as Python's own float. It goes into checkpoints, and those with a number of NumPy in them cannot be read by
    `torch.load(weights_only=True)`.

    Raises:
        TypeError: it is not a number.
        ValueError: it is infinite.
    """
    if value is None:
        return None
    scalar = isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()
    if isinstance(value, bool) or not (scalar or isinstance(value, numbers.Real)):
        raise TypeError(f"{name}={value!r}: give a number, or leave it out")
    number = float(value)
    if math.isinf(number):
        raise ValueError(f"{name}={value!r} is infinite; give a finite number, or leave it out")
    return number


def check_rates(
    optimizer: torch.optim.Optimizer,
    core_lr: float | None,
    core_weight_decay: float | None,
    max_update: float | None,
    matched: bool,
) -> None:
    """Raise ValueError for hyper-parameters of the cores that cannot work with the optimizer."""
    kind = type(optimizer).__name__
    if core_lr is not None:
        if not core_lr > 0:
            raise ValueError(f"core_lr={core_lr!r} must be positive; leave it out to train cores at the matrices' rate")
        if any(group.get("lr") is None for group in optimizer.param_groups):
            raise ValueError(
                f"core_lr is relative to the learning rate, which {kind} sets itself (lr=None); give it one"
            )
    if core_weight_decay is not None:
        if not core_weight_decay >= 0:
            raise ValueError(f"core_weight_decay={core_weight_decay!r} must not be negative")
        if "weight_decay" not in optimizer.defaults:
            raise ValueError(f"core_weight_decay is set, but {kind} has no weight_decay")
    if matched and (core_lr, core_weight_decay, max_update) != (None, None, None):
        raise ValueError(
            "matched=True takes the length of every step from the optimizer; drop core_lr, core_weight_decay and max_update, which "
            "would have no effect on it"
        )
    if max_update is not None:
        if not max_update > 0:
            raise ValueError(f"max_update={max_update!r} must be positive, or None for no cap")
        if any(group.get("lr") is None for group in optimizer.param_groups):
            raise ValueError(
                f"max_update is relative to the learning rate, which {kind} sets itself (lr=None); give it one"
            )


# -- optimizers -------------------------------------------------------------------------------------------------------


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer itself: the wrappers of accelerate and Lightning have no hooks of their own.

    Raises:
        TypeError: there is no torch optimizer inside, it has no step hooks, or it is refused (see `REFUSED`).
    """
    inner = optimizer
    while any(base.__name__ in _WRAPPERS for base in type(inner).__mro__) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    for base in type(inner).__mro__:
        if base.__name__ in REFUSED:
            raise TypeError(f"{base.__name__} cannot train tensor-network cores: {REFUSED[base.__name__]}")
    kind = type(inner).__name__
    if not isinstance(inner, torch.optim.Optimizer) or not hasattr(inner, "_optimizer_step_pre_hooks"):
        for name in ("optimizer", "base_optimizer", "_optimizer"):
            if isinstance(getattr(inner, name, None), torch.optim.Optimizer):
                raise TypeError(
                    f"{kind} wraps another optimizer and has no step hooks of its own: attach to the inner one, its "
                    f"attribute {name!r}, and step the wrapper as before"
                )
        raise TypeError(
            f"optimizer is {_described(optimizer)}, not a torch.optim.Optimizer with step hooks; pass the torch optimizer that "
            "steps the matrices"
        )
    if callable(getattr(inner, "eval", None)):
        raise TypeError(
            f"{kind} cannot train tensor-network cores: it swaps parameters in train() and eval() (schedule-free), and the "
            "matrices would not follow; use AdamW with a schedule"
        )
    return inner


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether stacked cores may be stepped as one tensor."""
    return type(optimizer) in ELEMENTWISE


# -- matrices ---------------------------------------------------------------------------------------------------------


def check_matrices(
    model: nn.Module,
    matrices: Mapping[str, TrainedMatrix],
    skipped: Sequence[Skipped],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Raise where there are no matrices to train through cores, or the optimizer does not step them as they are."""
    if not matrices:
        raise ValueError(f"the model has no LoRA matrices that can be expanded{_why_none(model, skipped)}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, matrix in matrices.items() if id(matrix.parameter) not in held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold {len(missing)} of {len(matrices)} matrices, such as {shown(missing)}; make it "
            "from [p for p in model.parameters() if p.requires_grad] after the adapters are in place"
        )
    for name, matrix in matrices.items():
        obstacle = obstacle_to_gathering(matrix.parameter)
        if obstacle is not None:
            raise TypeError(f"{name} cannot be trained through cores: {obstacle}")
    in_backward = [n for n, m in matrices.items() if getattr(m.parameter, "_in_backward_optimizers", None)]
    if in_backward:
        raise TypeError(
            f"{shown(in_backward)} is stepped by an optimizer in backward, before gradients could be pulled back; "
            "step the optimizer in the loop instead"
        )
    broken = [
        n for n, m in matrices.items() if not m.parameter.is_meta and not bool(torch.isfinite(local(m.parameter)).all())
    ]
    if broken:
        raise ValueError(f"{shown(broken)} holds NaN or infinity; load a good adapter before attaching")


def _why_none(model: nn.Module, skipped: Sequence[Skipped]) -> str:
    if skipped:
        return f" ({'; '.join(f'{s.name}: {s.reason}' for s in skipped[:3])}): add adapters first, or wake those that are there"
    configs = getattr(model, "peft_config", None)
    kinds = sorted({str(getattr(c, "peft_type", "")).rpartition(".")[2] for c in configs.values()}) if configs else []
    if kinds:
        return (
            f": {' and '.join(kinds)} has no pairs of linear layers lora_A and lora_B; use a tuner of PEFT that has, such as "
            "LoraConfig"
        )
    return ": add adapters first, with peft.get_peft_model or OverParamAdapter.from_linear"


def lost(matrix: TrainedMatrix, taken_out: bool = False) -> str:
    """What to say of a matrix whose parameter the optimizer does not hold any more.

    Args:
        taken_out: whether it is the parameter that the optimizer held at the attachment.
    """
    if taken_out:
        return (
            f"the parameter of {matrix.name} was taken out of the optimizer's groups after LoraOver was attached. Leave it there "
            "and freeze it, with requires_grad_(False) and no gradient, or attach LoraOver anew to what is to be trained"
        )
    return (
        f"the optimizer does not hold the parameter of {matrix.name} any more: it was replaced after LoraOver was attached "
        "(load_adapter with low_cpu_mem_usage=True does that). Make a new optimizer of the model's present parameters and "
        "attach LoraOver to it"
    )


def require_same_place(matrix: TrainedMatrix, parameter: nn.Parameter, held: bool) -> None:
    """Raise RuntimeError where a parameter cannot stand in for the one that the matrix had at the attachment."""
    obstacle = obstacle_to_gathering(parameter)
    if parameter.dim() < 2:
        obstacle = f"its shape is {tuple(parameter.shape)} (FSDP1 flattens parameters; use fully_shard, which is FSDP2)"
    elif parameter.shape != matrix.parameter.shape:
        obstacle = f"its shape is {tuple(parameter.shape)}, and was {tuple(matrix.parameter.shape)}"
    if obstacle is not None:
        raise RuntimeError(
            f"the parameter of {matrix.name} was replaced since LoraOver was attached: {obstacle}. Attach LoraOver to the "
            "model as it is trained"
        )
    if not held:
        raise RuntimeError(lost(matrix, taken_out=parameter is matrix.parameter))


# -- what a scheduler chose -------------------------------------------------------------------------------------------


def checked_names(names: object, what: str) -> list[str]:
    """Names, each once and in their order; TypeError for anything else. A text is one name, and not the names of its letters."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"{what} is {_described(names)}; give names of matrices in a list, such as ['q_proj.A']")
    listed = list(names)
    for name in listed:
        if not isinstance(name, str):
            raise TypeError(
                f"{what} has {_described(name)} among the names; give those of matrices, such as 'q_proj.A'"
            )
    return list(dict.fromkeys(listed))


def checked_choice(chosen: Iterable[str], matrices: Mapping[str, TrainedMatrix], scheduler: Scheduler) -> list[str]:
    """Names to expand, each once; ValueError for one that is not a matrix, or is expanded already."""
    names = list(dict.fromkeys(chosen))
    strangers = [name for name in names if name not in matrices]
    if strangers:
        raise ValueError(f"{scheduler.label} selected {shown(strangers)}, which is not among {shown(list(matrices))}")
    again = [name for name in names if matrices[name].expanded]
    if again:
        raise ValueError(f"{scheduler.label} selected {shown(again)}, which is expanded already")
    return names


def checked_release(chosen: Iterable[str], matrices: Mapping[str, TrainedMatrix], scheduler: Scheduler) -> list[str]:
    """Names to fold back, each once; ValueError for one that is not expanded."""
    names = list(dict.fromkeys(chosen))
    strangers = [name for name in names if name not in matrices or not matrices[name].expanded]
    if strangers:
        raise ValueError(f"{scheduler.label} released {shown(strangers)}, which is not expanded")
    return names
