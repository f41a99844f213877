"""`OverParamAdapter`: a LoRA pair around a linear layer, for models that compose adapters themselves.

It is plain LoRA (`y = base(x) + scaling * B A dropout(x)`), found by `LoraOver` like any other pair; what PEFT made is
found as it is and needs none of this.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["OverParamAdapter"]


class OverParamAdapter(nn.Module):
    """A LoRA pair `lora_A` [r, d_in], `lora_B` [d_out, r] around `base`.

    Args:
        lora_A: `nn.Linear(d_in, r, bias=False)`, used as it is.
        lora_B: `nn.Linear(r, d_out, bias=False)`, used as it is.
        base: the layer that is adapted; its `requires_grad` is left alone. None for the pair alone.
        scaling: factor on `B A`, `alpha / r` in LoRA and `alpha / sqrt(r)` in rsLoRA.
        dropout: probability of dropping an input of `A` while training.

    Raises:
        TypeError: `lora_A` or `lora_B` is not an `nn.Linear`.
        ValueError: the dimensions of the pair and the base do not fit, the pair has biases, or a bad dropout.
    """

    def __init__(
        self,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        base: nn.Module | None = None,
        scaling: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, half in (("lora_A", lora_A), ("lora_B", lora_B)):
            if not isinstance(half, nn.Linear):
                raise TypeError(f"{name} is a {type(half).__name__}; OverParamAdapter wraps two nn.Linear layers")
            if half.bias is not None:
                raise ValueError(f"{name} has a bias, which LoRA has not; make it with bias=False")
        if lora_A.out_features != lora_B.in_features:
            raise ValueError(
                f"lora_A gives rank {lora_A.out_features}, but lora_B takes rank {lora_B.in_features}; they must agree"
            )
        d_in, d_out = getattr(base, "in_features", None), getattr(base, "out_features", None)
        if (
            base is not None
            and None not in (d_in, d_out)
            and (d_in, d_out) != (lora_A.in_features, lora_B.out_features)
        ):
            raise ValueError(
                f"the pair maps {lora_A.in_features} -> {lora_B.out_features}, but base maps {d_in} -> {d_out}; "
                "make lora_A and lora_B with the dimensions of base"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout!r} is not a probability below 1")
        self.base = base
        self.lora_A = lora_A
        self.lora_B = lora_B
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    @classmethod
    def from_linear(
        cls, base: nn.Linear, rank: int, alpha: float | None = None, dropout: float = 0.0, use_rslora: bool = False
    ) -> OverParamAdapter:
        """A new pair around `base`, which is frozen. `A` is Kaiming-uniform and `B` zero, as in PEFT, on the device of
        `base`; the pair is float32, or the dtype of `base` where that is wider.

        Args:
            rank: r, at least 1.
            alpha: LoRA's alpha; `rank` where it is not given (scaling 1).
            dropout: see the class.
            use_rslora: scale by `alpha / sqrt(r)` instead of `alpha / r`.
        """
        if not isinstance(base, nn.Linear):
            raise TypeError(
                f"from_linear needs an nn.Linear, got {type(base).__name__}; pass an existing pair to the class"
            )
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank={rank!r}: the rank of a LoRA pair is an integer of at least 1")
        floating = base.weight.dtype if base.weight.dtype.is_floating_point else torch.float32
        dtype = torch.promote_types(floating, torch.float32)
        lora_A = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device, dtype=dtype)
        lora_B = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device, dtype=dtype)
        nn.init.kaiming_uniform_(lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(lora_B.weight)
        scaling = (rank if alpha is None else alpha) / (math.sqrt(rank) if use_rslora else rank)
        adapter = cls(lora_A, lora_B, base, scaling, dropout)
        base.requires_grad_(False)
        return adapter

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        update = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))) * self.scaling
        if self.base is None:
            return update  # type: ignore[no-any-return]
        y = self.base(x)
        return y + update.to(y.dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def delta_weight(self) -> Float[Tensor, "d_out d_in"]:
        """`scaling * B A`, the update of the weight."""
        return self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain `nn.Linear` with the update added to the weight of `base`, which itself is left alone.

        Raises:
            TypeError: there is no base, or it is not a plain `nn.Linear` (a quantized layer, say).
        """
        if type(self.base) is not nn.Linear:
            raise TypeError(
                f"cannot merge into a base of type {type(self.base).__name__}; only a plain nn.Linear has a dense weight"
            )
        base = self.base
        merged = nn.Linear(
            base.in_features,
            base.out_features,
            bias=base.bias is not None,
            device=base.weight.device,
            dtype=base.weight.dtype,
        )
        merged.weight.copy_(base.weight + self.delta_weight().to(base.weight.dtype))
        if base.bias is not None:
            merged.bias.copy_(base.bias)
        return merged

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.out_features}, scaling={self.scaling:g}"
