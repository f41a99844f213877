"""What is checked before anything is attached, and how an optimizer that loads in its own way is followed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from tnadapt.engine.tensors import local, obstacle_to_gathering
from tnadapt.lora_matrices import LoraMatrix, Skipped

__all__ = ["WrappedLoading", "check_matrices", "check_rates", "shown"]


def check_matrices(
    matrices: Mapping[str, LoraMatrix], skipped: list[Skipped], optimizer: torch.optim.Optimizer
) -> None:
    """Raise where there are no matrices to train through cores, or the optimizer does not step them as they are."""
    if not matrices:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:3])
        raise ValueError(
            "the model has no LoRA matrices that can be expanded"
            + (f" ({reasons})" if reasons else "")
            + ": add adapters first, with peft.get_peft_model or OverParamAdapter.from_linear"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, matrix in matrices.items() if id(matrix.parameter) not in held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold {len(missing)} of {len(matrices)} LoRA matrices, such as {shown(missing)}; make it "
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


def check_rates(optimizer: torch.optim.Optimizer, core_lr: float | None, core_weight_decay: float | None) -> None:
    """Raise ValueError for a rate or decay of the cores that cannot work with the optimizer."""
    base = optimizer.defaults.get("lr")
    if core_lr is not None:
        if not core_lr > 0:
            raise ValueError(f"core_lr={core_lr!r} must be positive; leave it out to train cores at the matrices' rate")
        if base is None or not float(base) > 0:
            raise ValueError(
                f"core_lr is relative to optimizer.defaults['lr'], which is {base!r}; make the optimizer with a positive lr"
            )
    if core_weight_decay is not None:
        if not core_weight_decay >= 0:
            raise ValueError(f"core_weight_decay={core_weight_decay!r} must not be negative")
        if "weight_decay" not in optimizer.defaults:
            raise ValueError(f"core_weight_decay is set, but {type(optimizer).__name__} has no weight_decay")


class WrappedLoading:
    """The loading hooks of an optimizer whose class loads in its own way and may not call torch's hooks (bitsandbytes)."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        before: Callable[[Any, dict[str, Any]], dict[str, Any]],
        after: Callable[[Any], None],
    ) -> None:
        self._optimizer = optimizer
        original = optimizer.load_state_dict

        def load_state_dict(state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            original(before(optimizer, state_dict), *args, **kwargs)
            after(optimizer)

        optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the optimizer its own method back."""
        vars(self._optimizer).pop("load_state_dict", None)


def shown(names: Iterable[str], limit: int = 3) -> str:
    """The first of `names` and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return (", ".join(listed[:limit]) or "nothing") + more
