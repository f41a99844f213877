"""Contractions in torch: differentiable, batched, and without a loop over the batch.

Letters as in `torch_backend`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

__all__ = [
    "contract_chain",
    "contract_cp",
    "contract_tucker",
    "cp_split",
    "khatri_rao",
    "sweeps_from_left",
]


def contract_chain(cores: Sequence[Tensor]) -> Tensor:
    """Chain cores contracted to [n, P], from the end that takes fewer multiplications; differentiable."""
    n, m = cores[0].shape[0], len(cores)
    if sweeps_from_left(tuple(tuple(core.shape[1:]) for core in cores)):
        partial = cores[0].reshape(n, -1, cores[0].shape[-1])
        for core in cores[1:]:
            d_left, p, d_right = core.shape[1:]
            partial = torch.bmm(partial, core.reshape(n, d_left, p * d_right)).reshape(n, -1, d_right)
        return partial.reshape(n, -1)
    partial = cores[-1].reshape(n, cores[-1].shape[1], -1)
    for k in range(m - 2, -1, -1):
        d_left, p, d_right = cores[k].shape[1:]
        partial = torch.bmm(cores[k].reshape(n, d_left * p, d_right), partial).reshape(n, d_left, -1)
    return partial.reshape(n, -1)


@lru_cache(maxsize=1024)
def sweeps_from_left(shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether contracting cores [d_left, p, d_right] from the left takes no more multiplications than from the right."""
    modes = [p for _, p, _ in shapes]
    left = sum(math.prod(modes[:k]) * math.prod(shapes[k]) for k in range(1, len(shapes)))
    right = sum(math.prod(modes[k + 1 :]) * math.prod(shapes[k]) for k in range(len(shapes) - 1))
    return left <= right


def contract_tucker(factors: Sequence[Tensor], core: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Factors and core tensor contracted to [n, P], and the partial contraction before each mode; differentiable.

    Every step takes the first mode off and puts its contraction last, so that after m steps all are in order and no
    step moves memory to get its mode in place."""
    n = core.shape[0]
    partial, kept = core, []
    for factor in factors:
        partial = partial.reshape(n, factor.shape[2], -1)
        kept.append(partial)
        partial = torch.bmm(partial.transpose(1, 2), factor.transpose(1, 2))
    return partial.reshape(n, -1), tuple(kept)


def khatri_rao_prefixes(factors: Sequence[Tensor]) -> list[Tensor]:
    """Columnwise Kronecker products of the first 1, 2, ... factors, each [n, p_1 * ... * p_k, R]."""
    products = [factors[0]]
    for factor in factors[1:]:
        product = products[-1].unsqueeze(2) * factor.unsqueeze(1)
        products.append(product.reshape(product.shape[0], -1, product.shape[-1]))
    return products


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Columnwise Kronecker product of all factors, [n, P, R]."""
    return khatri_rao_prefixes(factors)[-1]


@lru_cache(maxsize=1024)
def cp_split(modes: tuple[int, ...]) -> int:
    """Where to cut the modes into two halves so that their Khatri-Rao products are smallest together."""
    return min(range(1, len(modes)), key=lambda k: math.prod(modes[:k]) + math.prod(modes[k:]))


def contract_cp(factors: Sequence[Tensor]) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]]]:
    """CP factors contracted to [n, P], and the Khatri-Rao products of both halves; differentiable."""
    split = cp_split(tuple(factor.shape[1] for factor in factors))
    left, right = khatri_rao_prefixes(factors[:split]), khatri_rao_prefixes(factors[split:])
    return torch.bmm(left[-1], right[-1].transpose(1, 2)).reshape(factors[0].shape[0], -1), (left, right)
