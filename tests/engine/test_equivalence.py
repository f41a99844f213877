"""What LoraOver trains is what plain autograd trains straight through the cores.

The oracle holds the cores as leaves of the autograd graph and contracts them by Eq. 3 inside every forward pass. It uses
nothing of tnadapt; it only takes the cores of a matrix at the moment of its expansion (they are not unique), and checks
that they contract to the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import contract_mpo, paper_sites, square_view
from torch import Tensor, nn

from tnadapt import MPO, LoraOver, Static, TaylorRuntime
from tnadapt.engine.checks import REFUSED

from .models import backward, largest_difference, llama, loss_of, tokens, values, when_lent

STEPS = 15


def bond_dimensions(rows: int, cols: int, order: int) -> list[int]:
    """Eq. 4 for the paper's split: near-square factors at the ends, 1x1 sites between."""
    modes = [i * j for i, j in paper_sites(rows, cols, order)]
    return [min(math.prod(modes[:k]), math.prod(modes[k:])) for k in range(order + 1)]


class Oracle:
    """Trains the cores by autograd through their contraction; matrices that are not expanded as they are."""

    def __init__(self, make: Callable[[nn.Module], Any], ratio: float, decay: float | None, as_matrices: bool) -> None:
        self.model = llama(torch.float64)
        self.optimizer = make(self.model)
        self.groups = list(self.optimizer.param_groups)
        self.ratio, self.decay, self.as_matrices = ratio, decay, as_matrices
        self.cores: dict[str, list[nn.Parameter]] = {}
        self.shapes: dict[str, list[torch.Size]] = {}
        self.core_groups: dict[str, int] = {}
        self.parameters = dict(self.model.named_parameters())

    def expand(self, name: str, cores: list[Tensor], states: list[dict[str, Any]]) -> None:
        matrix = self.parameters[name]
        assert torch.allclose(contract_mpo(cores), matrix, rtol=0, atol=1e-12)
        index = next(k for k, group in enumerate(self.groups) if any(p is matrix for p in group["params"]))
        leaves = [
            nn.Parameter(core.detach().clone().reshape(square_view(core.shape) if self.as_matrices else core.shape))
            for core in cores
        ]
        hyper = {key: value for key, value in self.groups[index].items() if key not in ("params", "param_names")}
        if self.decay is not None:
            hyper["weight_decay"] = self.decay
        self.optimizer.add_param_group({**hyper, "params": leaves})
        for leaf, state in zip(leaves, states, strict=True):
            if state:
                self.optimizer.state[leaf] = {
                    k: v.view_as(leaf) if v.numel() == leaf.numel() else v for k, v in state.items()
                }
        self.core_groups[name] = index
        self.cores[name], self.shapes[name] = leaves, [core.shape for core in cores]

    def matrices(self) -> dict[str, Tensor]:
        return {
            name: contract_mpo([leaf.reshape(shape) for leaf, shape in zip(leaves, self.shapes[name], strict=True)])
            for name, leaves in self.cores.items()
        }

    def step(self, step: int, rate: float) -> None:
        for group, base in zip(self.groups, self.rates, strict=True):
            group["lr"] = base * rate
        for added, index in zip(
            self.optimizer.param_groups[len(self.groups) :], self.core_groups.values(), strict=True
        ):
            added["lr"] = self.groups[index]["lr"] * self.ratio
        self.optimizer.zero_grad()
        ids = tokens(step)
        loss_of(torch.func.functional_call(self.model, self.matrices(), (), {"input_ids": ids}).logits, ids).backward()
        self.optimizer.step()

    def values(self) -> dict[str, Tensor]:
        return {**values(self.model), **{name: matrix.detach() for name, matrix in self.matrices().items()}}


def parameter_name(name: str) -> str:
    return f"base_model.model.{name[:-2]}.lora_{name[-1]}.default.weight"


def check(
    make: Callable[[nn.Module], Any],
    make_reference: Callable[[nn.Module], Any] | None = None,
    *,
    order: int = 4,
    scheduler: Any = None,
    core_lr: float | None = None,
    decay: float | None = None,
    as_matrices: bool = False,
    handover: str = "restart",
    steps: int = STEPS,
) -> LoraOver:
    """Train by LoraOver, by the oracle and as plain LoRA, and compare."""
    make_reference = make_reference or make
    model, plain = llama(torch.float64), llama(torch.float64)
    optimizer, plain_optimizer = make(model), make_reference(plain)
    over = LoraOver(
        model,
        optimizer,
        MPO(order=order),
        scheduler or TaylorRuntime(top_n=2, split=2, every=4),
        core_lr=core_lr,
        core_weight_decay=decay,
        handover=handover,
    )
    ratio = 1.0 if core_lr is None else core_lr / optimizer.defaults["lr"]
    oracle = Oracle(make_reference, ratio, decay, as_matrices)
    rates = [group["lr"] for group in optimizer.param_groups]
    oracle.rates = rates
    taken: dict[str, tuple[list[Tensor], list[dict[str, Any]]]] = {}

    warm: list[bool] = []

    def take(*_: Any) -> None:
        # cores as they are when the optimizer is about to step them
        for name, entry in over.state_dict()["cores"].items():
            if parameter_name(name) not in oracle.cores:
                states = [{k: v.clone() for k, v in state.items()} for state in entry["state"]]
                taken[parameter_name(name)] = ([core.clone() for core in entry["cores"]], states)
                warm.extend(bool(state) for state in states)

    when_lent(over, take)
    for step in range(1, steps + 1):
        rate = 1 - 0.03 * step  # a learning-rate schedule
        for name, stepped in (("over", optimizer), ("plain", plain_optimizer)):
            for group, base in zip(stepped.param_groups, rates, strict=True):
                group["lr"] = base * rate
            stepped.zero_grad()
            backward(model if name == "over" else plain, step)
            stepped.step()
        expected = {name for event in over.history if event.step in (0, step) for name in event.names}
        assert {parameter_name(name) for name in expected if parameter_name(name) not in oracle.cores} == taken.keys()
        for name, (cores, states) in taken.items():
            rows, cols = oracle.parameters[name].shape
            assert [core.shape[0] for core in cores] == bond_dimensions(rows, cols, order)[:-1]
            oracle.expand(name, cores, states)
        taken.clear()
        oracle.step(step, rate)
    assert oracle.cores
    assert any(warm) == (handover == "warm")
    assert largest_difference(values(model), oracle.values()) < 1e-9
    assert largest_difference(values(model), values(plain)) > 1e-4
    return over


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("order", [2, 4, 7, 16])
@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
def test_adamw_with_an_expansion_in_mid_run(implementation, order):
    flags = {"foreach": implementation == "foreach", "fused": implementation == "fused"}
    over = check(
        lambda model: torch.optim.AdamW(parameters(model), lr=3e-3, weight_decay=0.1, **flags),
        lambda model: torch.optim.AdamW(parameters(model), lr=3e-3, weight_decay=0.1, foreach=False, fused=False),
        order=order,
    )
    shapes = {over.matrices[name].shape for name in over.expanded}
    assert len(shapes) >= 2, "several cohorts"
    assert [event.step for event in over.history] == [4, 8]
    assert len(over.expanded) == len(over.matrices) == 28


@pytest.mark.parametrize("order", [2, 7])
def test_every_matrix_from_the_start(order):
    check(
        lambda model: torch.optim.AdamW(parameters(model), lr=3e-3, weight_decay=0.1), order=order, scheduler=Static()
    )


def lora_plus(model: nn.Module) -> torch.optim.Optimizer:
    """B learns eight times faster and decays more."""
    sides = {side: [p for name, p in model.named_parameters() if f"lora_{side}" in name] for side in "AB"}
    groups = [{"params": sides["A"]}, {"params": sides["B"], "lr": 8e-3, "weight_decay": 0.3}]
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)


def test_rates_of_groups_times_the_ratio_of_core_lr():
    check(lora_plus, core_lr=2e-3)


def test_weight_decay_of_the_cores():
    check(lora_plus, decay=0.5, steps=10)


SGD = torch.optim.SGD
ELEMENTWISE = {
    "SGD": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD-plain": lambda p: SGD(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02, lr_decay=0.01, initial_accumulator_value=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=3e-3, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=3e-3),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=3e-3),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "AMSGrad": lambda p: torch.optim.AdamW(p, lr=3e-3, amsgrad=True),
}

for refused in REFUSED.keys() & ELEMENTWISE.keys():  # Adagrad, before torch 2.12
    del ELEMENTWISE[refused]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_optimizers(name):
    check(lambda model: ELEMENTWISE[name](parameters(model)), steps=11)


SHAPED = {
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=5e-3, weight_decay=0.1),
}
if hasattr(torch.optim, "Muon"):  # torch 2.9 and later
    SHAPED["Muon"] = lambda p: torch.optim.Muon(p, lr=5e-3, weight_decay=0.1)


@pytest.mark.parametrize("name", SHAPED)
def test_optimizers_that_look_at_shapes(name):
    check(lambda model: SHAPED[name](parameters(model)), as_matrices=True, steps=11)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_cores_that_are_handed_optimizer_state(name):
    """The oracle takes what the cores are handed at expansion, and goes on from there by itself."""
    made = {**ELEMENTWISE, "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1)}[name]
    check(lambda model: made(parameters(model)), handover="warm", order=7, steps=11)
