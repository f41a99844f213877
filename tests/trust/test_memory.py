"""Peak memory of an optimizer step above that of plain LoRA, as the allocator saw it, against the sum that is documented.

    cores + their optimizer state + max(core gradients, kept prefixes) + a copy of the matrices
          + the largest cohort's scratch: 2 x its matrices, 2 x a square of its bond for each of them (none at order 2)
          - the optimizer state that plain LoRA has of the expanded matrices

The optimizer's own scratch (for Adam with foreach a copy of the numbers that it steps at once) is that of the largest cohort,
while plain LoRA has it of all matrices.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tnadapt import MPO, LoraOver, OverParamAdapter

# more than 512 KiB of cores at order 2: smaller cohorts have their gradients twice
BYTES, SIZE, RANK, COUNT = 4, 768, 8, 8

#: how to make it, numbers of state and of its own scratch for each number that it steps
OPTIMIZERS: dict[str, tuple[Any, int, float]] = {
    "AdamW fused": (lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), 2, 0),
    "AdamW foreach": (lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True), 2, 1),
    "SGD momentum": (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, foreach=True), 1, 0),
    "SGD": (lambda p: torch.optim.SGD(p, lr=1e-3, foreach=True), 0, 0),
}


def adapters() -> nn.ModuleList:
    torch.manual_seed(0)
    layers = [OverParamAdapter.from_linear(nn.Linear(SIZE, SIZE), rank=RANK, alpha=16) for _ in range(COUNT)]
    for layer in layers:
        nn.init.normal_(layer.lora_B.weight)
    return nn.ModuleList(layers)


def changes(recorded: Any) -> list[int]:
    """What was allocated (positive) and freed, in order."""
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def measured(make: Any, order: int | None) -> tuple[int, int, LoraOver | None]:
    """Bytes between two steps and at most during one, above those of model and gradients; plain LoRA without an order."""
    model = adapters()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as before:
        optimizer = make(parameters)
        over = None if order is None else LoraOver(model, optimizer, MPO(order=order))
        optimizer.step()
        optimizer.step()
        gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as during:
        optimizer.step()
    rest, level, peak = sum(changes(before)), 0, 0
    for change in changes(during):
        level += change
        peak = max(peak, level)
    assert abs(level) < 64, "a step leaves nothing behind"
    return rest, rest + peak, over


def stated(order: int, state: int, scratch: float) -> tuple[int, float]:
    """The sum above, between two steps and at most during one: from shapes alone."""
    factorization, shapes = MPO(order=order), [(SIZE, RANK), (RANK, SIZE)]
    cores = COUNT * sum(factorization.num_parameters(shape) for shape in shapes)
    matrices = COUNT * sum(rows * cols for rows, cols in shapes)
    # sites of 1x1 make square cores, as large as the prefix that ends at them; only the first prefix is not kept but is core 0
    always = (1 + state) * cores + cores + matrices - state * matrices
    bond = max(max(core[0] for core in factorization.core_shapes(shape)) for shape in shapes)
    # of what flows back through 1x1 sites, what goes into a core and what comes out; the last goes where it belongs
    flowing = min(order - 2, 2) * COUNT * len(shapes) * bond**2
    pulling = 2 * matrices + flowing - scratch * matrices
    stepping = scratch * cores - scratch * matrices
    return BYTES * always, BYTES * (always + max(pulling, stepping))


@pytest.mark.parametrize("order", [2, 9, 16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_peak_above_plain_lora(name: str, order: int, record_property: Any) -> None:
    make, state, scratch = OPTIMIZERS[name]
    plain_rest, plain_peak, _ = measured(make, None)
    rest, peak, over = measured(make, order)
    assert over is not None
    want_rest, want_peak = stated(order, state, scratch)
    record_property("between steps", f"{rest - plain_rest} stated {want_rest}")
    record_property("peak", f"{peak - plain_peak} stated {want_peak}")
    print(f"{name}, order {order}: peak {(peak - plain_peak) / want_peak:.3f} of what is stated")
    assert rest - plain_rest == pytest.approx(want_rest, rel=0.01)
    assert peak - plain_peak == pytest.approx(want_peak, rel=0.05)
