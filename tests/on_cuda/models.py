"""A small model, its batches and optimizers, the same at every call and on every device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt import MPO, LoraOver, OverParamAdapter, TaylorRuntime

WIDTH, RANK, LAYERS, ROWS, ORDER = 24, 4, 2, 6, 4


class Net(nn.Module):
    """Adapters of one width, one after the other."""

    def __init__(self, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(0)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            base = nn.Linear(width, width, device="cpu")
            adapter = OverParamAdapter.from_linear(base, rank=RANK, alpha=8)
            for parameter in adapter.parameters():
                nn.init.normal_(parameter, std=0.3, generator=generator)
            self.layers.append(adapter)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def net(device: str, dtype: torch.dtype = torch.float32) -> Net:
    return Net().to(device, dtype)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def values(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, on the CPU."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def inputs(step: int, like: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(100 + step)
    return torch.randn(ROWS, WIDTH, generator=generator, device="cpu").to(like)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.flip(-1)).square().mean()


FORMS: dict[str, dict[str, bool]] = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True, "foreach": True},
}


def adamw(parameters: Iterable[nn.Parameter], form: str = "fused", lr: float = 1e-2) -> torch.optim.AdamW:
    """`eps` is large, so that the sign of a gradient of the size of rounding moves nothing."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1, eps=1e-4, **FORMS[form])


def in_rounds() -> TaylorRuntime:
    """Everything expanded, at steps 2 and 4."""
    return TaylorRuntime(top_n=LAYERS, split=2, every=2)


def attached(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> LoraOver:
    # layers of one kind are one group, so that rounds choose
    return LoraOver(model, optimizer, MPO(order=ORDER), in_rounds(), groups=lambda matrix: matrix.kind, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> list[float]:
    """Take these steps; returns their losses."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, inputs(step, trainable(model)[0]))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)
