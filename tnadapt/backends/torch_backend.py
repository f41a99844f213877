"""The reference backend: torch alone, batched, differentiable.

Shapes: n = batch (matrices of one structure), m = modes, p = size of a mode (a site's rows times its columns), d = bond,
R = rank, P = all modes together.

- chain (tensor train): cores [n, d_left, p, d_right];
- Tucker: factors [n, p_k, R_k] and the core tensor [n, R_1, ..., R_m];
- CP: factors [n, p_k, R].

A tensor is [n, p_1, ..., p_m]; contractions return it flat, [n, P].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["ChainContext", "TorchBackend"]

#: ALS stops after this many sweeps over all factors, or when a sweep gains less than this share of the norm.
ALS_SWEEPS, ALS_GAIN = 100, 1e-9
#: Added to the diagonal of its Gram matrices, whose own diagonal is 1: all columns but those solved for are unit vectors.
RIDGE = 1e-12


class ChainContext(NamedTuple):
    """What folding a chain leaves for pulling back through it.

    Swept from the left, `partial[k]` is cores 0..k contracted, [n, p_0 * ... * p_k, d_k]; from the right, it is cores
    k+1 and on, [n, d_k, p_{k+1} * ...]. The contraction of all cores is not kept.
    """

    from_left: bool
    partial: tuple[Tensor, ...]


class TorchBackend:
    """Every operation of the interface, written with torch primitives.

    The other backends derive from this class and override what their library does itself. Each contraction comes as
    three methods: `*_contract` is differentiable; `*_contract_keeping` returns also a context, from which
    `*_pull_back` makes the gradients of all its arguments without contracting again. A context is used once.
    """

    name = "torch"

    def svd(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Truncated singular value decomposition `U S Vh` of [n, a, b], largest `rank` values kept."""
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[..., :rank], s[..., :rank], vh[..., :rank, :]

    # -- chains -------------------------------------------------------------------------------------------------------

    def chain_decompose(self, tensor: Tensor, bonds: Sequence[int]) -> list[Tensor]:
        """Tensor-train sweep from the left (LoRA-Over, Algorithm 1; Oseledets 2011, TT-SVD).

        `bonds` are the m - 1 inner bond dimensions; all cores but the last have orthonormal columns.
        """
        n, modes = tensor.shape[0], tensor.shape[1:]
        cores: list[Tensor] = []
        rest, left = tensor, 1
        for p, bond in zip(modes[:-1], bonds, strict=True):
            u, s, vh = self.svd(rest.reshape(n, left * p, -1), bond)
            cores.append(u.reshape(n, left, p, bond))
            rest, left = s.unsqueeze(-1) * vh, bond
        cores.append(rest.reshape(n, left, modes[-1], 1))
        return cores

    def chain_contract(self, cores: Sequence[Tensor]) -> Tensor:
        """Contract chain cores to [n, P]; differentiable."""
        return _chain_forward(cores)[0]

    def chain_contract_keeping(self, cores: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """`chain_contract` and the partial contractions that `chain_pull_back` needs: one batched matmul per site."""
        return _chain_forward(cores)

    def chain_pull_back(
        self, cores: Sequence[Tensor], grad: Tensor, context: Any, out: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Gradients of `sum(grad * chain_contract(cores))`: two batched matmuls per site.

        With X_k the contraction of cores 0..k and C_k core k: X_k = X_{k-1} C_k, so dC_k = X_{k-1}^T dX_k and
        dX_{k-1} = dX_k C_k^T; the mirror image from the right. `grad` is [n, P]; `out` takes the results where given.
        """
        n, m = grad.shape[0], len(cores)
        grads: list[Tensor] = [grad] * m
        flow = grad
        sweep = range(m - 1, 0, -1) if context.from_left else range(m - 1)
        for k in sweep:
            d_left, p, d_right = cores[k].shape[1:]
            matrix = (d_left, p * d_right) if context.from_left else (d_left * p, d_right)
            target = None if out is None else out[k].view(n, *matrix)
            core = cores[k].reshape(n, *matrix).transpose(1, 2)
            if context.from_left:
                flow = flow.reshape(n, -1, p * d_right)
                product = torch.bmm(context.partial[k - 1].transpose(1, 2), flow, out=target)
                flow = torch.bmm(flow, core)
            else:
                flow = flow.reshape(n, d_left * p, -1)
                product = torch.bmm(flow, context.partial[k].transpose(1, 2), out=target)
                flow = torch.bmm(core, flow)
            grads[k] = product.view(cores[k].shape)
        end = 0 if context.from_left else m - 1
        rest = flow.reshape(cores[end].shape)
        grads[end] = rest if out is None else out[end].copy_(rest)
        return grads

    # -- Tucker -------------------------------------------------------------------------------------------------------

    def tucker_decompose(self, tensor: Tensor, ranks: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Higher-order SVD (De Lathauwer, De Moor, Vandewalle 2000): orthonormal factors, and the core tensor.

        Factor k holds the leading left singular vectors of the k-th unfolding, so the squared error is at most the sum
        over k of what is cut from each unfolding.
        """
        n = tensor.shape[0]
        factors = []
        for k, rank in enumerate(ranks):
            unfolding = tensor.movedim(k + 1, 1).reshape(n, tensor.shape[k + 1], -1)
            factors.append(self.svd(unfolding, rank)[0])
        # the transposed factors project the tensor on its core; the contraction is the one that folds
        projections = [factor.transpose(1, 2) for factor in factors]
        return factors, _tucker_forward(projections, tensor)[0].reshape(n, *ranks)

    def tucker_contract(self, factors: Sequence[Tensor], core: Tensor) -> Tensor:
        """Contract factors and core tensor to [n, P]; differentiable."""
        return _tucker_forward(factors, core)[0]

    def tucker_contract_keeping(self, factors: Sequence[Tensor], core: Tensor) -> tuple[Tensor, Any]:
        """`tucker_contract` and the partial contractions before each mode: one batched matmul per mode."""
        return _tucker_forward(factors, core)

    def tucker_pull_back(
        self, factors: Sequence[Tensor], core: Tensor, grad: Tensor, context: Any
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients for all factors and the core tensor: two batched matmuls per mode.

        Y_k = X_k^T U_k^T, with X_k the partial contraction [n, R_k, the others], gives dU_k = dY_k^T X_k^T and
        dX_k = U_k^T dY_k^T.
        """
        n = grad.shape[0]
        grads: list[Tensor] = [grad] * len(factors)
        flow = grad
        for k in range(len(factors) - 1, -1, -1):
            outward = flow.reshape(n, -1, factors[k].shape[1]).transpose(1, 2)
            grads[k] = torch.bmm(outward, context[k].transpose(1, 2))
            flow = torch.bmm(factors[k].transpose(1, 2), outward)
        return grads, flow.reshape(core.shape)

    # -- CP -----------------------------------------------------------------------------------------------------------

    def cp_decompose(self, tensor: Tensor, rank: int) -> list[Tensor]:
        """CP by alternating least squares (Kolda, Bader 2009, section 3.4), started from the higher-order SVD.

        Columns have norm 1 in all factors but that of the largest mode, which holds the weights; so a zero tensor has one
        zero factor. An approximation: what is missing is the caller's residual.
        """
        modes = tensor.shape[1:]
        largest = max(range(len(modes)), key=lambda k: modes[k])
        order = [k for k in range(len(modes)) if k != largest] + [largest]
        n = tensor.shape[0]
        unfoldings = [tensor.movedim(k + 1, 1).reshape(n, modes[k], -1) for k in range(len(modes))]
        factors = [self._als_start(unfolding, rank, k) for k, unfolding in enumerate(unfoldings)]
        norm = torch.linalg.vector_norm(tensor.reshape(n, -1), dim=1)
        error, running = norm, torch.ones_like(norm, dtype=torch.bool)
        for _ in range(ALS_SWEEPS):
            swept = list(factors)
            for k in order:
                others = [factor for q, factor in enumerate(swept) if q != k]
                gram = torch.stack([factor.transpose(1, 2) @ factor for factor in others]).prod(dim=0)
                # components that coincide make the Gram matrix singular; the ridge picks one of their mixtures
                gram = gram + RIDGE * torch.eye(rank, dtype=gram.dtype, device=gram.device)
                right = unfoldings[k] @ khatri_rao(others)
                solved = torch.linalg.solve(gram, right.transpose(1, 2)).transpose(1, 2)
                swept[k] = solved if k == largest else _unit_columns(solved, swept[k])
            # a member that has converged stays as it is, so that it does not depend on its neighbours in the batch
            factors = [torch.where(running[:, None, None], new, old) for new, old in zip(swept, factors, strict=True)]
            others = [factor for k, factor in enumerate(factors) if k != largest]
            missing = unfoldings[largest] - factors[largest] @ khatri_rao(others).transpose(1, 2)
            previous, error = error, torch.linalg.vector_norm(missing.reshape(n, -1), dim=1)
            running = running & (previous - error > ALS_GAIN * norm)
            if not bool(running.any()):
                break
        return factors

    def _als_start(self, unfolding: Tensor, rank: int, seed: int) -> Tensor:
        """Leading left singular vectors [n, p, rank]; where there are fewer, unit columns from a fixed seed beside them."""
        n, p, columns = unfolding.shape
        known = min(rank, p, columns)
        vectors = self.svd(unfolding, known)[0]
        if known == rank:
            return vectors
        # drawn on the CPU, so that every device starts the same
        generator = torch.Generator("cpu").manual_seed(seed)
        extra = torch.randn(p, rank - known, generator=generator, dtype=torch.float64, device="cpu")
        extra = (extra / extra.norm(dim=0)).to(vectors)
        return torch.cat([vectors, extra.expand(n, -1, -1)], dim=2)

    def cp_contract(self, factors: Sequence[Tensor]) -> Tensor:
        """Contract CP factors to [n, P]; differentiable."""
        return _cp_forward(factors)[0]

    def cp_contract_keeping(self, factors: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """`cp_contract` and the Khatri-Rao products of both halves: one batched matmul joins the halves."""
        return _cp_forward(factors)

    def cp_pull_back(self, factors: Sequence[Tensor], grad: Tensor, context: Any) -> list[Tensor]:
        """Gradients for all factors: two batched matmuls, then elementwise products down both halves."""
        n = grad.shape[0]
        split = len(context[0])
        left, right = context[0][-1], context[1][-1]
        joint = grad.reshape(n, left.shape[1], right.shape[1])
        flows = (torch.bmm(joint, right), torch.bmm(joint.transpose(1, 2), left))
        return [
            *_khatri_rao_pull_back(factors[:split], context[0], flows[0]),
            *_khatri_rao_pull_back(factors[split:], context[1], flows[1]),
        ]


def _chain_forward(cores: Sequence[Tensor]) -> tuple[Tensor, ChainContext]:
    n, m = cores[0].shape[0], len(cores)
    if sweeps_from_left(tuple(tuple(core.shape[1:]) for core in cores)):
        partial = [cores[0].reshape(n, -1, cores[0].shape[-1])]
        for core in cores[1:]:
            d_left, p, d_right = core.shape[1:]
            partial.append(torch.bmm(partial[-1], core.reshape(n, d_left, p * d_right)).reshape(n, -1, d_right))
        return partial.pop().reshape(n, -1), ChainContext(True, tuple(partial))
    partial = [cores[-1].reshape(n, cores[-1].shape[1], -1)]
    for k in range(m - 2, -1, -1):
        d_left, p, d_right = cores[k].shape[1:]
        partial.append(torch.bmm(cores[k].reshape(n, d_left * p, d_right), partial[-1]).reshape(n, d_left, -1))
    return partial.pop().reshape(n, -1), ChainContext(False, tuple(reversed(partial)))


@lru_cache(maxsize=1024)
def sweeps_from_left(shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether contracting cores [d_left, p, d_right] from the left takes no more multiplications than from the right."""
    modes = [p for _, p, _ in shapes]
    left = sum(math.prod(modes[:k]) * math.prod(shapes[k]) for k in range(1, len(shapes)))
    right = sum(math.prod(modes[k + 1 :]) * math.prod(shapes[k]) for k in range(len(shapes) - 1))
    return left <= right


def _tucker_forward(factors: Sequence[Tensor], core: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Every step takes the first mode off and puts its contraction last, so that after m steps all are in order and no
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


def _cp_forward(factors: Sequence[Tensor]) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]]]:
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


def _unit_columns(columns: Tensor, fallback: Tensor) -> Tensor:
    """Columns scaled to norm 1; those that vanish keep what they were, so that none ever becomes zero."""
    norms = columns.norm(dim=1, keepdim=True)
    return torch.where(norms > 1e-150, columns / norms.clamp_min(1e-150), fallback)
