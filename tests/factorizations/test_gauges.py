"""Gauges: what each one says of its cores, while all fold to one matrix."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tnadapt.factorizations import CP, CP_GAUGES, GAUGES, MPO, SVD, TUCKER_GAUGES, Factorization, Tucker

from .variants import KINDS, make_matrix, matrices, relative_error

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
        along = make_matrix(SHAPE, seed=1) if factorization.needs_gradient else None
        assert relative_error(factorization.fold(factorization.unfold(matrix, along)), matrix) <= 1e-13


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


# -- balanced -----------------------------------------------------------------------------------------------------------


def parts(cores: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """What is left and what is right of each bond, [a, d] and [d, b], by contracting core after core."""
    found = []
    for k in range(1, len(cores)):
        left, right = cores[0].flatten(0, 2), cores[-1].flatten(1)
        for core in cores[1:k]:
            left = (left @ core.flatten(1)).reshape(-1, core.shape[-1])
        for core in reversed(cores[k:-1]):
            right = (core.flatten(0, 2) @ right).reshape(core.shape[0], -1)
        found.append((left, right))
    return found


def imbalance(cores: tuple[Tensor, ...]) -> float:
    """How far the Gram matrices of both sides of a bond are apart, over the size of the larger: the worst bond."""
    errors = []
    for left, right in parts(cores):
        one, other = left.mT @ left, right @ right.mT
        errors.append(float((one - other).norm()) / max(float(one.norm()), float(other.norm()), 1e-300))
    return max(errors)


BALANCED = [
    MPO(sites=SITES, gauge="balanced"),
    MPO(sites=SITES, gauge="balanced", max_bond=4),
    MPO(sites=[(4, 3), (1, 1), (1, 1), (12, 5)], gauge="balanced"),
    MPO(order=16, gauge="balanced"),
    SVD(gauge="balanced"),
]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("zero", "huge", "tiny")])
@pytest.mark.parametrize("mpo", BALANCED, ids=lambda mpo: repr(mpo))
def test_balanced_has_the_singular_values_on_both_sides(mpo: MPO, kind: str) -> None:
    """Of every bond the Gram matrices are the singular values of the unfolding there: to 1e-12, rank-deficient ones too."""
    cores = mpo.unfold(make_matrix(SHAPE, kind))
    assert imbalance(cores) <= 1e-12
    for left, right in parts(cores):
        values = torch.linalg.svdvals(left @ right)[: left.shape[1]]
        for gram in (left.mT @ left, right @ right.mT):
            assert torch.allclose(torch.diag(values), gram, atol=1e-12 * float(values[0]), rtol=0)


@given(data=st.data(), order=st.integers(2, 6), scale=st.integers(-100, 100))
def test_balanced_at_any_scale(data: st.DataObject, order: int, scale: int) -> None:
    matrix = data.draw(matrices(shape=(24, 8), dtype=torch.float64))
    one = matrix.reshape(-1, 24, 8)[0]
    mpo = MPO(order=order, gauge="balanced")
    cores = mpo.unfold(one)
    assert all(bool(torch.isfinite(core).all()) for core in cores)
    if bool(one.any()) and 1e-100 < float(one.abs().max()) < 1e100:
        assert imbalance(cores) <= 1e-11
        # four times as large a matrix is twice as large at both ends, bit by bit, and the same between
        first, *middle, last = mpo.unfold(one * 4.0**scale)
        assert torch.equal(first, cores[0] * 2.0**scale)
        assert torch.equal(last, cores[-1] * 2.0**scale)
        assert all(map(torch.equal, middle, cores[1:-1]))


def test_balanced_of_the_papers_sites() -> None:
    """`U Lambda^1/2`, identities, `Lambda^1/2 V^T`."""
    matrix = make_matrix((768, 8))
    first, *middle, last = MPO(order=9, gauge="balanced").unfold(matrix)
    assert all(torch.equal(core[:, 0, 0], torch.eye(48, dtype=torch.float64)) for core in middle)
    assert float(first.norm()) == pytest.approx(float(last.norm()), rel=1e-12)
    for plain, core in zip(SVD(gauge="balanced").unfold(matrix), (first, last), strict=True):
        assert torch.equal(plain, core)


@pytest.mark.parametrize("sites", CANONICAL)
def test_balanced_leaves_zero_in_the_gauge_of_algorithm_1(sites: list[tuple[int, int]]) -> None:
    zero = torch.zeros(SHAPE)
    for balanced, plain in zip(
        MPO(sites=sites, gauge="balanced").unfold(zero), MPO(sites=sites).unfold(zero), strict=True
    ):
        assert torch.equal(balanced, plain)


def test_balanced_gives_directions_of_value_zero_a_gradient() -> None:
    """The left part of a direction that a rank-deficient matrix has not is small and not zero."""
    one, grad = SVD(max_bond=1), make_matrix((24, 8), seed=1)
    matrix = one.fold(one.unfold(make_matrix((24, 8))))
    svd = SVD(gauge="balanced")
    cores = svd.unfold(matrix)
    assert int((cores[1].flatten(1).norm(dim=1) > 1e-6).sum()) == 1
    grads = svd.pull_back(cores, grad)
    assert bool((grads[1].flatten(1).norm(dim=1) > 1e-9).all())


# -- random -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", CANONICAL)
def test_random_is_a_rotation_of_the_svd_gauge(sites: list[tuple[int, int]]) -> None:
    matrix = make_matrix(SHAPE)
    plain, rotated = MPO(sites=sites).unfold(matrix), MPO(sites=sites, gauge="random").unfold(matrix)
    assert all(orthonormal(core.flatten(0, 2)) for core in rotated[:-1])
    for (left, right), (left_r, right_r) in zip(parts(plain), parts(rotated), strict=True):
        rotation = left.mT @ left_r
        assert orthonormal(rotation)
        assert torch.allclose(left @ rotation, left_r, atol=1e-12)
        assert torch.allclose(rotation.mT @ right, right_r, atol=1e-12)
        if len(rotation) > 3:
            assert float(rotation.abs().max()) < 1 - 1e-6


def test_random_rounds_in_every_core() -> None:
    """Its cores are dense where those of the other gauges are identities, so that sixteen of float32 round sixteen times."""
    matrix = make_matrix((256, 256), dtype=torch.float32)
    for order in (2, 8, 16):
        mpo = MPO(order=order, gauge="random")
        assert relative_error(mpo.fold(mpo.unfold(matrix)), matrix) <= (1 + order) * torch.finfo(torch.float32).eps
        assert relative_error(mpo.fold(mpo.unfold(matrix.double())), matrix) <= 1e-13


def test_tucker_random_is_a_rotation() -> None:
    matrix = make_matrix(SHAPE)
    *plain, core = Tucker(sites=SITES).unfold(matrix)
    *rotated, turned = Tucker(sites=SITES, gauge="random").unfold(matrix)
    for factor, other in zip(plain, rotated, strict=True):
        rotation = factor.flatten(0, 1).mT @ other.flatten(0, 1)
        assert orthonormal(rotation)
        assert torch.allclose(factor @ rotation, other, atol=1e-12)
    assert float(turned.norm()) == pytest.approx(float(core.norm()))
    assert not torch.allclose(core, turned)


def test_random_draws_from_its_seed_alone() -> None:
    matrix = make_matrix(SHAPE)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = MPO(sites=SITES, gauge="random").unfold(matrix)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = MPO(sites=SITES, gauge="random").unfold(matrix)
    assert all(map(torch.equal, first, again))
    other = MPO(sites=SITES, gauge="random", seed=1).unfold(matrix)
    assert not any(map(torch.equal, first, other))


def test_rotations_are_uniform() -> None:
    """Of a Haar rotation the entries have mean 0, variance 1/d, and the trace has variance 1."""
    from tnadapt.factorizations.gauges import random_rotations

    like = torch.zeros(1, dtype=torch.float64)
    drawn = torch.stack([random_rotations([4], seed, like)[0] for seed in range(2000)])
    assert torch.allclose(drawn @ drawn.mT, torch.eye(4, dtype=torch.float64).expand_as(drawn), atol=1e-12)
    assert float(drawn.mean(dim=0).abs().max()) < 0.05
    assert torch.allclose(drawn.square().mean(dim=0), torch.full((4, 4), 0.25, dtype=torch.float64), atol=0.03)
    traces = drawn.diagonal(dim1=1, dim2=2).sum(1)
    assert float(traces.var()) == pytest.approx(1.0, abs=0.15)


# -- gradient -----------------------------------------------------------------------------------------------------------


def unfoldings(matrix: Tensor, sites: list[tuple[int, int]]) -> list[Tensor]:
    """The matrix as [modes up to k, modes after k] for each bond."""
    rows, cols = [i for i, _ in sites], [j for _, j in sites]
    m = len(sites)
    split = matrix.reshape(*rows, *cols).permute(*itertools.chain(*((k, m + k) for k in range(m))))
    return [split.reshape(math.prod(rows[:k]) * math.prod(cols[:k]), -1) for k in range(1, m)]


@pytest.mark.parametrize("sites", CANONICAL)
def test_from_zero_the_frames_are_the_gradients(sites: list[tuple[int, int]]) -> None:
    """Left of every bond stand the leading left singular vectors of the gradient's unfolding there."""
    grad = make_matrix(SHAPE, seed=2)
    mpo = MPO(sites=sites, gauge="gradient")
    cores = mpo.unfold(torch.zeros_like(grad), gradient=grad)
    assert not mpo.fold(cores).any()
    for (left, _), unfolding in zip(parts(cores), unfoldings(grad, sites), strict=True):
        d = left.shape[1]
        u, s, _ = torch.linalg.svd(unfolding, full_matrices=False)
        assert orthonormal(left)
        # both are bases of one space, and the same up to signs where values differ
        assert torch.allclose((left.mT @ u[:, :d]).abs(), torch.eye(d, dtype=torch.float64), atol=1e-6)
        assert torch.allclose((left.mT @ unfolding).norm(dim=1), s[:d])


@pytest.mark.parametrize("kind", ["normal", "rank-1", "deficient"])
@pytest.mark.parametrize("sites", CANONICAL)
def test_the_gradient_is_diagonal_in_its_frames(sites: list[tuple[int, int]], kind: str) -> None:
    """Of any matrix: the rows of `left^T G` are orthogonal, the longest first, and nothing of the matrix is outside."""
    matrix, grad = make_matrix(SHAPE, kind), make_matrix(SHAPE, seed=2)
    cores = MPO(sites=sites, gauge="gradient").unfold(matrix, gradient=grad)
    assert all(orthonormal(core.flatten(0, 2)) for core in cores[:-1])
    for (left, right), seen, held in zip(parts(cores), unfoldings(grad, sites), unfoldings(matrix, sites), strict=True):
        assert torch.allclose(left @ right, held, atol=1e-12)
        along = left.mT @ seen
        gram = along @ along.mT
        assert torch.allclose(gram, torch.diag(torch.diag(gram)), atol=1e-11 * float(gram.norm()))
        lengths = torch.diag(gram)
        assert bool((lengths[1:] <= lengths[:-1] + 1e-9).all())


def test_free_directions_follow_the_gradient() -> None:
    """A bond of 3 that a matrix of rank 1 fills by one: beside it stand the two directions that hold most of the gradient."""
    matrix, grad = make_matrix((24, 8), "rank-1"), make_matrix((24, 8), seed=2)
    # rank 1 in the order of the sites
    svd = SVD(max_bond=1)
    matrix = svd.fold(svd.unfold(matrix))
    cut = SVD(max_bond=3, gauge="gradient")
    cores = cut.unfold(matrix, gradient=grad)
    assert relative_error(cut.fold(cores), matrix) <= 1e-13
    sites = list(cut.structure((24, 8)).sites)
    [held], [seen] = unfoldings(matrix, sites), unfoldings(grad, sites)
    own = torch.linalg.svd(held)[0][:, :1]
    outside = seen - own @ (own.mT @ seen)
    best = float((own.mT @ seen).square().sum() + torch.linalg.svdvals(outside)[:2].square().sum())
    assert float((cores[0].flatten(0, 2).mT @ seen).square().sum()) == pytest.approx(best)


def test_tucker_frames_are_the_gradients() -> None:
    grad = make_matrix(SHAPE, seed=2)
    *plain, _ = Tucker(sites=SITES).unfold(grad)
    *factors, core = Tucker(sites=SITES, gauge="gradient").unfold(torch.zeros_like(grad), gradient=grad)
    assert not core.any()
    for one, other in zip(plain, factors, strict=True):
        overlap = one.flatten(0, 1).mT @ other.flatten(0, 1)
        assert torch.allclose(overlap.abs(), torch.eye(len(overlap), dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("make", [lambda **k: MPO(order=4, **k), Tucker], ids=["mpo", "tucker"])
def test_a_zero_gradient_moves_nothing(make: Any) -> None:
    """Where the gradient says nothing, the span is Algorithm 1's, and the scale of the gradient never matters."""
    matrix, grad = make_matrix((24, 8)), make_matrix((24, 8), seed=2)
    along = make(gauge="gradient")
    assert relative_error(along.fold(along.unfold(matrix, torch.zeros_like(matrix))), matrix) <= 1e-13
    for factor in (2.0**-400, 2.0**400):
        assert all(map(torch.equal, along.unfold(matrix, grad), along.unfold(matrix, grad * factor)))


def test_gradients_of_a_batch_are_its_members() -> None:
    batch, grads = make_matrix((3, *SHAPE)), make_matrix((3, *SHAPE), seed=2)
    batch[1] = 0
    mpo = MPO(sites=SITES, gauge="gradient")
    stacked = mpo.unfold(batch, gradient=grads)
    for k in range(3):
        for core, own in zip(stacked, mpo.unfold(batch[k], gradient=grads[k]), strict=True):
            assert torch.allclose(core[k], own, atol=1e-9)


def test_bad_gradients() -> None:
    matrix = make_matrix((24, 8), dtype=torch.float32)
    along = MPO(order=3, gauge="gradient")
    assert along.needs_gradient
    assert not MPO(order=3).needs_gradient
    with pytest.raises(
        ValueError, match=r"MPO\(order=3, gauge=gradient\) is aligned with a gradient: .*gradient=\.\.\."
    ):
        along.unfold(matrix)
    with pytest.raises(ValueError, match="does not look at a gradient"):
        MPO(order=3).unfold(matrix, gradient=matrix)
    with pytest.raises(ValueError, match=r"shape \(8, 24\), the matrix \(24, 8\)"):
        along.unfold(matrix, gradient=matrix.mT)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="gradient of the 24x8 matrix holds NaN"):
            along.unfold(matrix, gradient=torch.full_like(matrix, value))


def test_bad_seeds() -> None:
    for seed in (-1, 0.5, True, None):
        with pytest.raises(ValueError, match=f"seed={seed}"):
            MPO(order=3, gauge="random", seed=seed)  # type: ignore[arg-type]
    for make in (SVD, Tucker):
        with pytest.raises(ValueError, match="seed=3 is of the rotations of gauge='random', and the gauge is 'svd'"):
            make(seed=3)
    assert SVD(gauge="random", seed=3).label == "SVD(gauge=random, seed=3)"
