"""The reference backend: torch alone, batched, differentiable. Letters as in `base`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tnadapt.backends.base import Backend
from tnadapt.backends.contractions import contract_chain, contract_cp, contract_tucker
from tnadapt.backends.kernels import ChainKernel, CPKernel, Kernel, TuckerKernel

__all__ = ["TorchBackend", "TorchPrimitives"]


class TorchPrimitives(Backend):
    """Contracts equations and decomposes matrices by torch. The backends of other libraries derive from this class and override
    what their library does itself."""

    def contract(self, equation: str, *tensors: Tensor) -> Tensor:
        return torch.einsum(equation, *tensors)

    def svd(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[..., :rank], s[..., :rank], vh[..., :rank, :]


class TorchBackend(TorchPrimitives):
    """Contractions as batched matrix products, and kernels that pull back through them without recording them."""

    name = "torch"

    # -- chains -------------------------------------------------------------------------------------------------------

    def chain_contract(self, cores: Sequence[Tensor]) -> Tensor:
        return contract_chain(cores)

    def chain_kernel(self, cores: Sequence[Tensor]) -> Kernel:
        """`chain_contract` and its gradients for cores that keep their memory: one batched matmul per site, and two."""
        return ChainKernel(cores)

    # -- Tucker -------------------------------------------------------------------------------------------------------

    def tucker_contract(self, factors: Sequence[Tensor], core: Tensor) -> Tensor:
        return contract_tucker(factors, core)[0]

    def tucker_kernel(self, factors: Sequence[Tensor], core: Tensor) -> Kernel:
        """`tucker_contract` and its gradients for cores that keep their memory: one batched matmul per mode, and two."""
        return TuckerKernel(factors, core)

    # -- CP -----------------------------------------------------------------------------------------------------------

    def cp_contract(self, factors: Sequence[Tensor]) -> Tensor:
        return contract_cp(factors)[0]

    def cp_kernel(self, factors: Sequence[Tensor]) -> Kernel:
        """`cp_contract` and its gradients for factors that keep their memory: one batched matmul, and two."""
        return CPKernel(factors)
