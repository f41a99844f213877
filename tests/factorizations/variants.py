"""The one table of variants that every property is tested on, and the matrices it is tested with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from tnadapt.factorizations import CP, MPO, SVD, Factorization, TensorRing, Tucker


@dataclass(frozen=True, kw_only=True)
class AlongMPO(MPO):
    """The gauge `"gradient"` with a gradient of its own, so that it stands in the table like the others."""

    gauge: str = "gradient"

    def unfold(self, matrix: Tensor, gradient: Tensor | None = None) -> tuple[Tensor, ...]:
        return super().unfold(matrix, _gradient_for(matrix) if gradient is None else gradient)


@dataclass(frozen=True, kw_only=True)
class AlongTucker(Tucker):
    """As `AlongMPO`."""

    gauge: str = "gradient"

    def unfold(self, matrix: Tensor, gradient: Tensor | None = None) -> tuple[Tensor, ...]:
        return super().unfold(matrix, _gradient_for(matrix) if gradient is None else gradient)


def _gradient_for(matrix: Tensor) -> Tensor:
    """A fixed gradient of the matrix's shape; none where the matrix is nothing that has one."""
    if matrix.dim() < 2 or matrix.numel() == 0:
        return torch.zeros(matrix.shape)
    return make_matrix(matrix.shape, seed=4)


#: The shapes of the paper's models at r = 8, both orientations: T5-Base, Llama 2-7B, Llama 3.1-8B.
PAPER_SHAPES = [
    shape for d in (768, 3072, 4096, 11008, 1024, 14336) for shape in ((d, 8), (8, d))
]  # fmt: skip
AWKWARD_SHAPES = [(1, 1), (1, 7), (13, 1), (13, 17), (2, 3), (769, 8), (256, 256), (4, 251)]

#: Exact for every matrix: name -> factorization.
EXACT: dict[str, Factorization] = {
    "svd": SVD(),
    "mpo-3": MPO(order=3),
    "mpo-9": MPO(order=9),
    "mpo-16": MPO(order=16),
    "mpo-16-identity": MPO(order=16, gauge="identity"),
    "mpo-16-spread": MPO(order=16, gauge="spread"),
    "svd-identity": SVD(gauge="identity"),
    "svd-right": SVD(gauge="right"),
    "mpo-16-right": MPO(order=16, gauge="right"),
    "svd-balanced": SVD(gauge="balanced"),
    "mpo-16-balanced": MPO(order=16, gauge="balanced"),
    "svd-random": SVD(gauge="random"),
    "mpo-3-random": MPO(order=3, gauge="random", seed=5),
    "mpo-2-gradient": AlongMPO(order=2),
    "mpo-16-gradient": AlongMPO(order=16),
    "mpo-3x": MPO(expansion=3.0),
    "ring-2": TensorRing(order=2),
    "ring-3": TensorRing(order=3),
    "ring-16": TensorRing(order=16),
    "ring-1.2x": TensorRing(expansion=1.2),
    "tucker": Tucker(),
    "tucker-5": Tucker(order=5),
    "tucker-identity": Tucker(gauge="identity"),
    "tucker-spread": Tucker(gauge="spread"),
    "tucker-random": Tucker(order=3, gauge="random"),
    "tucker-gradient": AlongTucker(order=3),
    "tucker-2x": Tucker(expansion=2.0),
    "cp": CP(),
    "cp-16": CP(order=16),
    "cp-16-spread": CP(order=16, gauge="spread"),
    "cp-1.5x": CP(expansion=1.5),
}

#: Exact, for one shape: name -> (factorization, shape). The sites are not the paper's.
EXACT_SITES: dict[str, tuple[Factorization, tuple[int, int]]] = {
    "mpo-mixed": (MPO(sites=[(1, 1), (4, 3), (1, 1), (2, 5), (6, 1), (1, 1)]), (48, 15)),
    "mpo-mixed-identity": (MPO(sites=[(1, 1), (4, 3), (1, 1), (2, 5), (6, 1)], gauge="identity"), (48, 15)),
    "mpo-mixed-spread": (MPO(sites=[(4, 3), (1, 1), (2, 5), (6, 1), (1, 1)], gauge="spread"), (48, 15)),
    "mpo-mixed-right": (MPO(sites=[(4, 3), (1, 1), (2, 5), (6, 1), (1, 1)], gauge="right"), (48, 15)),
    "mpo-mixed-balanced": (MPO(sites=[(4, 3), (1, 1), (2, 5), (6, 1), (1, 1)], gauge="balanced"), (48, 15)),
    "mpo-mixed-random": (MPO(sites=[(1, 1), (4, 3), (1, 1), (2, 5), (6, 1)], gauge="random"), (48, 15)),
    "mpo-mixed-gradient": (AlongMPO(sites=[(1, 1), (4, 3), (1, 1), (2, 5), (6, 1), (1, 1)]), (48, 15)),
    "mpo-binary-balanced": (MPO(sites=[(2, 2)] * 4, gauge="balanced"), (16, 16)),
    "tucker-mixed-random": (Tucker(sites=[(4, 3), (1, 1), (2, 5), (6, 1)], gauge="random", seed=1), (48, 15)),
    "tucker-mixed-gradient": (AlongTucker(sites=[(4, 3), (1, 1), (2, 5), (6, 1)]), (48, 15)),
    "ring-mixed": (TensorRing(sites=[(1, 1), (4, 3), (1, 1), (2, 5), (6, 1), (1, 1)]), (48, 15)),
    "ring-large-first": (TensorRing(sites=[(12, 5), (2, 1), (1, 1), (2, 3)]), (48, 15)),
    "ring-binary": (TensorRing(sites=[(2, 2)] * 5), (32, 32)),
    "mpo-binary": (MPO(sites=[(2, 2)] * 8), (256, 256)),
    "tucker-mixed": (Tucker(sites=[(4, 3), (1, 1), (2, 5), (6, 1)]), (48, 15)),
    "tucker-mixed-identity": (Tucker(sites=[(4, 1), (1, 1), (2, 1), (6, 15)], gauge="identity"), (48, 15)),
    "tucker-mixed-balanced-identity": (Tucker(sites=[(4, 3), (2, 5), (6, 1)], gauge="identity"), (48, 15)),
    "tucker-mixed-spread": (Tucker(sites=[(4, 3), (1, 1), (2, 5), (6, 1)], gauge="spread"), (48, 15)),
    "tucker-binary": (Tucker(sites=[(2, 2)] * 8), (256, 256)),
    "cp-mixed": (CP(sites=[(4, 3), (1, 1), (2, 5), (6, 1)]), (48, 15)),
    "cp-mixed-spread": (CP(sites=[(2, 1), (4, 3), (1, 1), (6, 5)], gauge="spread"), (48, 15)),
    "cp-binary": (CP(sites=[(2, 2)] * 4), (16, 16)),
    "mpo-large-first": (MPO(sites=[(12, 5), (1, 1), (1, 1), (4, 3)]), (48, 15)),
    "mpo-ones-first": (MPO(sites=[(1, 1), (1, 1), (12, 8)]), (12, 8)),
    "mpo-ones-first-identity": (MPO(sites=[(1, 1), (1, 1), (12, 8)], gauge="identity"), (12, 8)),
}

#: Smaller than full rank wherever the matrix is not tiny.
TRUNCATED: dict[str, Factorization] = {
    "svd-bond-1": SVD(max_bond=1),
    "svd-bond-5": SVD(max_bond=5),
    "mpo-9-bond-4": MPO(order=9, max_bond=4),
    "tucker-cap-3": Tucker(max_rank=3),
    "tucker-spread-cap-2": Tucker(max_rank=2, gauge="spread"),
    "cp-cap-3": CP(max_rank=3),
    "cp-9-cap-3": CP(order=9, max_rank=3),
    "cp-spread-cap-2": CP(order=3, max_rank=2, gauge="spread"),
    "mpo-4-right-bond-3": MPO(order=4, max_bond=3, gauge="right"),
    "mpo-4-balanced-bond-3": MPO(order=4, max_bond=3, gauge="balanced"),
    "mpo-4-random-bond-3": MPO(order=4, max_bond=3, gauge="random"),
    "mpo-4-gradient-bond-3": AlongMPO(order=4, max_bond=3),
    "tucker-gradient-cap-2": AlongTucker(max_rank=2),
    "ring-2-bond-2": TensorRing(order=2, max_bond=2),
    "ring-5-bond-3": TensorRing(order=5, max_bond=3),
    "mpo-4-spread-bond-3": MPO(order=4, max_bond=3, gauge="spread"),
}

#: Truncated, for one shape, with more than two proper sites.
TRUNCATED_SITES: dict[str, tuple[Factorization, tuple[int, int]]] = {
    "mpo-mixed-bond-4": (MPO(sites=[(4, 3), (1, 1), (2, 5), (6, 1)], max_bond=4), (48, 15)),
    "mpo-mixed-balanced-bond-4": (MPO(sites=[(4, 3), (1, 1), (2, 5), (6, 1)], max_bond=4, gauge="balanced"), (48, 15)),
    "mpo-mixed-gradient-bond-4": (AlongMPO(sites=[(4, 3), (1, 1), (2, 5), (6, 1)], max_bond=4), (48, 15)),
    "ring-mixed-bond-3": (TensorRing(sites=[(4, 3), (1, 1), (2, 5), (6, 1)], max_bond=3), (48, 15)),
    "tucker-ranks": (Tucker(sites=[(4, 3), (1, 1), (2, 5), (6, 1)], ranks=(5, 1, 7, 2)), (48, 15)),
    "cp-rank-5": (CP(sites=[(4, 3), (1, 1), (2, 5), (6, 1)], rank=5), (48, 15)),
    "cp-rank-20": (CP(sites=[(4, 3), (2, 5), (6, 1)], rank=20, gauge="spread"), (48, 15)),
}

EVERY = {**EXACT, **TRUNCATED}

#: (factorization, shape) for tests that need no generated shape.
CASES: dict[str, tuple[Factorization, tuple[int, int]]] = {
    **{name: (factorization, (24, 8)) for name, factorization in EVERY.items()},
    **EXACT_SITES,
    **TRUNCATED_SITES,
}

KINDS = ("normal", "zero", "constant", "rank-1", "deficient", "ill-conditioned", "huge", "tiny")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@st.composite
def shapes(draw: st.DrawFn, largest: int = 256) -> tuple[int, int]:
    """Shapes from 1x1 on, many of them small, prime or a power of two."""
    side = st.one_of(
        st.integers(1, min(16, largest)),
        st.sampled_from([n for n in (1, 2, 31, 64, 96, 127, 128, 251, 256) if n <= largest]),
        st.integers(1, largest),
    )
    return draw(side), draw(side)


@st.composite
def matrices(draw: st.DrawFn, shape: tuple[int, int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """`[*batch, rows, cols]` of every kind, dtype and (mostly absent) batch dimensions."""
    rows, cols = shape if shape is not None else draw(shapes())
    dtype = dtype if dtype is not None else draw(st.sampled_from(DTYPES))
    kind, seed = draw(st.sampled_from(KINDS)), draw(st.integers(0, 2**16))
    batch = draw(st.sampled_from([(), (), (), (1,), (2,), (2, 2)])) if rows * cols <= 128 * 128 else ()
    return make_matrix((*batch, rows, cols), kind, dtype, seed)


def make_matrix(
    shape: Sequence[int], kind: str = "normal", dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    *batch, rows, cols = shape
    small = min(rows, cols)
    if kind == "zero":
        matrix = torch.zeros(*shape, dtype=torch.float64)
    elif kind == "constant":
        matrix = torch.full(tuple(shape), -0.75, dtype=torch.float64)
    elif kind == "rank-1":
        matrix = normal(*batch, rows, 1) @ normal(*batch, 1, cols)
    elif kind == "deficient":
        rank = max(1, small // 2)
        matrix = normal(*batch, rows, rank) @ normal(*batch, rank, cols)
    elif kind == "ill-conditioned":
        left, right = (torch.linalg.qr(normal(*batch, size, small)).Q for size in (rows, cols))
        matrix = left * torch.logspace(0, -14, small, dtype=torch.float64) @ right.mT
    else:
        matrix = normal(*shape)
        exponent = {"normal": 0, "huge": 1, "tiny": -1}[kind] * (150 if dtype == torch.float64 else 30)
        matrix = matrix * 10.0**exponent
    return matrix.to(dtype)


def tolerance(dtype: torch.dtype, sites: int) -> float:
    """Relative rounding error of a chain of `sites` cores held in `dtype` (at least float32): that of sums
    over a bond, and one more in each product. Never above 1e-6 in float32 and 1e-12 in float64."""
    wide = torch.promote_types(dtype, torch.float32)
    # float64 cores come straight from a decomposition, whose own rounding comes on top: some hundred eps, and with as many
    # equal entries as these tests have, whose roundings do not cancel, some thousand
    return 1e-12 if wide == torch.float64 else min(1e-6, torch.finfo(wide).eps * (3 + sites / 4))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected` (the largest over the batch), without overflow."""
    actual, expected = actual.double(), expected.double()
    scale = expected.abs().amax(dim=(-2, -1), keepdim=True)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    difference = torch.linalg.matrix_norm((actual - expected) / scale)
    size = torch.linalg.matrix_norm(expected / scale)
    return float((difference / torch.where(size == 0, torch.ones_like(size), size)).max())


def random_cores(
    factorization: Factorization, shape: tuple[int, int], batch: tuple[int, ...] = (), seed: int = 0
) -> list[Tensor]:
    """Cores in general position, scaled so that the folded matrix is of order one."""
    generator = torch.Generator().manual_seed(seed)
    cores = []
    for core_shape in factorization.core_shapes(shape):
        core = torch.randn(*batch, *core_shape, generator=generator, dtype=torch.float64)
        cores.append(core / math.sqrt(max(core_shape[0], core_shape[-1], 1)))
    return cores
