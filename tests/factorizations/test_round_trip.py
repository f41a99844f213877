"""Law 1: `fold(unfold(W)) == W` to rounding wherever the structure is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .variants import (
    AWKWARD_SHAPES,
    DTYPES,
    EXACT,
    EXACT_SITES,
    KINDS,
    PAPER_SHAPES,
    make_matrix,
    matrices,
    relative_error,
    tolerance,
)


@pytest.mark.parametrize("name", EXACT)
@given(data=st.data())
def test_any_matrix(name: str, data: st.DataObject) -> None:
    factorization = EXACT[name]
    matrix = data.draw(matrices())
    cores = factorization.unfold(matrix)
    assert relative_error(factorization.fold(cores), matrix) <= tolerance(matrix.dtype, len(cores))


@pytest.mark.parametrize("name", EXACT)
def test_equal_entries(name: str) -> None:
    """Their roundings do not cancel in the norms that a decomposition takes."""
    for shape in ((199, 199), (1, 40_000), (40_000, 1)):
        matrix = torch.full(shape, -0.75, dtype=torch.float64)
        cores = EXACT[name].unfold(matrix)
        assert relative_error(EXACT[name].fold(cores), matrix) <= tolerance(matrix.dtype, len(cores))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXACT_SITES)
def test_explicit_sites(name: str, kind: str) -> None:
    factorization, shape = EXACT_SITES[name]
    for dtype in DTYPES:
        matrix = make_matrix((2, *shape), kind, dtype)
        cores = factorization.unfold(matrix)
        assert relative_error(factorization.fold(cores), matrix) <= tolerance(dtype, len(cores))


@pytest.mark.parametrize("shape", AWKWARD_SHAPES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_awkward_shapes(name: str, shape: tuple[int, int]) -> None:
    factorization = EXACT[name]
    for kind in KINDS:
        for dtype in DTYPES:
            matrix = make_matrix(shape, kind, dtype)
            cores = factorization.unfold(matrix)
            assert relative_error(factorization.fold(cores), matrix) <= tolerance(dtype, len(cores)), (kind, dtype)


@pytest.mark.parametrize("shape", PAPER_SHAPES, ids=str)
def test_paper_shapes(shape: tuple[int, int]) -> None:
    matrix = make_matrix(shape)
    for name, factorization in EXACT.items():
        for dtype in (torch.float32, torch.float64):
            cores = factorization.unfold(matrix.to(dtype))
            assert relative_error(factorization.fold(cores), matrix.to(dtype)) <= tolerance(dtype, len(cores)), name


@pytest.mark.parametrize("name", ["svd-identity", "mpo-16-identity", "tucker-identity", "cp", "cp-16", "cp-16-spread"])
@given(data=st.data())
def test_cores_of_entries_are_bitwise(name: str, data: st.DataObject) -> None:
    factorization = EXACT[name]
    matrix = data.draw(matrices())
    assert torch.equal(
        factorization.fold(factorization.unfold(matrix)), matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    )


def test_entries_of_very_different_size_stay_bitwise() -> None:
    matrix = make_matrix((24, 8))
    matrix[0, 0], matrix[3, 4] = 1e300, 1e-300
    for name in ("svd-identity", "mpo-16-identity", "tucker-identity", "cp", "cp-16"):
        assert torch.equal(EXACT[name].fold(EXACT[name].unfold(matrix)), matrix), name
