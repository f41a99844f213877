"""Law 4: from `W = 0`, where every LoRA `B` starts, the gradient reaches at least one core."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given

from .variants import CASES, EVERY, make_matrix, relative_error, shapes


@pytest.mark.parametrize("name", EVERY)
@given(shape=shapes(128))
def test_gradient_reaches_a_core(name: str, shape: tuple[int, int]) -> None:
    factorization = EVERY[name]
    cores = factorization.unfold(torch.zeros(shape))
    assert not factorization.fold(cores).any()
    # an entry of the gradient can lie outside what a truncated chain reaches; a whole one cannot
    grads = factorization.pull_back(cores, make_matrix(shape, dtype=torch.float32))
    assert any(bool(grad.any()) for grad in grads)


@pytest.mark.parametrize("name", CASES)
def test_descent_leaves_zero(name: str) -> None:
    """A few steps of gradient descent bring the folded matrix nearer to a target that the cores can represent."""
    factorization, shape = CASES[name]
    target = factorization.fold(factorization.unfold(make_matrix(shape)))
    cores = list(factorization.unfold(torch.zeros(shape, dtype=torch.float64)))
    errors: list[float] = []
    for _ in range(3):
        grads = factorization.pull_back(cores, factorization.fold(cores) - target)
        # a rate that does not overshoot at any depth: to first order at most a hundredth of the target
        slope = sum(float(grad.square().sum()) for grad in grads)
        rate = 0.01 * min(1.0, float(target.square().sum()) / slope)
        cores = [core - rate * grad for core, grad in zip(cores, grads, strict=True)]
        errors.append(relative_error(factorization.fold(cores), target))
    assert all(after < before for before, after in pairwise([1.0, *errors])), errors


@pytest.mark.parametrize("name", CASES)
def test_zero_in_a_batch_of_others(name: str) -> None:
    factorization, shape = CASES[name]
    batch = torch.stack([make_matrix(shape), torch.zeros(shape, dtype=torch.float64), make_matrix(shape, "rank-1")])
    cores = factorization.unfold(batch)
    assert all(bool(torch.isfinite(core).all()) for core in cores)
    grads = factorization.pull_back(cores, torch.ones_like(batch))
    assert any(bool(grad[1].any()) for grad in grads)
