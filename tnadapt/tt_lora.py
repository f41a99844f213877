"""TT-LoRA: the update of a linear layer as a tensor train of low rank.

Source: Anjum et al. 2024, *Tensor Train Low-rank Approximation (TT-LoRA)*, arXiv:2408.01008.

The update `dW` [d_out, d_in] is reshaped to a tensor whose modes are those of d_out and then those of d_in, with
`prod(m) = d_out` and `prod(n) = d_in`. Its tensor train has one core per mode. As an MPO, this is the one with the sites
`(m_1, 1) ... (m_p, 1), (1, n_1) ... (1, n_q)`.

Letters: m/n = modes of d_out/d_in, p/q = how many there are, d = bond, r = the bond between the two halves, * = batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnadapt.adapter import LinearAdapter
from tnadapt.adapter.base import adapter_dtype, check_base
from tnadapt.factorizations import MPO, full_bonds, near_square
from tnadapt.factorizations.structure import Sites, is_count

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["TTLoraLinear"]

#: The modes of d_out and those of d_in.
TTShape = tuple[Sequence[int], Sequence[int]]


class TTLoraLinear(LinearAdapter):
    """`y = base(x) + alpha * dW x`, with `dW` as a tensor train.

    In forward, the cores of d_out are contracted to a matrix [d_out, r] and those of d_in to one of [r, d_in]. The input is
    multiplied by the second matrix and then by the first. No tensor of `d_out * d_in` numbers is made, and activations are r wide, as in
    LoRA. Folding the halves takes about `d² (d_out + d_in)` products for each forward, however many inputs there are.

    Args:
        base: the layer that is adapted, left as it is; `from_linear` freezes it.
        shape: `((m_1, ..., m_p), (n_1, ..., n_q))`, modes of d_out and of d_in. One mode for each is LoRA.
        rank: TT rank, the same for every bond. A bond whose full rank is smaller has its full rank. At most the largest of these
            full ranks.
        alpha: factor on `dW`. Unlike in LoRA, it is not divided by the rank.

    Attributes:
        cores: parameters of the shapes [d_{k-1}, i_k, j_k, d_k], those of d_out first (j_k = 1), then those of d_in (i_k = 1).

    Raises:
        TypeError: the base is not a linear layer.
        ValueError: modes that do not multiply to the dimensions of the base, or a bad rank or alpha.
    """

    def __init__(self, base: nn.Linear | LinearAdapter, shape: TTShape, rank: int, alpha: float = 1.0) -> None:
        super().__init__()
        check_base(type(self), base)
        if not is_count(rank):
            raise ValueError(f"rank={rank!r}: the rank of a tensor train is an integer of at least 1")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"alpha={alpha!r}: the factor on the update is a finite number")
        self.shape = _checked_shape(shape, base.out_features, base.in_features)
        largest = max(full_bonds(_sites(self.shape)))
        if rank > largest:
            raise ValueError(
                f"rank={rank} is above the full rank of every bond of {self.shape}, at most {largest}; give a smaller one"
            )
        self.rank, self.alpha = rank, float(alpha)
        self.base = base
        place: dict[str, Any] = {"device": base.weight.device, "dtype": adapter_dtype(base)}
        self.cores = nn.ParameterList(
            torch.empty(core, **place) for core in _tensor_train(_sites(self.shape), rank).core_shapes(self._dims)
        )
        self.reset_parameters()

    @classmethod
    def from_linear(  # type: ignore[override]
        cls,
        base: nn.Linear | LinearAdapter,
        rank: int | None = None,
        shape: TTShape | None = None,
        alpha: float = 1.0,
        parameters: int | None = None,
    ) -> TTLoraLinear:
        """A new tensor train around `base`, which is frozen; `dW` is zero. Its cores are on the device of `base`, in float32,
        or in the dtype of `base` where that is wider.

        Args:
            base: an `nn.Linear`, quantized ones included, or another adapter.
            rank: see the class; either this or `parameters`.
            shape: see the class. By default the two factors of each dimension nearest to its square root.
            alpha: see the class.
            parameters: numbers that the cores may have together; the largest rank that fits is taken.
        """
        check_base(cls, base)
        if (rank is None) == (parameters is None):
            raise ValueError(f"rank={rank!r} and parameters={parameters!r}: give one of the two")
        if shape is None:
            shape = near_square(base.out_features), near_square(base.in_features)
        if parameters is not None:
            rank = _largest_rank(_checked_shape(shape, base.out_features, base.in_features), parameters)
        assert rank is not None
        adapter = cls(base, shape, rank, alpha)
        base.requires_grad_(False)
        return adapter.train(base.training)

    @classmethod
    def from_settings(cls, base: nn.Linear | LinearAdapter, settings: Mapping[str, Any]) -> TTLoraLinear:
        out_modes, in_modes = settings["shape"]
        return cls.from_linear(base, settings["rank"], (out_modes, in_modes), settings["alpha"])

    def settings(self) -> dict[str, Any]:
        """Shape, rank and alpha."""
        return {"shape": [list(modes) for modes in self.shape], "rank": self.rank, "alpha": self.alpha}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero the first core and draw the others, so that `dW = 0` and the first core gets a gradient.

        The entries of what the first core is contracted with have the variance `1 / (3 d_in)` of LoRA's Kaiming-uniform `A`:
        a first step of Adam moves an entry of `dW` as far as it would in LoRA of rank `d_1`.
        """
        first, *others = self.cores
        first.zero_()
        # one entry of their product sums over the bonds between them; each core pays for the bond on its right
        share = (1 / (3 * self.in_features)) ** (1 / len(others))
        for core in others:
            core.normal_(std=math.sqrt(share / core.shape[-1]))

    @property
    def in_features(self) -> int:
        return math.prod(self.shape[1])

    @property
    def out_features(self) -> int:
        return math.prod(self.shape[0])

    @property
    def num_parameters(self) -> int:
        """Numbers in all cores: `sum of d_{k-1} i_k j_k d_k`."""
        return sum(core.numel() for core in self.cores)

    @property
    def _dims(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def halves(self) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
        """`dW` as a LoRA pair: the contracted cores of d_in and of d_out, `dW = halves()[1] @ halves()[0]`. Differentiable."""
        # every product is a row-major matrix already: no mode has to be moved
        p = len(self.shape[0])
        b = self.cores[0].flatten(0, 2)
        for core in self.cores[1:p]:
            b = (b @ core.flatten(1)).view(-1, core.shape[-1])
        a = self.cores[-1].flatten(1)
        for core in reversed(self.cores[p:-1]):
            a = (core.flatten(0, 2) @ a).view(core.shape[0], -1)
        return a, b

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        y = self.base(x)  # type: ignore[misc]
        a, b = self.halves()
        update = F.linear(F.linear(x.to(a.dtype), a), b) * self.alpha
        return y + update.to(y.dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def delta_weight(self) -> Float[Tensor, "d_out d_in"]:
        a, b = self.halves()
        return self.alpha * (b @ a)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, rank={self.rank}, alpha={self.alpha:g}, parameters={self.num_parameters}"


def _tensor_train(sites: Sites, rank: int) -> MPO:
    return MPO(sites=sites, max_bond=rank)


def _sites(shape: TTShape) -> Sites:
    return tuple((m, 1) for m in shape[0]) + tuple((1, n) for n in shape[1])


def _largest_rank(shape: TTShape, parameters: int) -> int:
    """The largest rank whose cores have at most `parameters` numbers. Ranks above the largest full bond add nothing."""
    sites, dims = _sites(shape), (math.prod(shape[0]), math.prod(shape[1]))
    smallest = _tensor_train(sites, 1).num_parameters(dims)
    if not is_count(parameters) or parameters < smallest:
        raise ValueError(
            f"parameters={parameters!r}: a tensor train of rank 1 with the modes {shape[0]} and {shape[1]} has {smallest}; "
            "give at least that, or smaller modes"
        )
    low, high = 1, max(full_bonds(sites))
    while low < high:
        middle = (low + high + 1) // 2
        if _tensor_train(sites, middle).num_parameters(dims) <= parameters:
            low = middle
        else:
            high = middle - 1
    return low


def _checked_shape(shape: object, d_out: int, d_in: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`shape` as tuples that multiply to the dimensions of the layer."""
    example = f"shape=({near_square(d_out)}, {near_square(d_in)})"
    pair = tuple(shape) if isinstance(shape, Sequence) else ()
    if len(pair) != 2 or not all(
        isinstance(modes, Sequence) and len(modes) > 0 and all(is_count(mode) for mode in modes) for modes in pair
    ):
        raise ValueError(
            f"shape={shape!r}: give the modes of d_out and those of d_in, integers of at least 1, such as {example}"
        )
    outer, inner = tuple(pair[0]), tuple(pair[1])
    if (math.prod(outer), math.prod(inner)) != (d_out, d_in):
        raise ValueError(
            f"shape={shape!r} multiplies to {math.prod(outer)} and {math.prod(inner)}, but the layer has d_out={d_out} and "
            f"d_in={d_in}; give for example {example}"
        )
    return outer, inner
