"""Which optimizers can step cores: unwrapping, the table of refused ones, and which work element by element."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["ELEMENTWISE", "REFUSED", "is_elementwise", "unwrap"]

#: class name (of any base of the optimizer's class) -> why it is refused and the way out
REFUSED: dict[str, str] = {
    "LBFGS": "it evaluates the loss several times in one step, and the cores would follow only the first; use AdamW or SGD",
    "SAM": "it steps to a perturbed point and back inside one step; use its base optimizer",
    "ZeroRedundancyOptimizer": "it steps a private copy of the groups, where cores would never move; use FSDP2, or AdamW under DDP",
    "DeepSpeedOptimizerWrapper": "DeepSpeed flattens and partitions parameters, so LoRA matrices are not whole; use FSDP2 or DDP",
    "DeepSpeedZeroOptimizer": "ZeRO flattens and partitions parameters, so LoRA matrices are not whole; use FSDP2 or DDP",
    "DeepSpeedZeroOptimizer_Stage3": "ZeRO flattens and partitions parameters, so LoRA matrices are not whole; use FSDP2 or DDP",
    "Prodigy": "it keeps its step size in the parameter groups, which cores enter for the step only; use AdamW with a tuned rate",
    "LoraFAOptimizer": "it steps pairs by position in its groups and freezes A; use AdamW",
    "RiemannianPreconditionedOptimizer": "it preconditions the gradients of A and B inside its step, after they were pulled back; use its base class",
    "Lomo": "it updates parameters during backward, before there is a step to follow; use AdamW",
    "AdaLomo": "it updates parameters during backward, before there is a step to follow; use AdamW",
}

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


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer itself: accelerate's wrapper has no hooks of its own.

    Raises:
        TypeError: there is no torch optimizer inside, it has no step hooks, or it is refused (see `REFUSED`).
    """
    inner = optimizer.optimizer if type(optimizer).__name__ == "AcceleratedOptimizer" else optimizer
    for base in type(inner).__mro__:
        if base.__name__ in REFUSED:
            raise TypeError(f"{base.__name__} cannot train tensor-network cores: {REFUSED[base.__name__]}")
    if not isinstance(inner, torch.optim.Optimizer) or not hasattr(inner, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"the optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer with step hooks; pass the torch "
            "optimizer that steps the LoRA parameters"
        )
    if callable(getattr(inner, "eval", None)):
        raise TypeError(
            f"{type(inner).__name__} cannot train tensor-network cores: it swaps parameters in train() and eval() "
            "(schedule-free), and the matrices would not follow; use AdamW with a schedule"
        )
    return inner


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether stacked cores may be stepped as one tensor."""
    return type(optimizer) in ELEMENTWISE
