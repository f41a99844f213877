"""`max_update`, for gradients of any size: a step beyond the cap ends at the cap, one within it is not touched."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tnadapt import MPO, LoraOver

from .machine import Stack, backward, matrix_parameters
from .plans import Setting

RATE = 1e-2


def moved(order: int, optimizer_class: Any, size: float, cap: float | None) -> dict[str, Tensor]:
    """How far every matrix is moved by one step of gradients that are `size` times those of the loss."""
    model = Stack(Setting())
    matrices = matrix_parameters(model)
    optimizer = optimizer_class(list(matrices.values()), lr=RATE)
    LoraOver(model, optimizer, MPO(order=order), max_update=cap)
    backward(model, 1, None)
    for parameter in matrices.values():
        assert parameter.grad is not None
        parameter.grad *= size
    before = {name: p.detach().clone() for name, p in matrices.items()}
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in matrices.items()}


# the search for a smaller example takes longer than the suite may
@settings(phases=(Phase.explicit, Phase.generate))
@example(order=4, optimizer_class=torch.optim.SGD, size=1e4, cap=1.0)
@example(order=9, optimizer_class=torch.optim.SGD, size=1e6, cap=1.0)
@given(
    order=st.sampled_from([2, 3, 4, 6, 9]),
    optimizer_class=st.sampled_from([torch.optim.SGD, torch.optim.AdamW]),
    size=st.floats(-4, 6).map(lambda exponent: 10.0**exponent),
    cap=st.sampled_from([0.01, 0.3, 1.0, 5.0]),
)
def test_a_step_beyond_the_cap_ends_at_the_cap(order: int, optimizer_class: Any, size: float, cap: float) -> None:
    free, capped = (moved(order, optimizer_class, size, each) for each in (None, cap))
    for name, update in capped.items():
        limit = cap * RATE * math.sqrt(update.numel())
        if float(free[name].norm()) <= limit:
            assert torch.equal(update, free[name]), f"the step of {name} is within the cap, and was changed"
        else:
            assert abs(float(update.norm()) - limit) <= 0.01 * limit, (
                f"{name} moved {float(update.norm())}, not {limit}"
            )
