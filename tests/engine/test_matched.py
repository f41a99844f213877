"""Matched steps: every matrix moves exactly as far as the optimizer would have moved it without cores."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tnadapt import CP, MPO, SVD, Factorization, LoraOver, TaylorRuntime, Tucker

from .models import adapters, backward_through, same, trainable, values


class Lion(torch.optim.Optimizer):
    """As third parties write it (Chen et al. 2023): the sign of an interpolation of momentum and gradient."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                parameter.sub_((0.9 * momentum + 0.1 * parameter.grad).sign(), alpha=group["lr"])
                momentum.lerp_(parameter.grad, 0.01)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Lion": lambda p: Lion(p, lr=1e-3),
}
if hasattr(torch.optim, "Muon"):  # torch 2.9 and later
    OPTIMIZERS["Muon"] = lambda p: torch.optim.Muon(p, lr=1e-2)

FACTORIZATIONS: dict[str, Factorization] = {
    "order 2": SVD(),
    "order 4": MPO(order=4),
    "order 9": MPO(order=9),
    "random rotation": MPO(order=4, gauge="random"),
    "Tucker": Tucker(),
    "CP": CP(),
}


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_are_as_long_as_the_optimizers_own(optimizer: str, factorization: str) -> None:
    """The oracle takes each step from where the matrices are, with the optimizer's state of plain matrices."""
    model = adapters(12, 9)
    stepped = OPTIMIZERS[optimizer](trainable(model))
    over = LoraOver(model, stepped, FACTORIZATIONS[factorization], matched=True)
    shadow = copy.deepcopy(model)
    plain = OPTIMIZERS[optimizer](trainable(shadow))
    for _ in range(4):
        before = values(model)
        with torch.no_grad():
            for p, q in zip(trainable(shadow), trainable(model), strict=True):
                p.copy_(q)
        for m, o in ((model, stepped), (shadow, plain)):
            o.zero_grad()
            backward_through(m, 0, 1)
            o.step()
        for name, value in values(model).items():
            wanted = float((values(shadow)[name] - before[name]).norm())
            assert float((value - before[name]).norm()) == pytest.approx(wanted, rel=1e-5), name
        assert over.changed_outside() == ()
    assert not same(values(model), values(shadow)), "the directions differ"


def test_only_what_is_expanded_goes_another_way() -> None:
    def run(matched: bool | None) -> dict[str, Tensor]:
        model = adapters(12, 12)
        optimizer = torch.optim.SGD(trainable(model), lr=1e-2, momentum=0.9)
        if matched is not None:
            over = LoraOver(model, optimizer, SVD(), TaylorRuntime(top_n=9, split=1, every=3), matched=matched)
        for _ in range(2):
            backward_through(model, 0, 1)
            optimizer.step()
            optimizer.zero_grad()
        assert matched is None or over.expanded == ()
        return values(model)

    assert same(run(True), run(None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_up_to_rounding(dtype: torch.dtype) -> None:
    model = adapters(12, 12).to(dtype)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-1)
    over = LoraOver(model, optimizer, MPO(order=4), matched=True)
    for layer in model:
        layer(torch.ones(2, 12, dtype=dtype)).float().square().mean().backward()
    lengths = {n: 1e-1 * float(m.parameter.grad.float().norm()) for n, m in over.matrices.items()}  # type: ignore[union-attr]
    optimizer.step()
    rounding = 4 * torch.finfo(dtype).eps * max(float(p.detach().float().norm()) for p in trainable(model))
    for name, norm in over.update_norms().items():
        assert math.isclose(norm, lengths[name], rel_tol=1e-4, abs_tol=rounding), name


@pytest.mark.parametrize("saved", [1, 3, 5])
def test_a_run_that_is_resumed_ends_with_the_same_bits(saved: int) -> None:
    def start() -> tuple[nn.ModuleList, torch.optim.Optimizer, LoraOver]:
        model = adapters(12, 12)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        return model, optimizer, LoraOver(model, optimizer, MPO(order=4), TaylorRuntime(9, 2, 2), matched=True)

    def train(model: nn.ModuleList, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            backward_through(model, 0, 1)
            optimizer.step()

    model, optimizer, over = start()
    train(model, optimizer, saved)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 4)
    other, its_optimizer, its_over = start()
    other.load_state_dict(kept[0])
    its_optimizer.load_state_dict(kept[1])
    train(other, its_optimizer, 4)
    assert same(values(model), values(other))
    assert its_over.history == over.history


def test_settings_without_effect_are_refused() -> None:
    model = adapters(12)
    optimizer = torch.optim.AdamW(trainable(model))
    for setting in ({"core_lr": 1e-3}, {"core_weight_decay": 0.1}, {"max_update": 1.0}):
        with pytest.raises(ValueError, match="matched=True takes the length of every step from the optimizer"):
            LoraOver(model, optimizer, SVD(), matched=True, **setting)
