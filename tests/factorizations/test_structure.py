"""Counts of parameters: the formulas of the paper, computed here on their own, and the tensors themselves."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnadapt.factorizations import CP, MPO, SVD, Tucker, near_square, paper_sites

from .variants import CASES, EVERY, PAPER_SHAPES, shapes

#: Sites as the paper's table prints them: rows and columns of the first and of the last site.
PAPER_SPLITS = {
    768: (24, 32),
    3072: (48, 64),
    4096: (64, 64),
    11008: (86, 128),
    1024: (32, 32),
    14336: (112, 128),
    8: (2, 4),
}


def bonds_of_eq_4(modes: list[int]) -> list[int]:
    """Eq. 4 by walking from both sides: a bond cannot exceed what either side spans."""
    from_left, from_right = [1], [1]
    for p in modes:
        from_left.append(from_left[-1] * p)
    for p in reversed(modes):
        from_right.append(from_right[-1] * p)
    return [min(a, b) for a, b in zip(from_left, reversed(from_right), strict=True)]


def added_of_eq_6(sites: list[tuple[int, int]]) -> int:
    bonds = bonds_of_eq_4([i * j for i, j in sites])
    total = sum(i * j * bonds[k] * bonds[k + 1] for k, (i, j) in enumerate(sites))
    return total - math.prod(i for i, _ in sites) * math.prod(j for _, j in sites)


@pytest.mark.parametrize("order", [2, 8, 9, 10, 16])
@pytest.mark.parametrize("shape", PAPER_SHAPES, ids=str)
def test_paper_structures(shape: tuple[int, int], order: int) -> None:
    (first_row, last_row), (first_col, last_col) = PAPER_SPLITS[shape[0]], PAPER_SPLITS[shape[1]]
    sites = [(first_row, first_col), *[(1, 1)] * (order - 2), (last_row, last_col)]
    mpo = MPO(order=order)
    bonds = bonds_of_eq_4([i * j for i, j in sites])
    assert mpo.core_shapes(shape) == tuple((bonds[k], i, j, bonds[k + 1]) for k, (i, j) in enumerate(sites))
    assert mpo.added_parameters(shape) == added_of_eq_6(sites)
    assert mpo.structure(shape).exact


def test_documented_example() -> None:
    shapes_of_cores = MPO(order=9).core_shapes((4096, 8))
    assert shapes_of_cores[0] == (1, 64, 2, 128)
    assert shapes_of_cores[1:-1] == ((128, 1, 1, 128),) * 7
    assert shapes_of_cores[-1] == (128, 64, 4, 1)


@given(shape=shapes(), order=st.integers(2, 20))
def test_counts_of_any_shape(shape: tuple[int, int], order: int) -> None:
    mpo = MPO(order=order)
    assert mpo.added_parameters(shape) == added_of_eq_6(list(paper_sites(shape, order)))
    assert mpo.num_parameters(shape) == mpo.added_parameters(shape) + shape[0] * shape[1]
    assert SVD().core_shapes(shape) == MPO(order=2).core_shapes(shape)


@given(shape=shapes(), order=st.integers(2, 20), cap=st.integers(1, 40))
def test_cap_on_bonds(shape: tuple[int, int], order: int, cap: int) -> None:
    capped, full = MPO(order=order, max_bond=cap).structure(shape), MPO(order=order).structure(shape)
    for got, whole in zip(capped.core_shapes, full.core_shapes, strict=True):
        assert got == (min(whole[0], cap), *whole[1:3], min(whole[3], cap))
    assert capped.exact == (capped.core_shapes == full.core_shapes)


@given(n=st.integers(1, 20000))
def test_near_square(n: int) -> None:
    small, large = near_square(n)
    assert small * large == n
    assert small <= large
    assert all(n % between for between in range(small + 1, math.isqrt(n) + 1))


@given(shape=shapes(), order=st.integers(2, 20))
def test_counts_of_tucker_and_cp(shape: tuple[int, int], order: int) -> None:
    first, last = (math.prod(site) for site in (paper_sites(shape, order)[0], paper_sites(shape, order)[-1]))
    small = min(first, last)
    # two proper sites: both factors have the rank of the one unfolding there is; a 1x1 site is one number
    assert Tucker(order=order).num_parameters(shape) == first * small + last * small + small * small + order - 2
    # and one scale for each component
    assert CP(order=order).num_parameters(shape) == (first + last + order - 2) * small
    assert Tucker(order=order).structure(shape).exact
    assert CP(order=order).structure(shape).exact


def test_counts_with_more_proper_sites() -> None:
    sites = [(4, 3), (2, 5), (6, 1)]
    assert Tucker(sites=sites).core_shapes((48, 15)) == ((4, 3, 12), (2, 5, 10), (6, 1, 6), (12, 10, 6))
    # the product of all modes but the largest
    assert CP(sites=sites).core_shapes((48, 15)) == ((4, 3, 60), (2, 5, 60), (6, 1, 60))


def expansions_by_hand(shape: tuple[int, int], orders: range) -> list[float]:
    """Expansion of every MPO with two ends and 1x1 sites between, from Eq. 4 and Eq. 6."""
    rows, cols = shape
    found = []
    for i in (i for i in range(1, rows + 1) if rows % i == 0):
        for j in (j for j in range(1, cols + 1) if cols % j == 0):
            for order in orders:
                sites = [(i, j), *[(1, 1)] * (order - 2), (rows // i, cols // j)]
                found.append(1 + added_of_eq_6(sites) / (rows * cols))
    return found


@given(shape=shapes(128), target=st.floats(1, 10))
def test_target_expansion_is_the_nearest_there_is(shape: tuple[int, int], target: float) -> None:
    structure = MPO(expansion=target).structure(shape)
    assert structure.exact
    nearest = min(abs(found - target) for found in expansions_by_hand(shape, range(2, 33)))
    assert abs(structure.expansion - target) == pytest.approx(nearest, abs=1e-9)


@given(shape=shapes(64), order=st.integers(2, 6))
def test_of_equal_expansions_the_fewest_sites_win_then_the_papers_split(shape: tuple[int, int], order: int) -> None:
    target = MPO(order=order).structure(shape).expansion
    found = MPO(expansion=target).structure(shape)
    assert found.expansion == target
    reached = [
        n
        for n in range(2, order + 1)
        if any(one == pytest.approx(target) for one in expansions_by_hand(shape, range(n, n + 1)))
    ]
    assert len(found.sites) == reached[0]
    if reached[0] == order:
        assert found.sites == paper_sites(shape, order)


def test_structures_are_values() -> None:
    one, other = MPO(order=3).structure((24, 8)), MPO(order=3).structure((24, 8))
    assert one == other
    assert hash(one) == hash(other)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.exact = False  # type: ignore[misc]


@pytest.mark.parametrize("target", [1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
@pytest.mark.parametrize("shape", PAPER_SHAPES, ids=str)
def test_target_expansion_at_the_papers_shapes(shape: tuple[int, int], target: float) -> None:
    """The paper's analysis goes from 1x to 7x: every step of it is within three per cent."""
    assert MPO(expansion=target).structure(shape).expansion == pytest.approx(target, rel=0.03)


def test_target_expansion_of_tucker_and_cp() -> None:
    for factorization in (Tucker(expansion=2.0), CP(expansion=1.5)):
        structure = factorization.structure((768, 8))
        assert structure.exact
        assert structure.expansion == pytest.approx(factorization.expansion, rel=0.15)
        assert f"expansion={factorization.expansion:g}" in factorization.label
    assert Tucker(expansion=100.0).structure((768, 8)).expansion <= 3


def counts_of_two_ends(kind: str, ends: tuple[int, int]) -> int:
    """Two factors with as many columns as the smaller end is long, and between those of a Tucker a square core."""
    return sum(ends) * min(ends) + (min(ends) ** 2 if kind == "tucker" else 0)


@pytest.mark.parametrize("kind", ["tucker", "cp"])
@given(shape=shapes(64), target=st.floats(1, 4))
def test_target_expansion_of_two_ends_is_the_nearest_there_is(kind: str, shape: tuple[int, int], target: float) -> None:
    found = (Tucker if kind == "tucker" else CP)(expansion=target).structure(shape)
    rows, cols = shape
    splits = [(i, j) for i in range(1, rows + 1) if rows % i == 0 for j in range(1, cols + 1) if cols % j == 0]
    # a 1x1 site adds nothing that counts to a Tucker, and to a CP one number for each component
    depths = [0] if kind == "tucker" else range(31)
    possible = [
        (counts_of_two_ends(kind, (i * j, rows * cols // (i * j))) + depth * min(i * j, rows * cols // (i * j)))
        / (rows * cols)
        for i, j in splits
        for depth in depths
    ]
    assert abs(found.expansion - target) == pytest.approx(min(abs(one - target) for one in possible), abs=1e-9)


@pytest.mark.parametrize(
    ("cp", "shape", "scratch"),
    [
        # exact: modes of 12, 10 and 6 have rank 60; folding multiplies 10 and 6 to 60 columns, beside those of 12
        (CP(sites=[(4, 3), (2, 5), (6, 1)]), (48, 15), 60 * (12 + 60)),
        # truncated: least squares hold the product of all but the smallest mode
        (CP(sites=[(4, 3), (2, 5), (6, 1)], rank=5), (48, 15), 5 * 12 * 10),
        (CP(sites=[(2, 1), (4, 3), (6, 5)], rank=5), (48, 15), 5 * 12 * 30),
        (CP(sites=[(2, 1), (4, 3), (1, 1), (6, 5)], rank=5), (48, 15), 5 * 12 * 30),
        # two proper sites: the SVD holds twice the matrix, at full rank or not
        (CP(sites=[(4, 3), (1, 1), (6, 1)], rank=3), (24, 3), 2 * 24 * 3),
        (CP(sites=[(4, 3), (6, 1)], rank=5), (24, 3), 2 * 24 * 3),
        (CP(sites=[(3, 1), (6, 3)]), (18, 3), 2 * 18 * 3),
    ],
    ids=lambda value: getattr(value, "label", str(value)),
)
def test_scratch_of_a_cp_by_hand(cp: CP, shape: tuple[int, int], scratch: int) -> None:
    assert cp.structure(shape).scratch == scratch


def test_what_decompositions_of_svds_need() -> None:
    assert MPO(order=9).structure((48, 15)).scratch == 2 * 48 * 15
    assert Tucker(order=9).structure((48, 15)).scratch == 3 * 48 * 15


LABELS = {
    "MPO(order=2)": MPO(order=2),
    "SVD()": SVD(),
    "SVD(max_bond=4, gauge=right)": SVD(max_bond=4, gauge="right"),
    "SVD(sites=…)": SVD(sites=[(4, 2), (6, 4)]),
    "MPO(order=9, max_bond=4)": MPO(order=9, max_bond=4),
    "MPO(sites=…, gauge=spread)": MPO(sites={(24, 8): [(4, 2), (6, 4)]}, gauge="spread"),
    "MPO(expansion=2.5)": MPO(expansion=2.5),
    "Tucker(order=2, max_rank=3)": Tucker(max_rank=3),
    "Tucker(order=2, ranks=…, gauge=spread)": Tucker(ranks=(2, 2), gauge="spread"),
    "Tucker(sites=…)": Tucker(sites=[(4, 2), (6, 4)]),
    "CP(order=2, rank=3)": CP(rank=3),
    "CP(order=2, max_rank=3, gauge=spread)": CP(max_rank=3, gauge="spread"),
    "CP(expansion=2)": CP(expansion=2),
}


@pytest.mark.parametrize("label", LABELS)
def test_labels(label: str) -> None:
    assert LABELS[label].label == label


def test_labels_tell_variants_apart() -> None:
    labels = [factorization.label for factorization in EVERY.values()]
    assert len(set(labels)) == len(labels)
    assert MPO(order=16).label == "MPO(order=16)"


def test_a_prime_gains_little() -> None:
    assert MPO(order=16).structure((769, 8)).expansion < 1.02
    assert MPO(order=16).structure((13, 17)).expansion < 2
    assert MPO(order=16).core_shapes((1, 1)) == ((1, 1, 1, 1),) * 16


@pytest.mark.parametrize("name", CASES)
def test_counts_equal_the_tensors(name: str) -> None:
    factorization, shape = CASES[name]
    cores = factorization.unfold(torch.ones(shape))
    assert sum(core.numel() for core in cores) == factorization.num_parameters(shape)
    assert tuple(tuple(core.shape) for core in cores) == factorization.core_shapes(shape)
