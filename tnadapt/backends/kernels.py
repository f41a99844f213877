"""Contractions in torch, and the kernels that repeat them at every training step.

Letters as in `torch_backend`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "CPKernel",
    "ChainKernel",
    "Kernel",
    "TuckerKernel",
    "contract_chain",
    "contract_cp",
    "contract_tucker",
    "cp_split",
    "flatten",
    "khatri_rao",
    "sweeps_from_left",
]


class Kernel(Protocol):
    """A contraction of tensors that stay where they are while their numbers change, and its gradients."""

    def contract(self) -> Tensor:
        """The contraction of the tensors as they are now, [n, P]. Keeps what pulling back through it reuses."""

    def pull_back(self, grad: Tensor) -> Tensor:
        """Gradients of `sum(grad * contract())` with respect to all tensors, flat, one tensor after the other.

        `grad` is [n, P]. The tensors must not have changed since they were contracted; where they were not contracted, or were
        pulled back through since, they are contracted again. The result lasts until the next contraction.
        """


class ChainKernel:
    """A chain in place, swept from the end that takes fewer multiplications.

    From the left, with X_k the contraction of cores 0..k and C_k core k: X_k = X_{k-1} C_k, so dC_k = X_{k-1}^T dX_k and
    dX_{k-1} = dX_k C_k^T; the mirror image from the right.

    One allocation holds first the partial contractions X and then the gradients: X_k stands in slot k, which is as large
    as the larger of X_k and C_k. Pulling back goes from the last slot to the first and packs the gradients at the far end,
    so that the gradient of core k lies in slots that no X still to be read stands in. X_0 is core 0 itself. All views are
    made once, so that a contraction is its matmuls and nothing else.
    """

    def __init__(self, cores: Sequence[Tensor]) -> None:
        n, m = cores[0].shape[0], len(cores)
        shapes = [tuple(core.shape[1:]) for core in cores]
        self._from_left = sweeps_from_left(tuple(shapes))
        order = list(range(m)) if self._from_left else list(range(m - 1, -1, -1))
        sizes = [n * math.prod(shape) for shape in shapes]
        swept, partials = 1, [0] * m
        for k in order:
            swept *= shapes[k][1]
            partials[k] = n * swept * shapes[k][2 if self._from_left else 0]
        slots = [sizes[k] if k in (0, m - 1) else max(sizes[k], partials[k]) for k in range(m)]
        memory = cores[0].new_empty(sum(slots))
        start = memory.numel() - sum(sizes) if self._from_left else 0
        #: gradients of all cores, one after the other
        self._flat = memory[start : start + sum(sizes)]
        grads = torch.split(self._flat, sizes)
        held = torch.split(memory, slots)
        matrices = [core.view(n, *self._unfolding(shape)) for core, shape in zip(cores, shapes, strict=True)]

        self._forward: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._backward: list[tuple[tuple[int, ...], Tensor, Tensor, Tensor, Tensor | None]] = []
        first = order[0]
        partial = self._opened(cores[first].view(n, -1), shapes[first])
        for k in order[1:]:
            rows, columns = (partial, matrices[k]) if self._from_left else (matrices[k], partial)
            shape = (n, rows.shape[1], columns.shape[2])
            out = None if k == order[-1] else held[k][: partials[k]].view(shape)
            self._forward.append((rows, columns, out))
            into = grads[first].view(partial.shape) if k == order[1] else None
            grad = grads[k].view(matrices[k].shape)
            self._backward.append((shape, partial.transpose(1, 2), matrices[k].transpose(1, 2), grad, into))
            if out is not None:
                partial = self._opened(out, shapes[k])
        self._backward.reverse()
        self._ready = False

    def _unfolding(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """A core as the matrix by which the sweep multiplies."""
        left, p, right = shape
        return (left, p * right) if self._from_left else (left * p, right)

    def _opened(self, partial: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What is swept up to a core of `shape`, with that core's far bond as last (from the right: first) dimension."""
        n = partial.shape[0]
        return partial.view(n, -1, shape[2]) if self._from_left else partial.view(n, shape[0], -1)

    def contract(self) -> Tensor:
        """All cores contracted, [n, P]."""
        self._ready = False
        self._sweep()
        rows, columns, _ = self._forward[-1]
        self._ready = True
        return torch.bmm(rows, columns).view(rows.shape[0], -1)

    def _sweep(self) -> None:
        for rows, columns, out in self._forward[:-1]:
            torch.bmm(rows, columns, out=out)

    def pull_back(self, grad: Tensor) -> Tensor:
        """Gradients of `sum(grad * contract())`, in memory that the next contraction overwrites."""
        if not self._ready:
            self._sweep()
        self._ready = False
        flow = grad
        for shape, partial, core, out, into in self._backward:
            flow = flow.view(shape)
            if self._from_left:
                torch.bmm(partial, flow, out=out)
                flow = torch.bmm(flow, core, out=into)
            else:
                torch.bmm(flow, partial, out=out)
                flow = torch.bmm(core, flow, out=into)
        return self._flat


class TuckerKernel:
    """A Tucker in place. Y_k = X_k^T U_k^T, with X_k the partial contraction [n, R_k, the others], gives
    dU_k = dY_k^T X_k^T and dX_k = U_k^T dY_k^T."""

    def __init__(self, factors: Sequence[Tensor], core: Tensor) -> None:
        self._factors, self._core = factors, core
        self._partial: Sequence[Tensor] | None = None

    def contract(self) -> Tensor:
        """Factors and core tensor contracted, [n, P]."""
        flat, self._partial = contract_tucker(self._factors, self._core)
        return flat

    def pull_back(self, grad: Tensor) -> Tensor:
        """Gradients of `sum(grad * contract())`, in memory of their own."""
        if self._partial is None:
            self.contract()
        assert self._partial is not None
        partial, self._partial = self._partial, None
        n, factors = grad.shape[0], self._factors
        grads: list[Tensor] = []
        flow = grad
        for factor, before in zip(reversed(factors), reversed(partial), strict=True):
            outward = flow.reshape(n, -1, factor.shape[1]).transpose(1, 2)
            grads.append(torch.bmm(outward, before.transpose(1, 2)))
            flow = torch.bmm(factor.transpose(1, 2), outward)
        return flatten([*reversed(grads), flow])


class CPKernel:
    """A CP in place: the Khatri-Rao products of both halves, and one batched matmul that joins them."""

    def __init__(self, factors: Sequence[Tensor]) -> None:
        self._factors = factors
        self._halves: tuple[list[Tensor], list[Tensor]] | None = None

    def contract(self) -> Tensor:
        """Factors contracted, [n, P]."""
        flat, self._halves = contract_cp(self._factors)
        return flat

    def pull_back(self, grad: Tensor) -> Tensor:
        """Gradients of `sum(grad * contract())`, in memory of their own: two batched matmuls, then elementwise products down
        both halves."""
        if self._halves is None:
            self.contract()
        assert self._halves is not None
        (left, right), self._halves = self._halves, None
        split = len(left)
        joint = grad.reshape(grad.shape[0], left[-1].shape[1], right[-1].shape[1])
        flows = (torch.bmm(joint, right[-1]), torch.bmm(joint.transpose(1, 2), left[-1]))
        return flatten(
            [
                *_khatri_rao_pull_back(self._factors[:split], left, flows[0]),
                *_khatri_rao_pull_back(self._factors[split:], right, flows[1]),
            ]
        )


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All entries, one tensor after the other."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


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


def _khatri_rao_pull_back(factors: Sequence[Tensor], products: Sequence[Tensor], flow: Tensor) -> list[Tensor]:
    """Gradients of the factors of one half, from the gradient [n, P, R] of its Khatri-Rao product."""
    grads: list[Tensor] = [flow] * len(factors)
    for k in range(len(factors) - 1, 0, -1):
        n, p, rank = factors[k].shape
        flow = flow.reshape(n, -1, p, rank)
        grads[k] = (flow * products[k - 1].unsqueeze(2)).sum(dim=1)
        flow = (flow * factors[k].unsqueeze(1)).sum(dim=2)
    grads[0] = flow.reshape(factors[0].shape)
    return grads
