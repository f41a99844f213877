"""A contraction that a training loop repeats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tnadapt.backends import Kernel
from tnadapt.factorizations.precision import full_precision

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Workspace"]


class Workspace:
    """Stacked cores ready to be contracted and pulled back through, without autograd and in full precision.

    The cores stay where they are while their numbers change. Letters: n = batch, modes in the order of the sites.

    Args:
        kernel: the backend's contraction of these cores.
        device: where they are.
    """

    def __init__(self, kernel: Kernel, device: torch.device) -> None:
        self._kernel = kernel
        self.device = device

    @torch.no_grad()
    @full_precision
    def contract(self) -> Float[Tensor, "n numel"]:
        """The cores as they are now, contracted. Keeps what `pull_back` reuses."""
        return self._kernel.contract()

    @torch.no_grad()
    @full_precision
    def pull_back(self, grad: Float[Tensor, "n numel"]) -> Float[Tensor, " parameters"]:
        """Gradients of `sum(grad * contract())`, one core after the other, each [n, *core_k].

        The cores must not have changed since they were contracted; where they were not contracted, or were pulled back through
        since, they are contracted again. The memory of the result may be used again by the next `contract`.
        """
        return self._kernel.pull_back(grad)
