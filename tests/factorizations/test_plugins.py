"""docs/plugins.md: every block runs, is as short as the page says, and trains a model; registries are as before afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pages import DOCS, blocks, run
from tnadapt import Backend, Factorization, LoraOver, OverParamAdapter, Scheduler, TrainedMatrix, register_backend
from tnadapt.backends import BACKENDS, TorchBackend, get_backend
from tnadapt.factorizations import CP, MPO, TensorRing, Tucker
from tnadapt.factorizations.base import _FACTORIZATIONS
from tnadapt.schedulers.base import _SCHEDULERS

from .variants import make_matrix, relative_error

PAGE = DOCS / "plugins.md"


@pytest.fixture(autouse=True)
def _registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for registry in (_FACTORIZATIONS, _SCHEDULERS):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    before = dict(BACKENDS)
    yield
    BACKENDS.clear()
    BACKENDS.update(before)
    get_backend.cache_clear()


@pytest.fixture
def page(_registries: None) -> dict[str, Any]:
    """What the page defines, after all its blocks have run."""
    return run(PAGE)


def test_a_plug_in_takes_less_than_sixty_lines() -> None:
    found = blocks(PAGE)
    assert len(found) == 4
    assert all(len(block.splitlines()) < 60 for block in found)


def test_the_page_runs(page: dict[str, Any]) -> None:
    assert issubclass(page["Product"], Factorization)
    assert issubclass(page["LargestGradients"], Scheduler)
    assert issubclass(page["NumpyDecompositions"], Backend)


def test_all_of_them_train_together_as_autograd_does(page: dict[str, Any]) -> None:
    """Both matrices move as products of three parameters would that AdamW trains by autograd."""
    torch.manual_seed(0)
    model = OverParamAdapter.from_linear(torch.nn.Linear(10, 6, dtype=torch.float64), rank=3)
    pair = [model.lora_A.weight, model.lora_B.weight]
    torch.nn.init.normal_(pair[1])
    factorization = page["Product"](backend="numpy_svd")
    cores = [core.requires_grad_() for weight in pair for core in factorization.unfold(weight.detach())]
    optimizer = torch.optim.AdamW(pair, lr=1e-2, weight_decay=0.01)
    reference = torch.optim.AdamW(cores, lr=1e-2, weight_decay=0.01)
    over = LoraOver(model, optimizer, factorization, page["LargestGradients"](every=1, share=1.0), handover="restart")
    x, frozen = torch.randn(7, 10, dtype=torch.float64), torch.nn.Linear(10, 6, dtype=torch.float64)
    frozen.load_state_dict({"weight": model.base.weight, "bias": model.base.bias})
    for _ in range(6):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        lora_a, lora_b = torch.linalg.multi_dot(cores[:3]), torch.linalg.multi_dot(cores[3:])
        (frozen(x) + model.scaling * x @ lora_a.mT @ lora_b.mT).square().sum().backward()
        reference.step()
        reference.zero_grad()
    assert all(matrix.expanded for matrix in over.matrices.values())
    for weight, own in zip(pair, (cores[:3], cores[3:]), strict=True):
        assert relative_error(weight.detach(), torch.linalg.multi_dot(own).detach()) <= 1e-10


def test_settings_of_ones_own_are_in_the_label_that_a_resumed_run_is_compared_by() -> None:
    """Both plug-ins have cores of the same shapes whatever the setting, so the shapes of a state cannot tell."""

    @dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
    class Turned(MPO):
        _label_parts = Factorization._label_parts
        angle: float = 0.0

    class Every(Scheduler):
        def __init__(self, steps: int = 3) -> None:
            self.steps = steps

        def select(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> list[str]:
            return [name for name, matrix in matrices.items() if not matrix.expanded]

    def attached(angle: float, steps: int) -> tuple[torch.optim.Optimizer, LoraOver]:
        torch.manual_seed(0)
        model = OverParamAdapter.from_linear(torch.nn.Linear(12, 12), rank=4)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        return optimizer, LoraOver(model, optimizer, Turned(order=3, angle=angle), Every(steps))

    optimizer, over = attached(0.5, 3)
    assert repr(over).startswith("LoraOver(Turned(order=3, angle=0.5), Every();")
    state = optimizer.state_dict()
    attached(0.5, 3)[0].load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"saved with Turned\(order=3, angle=0.5\) for .*, this run has Turned\(order=3\)"
    ):
        attached(0.0, 3)[0].load_state_dict(state)
    with pytest.warns(UserWarning, match=r"saved with scheduler Every\(\), this run has scheduler Every\(steps=4\)"):
        attached(0.5, 4)[0].load_state_dict(state)


EACH = [
    (MPO(order=5), (24, 8)),
    (MPO(sites=[(4, 3), (1, 1), (2, 5), (6, 1)], gauge="gradient"), (48, 15)),
    (MPO(order=4, gauge="balanced", max_bond=3), (24, 8)),
    (Tucker(sites=[(4, 3), (2, 5), (6, 1)]), (48, 15)),
    (CP(sites=[(4, 3), (2, 5), (6, 1)], rank=5), (48, 15)),
    (TensorRing(order=4), (24, 8)),
]


@pytest.mark.parametrize(("factorization", "shape"), EACH, ids=lambda value: repr(value))
def test_two_operations_make_a_backend_of_every_factorization(
    factorization: Factorization, shape: tuple[int, int]
) -> None:
    """The default operations, on an equation and an SVD alone, give what the torch backend's own kernels give."""
    calls: set[str] = set()

    class Two(Backend):
        name = "two"

        def contract(self, equation: str, *tensors: Tensor) -> Tensor:
            calls.add("contract")
            return torch.einsum(equation, *tensors)

        def svd(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
            calls.add("svd")
            return TorchBackend().svd(matrix, rank)

    register_backend(Two)
    theirs = dataclasses.replace(factorization, backend="two")
    matrix, grad = make_matrix((2, *shape)), make_matrix((2, *shape), seed=1)
    along = grad if factorization.needs_gradient else None
    cores = theirs.unfold(matrix, along)
    for got, want in zip(cores, factorization.unfold(matrix, along), strict=True):
        assert relative_error(got.flatten(1), want.flatten(1)) <= 1e-9
    assert relative_error(theirs.fold(cores), factorization.fold(cores)) <= 1e-13
    for got, want in zip(theirs.pull_back(cores, grad), factorization.pull_back(cores, grad), strict=True):
        assert relative_error(got.flatten(1), want.flatten(1)) <= 1e-11
    assert calls == {"contract", "svd"}


def test_names_of_backends() -> None:
    class Mine(TorchBackend):
        name = "mine"

    class Other(TorchBackend):
        name = "mine"

    class Nameless(Backend):
        def contract(self, equation: str, *tensors: Tensor) -> Tensor:
            return tensors[0]

        def svd(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
            return matrix, matrix, matrix

    with pytest.raises(ValueError, match=r"backend 'mine' is unknown; choose one of .*torch.*register_backend"):
        MPO(order=3, backend="mine")
    assert register_backend(Mine) is Mine
    register_backend(Mine)
    assert isinstance(MPO(order=3, backend="mine").operations, Mine)
    with pytest.raises(ValueError, match="the name 'mine' belongs to another backend"):
        register_backend(Other)
    with pytest.raises(ValueError, match="the name 'torch' belongs"):
        register_backend(Mine, "torch")
    register_backend(Other, "other")
    assert isinstance(get_backend("other"), Other)
    with pytest.raises(TypeError, match="name=None; give the class a name"):
        register_backend(Nameless)
    for what in (Mine(), "torch", int):
        with pytest.raises(TypeError, match="register_backend takes a subclass of Backend"):
            register_backend(what)  # type: ignore[type-var]


def test_without_a_plan_from_expansion_it_is_refused() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Plain(MPO):
        def _full_parameters(self, sites: Any) -> int:
            return Factorization._full_parameters(self, sites)

    with pytest.raises(ValueError, match=r"Plain cannot be planned from expansion=3\.0"):
        Plain(expansion=3.0).structure((24, 8))
