"""Memory above plain LoRA as `plan` tells it."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tnadapt import MPO, LoraOver, OverParamAdapter, plan

from .conftest import needs_cuda
from .pretended import a_gpu, moved

WIDTH, RANK, LAYERS = 768, 8, 4


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from devices import watched_memory

    return watched_memory


def adapters(device: str) -> nn.ModuleList:
    torch.manual_seed(0)
    layers = [OverParamAdapter.from_linear(nn.Linear(WIDTH, WIDTH), rank=RANK, alpha=16) for _ in range(LAYERS)]
    model = nn.ModuleList(layers).to(device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    return model


def taken(watched: Any, device: str, factorization: MPO | None) -> tuple[int, int]:
    """Bytes between two steps, and at most in one, above those of model and gradients."""
    pretended, held_on = device == "pretended", "cuda" if device == "cuda" else "cpu"
    model: nn.Module = adapters(held_on)
    with a_gpu() if pretended else nullcontext():
        model = moved(model) if pretended else model
        with watched(held_on) as between:
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
            if factorization is not None:
                LoraOver(model, optimizer, factorization)
            optimizer.step()
            optimizer.step()
            gc.collect()
        with watched(held_on) as during:
            optimizer.step()
    return between.kept, between.kept + during.peak


@pytest.mark.parametrize("device", ["cpu", "pretended", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("order", [pytest.param(9, marks=pytest.mark.slow), 16])
def test_a_step_takes_the_memory_that_is_planned(device: str, watched: Any, order: int) -> None:
    factorization = MPO(order=order)
    taken(watched, device, factorization)  # libraries take work space once
    gc.collect()
    plain, ours = taken(watched, device, None), taken(watched, device, factorization)
    planned = plan(adapters("cpu"), factorization).costs(decompose_rate=1e9).memory
    print(f"{device}, order {order}: {(ours[1] - plain[1]) / planned.total:.3f} of what is planned")
    assert ours[1] - plain[1] == pytest.approx(planned.total, rel=0.05)
