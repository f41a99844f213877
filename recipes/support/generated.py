"""OP-LoRA: each LoRA pair is what a small MLP writes, which is dropped after training (Teterwak et al., arXiv:2412.10362).

For a layer with a learned ``z`` [n], ``h = relu(W1 z + b1)`` [n], and the entries of A and B together are ``W2 h + b2``. Here
``b2`` is LoRA's own initialization and ``W2`` starts at zero, so training starts at the function and the distribution of LoRA.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.utils import parametrize

#: n, the width of an MLP; that of the paper's experiments with language models is not fixed.
WIDTH = 32


class Hidden(nn.Module):
    """What the MLP of a layer writes A and B from."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.randn(WIDTH).to(like))
        self.inner = nn.Linear(WIDTH, WIDTH).to(like)

    def forward(self) -> Tensor:
        return torch.relu(self.inner(self.z))


class Generated(nn.Module):
    """One matrix of the pair: its bias ``b2``, which ``parametrize`` keeps as the original, and ``W2 h``."""

    def __init__(self, hidden: Hidden, matrix: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
        self.head = nn.Parameter(matrix.new_zeros(matrix.numel(), WIDTH))

    def forward(self, bias: Tensor) -> Tensor:
        written: Tensor = self.head @ self.hidden()
        return bias + written.view_as(bias)


def generate_pairs(model: Any) -> None:
    """Let an MLP for each layer write the LoRA pairs of ``model``; what they are does not change by it."""
    for module in _lora_layers(model):
        a, b = module.lora_A["default"], module.lora_B["default"]
        hidden = Hidden(a.weight)
        for linear in (a, b):
            parametrize.register_parametrization(linear, "weight", Generated(hidden, linear.weight))


def drop_generators(model: Any) -> None:
    """Keep the pairs that the MLPs have written as plain LoRA."""
    for module in _lora_layers(model):
        for linear in (module.lora_A["default"], module.lora_B["default"]):
            if parametrize.is_parametrized(linear):
                parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def _lora_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]
