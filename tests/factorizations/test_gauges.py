"""Gauges: what each one says of its cores, while all fold to one matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tnadapt.factorizations import CP, CP_GAUGES, GAUGES, MPO, TUCKER_GAUGES, Factorization, Tucker

from .variants import make_matrix, relative_error

SHAPE = (48, 15)
SITES = [(4, 3), (1, 1), (2, 5), (6, 1)]
CANONICAL = [
    SITES,
    [(4, 3), (1, 1), (1, 1), (12, 5)],
    [(4, 3), (2, 1), (6, 5), (1, 1), (1, 1)],
    [(1, 1), (1, 1), (4, 3), (2, 1), (6, 5)],
]


def orthonormal(matrix: Tensor) -> bool:
    return torch.allclose(matrix.mT @ matrix, torch.eye(matrix.shape[1], dtype=matrix.dtype), atol=1e-12)


def norms(cores: tuple[Tensor, ...]) -> list[float]:
    return [float(core.norm()) for core in cores]


def test_every_gauge_is_of_one_matrix() -> None:
    matrix = make_matrix(SHAPE)
    each: list[Factorization] = [
        *(MPO(sites=SITES, gauge=gauge) for gauge in GAUGES),
        *(Tucker(sites=SITES, gauge=gauge) for gauge in TUCKER_GAUGES),
        *(CP(sites=SITES, gauge=gauge) for gauge in CP_GAUGES),
    ]
    for factorization in each:
        assert relative_error(factorization.fold(factorization.unfold(matrix)), matrix) <= 1e-13


@pytest.mark.parametrize("kind", ["normal", "zero", "deficient"])
@pytest.mark.parametrize("sites", CANONICAL)
def test_svd_is_left_canonical(sites: list[tuple[int, int]], kind: str) -> None:
    matrix = make_matrix(SHAPE, kind)
    cores = MPO(sites=sites).unfold(matrix)
    assert all(orthonormal(core.flatten(0, 2)) for core in cores[:-1])
    assert float(cores[-1].norm()) == pytest.approx(float(matrix.norm()))


@pytest.mark.parametrize("kind", ["normal", "zero", "deficient"])
@pytest.mark.parametrize("sites", CANONICAL)
def test_right_is_right_canonical(sites: list[tuple[int, int]], kind: str) -> None:
    matrix = make_matrix(SHAPE, kind)
    cores = MPO(sites=sites, gauge="right").unfold(matrix)
    assert all(orthonormal(core.flatten(1, 3).mT) for core in cores[1:])
    assert float(cores[0].norm()) == pytest.approx(float(matrix.norm()))


@pytest.mark.parametrize("kind", ["normal", "constant", "deficient"])
@pytest.mark.parametrize("max_bond", [None, 4])
@pytest.mark.parametrize("gauge", ["svd", "right"])
def test_sites_without_entries_between_others_are_identities(gauge: str, max_bond: int | None, kind: str) -> None:
    cores = MPO(sites=[(4, 3), (1, 1), (2, 5), (1, 1), (6, 1)], gauge=gauge, max_bond=max_bond).unfold(
        make_matrix(SHAPE, kind)
    )
    for k in (1, 3):
        assert torch.equal(cores[k][:, 0, 0], torch.eye(cores[k].shape[0], dtype=torch.float64))


def test_identity_keeps_the_entries() -> None:
    matrix = make_matrix(SHAPE)
    for factorization in (MPO(sites=SITES, gauge="identity"), Tucker(sites=SITES, gauge="identity"), CP(sites=SITES)):
        cores = factorization.unfold(matrix)
        keeping = [core for core in cores if not bool(((core == 0) | (core == 1)).all())]
        assert len(keeping) == 1
        assert torch.equal(keeping[0].flatten().sort().values, matrix.flatten().sort().values)


@pytest.mark.parametrize(
    ("sites", "rank", "largest"),
    [
        ([(4, 3), (2, 5), (6, 1)], None, 0),
        ([(4, 3), (2, 5), (6, 1)], 4, 0),
        ([(2, 5), (24, 3)], 4, 1),
        ([(24, 3), (1, 1), (2, 5)], 4, 0),
    ],
)
def test_the_largest_mode_of_a_cp_holds_the_weights(
    sites: list[tuple[int, int]], rank: int | None, largest: int
) -> None:
    """Exact, by least squares, and by the SVD where two sites are left."""
    cores = CP(sites=sites, rank=rank).unfold(1e3 * make_matrix(SHAPE))
    for k, core in enumerate(cores):
        columns = core.flatten(0, 1).norm(dim=0)
        assert torch.allclose(columns, torch.ones_like(columns)) == (k != largest)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_spread_evens_the_norms(scale: float) -> None:
    matrix = make_matrix(SHAPE) * scale
    for factorization in (
        MPO(order=16, gauge="spread"),
        MPO(sites=SITES, gauge="spread"),
        Tucker(sites=SITES, gauge="spread"),
    ):
        found = norms(factorization.unfold(matrix))
        # powers of two, rounded: each core within a factor of two of the mean
        assert max(found) <= 4 * min(found)
    for component in torch.stack(
        [core.flatten(0, 1).norm(dim=0) for core in CP(order=4, gauge="spread").unfold(matrix)]
    ).T:
        assert float(component.max()) <= 4 * float(component.min())


@pytest.mark.parametrize(
    "make", [lambda gauge: MPO(order=5, gauge=gauge), lambda gauge: Tucker(gauge=gauge)], ids=["mpo", "tucker"]
)
def test_spread_leaves_zero_alone(make: object) -> None:
    zero = torch.zeros(SHAPE)
    assert callable(make)
    for spread, plain in zip(make("spread").unfold(zero), make("svd").unfold(zero), strict=True):
        assert torch.equal(spread, plain)


def test_spread_does_not_round() -> None:
    """Shares are powers of two: what folds is bit by bit what the plain gauge folds."""
    matrix = make_matrix((768, 8), dtype=torch.float32)
    plain, spread = MPO(order=16), MPO(order=16, gauge="spread")
    assert torch.equal(plain.fold(plain.unfold(matrix)), spread.fold(spread.unfold(matrix)))
