"""Kernels repeat a contraction in place; oracle: float64 autograd through the differentiable contraction."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tnadapt.backends import Kernel, get_backend
from tnadapt.factorizations.sites import from_sites, to_sites

SIZES = st.integers(1, 5)


@st.composite
def chains(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Cores with any bonds, also ones larger than what stands on either side of them."""
    modes = draw(st.lists(SIZES, min_size=2, max_size=6))
    bonds = [1, *draw(st.lists(st.integers(1, 9), min_size=len(modes) - 1, max_size=len(modes) - 1)), 1]
    return [(bonds[k], p, bonds[k + 1]) for k, p in enumerate(modes)]


def random(shapes: list[tuple[int, ...]], n: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def check_repeated(kernel: Kernel, tensors: list[Tensor], contract: object) -> None:
    """As the tensors change in place, contracted before each pull-back or not."""
    shapes, n = [tuple(t.shape[1:]) for t in tensors], tensors[0].shape[0]
    for seed, contracts in enumerate((False, True, False, True, True)):
        for tensor, new in zip(tensors, random(shapes, n, seed), strict=True):
            tensor.copy_(new)
        leaves = [t.clone().requires_grad_() for t in tensors]
        expected = contract(leaves)  # type: ignore[operator]
        grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if contracts:
            found = kernel.contract()
            assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
            kept = found.clone()
        kept_grad = grad.clone()
        flat = kernel.pull_back(grad)
        assert torch.equal(grad, kept_grad)
        wanted = torch.cat([g.reshape(-1) for g in torch.autograd.grad(expected, leaves, grad)])
        assert float((flat - wanted).norm()) <= 1e-12 * (1 + float(wanted.norm()))
        assert all(map(torch.equal, tensors, leaves)), "the tensors are read only"
        if contracts:
            assert torch.equal(found, kept), "a result is not overwritten by pulling back"


@given(shapes=chains(), n=st.integers(1, 3))
def test_chain(shapes: list[tuple[int, ...]], n: int) -> None:
    backend, cores = get_backend("torch"), random(shapes, n, 99)
    check_repeated(backend.chain_kernel(cores), cores, backend.chain_contract)


@given(modes=st.lists(SIZES, min_size=2, max_size=4), data=st.data(), n=st.integers(1, 3))
def test_tucker(modes: list[int], data: st.DataObject, n: int) -> None:
    ranks = [data.draw(st.integers(1, 4)) for _ in modes]
    tensors = random([*zip(modes, ranks, strict=True), tuple(ranks)], n, 99)
    backend = get_backend("torch")
    kernel = backend.tucker_kernel(tensors[:-1], tensors[-1])
    check_repeated(kernel, tensors, lambda leaves: backend.tucker_contract(leaves[:-1], leaves[-1]))


@given(modes=st.lists(SIZES, min_size=2, max_size=4), rank=st.integers(1, 4), n=st.integers(1, 3))
def test_cp(modes: list[int], rank: int, n: int) -> None:
    backend, factors = get_backend("torch"), random([(p, rank) for p in modes], n, 99)
    check_repeated(backend.cp_kernel(factors), factors, backend.cp_contract)


@pytest.mark.parametrize("backend", ["opt_einsum", "tensorly", "tensornetwork"])
def test_libraries(backend: str) -> None:
    instance = get_backend(backend)
    cores = random([(1, 2, 3), (3, 1, 3), (3, 4, 1)], 2, 0)
    check_repeated(instance.chain_kernel(cores), cores, instance.chain_contract)
    factors = random([(2, 3), (4, 3), (3, 3)], 2, 0)
    check_repeated(instance.cp_kernel(factors), factors, instance.cp_contract)
    tensors = random([(2, 2), (4, 3), (2, 3)], 2, 0)
    kernel = instance.tucker_kernel(tensors[:-1], tensors[-1])
    check_repeated(kernel, tensors, lambda leaves: instance.tucker_contract(leaves[:-1], leaves[-1]))


@pytest.mark.parametrize("shape", [(1, 12, 48), (48, 12, 1)], ids=["smaller end left", "smaller end right"])
def test_gradients_and_prefixes_share_one_memory(shape: tuple[int, int, int]) -> None:
    """A chain of 1x1 sites needs no more memory than its cores have."""
    small, p, large = shape
    modes = [small if small > 1 else 12, *[1] * 6, large if large > 1 else 12]
    bond = min(modes[0], modes[-1])
    bonds = [1, *[bond] * (len(modes) - 1), 1]
    shapes = [(bonds[k], mode, bonds[k + 1]) for k, mode in enumerate(modes)]
    assert p == bond
    cores = random(shapes, 3, 0)
    flat = get_backend("torch").chain_kernel(cores).pull_back(torch.ones(3, math.prod(modes), dtype=torch.float64))
    assert flat.untyped_storage().nbytes() == sum(core.numel() for core in cores) * 8


@given(
    sites=st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 8])), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    n=st.integers(1, 3),
)
def test_sites_and_back(sites: list[tuple[int, int]], dtype: torch.dtype, n: int) -> None:
    """Entry (i_1 ... i_m, j_1 ... j_m) of a matrix is entry (i_1 j_1, ..., i_m j_m) of the tensor; bits stay as they are."""
    rows, cols = math.prod(i for i, _ in sites), math.prod(j for _, j in sites)
    matrices = torch.randn(n, rows, cols, generator=torch.Generator().manual_seed(rows * cols)).to(dtype)
    tensor = to_sites(matrices, tuple(sites))
    assert tensor.shape == (n, *[i * j for i, j in sites])
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        where = [
            (int(torch.randint(i, (), generator=draw)), int(torch.randint(j, (), generator=draw))) for i, j in sites
        ]
        row = col = 0
        for (i, j), (a, b) in zip(sites, where, strict=True):
            row, col = row * i + a, col * j + b
        site = tuple(a * j + b for (_, j), (a, b) in zip(sites, where, strict=True))
        assert torch.equal(tensor[(slice(None), *site)], matrices[:, row, col])
    assert torch.equal(from_sites(tensor.reshape(n, -1), tuple(sites)), matrices)
