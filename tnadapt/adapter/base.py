"""What every adapter around a linear layer has: a base, an update of its weight, and a way to merge the two."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["LinearAdapter", "adapter_dtype", "check_base"]


class LinearAdapter(nn.Module, ABC):
    """A layer that computes `base(x) + x dWᵀ` with a trained update `dW` [d_out, d_in] of few parameters.

    Attributes:
        base: the adapted layer, which may be an adapter itself; None for the update alone.
        notes: names of settings that do not change what the layer computes.
    """

    base: nn.Module | None
    notes: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    @abstractmethod
    def from_linear(cls, base: nn.Linear | LinearAdapter, **options: Any) -> Self:
        """A new adapter around `base`, which is frozen. Its update is zero."""

    @classmethod
    @abstractmethod
    def from_settings(cls, base: nn.Linear | LinearAdapter, settings: Mapping[str, Any]) -> Self:
        """The adapter that `settings()` describes, around `base`, which is frozen."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What an adapter file holds beside the tensors, as plain JSON."""

    @abstractmethod
    def delta_weight(self) -> Float[Tensor, "d_out d_in"]:
        """The update of the weight, detached, in the dtype of the adapter."""

    @property
    @abstractmethod
    def in_features(self) -> int:
        """d_in."""

    @property
    @abstractmethod
    def out_features(self) -> int:
        """d_out."""

    @property
    def weight(self) -> Tensor:
        """The weight of the base, which models like T5 read to learn its dtype; the update is not in it."""
        return self.base.weight  # type: ignore[union-attr, return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base."""
        return getattr(self.base, "bias", None)

    def trained_tensors(self) -> dict[str, nn.Parameter]:
        """The parameters of the adapter itself by their names in it, without those of the base."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("base.")}

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain `nn.Linear` with the update added to the weight of `base`, which itself is left alone. An adapter around
        an adapter merges both updates.

        Raises:
            TypeError: there is no base, or it is neither a plain `nn.Linear` nor an adapter (a quantized layer, say).
            ValueError: hooks on the base change what it computes, so the merged layer would compute something else; or the
                merged weight is not finite, as where the sum overflows float16.
        """
        base = self.base.merge() if isinstance(self.base, LinearAdapter) else self.base
        if type(base) is not nn.Linear:
            raise TypeError(
                f"cannot merge into a base of type {type(base).__name__}; only a plain nn.Linear has a dense weight"
            )
        if base._forward_hooks or base._forward_pre_hooks:
            raise ValueError(
                "the base has forward hooks, which a merged layer would not have; merge or remove what put them there "
                "first (for a RowRescale, call its merge())"
            )
        merged = nn.Linear(
            base.in_features,
            base.out_features,
            bias=base.bias is not None,
            device=base.weight.device,
            dtype=base.weight.dtype,
        )
        # added in the wider of both dtypes, so that a low-precision weight is rounded once
        merged.weight.copy_(base.weight + self.delta_weight().to(base.weight.device))
        if not merged.weight.is_meta and not bool(torch.isfinite(merged.weight).all()):
            raise ValueError(
                f"the sum of weight and update is not finite in {base.weight.dtype}; look for NaN in the adapter, or merge into a base "
                "of a wider dtype"
            )
        if base.bias is not None:
            merged.bias.copy_(base.bias)
        return merged.train(self.training)


def check_base(kind: type[LinearAdapter], base: object) -> None:
    """Raise TypeError where `kind` cannot adapt `base`."""
    if not isinstance(base, nn.Linear | LinearAdapter):
        raise TypeError(
            f"from_linear needs an nn.Linear, got {type(base).__name__}; {kind.__name__} adapts linear layers "
            "(and what is built around them, such as another adapter)"
        )
    if isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"the out_proj of nn.MultiheadAttention is never called: the attention reads its weight, so a "
            f"{kind.__name__} around it would do nothing; adapt an attention that is made of nn.Linear layers"
        )


def adapter_dtype(base: nn.Linear | LinearAdapter) -> torch.dtype:
    """float32, or the dtype of `base` where that is wider."""
    dtype = base.weight.dtype
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32
