"""`OverParamAdapter`: a LoRA pair around a linear layer, for models that compose adapters themselves.

It is plain LoRA, `y = base(x) + scaling * B A dropout(x)`. `LoraOver` finds it like any other pair. Adapters that PEFT made are
found as they are and need none of this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tnadapt.adapter.base import LinearAdapter, adapter_dtype, check_base
from tnadapt.factorizations import Factorization

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["OverParamAdapter"]

#: One factorization for both matrices, or one for each side, "A" and "B"; a side that is missing or None has none.
FactorizationArgument = Factorization | Mapping[str, Factorization | None]


class OverParamAdapter(LinearAdapter):
    """A LoRA pair `lora_A` [r, d_in], `lora_B` [d_out, r] around `base`.

    Args:
        lora_A: `nn.Linear(d_in, r, bias=False)`, used as it is.
        lora_B: `nn.Linear(r, d_out, bias=False)`, used as it is.
        base: the layer that is adapted; its `requires_grad` is left alone. None for the pair alone.
        scaling: factor on `B A`, `alpha / r` in LoRA and `alpha / sqrt(r)` in rsLoRA.
        dropout: probability of dropping an input of `A` while training.
        factorization: how the matrices are to be over-parameterized: one factorization for both, or a mapping from side,
            `{"A": MPO(order=9), "B": SVD()}`. Only `LoraOver` reads it; the adapter computes the same without it.

    Attributes:
        factorization: `{"A": ..., "B": ...}`, None for a side without one. Files of adapters keep it.

    Raises:
        TypeError: `lora_A` or `lora_B` is not an `nn.Linear`, or `factorization` holds something else.
        ValueError: the dimensions of the pair and the base do not fit, the pair has biases, a bad scaling or dropout, or a
            factorization of another side or for another shape.
    """

    notes: ClassVar[frozenset[str]] = frozenset({"factorization"})

    def __init__(
        self,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        base: nn.Module | None = None,
        scaling: float = 1.0,
        dropout: float = 0.0,
        factorization: FactorizationArgument | None = None,
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
        # one of NumPy could not be written to a file of adapters
        scaling = float(scaling)
        if not math.isfinite(scaling):
            raise ValueError(f"scaling={scaling!r} (alpha / r in LoRA): the factor on the update is a finite number")
        self.factorization = _by_side(factorization, lora_A, lora_B)
        self.base = base
        self.lora_A = lora_A
        self.lora_B = lora_B
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    @classmethod
    def from_linear(  # type: ignore[override]
        cls,
        base: nn.Linear | LinearAdapter,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        factorization: FactorizationArgument | None = None,
    ) -> OverParamAdapter:
        """A new pair around `base`, which is frozen. `A` is Kaiming-uniform and `B` zero, as in PEFT, on the device of
        `base`; the pair is float32, or the dtype of `base` where that is wider.

        Args:
            base: an `nn.Linear`, quantized ones included, or another adapter.
            rank: r, at least 1.
            alpha: LoRA's alpha; `rank` where it is not given (scaling 1).
            dropout: see the class.
            use_rslora: scale by `alpha / sqrt(r)` instead of `alpha / r`.
            factorization: see the class.
        """
        check_base(cls, base)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank={rank!r}: the rank of a LoRA pair is an integer of at least 1")
        if alpha is not None and not math.isfinite(alpha):
            raise ValueError(f"alpha={alpha!r}: LoRA's alpha is a finite number")
        place: dict[str, Any] = {"device": base.weight.device, "dtype": adapter_dtype(base)}
        lora_A = nn.Linear(base.in_features, rank, bias=False, **place)
        lora_B = nn.Linear(rank, base.out_features, bias=False, **place)
        nn.init.kaiming_uniform_(lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(lora_B.weight)
        scaling = (rank if alpha is None else alpha) / (math.sqrt(rank) if use_rslora else rank)
        adapter = cls(lora_A, lora_B, base, scaling, dropout, factorization)
        base.requires_grad_(False)
        return adapter.train(base.training)

    @classmethod
    def from_settings(cls, base: nn.Linear | LinearAdapter, settings: Mapping[str, Any]) -> OverParamAdapter:
        noted = settings.get("factorization")
        if noted is not None and not isinstance(noted, Mapping):
            raise TypeError(f"factorization={noted!r} has no entries for the sides of the pair")
        adapter = cls.from_linear(
            base,
            rank=settings["rank"],
            dropout=settings["dropout"],
            factorization=noted and {side: Factorization.from_dict(one) for side, one in noted.items()},
        )
        # not by way of alpha: alpha / r would round
        adapter.scaling = settings["scaling"]
        return adapter

    def settings(self) -> dict[str, Any]:
        """Rank, scaling, dropout, and the factorization of each side that has one, as its `to_dict` describes it.

        Raises:
            TypeError, ValueError: a factorization cannot be described (see `Factorization.to_dict`).
        """
        dropout = self.dropout.p if isinstance(self.dropout, nn.Dropout) else 0.0
        settings = {"rank": self.rank, "scaling": self.scaling, "dropout": dropout}
        noted = {side: one.to_dict() for side, one in self.factorization.items() if one is not None}
        return {**settings, "factorization": noted} if noted else settings

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_A.out_features

    @property
    def in_features(self) -> int:
        return self.lora_A.in_features

    @property
    def out_features(self) -> int:
        return self.lora_B.out_features

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

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}"


def _by_side(
    given: FactorizationArgument | None, lora_A: nn.Linear, lora_B: nn.Linear
) -> dict[str, Factorization | None]:
    """`given` as a mapping with both sides, checked against the shapes of the pair."""
    if given is None or isinstance(given, Factorization):
        by_side: dict[str, Factorization | None] = {"A": given, "B": given}
    elif isinstance(given, Mapping):
        other = [side for side in given if side not in ("A", "B")]
        if other:
            raise ValueError(f'factorization has an entry for {other[0]!r}; the sides of a LoRA pair are "A" and "B"')
        by_side = {side: given.get(side) for side in ("A", "B")}
    else:
        raise TypeError(
            f"factorization={given!r} is a {type(given).__name__}; give a factorization such as MPO(order=9), or a mapping "
            'such as {"A": MPO(order=9), "B": SVD()}'
        )
    for (side, factorization), half in zip(by_side.items(), (lora_A, lora_B), strict=True):
        if factorization is None:
            continue
        if not isinstance(factorization, Factorization):
            raise TypeError(
                f"the factorization of {side} is a {type(factorization).__name__}; give one such as MPO(order=9), or None"
            )
        rows, cols = half.weight.shape
        try:
            factorization.structure((rows, cols))
        except ValueError as error:
            raise ValueError(f"the factorization of {side} does not fit its {rows}x{cols} matrix: {error}") from error
    return by_side
