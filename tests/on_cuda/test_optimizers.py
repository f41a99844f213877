"""AdamW in all its forms, killed and resumed, and under a GradScaler."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from .models import FORMS, adamw, attached, inputs, largest_difference, loss_of, net, train, trainable, values

STEPS = range(1, 8)


def require(form: str, device: str) -> None:
    if form == "capturable" and device == "cpu":
        pytest.skip("capturable optimizers need CUDA")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_adamw_trains_what_a_loop_in_float64_trains(device: str, form: str) -> None:
    require(form, device)
    exact = net("cpu", torch.float64)
    reference = adamw(trainable(exact), "for-loop")
    attached(exact, reference)
    before = values(exact)
    train(exact, reference, STEPS)
    model = net(device)
    optimizer = adamw(trainable(model), form)
    over = attached(model, optimizer)
    train(model, optimizer, STEPS)
    assert [event.step for event in over.history] == [2, 4]
    assert len(over.expanded) == 4
    assert largest_difference(values(model), values(exact)) < 1e-4
    assert largest_difference(values(exact), before) > 1e-2, "the tolerance says something"


@pytest.mark.parametrize("form", FORMS)
def test_saved_and_resumed_through_the_cpu_ends_with_the_same_bits(device: str, form: str) -> None:
    require(form, device)
    model = net(device)
    optimizer = adamw(trainable(model), form)
    attached(model, optimizer)
    train(model, optimizer, STEPS[:3])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, STEPS[3:])
    file.seek(0)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    assert {t.device.type for t in tensors_of(saved)} == {"cpu"}
    resumed = net(device)
    other = adamw(trainable(resumed), form)
    over = attached(resumed, other)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, STEPS[3:])
    assert largest_difference(values(resumed), values(model)) == 0
    cores = over.state_dict()["cores"]
    assert len(cores) == 4
    places = {t.device.type for entry in cores.values() for t in tensors_of(entry["cores"])}
    assert places == {device}
    # fused and capturable forms read their step counts on the device
    counts = {state["step"].device.type for entry in cores.values() for state in entry["state"]}
    assert counts == {device if form in ("fused", "capturable") else "cpu"}


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for each in inside for tensor in tensors_of(each)]


def scaled(device: str, form: str, scale: float, overflow: int | None = None) -> Any:
    """Train under float16 autocast; the loss of step `overflow` is infinite."""
    model = net(device)
    optimizer = adamw(trainable(model), form)
    over = attached(model, optimizer)
    scaler = torch.amp.GradScaler(device, init_scale=scale, growth_interval=1000)
    seen: list[dict[str, Tensor]] = []
    for step in STEPS:
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = loss_of(model, inputs(step, trainable(model)[0]))
        scaler.scale(loss * (float("inf") if step == overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append(values(model))
    return seen, scaler.get_scale(), over


@pytest.mark.parametrize("form", ["foreach", "fused"])
def test_the_scale_of_float16_makes_no_difference(device: str, form: str) -> None:
    (large, scale, _), (one, _, _) = (scaled(device, form, 2.0**10), scaled(device, form, 1.0))
    assert scale == 2.0**10
    # gradients of float16, of which small ones lose digits without a scale
    assert largest_difference(large[-1], one[-1]) < 5e-3
    assert largest_difference(large[-1], large[0]) > 2e-2, "the tolerance says something"


@pytest.mark.parametrize("form", ["foreach", "fused"])
def test_a_step_that_overflows_moves_nothing(device: str, form: str) -> None:
    seen, scale, over = scaled(device, form, 2.0**10, overflow=5)
    assert largest_difference(seen[4], seen[3]) == 0
    assert largest_difference(seen[5], seen[4]) > 0
    assert scale == 2.0**9
    assert over.step == len(STEPS) - 1
