"""Truncation: the bound of Eq. 11, and the best rank-k error where there are two sites."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tnadapt.factorizations import CP, MPO, SVD, Factorization, Tucker, paper_sites

from .variants import TRUNCATED, make_matrix, matrices, relative_error, shapes


def unfoldings(matrix: Tensor, sites: list[tuple[int, int]]) -> list[Tensor]:
    """The matrices `[(i_1 j_1 ... i_k j_k), (the others)]` that the bonds cut."""
    m = len(sites)
    tensor = matrix.reshape(*[i for i, _ in sites], *[j for _, j in sites])
    tensor = tensor.permute([axis for k in range(m) for axis in (k, m + k)])
    modes = [i * j for i, j in sites]
    return [tensor.reshape(math.prod(modes[:k]), -1) for k in range(1, m)]


def tail(matrix: Tensor, rank: int) -> float:
    """Frobenius error of the best rank-`rank` approximation."""
    return float(torch.linalg.svdvals(matrix)[rank:].norm())


@pytest.mark.parametrize("gauge", ["svd", "right", "spread"])
@given(data=st.data(), cap=st.integers(1, 12), order=st.integers(2, 9))
def test_eq_11(gauge: str, data: st.DataObject, cap: int, order: int) -> None:
    shape = data.draw(shapes(64))
    matrix = make_matrix(shape, data.draw(st.sampled_from(["normal", "ill-conditioned", "deficient"])))
    mpo = MPO(order=order, max_bond=cap, gauge=gauge)
    error = float((mpo.fold(mpo.unfold(matrix)) - matrix).norm())
    bound = math.sqrt(sum(tail(u, cap) ** 2 for u in unfoldings(matrix, list(paper_sites(shape, order)))))
    assert error <= bound + 1e-11 * float(matrix.norm())


@pytest.mark.parametrize("cap", [1, 2, 3, 5])
def test_eq_11_many_sites(cap: int) -> None:
    sites = [(2, 2), (2, 3), (1, 1), (3, 1), (2, 2)]
    mpo = MPO(sites=sites, max_bond=cap)
    matrix = make_matrix((24, 12))
    error = float((mpo.fold(mpo.unfold(matrix)) - matrix).norm())
    tails = [tail(u, cap) for u in unfoldings(matrix, sites)]
    assert max(tails) - 1e-12 <= error <= math.sqrt(sum(t * t for t in tails)) + 1e-12


TWO_SITES = {
    "svd": lambda cap: SVD(max_bond=cap),
    "mpo-5": lambda cap: MPO(order=5, max_bond=cap),
    "svd-right": lambda cap: SVD(max_bond=cap, gauge="right"),
    "tucker": lambda cap: Tucker(max_rank=cap),
    "cp": lambda cap: CP(max_rank=cap),
    "cp-5-spread": lambda cap: CP(order=5, max_rank=cap, gauge="spread"),
}


@pytest.mark.parametrize("name", TWO_SITES)
@given(shape=shapes(64), cap=st.integers(1, 20))
def test_two_sites_give_the_best_rank_k(name: str, shape: tuple[int, int], cap: int) -> None:
    factorization: Factorization = TWO_SITES[name](cap)
    matrix = make_matrix(shape)
    (pairs,) = unfoldings(matrix, list(paper_sites(shape, 2)))
    error = float((factorization.fold(factorization.unfold(matrix)) - matrix).norm())
    assert error == pytest.approx(tail(pairs, cap), rel=1e-9, abs=1e-11 * float(matrix.norm()))


@pytest.mark.parametrize("sites", [[(4, 3), (12, 5)], [(1, 1), (4, 3), (1, 1), (12, 5)], [(2, 1), (24, 15)]])
def test_two_sites_of_a_cp_need_no_iteration(sites: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    cp = CP(sites=sites, rank=1)
    expected = tail(unfoldings(make_matrix((48, 15)), [site for site in sites if site != (1, 1)])[0], 1)
    monkeypatch.setattr(cp.operations, "cp_decompose", lambda *_: pytest.fail("least squares"))
    error = float((cp.fold(cp.unfold(make_matrix((48, 15)))) - make_matrix((48, 15))).norm())
    assert error == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("ranks", [(1, 1, 1, 1), (5, 1, 7, 2), (12, 1, 3, 6), (2, 1, 10, 1)])
def test_tucker_bound(ranks: tuple[int, ...]) -> None:
    """The higher-order SVD misses at most what is cut from the unfoldings of the single modes, and at least the most."""
    sites = [(4, 3), (1, 1), (2, 5), (6, 1)]
    matrix = make_matrix((48, 15))
    tucker = Tucker(sites=sites, ranks=ranks)
    error = float((tucker.fold(tucker.unfold(matrix)) - matrix).norm())
    modes = [i * j for i, j in sites]
    tensor = unfoldings(matrix, sites)[0].reshape(modes)
    tails = [tail(tensor.movedim(k, 0).reshape(modes[k], -1), rank) for k, rank in enumerate(ranks)]
    assert max(tails) - 1e-12 <= error <= math.sqrt(sum(t * t for t in tails)) + 1e-12


def test_cp_by_least_squares_finds_what_is_there() -> None:
    """A matrix made of three components, and one near it, is found with three."""
    sites = [(4, 3), (2, 5), (6, 1)]
    generator = torch.Generator().manual_seed(3)
    cp = CP(sites=sites, rank=3)
    made = cp.fold([torch.randn(shape, generator=generator, dtype=torch.float64) for shape in cp.core_shapes((48, 15))])
    assert float((cp.fold(cp.unfold(made)) - made).norm()) <= 1e-4 * float(made.norm())
    noisy = made + 1e-2 * make_matrix((48, 15))
    assert float((cp.fold(cp.unfold(noisy)) - made).norm()) <= 1e-2 * float(noisy.norm())


def test_more_components_miss_less() -> None:
    sites, matrix = [(4, 3), (2, 5), (6, 1)], make_matrix((48, 15))
    errors = []
    for rank in (1, 5, 15, 30, 45):
        cp = CP(sites=sites, rank=rank)
        errors.append(float((cp.fold(cp.unfold(matrix)) - matrix).norm() / matrix.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1
    assert errors[-1] < 0.35


@given(data=st.data())
def test_what_is_missed_is_never_more_than_the_matrix(data: st.DataObject) -> None:
    """Zero would miss the whole matrix: no truncation may miss more, nor make numbers that are not finite."""
    matrix = data.draw(matrices(dtype=torch.float32))
    factorization = TRUNCATED[data.draw(st.sampled_from(sorted(TRUNCATED)))]
    folded = factorization.fold(factorization.unfold(matrix))
    assert bool(torch.isfinite(folded).all())
    assert relative_error(folded, matrix) <= 1 + 1e-6
