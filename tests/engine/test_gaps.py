"""Details of the engine that the other tests do not look at."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from tnadapt import MPO, SVD, Factorization, LoraOver, Scheduler, TrainedMatrix

from .models import adapters, backward_through, everything, same, trainable

Attached = tuple[nn.ModuleList, torch.optim.Optimizer, LoraOver]


def after_a_step(optimizer_type: Callable[..., torch.optim.Optimizer], factorization: Factorization) -> Attached:
    """One expanded adapter that was stepped; its gradients are kept."""
    model = adapters(12)
    optimizer = optimizer_type(trainable(model), lr=1e-2)
    over = LoraOver(model, optimizer, factorization)
    backward_through(model, 0)
    optimizer.step()
    return model, optimizer, over


def half_residual(entry: dict[str, Any]) -> None:
    entry["residual"] = entry["residual"][:1].clone()


def nan_residual(entry: dict[str, Any]) -> None:
    entry["residual"] = entry["residual"] * float("nan")


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no residual": (lambda entry: entry.update(residual=None), "residual of 0.A is damaged"),
    "residual shape": (half_residual, "residual of 0.A is damaged"),
    "residual NaN": (nan_residual, "residual of 0.A is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_members_are_refused(damage: str) -> None:
    model, optimizer, over = after_a_step(torch.optim.AdamW, SVD(max_bond=2))
    state = copy.deepcopy(over.state_dict())
    spoil, said = DAMAGE[damage]
    spoil(state["cores"]["0.A"])
    before = everything(model, optimizer, over)
    with pytest.raises(ValueError, match=said):
        over.load_state_dict(state)
    after = everything(model, optimizer, over)
    assert all(same(value, after[key]) for key, value in before.items())


def test_what_is_within_the_limit_goes_its_own_way() -> None:
    """Of two matrices of one cohort one is shortened, and the other goes where it goes without a limit."""

    def run(limit: float | None) -> tuple[nn.ModuleList, LoraOver]:
        model = adapters(12, 12)
        optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
        over = LoraOver(model, optimizer, MPO(order=3), max_update=limit)
        generator = torch.Generator().manual_seed(0)
        for k, layer in enumerate(model):
            for parameter in (layer.lora_A.weight, layer.lora_B.weight):
                parameter.grad = (1e-2, 1.0)[k] * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        return model, over

    free, unlimited = run(None)
    norms = unlimited.update_norms()
    slow, fast = max(norms["0.A"], norms["0.B"]), min(norms["1.A"], norms["1.B"])
    assert 2 * slow < fast / 2, "the matrices differ"
    limit = 1.5 * slow / (1e-2 * math.sqrt(48))
    model, over = run(limit)
    assert len(over._expanded.now.cohorts) == 1
    for name in ("1.A", "1.B"):
        assert over.update_norms()[name] == pytest.approx(1.5 * slow, rel=2e-3)
    for name in ("lora_A", "lora_B"):
        assert torch.allclose(getattr(model[0], name).weight, getattr(free[0], name).weight, rtol=1e-12, atol=1e-14)


def test_a_state_that_was_loaded_is_not_trained() -> None:
    """Entries that are not of the cores' size too, as Adafactor's rows and columns."""
    _, optimizer, over = after_a_step(torch.optim.Adafactor, MPO(order=3))
    state = copy.deepcopy(over.state_dict())
    kept = copy.deepcopy(state)
    assert "row_var" in state["cores"]["0.A"]["state"][0]
    over.load_state_dict(state)
    optimizer.step()
    assert not same(over.state_dict(), kept)
    assert same(state, kept)


def test_an_optimizer_may_keep_gradients_without_copying_them() -> None:
    """Their memory is not used for those of the next step."""

    class Averaged(torch.optim.Optimizer):
        """Steps along the mean of this gradient and the last one."""

        def __init__(self, parameters: list[nn.Parameter], copies: bool) -> None:
            super().__init__(parameters, {"lr": 1e-2})
            self.copies = copies

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    last = self.state[parameter].get("last", torch.zeros_like(parameter))
                    parameter.sub_((parameter.grad + last) / 2, alpha=group["lr"])
                    self.state[parameter]["last"] = parameter.grad.clone() if self.copies else parameter.grad

    def run(copies: bool) -> nn.ModuleList:
        model = adapters(12)
        optimizer = Averaged(trainable(model), copies)
        over = LoraOver(model, optimizer, MPO(order=3))
        for _ in range(4):
            backward_through(model, 0)
            optimizer.step()
            optimizer.zero_grad()
        assert len(over.expanded) == 2
        return model

    assert all(map(torch.equal, run(False).parameters(), run(True).parameters()))


def test_updates_are_of_what_is_expanded() -> None:
    _, _, over = after_a_step(torch.optim.AdamW, MPO(order=3))
    assert set(over.update_norms()) == {"0.A", "0.B"}
    over.fold(["0.A"])
    assert set(over.update_norms()) == {"0.B"}
    over.load_state_dict(copy.deepcopy(over.state_dict()))
    assert over.update_norms() == {}


class Never(Scheduler):
    """Expands nothing."""

    def select(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> Iterable[str]:
        return ()


def test_large_gradients_are_finite() -> None:
    """Their squares may not be."""
    model = adapters(12)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-200)
    over = LoraOver(model, optimizer, MPO(order=3), Never())
    for parameter in (model[0].lora_A.weight, model[0].lora_B.weight):
        parameter.grad = torch.full_like(parameter, 1e200)
    optimizer.step()
    assert over.step == 1
