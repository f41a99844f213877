"""Forward and backward passes beside an eager step: in a CUDA graph, and on streams of their own; and who waits for whom."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tnadapt import MPO, LoraOver, Static, TaylorRuntime

from .conftest import needs_cuda
from .models import FORMS, Net, adamw, attached, inputs, largest_difference, loss_of, net, train, trainable, values
from .pretended import Pretended, a_gpu, moved

STEPS = range(1, 8)


def recorded(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """The forward and backward pass on `x`, which writes the same gradients every time: a CUDA graph on a GPU."""

    def passes() -> None:
        loss_of(model, x).backward()

    def again() -> None:
        for parameter in trainable(model):
            assert parameter.grad is not None
            parameter.grad.zero_()
        passes()

    if x.device.type != "cuda":
        passes()
        return again
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            model.zero_grad()
            passes()
    torch.cuda.current_stream().wait_stream(aside)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        passes()
    return graph.replay


def test_a_recorded_model_is_stepped_as_one_that_is_not(device: str) -> None:
    plain, model = net(device), net(device)
    optimizers = [adamw(trainable(each)) for each in (plain, model)]
    overs = [attached(each, optimizer) for each, optimizer in zip((plain, model), optimizers, strict=True)]
    x = inputs(0, trainable(model)[0])
    passes = recorded(model, x)
    gradients = [p.grad for p in trainable(model)]
    for step in STEPS:
        x.copy_(inputs(step, x))
        passes()
        optimizers[1].step()
    train(plain, optimizers[0], STEPS)
    assert largest_difference(values(model), values(plain)) < 1e-6
    assert overs[0].expanded == overs[1].expanded
    assert len(overs[1].expanded) == 4
    # the graph goes on writing where it wrote
    assert all(p.grad is grad for p, grad in zip(trainable(model), gradients, strict=True))


@needs_cuda
def test_a_step_that_is_recorded_itself_is_refused() -> None:
    model = net("cuda")
    optimizer = adamw(trainable(model), "capturable")
    attached(model, optimizer)
    train(model, optimizer, STEPS[:5])
    with pytest.raises(RuntimeError, match="captured into a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_passes_and_steps_on_two_streams_train_as_on_one(device: str) -> None:
    one, two = net(device), net(device)
    optimizer = adamw(trainable(one))
    attached(one, optimizer)
    train(one, optimizer, STEPS)

    module = torch.get_device_module(device)  # on a CPU streams are names for the same thing
    passing, stepping = module.Stream(), module.Stream()
    optimizer = adamw(trainable(two))
    over = attached(two, optimizer)
    module.synchronize()
    for step in STEPS:
        passing.wait_stream(stepping)
        with module.stream(passing):
            optimizer.zero_grad(set_to_none=False)
            loss_of(two, inputs(step, trainable(two)[0])).backward()
        stepping.wait_stream(passing)
        with module.stream(stepping):
            optimizer.step()
    module.synchronize()
    assert len(over.expanded) == 4
    # libraries may choose other kernels on another stream
    assert largest_difference(values(two), values(one)) <= (0 if device == "cpu" else 1e-6)


# -- flags that are read one step later -------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_stops_training_before_a_matrix_is_spoilt(device: str) -> None:
    model = net(device)
    optimizer = adamw(trainable(model))
    over = attached(model, optimizer)
    train(model, optimizer, STEPS[:5])
    loss_of(model, inputs(6, trainable(model)[0])).backward()
    gradient = next(iter(over.matrices.values())).parameter.grad
    assert gradient is not None
    gradient[0, 0] = float("nan")
    if device == "cpu":
        with pytest.raises(FloatingPointError, match="nothing was changed"):
            optimizer.step()
    else:
        optimizer.step()  # nobody has waited for the flag
        with pytest.raises(FloatingPointError, match="of the step before"):
            train(model, optimizer, [7])
    assert all(bool(value.isfinite().all()) for value in values(model).values())


@needs_cuda
def test_flags_come_to_memory_that_is_pinned() -> None:
    model = net("cuda")
    optimizer = adamw(trainable(model))
    over = attached(model, optimizer)
    train(model, optimizer, STEPS[:5])
    ((flag, event),) = over._step._nonfinite
    assert flag.is_pinned()
    assert event is not None
    event.synchronize()
    assert bool(flag)


# -- who waits --------------------------------------------------------------------------------------------------------


def scheduled(kind: str) -> TaylorRuntime | Static:
    return Static() if kind == "static" else TaylorRuntime(top_n=3, split=2, every=2)


@pytest.mark.parametrize("kind", ["static", "rounds"])
def test_an_ordinary_step_waits_for_nothing_on_a_gpu_that_is_pretended(kind: str) -> None:
    torch.manual_seed(0)
    model, alike = Net(layers=3), Net(layers=3)
    for one, other in zip(trainable(model), trainable(alike), strict=True):
        one.grad = torch.randn_like(one)
        other.grad = one.grad.clone()
    # the same on the CPU, to see that the numbers are right
    expected = adamw(trainable(alike))
    LoraOver(alike, expected, MPO(order=4), scheduled(kind))
    waits: list[list[str]] = []
    launches: list[int] = []
    with a_gpu() as gpu:
        moved(model)
        optimizer = adamw(trainable(model))
        over = LoraOver(model, optimizer, MPO(order=4), scheduled(kind))
        for _ in range(8):
            gpu.forget()
            optimizer.step()
            expected.step()
            waits.append(gpu.waits)
            launches.append(len(gpu.launches))
        assert len(over.expanded) == 6
        trained = [p.held.clone() for p in trainable(model) if isinstance(p, Pretended)]
    for one, other in zip(trained, trainable(alike), strict=True):
        assert torch.equal(one, other)
    expanding = {event.step or 1 for event in over.history}
    for step, lines in enumerate(waits, start=1):
        # choosing and decomposing are the host's work
        assert bool(lines) is (step in expanding), f"step {step}: {lines}"
    assert launches[-1] == launches[-2]
    # a site is two products in the pull-back and one in the refold, once for each cohort
    assert launches[-1] < 60


def with_gradients() -> Net:
    """The small model with random gradients, the same at every call."""
    model, generator = Net(), torch.Generator("cpu").manual_seed(3)
    for parameter in trainable(model):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_adamw_steps_on_a_gpu_that_is_pretended_as_on_a_cpu_and_resumes_there(form: str) -> None:
    alike = with_gradients()
    optimizer = adamw(trainable(alike), "foreach" if form == "capturable" else form)
    LoraOver(alike, optimizer, MPO(order=4), Static())
    for _ in range(6):
        optimizer.step()
    with a_gpu() as gpu:
        model = moved(with_gradients())
        optimizer = adamw(trainable(model), form)
        LoraOver(model, optimizer, MPO(order=4), Static())
        for _ in range(3):
            optimizer.step()
        state, weights = on_the_cpu(optimizer.state_dict()), [p.held.clone() for p in trainable(model)]
        model = with_gradients()
        for parameter, value in zip(trainable(model), weights, strict=True):
            parameter.detach().copy_(value)
        moved(model)
        optimizer = adamw(trainable(model), form)
        over = LoraOver(model, optimizer, MPO(order=4), Static())
        optimizer.load_state_dict(state)
        for step in (4, 5, 6):
            gpu.forget()
            optimizer.step()
            # the first step after loading looks whether the matrices are those of the cores
            assert bool(gpu.waits) is (step == 4), gpu.waits
        counts = {
            entry["step"].device.type for cores in over.state_dict()["cores"].values() for entry in cores["state"]
        }
        found = {name: p.held.clone() for name, p in model.named_parameters() if isinstance(p, Pretended)}
    assert counts == {"cuda" if form in ("fused", "capturable") else "cpu"}
    expected = values(alike)
    # the capturable form divides in another order
    difference = largest_difference({name: found[name] for name in expected}, expected)
    assert difference <= (2e-5 if form == "capturable" else 0)


def on_the_cpu(state: Any) -> Any:
    """As a file is read with `map_location="cpu"`."""
    return tree_map_only(Tensor, lambda t: t.held.clone() if isinstance(t, Pretended) else t.clone(), state)


def stepped_once(model: Net) -> tuple[LoraOver, torch.optim.Optimizer]:
    """The model is moved to the GPU that is pretended, and takes a step with every matrix expanded."""
    moved(model)
    optimizer = adamw(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), Static())
    optimizer.step()
    return over, optimizer


def test_a_gradient_that_is_not_finite_is_told_one_step_later_on_a_gpu_that_is_pretended() -> None:
    model = with_gradients()
    with a_gpu() as gpu:
        over, optimizer = stepped_once(model)
        gradients = [matrix.parameter.grad for matrix in over.matrices.values()]
        for gradient in gradients:
            assert gradient is not None
            gradient.fill_(float("inf"))
        gpu.forget()
        optimizer.step()  # zeros are pulled back
        assert gpu.waits == []
        with pytest.raises(FloatingPointError, match="of the step before"):
            optimizer.step()
        assert all(bool(parameter.isfinite().all()) for parameter in trainable(model))


def test_a_look_at_the_matrices_waits_and_is_seen_on_a_gpu_that_is_pretended() -> None:
    model = with_gradients()
    with a_gpu() as gpu:
        over, _ = stepped_once(model)
        gpu.forget()
        assert over.changed_outside() == ()
        assert gpu.waits
        gpu.forget()
        assert float(trainable(model)[0].sum()) != 0
        assert gpu.waits == ["elsewhere"]


@needs_cuda
@pytest.mark.parametrize("form", ["foreach", "fused"])
def test_an_ordinary_step_waits_for_nothing(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    sys.modules.pop("devices", None)
    from devices import waits

    model = net("cuda")
    optimizer = adamw(trainable(model), form)
    attached(model, optimizer)
    train(model, optimizer, STEPS)
    loss_of(model, inputs(8, trainable(model)[0])).backward()
    assert waits(lambda: trainable(model)[0].sum().item()), "torch tells of waits"
    assert waits(optimizer.step) == []
