"""Law 3: `pull_back(cores, G)` is the gradient of `sum(G * fold(cores))`; oracle: float64 autograd through one einsum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import contract
from torch import Tensor

from tnadapt.backends.contractions import contract_cp, sweeps_from_left
from tnadapt.factorizations import Factorization
from tnadapt.factorizations.sites import from_sites, to_sites

from .variants import CASES, EVERY, make_matrix, random_cores, shapes

RTOL = 1e-11
EPS = torch.finfo(torch.float64).eps


def reference_gradients(factorization: Factorization, cores: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [core.detach().clone().requires_grad_() for core in cores]
    return torch.autograd.grad((contract(factorization, leaves) * grad).sum(), leaves)


def assert_close(actual: Tensor, expected: Tensor, terms: float = 0.0) -> None:
    """To rounding of the result, and of its `terms`, which may cancel."""
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= RTOL * float(expected.norm()) + EPS * terms + 1e-300


def check(factorization: Factorization, cores: list[Tensor], batch: tuple[int, ...], shape: tuple[int, int]) -> None:
    grad = make_matrix((*batch, *shape), seed=1)
    assert_close(factorization.fold(cores), contract(factorization, cores))
    expected = reference_gradients(factorization, cores, grad)
    # no gradient is larger than the product of the norms of all that is contracted with it
    norms = [float(core.norm()) for core in cores]
    terms = [float(grad.norm()) * math.prod(norms[:k] + norms[k + 1 :]) for k in range(len(cores))]
    for actual, want, size in zip(factorization.pull_back(cores, grad), expected, terms, strict=True):
        assert_close(actual, want, size)
    leaves = [core.clone().requires_grad_() for core in cores]
    recorded = torch.autograd.grad(factorization.fold(leaves), leaves, grad)
    for actual, want, size in zip(recorded, expected, terms, strict=True):
        assert_close(actual, want, size)


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_random_cores(name: str, batch: tuple[int, ...]) -> None:
    factorization, shape = CASES[name]
    check(factorization, random_cores(factorization, shape, batch), batch, shape)


@pytest.mark.parametrize("name", EVERY)
@given(shape=shapes(96), seed=st.integers(0, 2**16))
@example(shape=(2, 2), seed=273)  # terms of a chain of 1x1 cores cancel to a millionth
def test_any_shape(name: str, shape: tuple[int, int], seed: int) -> None:
    check(EVERY[name], random_cores(EVERY[name], shape, seed=seed), (), shape)


@pytest.mark.parametrize("name", CASES)
def test_unfolded_cores(name: str) -> None:
    factorization, shape = CASES[name]
    for kind in ("normal", "zero", "deficient"):
        check(factorization, list(factorization.unfold(make_matrix((2, *shape), kind))), (2,), shape)


@pytest.mark.parametrize("name", CASES)
def test_kernel(name: str) -> None:
    """What the engine calls: the same numbers at every repetition, whether contracted before or not, and as the cores change."""
    factorization, shape = CASES[name]
    sites = factorization.structure(shape).sites
    fused = stack_fused(factorization, random_cores(factorization, shape, (3,)))
    kernel = factorization.kernel(fused)
    for seed, contracts in enumerate((True, False, True, True)):
        for core, new in zip(
            fused, stack_fused(factorization, random_cores(factorization, shape, (3,), seed=seed)), strict=True
        ):
            core.copy_(new)
        cores = [core.view(3, *own) for core, own in zip(fused, factorization.core_shapes(shape), strict=True)]
        grad = make_matrix((3, *shape), seed=seed)
        if contracts:
            matrices = from_sites(kernel.contract(), sites)
            assert not matrices.requires_grad
            assert torch.equal(matrices, factorization.fold(cores))
        found = torch.split(kernel.pull_back(to_sites(grad, sites).flatten(1)), [core.numel() for core in cores])
        for actual, want in zip(found, factorization.pull_back(cores, grad), strict=True):
            assert actual.is_contiguous()
            assert_close(actual.view(want.shape), want)


def stack_fused(factorization: Factorization, cores: Sequence[Tensor]) -> list[Tensor]:
    shapes = factorization.fused_shapes([tuple(core.shape[1:]) for core in cores])
    return [core.reshape(-1, *shape) for core, shape in zip(cores, shapes, strict=True)]


def test_low_precision_gradient() -> None:
    """A bfloat16 matrix has a bfloat16 gradient and float32 cores."""
    factorization = EVERY["mpo-3"]
    cores = factorization.unfold(make_matrix((24, 8), dtype=torch.bfloat16))
    grad = make_matrix((24, 8), dtype=torch.bfloat16, seed=1)
    for got, want in zip(
        factorization.pull_back(cores, grad), factorization.pull_back(cores, grad.float()), strict=True
    ):
        assert torch.equal(got, want)


def test_contraction_starts_at_the_smaller_end() -> None:
    """1x1 cores are multiplied into the smaller end, whichever it is."""
    small, large = (1, 12, 12), (12, 60, 1)
    middle = [(12, 1, 12)] * 3
    assert sweeps_from_left((small, *middle, large))
    assert not sweeps_from_left((large[::-1], *middle, small[::-1]))


@given(st.lists(st.sampled_from([1, 1, 2, 3, 5]), min_size=2, max_size=5), st.integers(1, 3))
@example([1, 1, 4], 2)
def test_modes_of_size_one_leave_no_half_of_a_cp_empty(modes: list[int], rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(2, p, rank, generator=generator, dtype=torch.float64) for p in modes]
    letters = "abcde"[: len(modes)]
    wanted = torch.einsum(f"{','.join(f'n{p}r' for p in letters)}->n{letters}", *factors)
    assert_close(contract_cp(factors)[0], wanted.reshape(2, -1))


def test_arguments_by_name() -> None:
    mpo = EVERY["mpo-3"]
    cores = mpo.unfold(matrix=make_matrix((24, 8)))
    assert torch.equal(mpo.fold(cores=cores), mpo.fold(cores))
    grads = mpo.pull_back(cores=cores, grad=make_matrix((24, 8)))
    assert all(map(torch.equal, grads, mpo.pull_back(cores, make_matrix((24, 8)))))
