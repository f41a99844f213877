"""What the library backends share: gradients by autograd through the library's own contraction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tnadapt.backends.kernels import Kernel, flatten
from tnadapt.backends.torch_backend import TorchBackend

__all__ = ["AutogradBackend"]


class AutogradBackend(TorchBackend):
    """A backend whose library contracts but has no kernel for pulling back."""

    def chain_kernel(self, cores: Sequence[Tensor]) -> Kernel:
        return AutogradKernel(self.chain_contract, cores)

    def tucker_kernel(self, factors: Sequence[Tensor], core: Tensor) -> Kernel:
        return AutogradKernel(lambda tensors: self.tucker_contract(tensors[:-1], tensors[-1]), [*factors, core])

    def cp_kernel(self, factors: Sequence[Tensor]) -> Kernel:
        return AutogradKernel(self.cp_contract, factors)


class AutogradKernel(Kernel):
    """Keeps the autograd graph of a contraction between contracting and pulling back."""

    def __init__(self, contract: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors[0].device)
        self._differentiable, self._tensors = contract, tensors
        self._graph: tuple[list[Tensor], Tensor] | None = None

    def _contract(self) -> Tensor:
        """The library's contraction, [n, P]."""
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in self._tensors]
            result = self._differentiable(leaves)
        self._graph = leaves, result
        return result.detach()

    def _pull_back(self, grad: Tensor) -> Tensor:
        """Gradients of `sum(grad * contract())`, in memory of their own."""
        if self._graph is None:
            self._contract()
        assert self._graph is not None
        (leaves, result), self._graph = self._graph, None
        return flatten(torch.autograd.grad(result, leaves, grad))
