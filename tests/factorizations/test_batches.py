"""Law 5: a batch is folded, unfolded and pulled back as its members are, one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .variants import CASES, EVERY, make_matrix, random_cores, relative_error, shapes

BATCHES = [(1,), (3,), (2, 3)]


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((actual - expected).norm()) <= 1e-12 * (1 + float(expected.norm()))


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_batched_equals_looped(name: str, batch: tuple[int, ...]) -> None:
    factorization, shape = CASES[name]
    cores, grad = random_cores(factorization, shape, batch), make_matrix((*batch, *shape), seed=3)
    folded, grads = factorization.fold(cores), factorization.pull_back(cores, grad)
    assert folded.shape == (*batch, *shape)
    unfolded = factorization.unfold(folded)
    for index in torch.cartesian_prod(*[torch.arange(b) for b in batch]).reshape(-1, len(batch)).tolist():
        at = tuple(index)
        one = [core[at] for core in cores]
        assert close(folded[at], factorization.fold(one))
        for got, want in zip(grads, factorization.pull_back(one, grad[at]), strict=True):
            assert close(got[at], want)
        # cores of equal singular values are not unique, what they fold to is
        alone = factorization.fold(factorization.unfold(folded[at]))
        assert relative_error(factorization.fold([core[at] for core in unfolded]), alone) <= 1e-11


@pytest.mark.parametrize("name", EVERY)
@given(shape=shapes(64), n=st.integers(1, 4))
def test_any_shape(name: str, shape: tuple[int, int], n: int) -> None:
    factorization = EVERY[name]
    matrix = make_matrix((n, *shape), "deficient")
    folded = factorization.fold(factorization.unfold(matrix))
    for k in range(n):
        assert relative_error(folded[k], factorization.fold(factorization.unfold(matrix[k]))) <= 1e-11
