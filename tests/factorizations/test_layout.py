"""Law 2: shapes, contiguity and dtype of cores and gradients; fused optimizers index flat memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .variants import CASES, EVERY, make_matrix, matrices, relative_error


@pytest.mark.parametrize("name", EVERY)
@given(data=st.data())
def test_shape_dtype_contiguity(name: str, data: st.DataObject) -> None:
    factorization = EVERY[name]
    matrix = data.draw(matrices())
    cores = factorization.unfold(matrix)
    batch, shape = matrix.shape[:-2], (matrix.shape[-2], matrix.shape[-1])
    grads = factorization.pull_back(cores, torch.ones_like(matrix))
    wide = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    for core, grad, expected in zip(cores, grads, factorization.core_shapes(shape), strict=True):
        assert core.shape == (*batch, *expected) == grad.shape
        assert core.is_contiguous()
        assert grad.is_contiguous()
        assert core.dtype == wide == grad.dtype
        assert not core.requires_grad
        assert core.untyped_storage().nbytes() == core.numel() * core.element_size()


@pytest.mark.parametrize("name", CASES)
def test_cores_are_their_own_memory(name: str) -> None:
    """A core that aliased the matrix or another core would be overwritten by the first step."""
    factorization, shape = CASES[name]
    matrix = make_matrix(shape)
    kept = matrix.clone()
    cores = factorization.unfold(matrix)
    for k, core in enumerate(cores):
        untouched = [other.clone() for other in cores[k + 1 :]]
        core.fill_(7.0)
        assert all(map(torch.equal, cores[k + 1 :], untouched))
    assert torch.equal(matrix, kept)


@pytest.mark.parametrize("name", CASES)
def test_views_of_matrices_and_of_cores(name: str) -> None:
    """Transposed, strided and expanded inputs mean what their values say."""
    factorization, shape = CASES[name]
    matrix = make_matrix(shape)
    strided = torch.stack([matrix, matrix], dim=-1)[..., 0]
    assert not strided.is_contiguous() or strided.numel() == 1
    for got, want in zip(factorization.unfold(strided), factorization.unfold(matrix), strict=True):
        assert torch.equal(got, want)
    cores = factorization.unfold(matrix)
    strided_cores = [torch.stack([core, core], dim=-1)[..., 0] for core in cores]
    assert relative_error(factorization.fold(strided_cores), factorization.fold(cores)) <= 1e-14
    column_major = matrix.mT.contiguous().mT
    for got, want in zip(
        factorization.pull_back(strided_cores, column_major), factorization.pull_back(cores, matrix), strict=True
    ):
        assert got.is_contiguous()
        assert float((got - want).norm()) <= 1e-12 * float(want.norm())


@pytest.mark.parametrize("name", CASES)
def test_parameters_with_gradients(name: str) -> None:
    """Unfolding a Parameter records no graph; folding under no_grad leaves none."""
    factorization, shape = CASES[name]
    parameter = torch.nn.Parameter(make_matrix(shape))
    cores = factorization.unfold(parameter)
    assert not any(core.requires_grad for core in cores)
    with torch.no_grad():
        assert not factorization.fold([core.requires_grad_() for core in cores]).requires_grad
