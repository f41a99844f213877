"""The checkers of plug-ins: what keeps the laws passes, and of what breaks one they say which, with the example."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tnadapt import Budget, LossAblation, Scheduler, Static, TaylorRuntime
from tnadapt.backends import AutogradKernel, Backend
from tnadapt.factorizations import CP, MPO, SVD, Factorization, TensorRing
from tnadapt.testing import LawBroken, check_backend, check_factorization, check_scheduler, example_matrices

from .variants import EVERY

NAMES = list(example_matrices())


@pytest.mark.parametrize("name", EVERY)
def test_factorizations_keep_the_laws(name: str) -> None:
    check_factorization(EVERY[name], shapes=[(24, 8), (1, 6), (13, 17)])


@pytest.mark.parametrize(
    "scheduler",
    [
        Static(),
        Static(NAMES[:3]),
        Static(r"q\.A$"),
        Static(fold_after=7, refresh_every=2),
        LossAblation({name: float(k) for k, name in enumerate(NAMES)}, 2),
        TaylorRuntime(3, 2, 4),
        TaylorRuntime(3, 3, 2, reduction="elementwise", average=True, reset=True, expand_after_update=True),
        Budget(40, 3),
        Budget(110, 2, decay=0.5, margin=1.0, per_group=True),
    ],
    ids=repr,
)
def test_schedulers_keep_the_laws(scheduler: Scheduler) -> None:
    check_scheduler(scheduler)


@pytest.mark.parametrize("backend", ["torch", "opt_einsum", "tensorly", "tensornetwork"])
def test_backends_keep_the_laws(backend: str) -> None:
    check_backend(backend)


# -- factorizations, one for each law -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Drifts(MPO):
    def _unfold(self, matrices: Tensor, structure: Any) -> Sequence[Tensor]:
        first, *rest = super()._unfold(matrices, structure)
        return [first * 1.001, *rest]


@dataclass(frozen=True, kw_only=True)
class Strided(MPO):
    def unfold(self, matrix: Tensor, gradient: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(torch.stack([core, core], dim=-1)[..., 0] for core in super().unfold(matrix))


@dataclass(frozen=True, kw_only=True)
class OtherShapes(MPO):
    def unfold(self, matrix: Tensor, gradient: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(core.flatten(-3, -2) for core in super().unfold(matrix))


@dataclass(frozen=True, kw_only=True)
class LosesEntries(MPO):
    def _contract(self, fused: Sequence[Tensor]) -> Tensor:
        return super()._contract(fused)[:, 1:]

    def kernel(self, fused: Sequence[Tensor]) -> Any:
        return AutogradKernel(self._contract, fused)


@dataclass(frozen=True, kw_only=True)
class LosesColumns(MPO):
    def _unfold(self, matrices: Tensor, structure: Any) -> Sequence[Tensor]:
        *rest, last = super()._unfold(matrices, structure)
        return [*rest, last[..., 1:, :]]


@dataclass(frozen=True, kw_only=True)
class LosesACore(MPO):
    def _unfold(self, matrices: Tensor, structure: Any) -> Sequence[Tensor]:
        return super()._unfold(matrices, structure)[:-1]


@dataclass(frozen=True, kw_only=True)
class Writes(MPO):
    def unfold(self, matrix: Tensor, gradient: Tensor | None = None) -> tuple[Tensor, ...]:
        cores = super().unfold(matrix)
        matrix.mul_(2)
        return cores


@dataclass(frozen=True, kw_only=True)
class HalfGradient(MPO):
    def pull_back(self, cores: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        first, *rest = super().pull_back(cores, grad)
        return (first / 2, *rest)


@dataclass(frozen=True, kw_only=True)
class OtherKernel(MPO):
    def pull_back(self, cores: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        return MPO(order=self.order).pull_back(cores, grad)

    def kernel(self, fused: Sequence[Tensor]) -> Any:
        return AutogradKernel(lambda tensors: 2 * self._contract(tensors), fused)


@dataclass(frozen=True, kw_only=True)
class DeadAtZero(MPO):
    """The square root of the norm in every core, as a balanced gauge without an answer for zero has it."""

    def _unfold(self, matrices: Tensor, structure: Any) -> Sequence[Tensor]:
        first, *rest, last = super()._unfold(matrices, structure)
        root = matrices.flatten(1).norm(dim=1).sqrt()[:, None, None, None]
        return [first * root, *rest, last / torch.where(root > 0, root, 1.0)]


@dataclass(frozen=True, kw_only=True)
class FirstOfTheBatch(MPO):
    def _unfold(self, matrices: Tensor, structure: Any) -> Sequence[Tensor]:
        return super()._unfold(matrices[:1].expand_as(matrices), structure)


@dataclass(frozen=True, kw_only=True)
class Forgets(MPO):
    more: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key != "more"}


@dataclass(frozen=True, kw_only=True)
class HashOfItsOwn(MPO):
    def __hash__(self) -> int:
        return id(self)


@pytest.mark.parametrize(
    ("factorization", "law", "example"),
    [
        (Drifts(order=3), 1, r"normal matrix, shape \(24, 8\), torch.float64: fold\(unfold\(W\)\) is off by 0.001"),
        (Strided(order=3), 2, "core 0 is not contiguous"),
        (OtherShapes(order=3), 2, r"unfold gives cores of shapes .* core_shapes says"),
        (LosesEntries(order=3), 1, r"LosesEntries._contract gave the shape \(1, 191\) for 1 matrices with the sites"),
        (LosesColumns(order=3), 2, r"LosesColumns._unfold gave cores of shapes .* where structure\(\) has"),
        (LosesACore(order=3), 2, r"LosesACore._unfold gave cores of shapes .* where structure\(\) has"),
        (Writes(order=3), 2, "unfold writes to the matrix"),
        (HalfGradient(order=3), 3, r"shape \(24, 8\).*gradient of core 0 differs from autograd's by 0.5"),
        (OtherKernel(order=3), 3, "its kernel contracts to another matrix"),
        (DeadAtZero(order=3), 4, r"zero matrix, shape \(24, 8\): no core gets a gradient"),
        (FirstOfTheBatch(order=3), 5, "member 1 unfolds differently alone"),
        (Forgets(order=3, more=1), 6, "is rebuilt as"),
        (HashOfItsOwn(order=3), 6, "another hash"),
        (MPO(sites=[(4, 2), (6, 4)]), 2, r"shape \(8, 24\).*multiply to 24x8"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Factorization) else None,
)
def test_broken_factorizations(factorization: Factorization, law: int, example: str) -> None:
    with pytest.raises(LawBroken, match=rf"breaks law {law} of Factorization: .*{example}") as caught:
        check_factorization(factorization)
    assert caught.value.law == law


def test_shapes_are_those_that_are_asked_for() -> None:
    check_factorization(MPO(sites=[(4, 2), (6, 4)]), shapes=[(24, 8)], dtypes=[torch.float32])
    for factorization in (SVD(), CP(order=3), TensorRing(order=4)):
        check_factorization(factorization)


# -- schedulers ---------------------------------------------------------------------------------------------------------


class One(Scheduler):
    """The next matrix every second step: keeps the laws, and is broken in one place by each of the others."""

    def __init__(self, every: int = 2) -> None:
        self.every, self.seen = every, 0

    def due(self, step: int) -> bool:
        return step > 0 and step % self.every == 0

    def first_step(self) -> int:
        return self.every

    def observe(self, step: int, matrices: Any) -> None:
        self.seen += 1

    def select(self, step: int, matrices: Any) -> Iterable[str]:
        waiting = [name for name, matrix in matrices.items() if not matrix.expanded]
        return waiting[self.seen % len(waiting) :][:1] if self.due(step) and waiting else []

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["seen"]


class Again(One):
    def select(self, step: int, matrices: Any) -> Iterable[str]:
        return list(matrices)[:1] if self.due(step) else []


class Stranger(One):
    def select(self, step: int, matrices: Any) -> Iterable[str]:
        return ["nowhere"] if self.due(step) else []


class Releases(One):
    def release(self, step: int, matrices: Any) -> Iterable[str]:
        return list(matrices)[:1]


class Raises(One):
    def observe(self, step: int, matrices: Any) -> None:
        raise KeyError("lost")


class Early(One):
    def first_step(self) -> int:
        return 10


class Scales(One):
    def observe(self, step: int, matrices: Any) -> None:
        super().observe(step, matrices)
        for matrix in matrices.values():
            matrix.parameter.grad.mul_(2)


class Loses(One):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


class Lends(One):
    def __init__(self, every: int = 2) -> None:
        super().__init__(every)
        self.log: list[int] = []

    def observe(self, step: int, matrices: Any) -> None:
        super().observe(step, matrices)
        self.log.append(step)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "log": self.log}


class Objects(One):
    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "which": {1, 2}}


class Random(One):
    def select(self, step: int, matrices: Any) -> Iterable[str]:
        waiting = [name for name, matrix in matrices.items() if not matrix.expanded]
        return random.sample(waiting, 1) if self.due(step) and waiting else []


class Hides(Scheduler):
    def __init__(self, every: int) -> None:
        self._every = every

    def __repr__(self) -> str:
        return "Hides()"

    def select(self, step: int, matrices: Any) -> Iterable[str]:
        return []


@pytest.mark.parametrize(
    ("scheduler", "law", "example"),
    [
        (Again(), 1, r"step 4: selected \['layers\.0\.q\.A'\], which are expanded"),
        (Stranger(), 1, r"step 2: \['nowhere'\] are no names"),
        (Releases(), 1, r"step 2: released .* which are not expanded"),
        (Raises(), 1, "step 1: KeyError"),
        (Early(), 2, r"at step 2, before first_step\(\)=10"),
        (Scales(), 3, r"step 1: layers\.0\.q\.A or its gradient was written to"),
        (Loses(), 4, "saved after step 1 of 24: the resumed run chose"),
        (Lends(), 4, "the state that was saved changes"),
        (Objects(), 4, "the state holds a set"),
        (Random(), 5, "of two runs on the same matrices"),
        (Hides(2), 6, "does not keep its argument every"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Scheduler) else None,
)
def test_broken_schedulers(scheduler: Scheduler, law: int, example: str) -> None:
    check_scheduler(One())
    with pytest.raises(LawBroken, match=rf"breaks law {law} of Scheduler: .*{example}") as caught:
        check_scheduler(scheduler)
    assert caught.value.law == law


# -- backends -----------------------------------------------------------------------------------------------------------


class Plain(Backend):
    """The two operations that a backend needs."""

    name = "plain"

    def contract(self, equation: str, *tensors: Tensor) -> Tensor:
        return torch.einsum(equation, *tensors)

    def svd(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[..., :rank], s[..., :rank], vh[..., :rank, :]

    def __repr__(self) -> str:
        return type(self).__name__


class Detached(Plain):
    def contract(self, equation: str, *tensors: Tensor) -> Tensor:
        return super().contract(equation, *tensors).detach()


class Single(Plain):
    def contract(self, equation: str, *tensors: Tensor) -> Tensor:
        return super().contract(equation, *(tensor.float() for tensor in tensors)).to(tensors[0].dtype)


class Smallest(Plain):
    def svd(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[..., -rank:], s[..., -rank:], vh[..., -rank:, :]


class Unscaled(Plain):
    def svd(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = super().svd(matrix, rank)
        return u * 2, s, vh / 2


class BadChain(Plain):
    def chain_contract(self, cores: Sequence[Tensor]) -> Tensor:
        return super().chain_contract(cores) * 2


class BadKernel(Plain):
    def cp_kernel(self, factors: Sequence[Tensor]) -> Any:
        return AutogradKernel(lambda tensors: self.cp_contract([t.detach() + 0 * t for t in tensors]), factors)


class BadTucker(Plain):
    def tucker_decompose(self, tensor: Tensor, ranks: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        factors, core = super().tucker_decompose(tensor, ranks)
        return factors, core * 0.9


class InPlace(Plain):
    def svd(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        found = super().svd(matrix, rank)
        matrix.zero_()
        return found


@pytest.mark.parametrize(
    ("make", "law", "example"),
    [
        (Detached, 1, "autograd does not see it"),
        (Single, 1, r"contract\('nab,nbc->nac'\) of .*torch.float64: differs from torch.einsum"),
        (Smallest, 2, r"svd of normal matrices \(2, 6, 4\), rank 1: gives the values"),
        (Unscaled, 2, "the left vectors are not orthonormal"),
        (BadChain, 3, "chain_contract of a batch of 1: off by 1"),
        (BadKernel, 3, "cp_kernel: its gradient is off"),
        (BadTucker, 3, r"tucker_decompose with ranks \[4, 5, 6\]: misses 0.1"),
        (InPlace, 4, "an argument was written to"),
    ],
)
def test_broken_backends(make: Callable[[], Backend], law: int, example: str) -> None:
    check_backend(Plain())
    with pytest.raises(LawBroken, match=rf"breaks law {law} of Backend: .*{example}") as caught:
        check_backend(make())
    assert caught.value.law == law


@pytest.mark.parametrize("check", [check_factorization, check_scheduler, check_backend])
@pytest.mark.parametrize("thing", [3, MPO])
def test_a_checker_of_something_else_says_what_it_takes(check, thing) -> None:
    message = f"{check.__name__} takes an object of a subclass of .*, got {'<class' if thing is MPO else '3'}"
    with pytest.raises(TypeError, match=message):
        check(thing)
