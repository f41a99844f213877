"""What the library backends share: gradients by autograd through the library's own contraction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tnadapt.backends.torch_backend import TorchBackend

__all__ = ["AutogradBackend"]


class AutogradBackend(TorchBackend):
    """A backend whose library contracts but has no kernel for pulling back: the context is the autograd graph."""

    def chain_contract_keeping(self, cores: Sequence[Tensor]) -> tuple[Tensor, Any]:
        return _record(self.chain_contract, cores)

    def chain_pull_back(
        self, cores: Sequence[Tensor], grad: Tensor, context: Any, out: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        grads = _replay(context, grad)
        if out is None:
            return grads
        return [target.copy_(g) for target, g in zip(out, grads, strict=True)]

    def tucker_contract_keeping(self, factors: Sequence[Tensor], core: Tensor) -> tuple[Tensor, Any]:
        return _record(lambda leaves: self.tucker_contract(leaves[:-1], leaves[-1]), [*factors, core])

    def tucker_pull_back(
        self, factors: Sequence[Tensor], core: Tensor, grad: Tensor, context: Any
    ) -> tuple[list[Tensor], Tensor]:
        *grads, last = _replay(context, grad)
        return grads, last

    def cp_contract_keeping(self, factors: Sequence[Tensor]) -> tuple[Tensor, Any]:
        return _record(self.cp_contract, factors)

    def cp_pull_back(self, factors: Sequence[Tensor], grad: Tensor, context: Any) -> list[Tensor]:
        return _replay(context, grad)


def _record(contract: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, Any]:
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        result = contract(leaves)
    return result.detach(), (leaves, result)


def _replay(context: Any, grad: Tensor) -> list[Tensor]:
    leaves, result = context
    return [g.contiguous() for g in torch.autograd.grad(result, leaves, grad)]
