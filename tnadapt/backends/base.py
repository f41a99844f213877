"""What a backend does: it contracts an equation and computes a singular value decomposition. All else has a default.

Shapes: n = batch (matrices of one structure), m = modes, p = size of a mode (a site's rows times its columns), d = bond,
R = rank, P = all modes together.

- chain (tensor train): cores [n, d_left, p, d_right];
- Tucker: factors [n, p_k, R_k] and the core tensor [n, R_1, ..., R_m];
- CP: factors [n, p_k, R].

A tensor is [n, p_1, ..., p_m]; contractions return it flat, [n, P].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from tnadapt.backends.contractions import contract_tucker, cp_split, khatri_rao
from tnadapt.backends.kernels import AutogradKernel, Kernel

__all__ = ["Backend"]

#: ALS stops after this many sweeps over all factors, or when a sweep gains less than this share of the norm.
ALS_SWEEPS, ALS_GAIN = 100, 1e-9
#: Added to the diagonal of its Gram matrices, whose own diagonal is 1: all columns but those solved for are unit vectors.
RIDGE = 1e-12


class Backend(ABC):
    """Contracts and decomposes. A subclass needs `name`, `contract` and `svd`; the operations of chains, Tucker and CP are made of
    these two, and a subclass overrides those that its library does itself.

    Each contraction comes as two methods: `*_contract` is differentiable; `*_kernel` is for tensors that are contracted and
    pulled back through at every training step, by default along what autograd records.

    Laws (`tnadapt.testing.check_backend` checks them):

    1. `contract` is `torch.einsum`, in values and in gradients by autograd; dtype and device stay.
    2. `svd` gives the largest singular values, sorted, with orthonormal vectors, of any batch of finite matrices.
    3. Every operation means what the default one does.
    4. Arguments are only read.
    """

    name: ClassVar[str]

    @abstractmethod
    def contract(self, equation: str, *tensors: Tensor) -> Tensor:
        """The contraction that an equation in the notation of `torch.einsum` states, such as `"nab,nbc->nac"`; differentiable.

        In every equation that the package asks for, the first index is the batch, and all tensors have it.
        """

    @abstractmethod
    def svd(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Truncated singular value decomposition `U S Vh` of [n, a, b], the largest `rank` values kept: [n, a, rank],
        [n, rank], [n, rank, b]."""

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
        n = cores[0].shape[0]
        partial = cores[0].reshape(n, -1, cores[0].shape[-1])
        for core in cores[1:]:
            partial = self.contract("nxd,ndpe->nxpe", partial, core).reshape(n, -1, core.shape[-1])
        return partial.reshape(n, -1)

    def chain_kernel(self, cores: Sequence[Tensor]) -> Kernel:
        """`chain_contract` and its gradients for cores that keep their memory."""
        return AutogradKernel(self.chain_contract, cores)

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
        return factors, contract_tucker(projections, tensor)[0].reshape(n, *ranks)

    def tucker_contract(self, factors: Sequence[Tensor], core: Tensor) -> Tensor:
        """Contract factors and core tensor to [n, P]; differentiable."""
        n, partial = core.shape[0], core
        for factor in factors:
            # the first mode goes, its contraction comes last: after all factors the modes are in order
            partial = self.contract("nrx,npr->nxp", partial.reshape(n, factor.shape[2], -1), factor)
        return partial.reshape(n, -1)

    def tucker_kernel(self, factors: Sequence[Tensor], core: Tensor) -> Kernel:
        """`tucker_contract` and its gradients for cores that keep their memory."""
        return AutogradKernel(lambda tensors: self.tucker_contract(tensors[:-1], tensors[-1]), [*factors, core])

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
        n, split = factors[0].shape[0], cp_split(tuple(factor.shape[1] for factor in factors))
        halves = []
        for half in (factors[:split], factors[split:]):
            product = half[0]
            for factor in half[1:]:
                product = self.contract("nxr,npr->nxpr", product, factor).reshape(n, -1, factor.shape[2])
            halves.append(product)
        return self.contract("nxr,nyr->nxy", *halves).reshape(n, -1)

    def cp_kernel(self, factors: Sequence[Tensor]) -> Kernel:
        """`cp_contract` and its gradients for factors that keep their memory."""
        return AutogradKernel(self.cp_contract, factors)


def _unit_columns(columns: Tensor, fallback: Tensor) -> Tensor:
    """Columns scaled to norm 1; those that vanish keep what they were, so that none ever becomes zero."""
    norms = columns.norm(dim=1, keepdim=True)
    return torch.where(norms > 1e-150, columns / norms.clamp_min(1e-150), fallback)
