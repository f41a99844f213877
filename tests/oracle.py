"""The one place where tests define what cores stand for: the contractions of the papers, written out in plain torch.

Nothing of tnadapt is used here. Every function takes leading batch dimensions and is differentiable, so that autograd through
it is the oracle for every gradient. Each site of a matrix has `i_k` rows and `j_k` columns; a row of the matrix is numbered by
(i_1, ..., i_m) and a column by (j_1, ..., j_m), both row-major.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "contract",
    "contract_cp",
    "contract_mpo",
    "contract_ring",
    "contract_tucker",
    "near_square",
    "paper_sites",
    "square_view",
]


def contract_mpo(cores: Sequence[Tensor]) -> Tensor:
    """LoRA-Over, Eq. 3: entry (i_1...i_m, j_1...j_m) is the product of the matrices T^(k)[:, i_k, j_k, :].

    Args:
        cores: core k is `[*batch, d_{k-1}, i_k, j_k, d_k]`, with `d_0 = d_m = 1`.

    Returns:
        `[*batch, rows, cols]`.
    """
    chain = cores[0].squeeze(-4)
    for core in cores[1:]:
        wider = torch.einsum("...IJd,...dije->...IiJje", chain, core)
        chain = wider.flatten(-5, -4).flatten(-3, -2)
    return chain.squeeze(-1)


def contract_tucker(cores: Sequence[Tensor]) -> Tensor:
    """Factors `[*batch, i_k, j_k, R_k]` of every site, then the core tensor `[*batch, R_1, ..., R_m]`: `[*batch, rows, cols]`."""
    factors = cores[:-1]
    letters = iter(ascii_letters)
    ranks, rows, cols = ([next(letters) for _ in factors] for _ in range(3))
    terms = [f"...{i}{j}{r}" for i, j, r in zip(rows, cols, ranks, strict=True)] + [f"...{''.join(ranks)}"]
    full = torch.einsum(f"{','.join(terms)}->...{''.join(rows)}{''.join(cols)}", *cores)
    batch = full.shape[: full.dim() - 2 * len(factors)]
    return full.reshape(*batch, *(math.prod(factor.shape[axis] for factor in factors) for axis in (-3, -2)))


def contract_cp(cores: Sequence[Tensor]) -> Tensor:
    """Factors `[*batch, i_k, j_k, R]`: the sum over R components of the products of their vectors, `[*batch, rows, cols]`."""
    folded = cores[0]
    for core in cores[1:]:
        folded = torch.einsum("...IJr,...ijr->...IiJjr", folded, core).flatten(-5, -4).flatten(-3, -2)
    return folded.sum(-1)


def contract_ring(cores: Sequence[Tensor]) -> Tensor:
    """Cores `[*batch, d_{k-1}, i_k, j_k, d_k]` with `d_0 = d_m`: the trace of the product of a matrix per site."""
    folded = cores[0]
    for core in cores[1:]:
        folded = torch.einsum("...aIJb,...bijc->...aIiJjc", folded, core).flatten(-5, -4).flatten(-3, -2)
    return folded.diagonal(dim1=-4, dim2=-1).sum(-1)


_DEFINITIONS = {"MPO": contract_mpo, "Tucker": contract_tucker, "CP": contract_cp, "TensorRing": contract_ring}


def contract(factorization: Any, cores: Sequence[Tensor]) -> Tensor:
    """The matrix that cores of a factorization stand for; a factorization is known by the name of its class or of a base."""
    for base in type(factorization).__mro__:
        if base.__name__ in _DEFINITIONS:
            return _DEFINITIONS[base.__name__](cores)
    raise TypeError(f"no definition of a {type(factorization).__name__} is written down in this file")


def near_square(n: int) -> tuple[int, int]:
    """The two factors of `n` nearest to its square root, smaller first."""
    small = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    return small, n // small


def paper_sites(rows: int, cols: int, order: int) -> list[tuple[int, int]]:
    """The split of the paper's tables: near-square factors of both dimensions at the ends, 1x1 sites between."""
    (i_first, i_last), (j_first, j_last) = near_square(rows), near_square(cols)
    return [(i_first, j_first), *[(1, 1)] * (order - 2), (i_last, j_last)]


def square_view(shape: Sequence[int]) -> tuple[int, int]:
    """The unfolding of a core that is nearest to a square, as which optimizers that look at shapes are given it."""
    views = [(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape))]
    return min(views, key=lambda view: max(view) / min(view))
