"""Tucker: one factor matrix per site around a core tensor (discussed in LoRA-Over, Table 8; not evaluated there).

Letters: n = batch, m = sites, i/j = rows/columns of a site, p = i*j, R = rank of a site, P = all p together.
Cores are the m factors [i_k, j_k, R_k], then the core tensor [R_1, ..., R_m].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from tnadapt.backends import Kernel
from tnadapt.factorizations.base import (
    Factorization,
    check_cap,
    explicit_for,
    power_of_two_scale,
    spread_exponents,
)
from tnadapt.factorizations.gauges import gradient_frame, random_rotations
from tnadapt.factorizations.sites import to_sites
from tnadapt.factorizations.structure import Shape, Sites, Structure, checked_key, is_count

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["TUCKER_GAUGES", "Tucker"]

TUCKER_GAUGES = ("svd", "identity", "spread", "random", "gradient")


@dataclass(frozen=True, kw_only=True, repr=False)
class Tucker(Factorization):
    """Tucker decomposition of `order` sites; `order`, `sites`, `expansion` and `backend` as in `Factorization`.

    With two sites it is the matrix product `U G V^T` of three matrices. That is the default, because a 1x1 site would add one
    number and no depth. For more sites, give `sites` that all have more than one entry.

    >>> Tucker().core_shapes((768, 8))
    ((24, 2, 48), (32, 4, 48), (48, 48))

    Attributes:
        ranks: explicit rank of each site, for one number of sites, or a mapping from shape to ranks; full rank where
            None. Ranks below it truncate, and training keeps what is missing as a frozen residual.
        max_rank: cap on the ranks of all sites.
        gauge: `"svd"` is the higher-order SVD: orthonormal factors, the norm in the core tensor. `"identity"` keeps the
            entries of the matrix in one core and identities in all others, so that fold(unfold(W)) is bitwise W.
            `"spread"` is `"svd"` with the norm spread over factors and core tensor, evenly up to powers of two (skipped
            for a zero matrix). `"random"` is `"svd"` with every factor's columns rotated at random, and the core tensor with
            them: the control when gauges are compared. `"gradient"` has factors along the singular vectors of a gradient
            that `unfold` is given, see `gradient_frame`.
        seed: of the rotations of `"random"`.

    Raises:
        ValueError: an argument that means nothing, with its value and what to give instead.
    """

    ranks: Sequence[int] | Mapping[Shape, Sequence[int]] | None = field(default=None, hash=False)
    max_rank: int | None = None
    gauge: str = "svd"
    seed: int = 0

    _GAUGES: ClassVar[tuple[str, ...]] = TUCKER_GAUGES
    #: A 1x1 site adds one number, so that more sites bring no expansion nearer.
    _EXPANSION_ORDERS: ClassVar[range] = range(2, 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cap("max_rank", self.max_rank)
        self._check_gauge(self.gauge)
        self._check_seed(self.seed, self.gauge)
        if self.ranks is not None:
            object.__setattr__(self, "ranks", _checked_ranks(self.ranks))
        truncation = "max_rank" if self.max_rank is not None else "ranks" if self.ranks is not None else None
        if truncation is not None and self.gauge == "identity":
            raise ValueError(
                f"gauge='identity' keeps the whole matrix in one core and cannot be truncated; drop {truncation}, "
                "or take gauge='svd'"
            )
        if truncation is not None and self.expansion is not None:
            raise ValueError(f"expansion={self.expansion!r} plans exact cores, {truncation} cuts them; drop one")
        if self.max_rank is not None and self.ranks is not None:
            raise ValueError(f"ranks={self.ranks!r} and max_rank={self.max_rank} both set the ranks; drop one")

    def _label_parts(self) -> list[str]:
        parts = [] if self.ranks is None else ["ranks=…"]
        if self.max_rank is not None:
            parts.append(f"max_rank={self.max_rank}")
        parts += [] if self.gauge == "svd" else [f"gauge={self.gauge}"]
        return [*parts, f"seed={self.seed}"] if self.seed else parts

    @property
    def needs_gradient(self) -> bool:
        return self.gauge == "gradient"

    def structure(self, shape: Shape) -> Structure:
        sites = self._resolve_sites(shape)
        full = _full_ranks(sites)
        ranks = full if self.max_rank is None else tuple(min(rank, self.max_rank) for rank in full)
        explicit = explicit_for(shape, self.ranks)
        if explicit is not None:
            if len(explicit) != len(full) or any(rank > most for rank, most in zip(explicit, full, strict=True)):
                raise ValueError(
                    f"ranks={explicit} do not fit the sites {list(sites)} of a {shape[0]}x{shape[1]} matrix, whose full "
                    f"ranks are {full}; give as many ranks as sites and none above those, or max_rank for a cap"
                )
            ranks = explicit
        return Structure(
            shape=shape,
            sites=sites,
            core_shapes=_core_shapes(sites, ranks),
            exact=ranks == full,
            # one unfolding at a time with U and Vh of its SVD, then the partly projected tensor
            scratch=3 * math.prod(shape),
        )

    def _full_parameters(self, sites: Sites) -> int:
        return sum(math.prod(shape) for shape in _core_shapes(sites, _full_ranks(sites)))

    # -- tensors ------------------------------------------------------------------------------------------------------

    def _unfold(self, matrices: Float[Tensor, "n rows cols"], structure: Structure) -> Sequence[Tensor]:
        ranks = structure.core_shapes[-1]
        if self.gauge == "identity":
            return _identity_cores(to_sites(matrices, structure.sites), ranks)
        # a decomposition may square entries: brought near 1, they neither overflow nor vanish
        scale = power_of_two_scale(matrices)
        factors, core = self.operations.tucker_decompose(to_sites(matrices / scale, structure.sites), ranks)
        core = core * scale.reshape(-1, *[1] * len(ranks))
        if self.gauge == "random":
            rotations = random_rotations(ranks, self.seed, like=core)
            return [*(f @ q for f, q in zip(factors, rotations, strict=True)), self._project(rotations, core)]
        cores = [*factors, core]
        if self.gauge == "spread":
            logs = torch.stack([part.flatten(1).norm(dim=1) for part in cores]).log2()
            shares = torch.exp2(spread_exponents(logs))
            cores = [
                part * share.reshape(-1, *[1] * (part.dim() - 1)) for part, share in zip(cores, shares, strict=True)
            ]
        return cores

    def _unfold_along(
        self, matrices: Float[Tensor, "n rows cols"], gradients: Float[Tensor, "n rows cols"], structure: Structure
    ) -> Sequence[Tensor]:
        tensor, slope = to_sites(matrices, structure.sites), to_sites(gradients, structure.sites)
        n, modes = tensor.shape[0], tensor.shape[1:]
        factors = []
        for k, rank in enumerate(structure.core_shapes[-1]):
            own, along = (t.movedim(k + 1, 1).reshape(n, modes[k], -1) for t in (tensor, slope))
            factors.append(gradient_frame(self.operations.svd, own, along, rank))
        return [*factors, self._project(factors, tensor)]

    def _project(self, factors: Sequence[Tensor], tensor: Tensor) -> Tensor:
        """The tensor [n, p_1, ..., p_m] in the bases of factors [n, p_k, R_k] or [p_k, R_k]."""
        n = tensor.shape[0]
        projections = [factor.mT.expand(n, -1, -1) for factor in factors]
        return self.operations.tucker_contract(projections, tensor).reshape(n, *[f.shape[-1] for f in factors])

    def _contract(self, fused: Sequence[Tensor]) -> Float[Tensor, "n numel"]:
        return self.operations.tucker_contract(fused[:-1], fused[-1])

    def kernel(self, fused: Sequence[Tensor]) -> Kernel:
        return self.operations.tucker_kernel(fused[:-1], fused[-1])

    def _sites_of(self, shapes: Sequence[tuple[int, ...]]) -> Sites:
        return tuple((i, j) for i, j, _ in shapes[:-1])

    def fused_shapes(self, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        return (*((i * j, rank) for i, j, rank in shapes[:-1]), tuple(shapes[-1]))

    def _core_dims(self, count: int) -> Sequence[int]:
        return [*[3] * (count - 1), count - 1]

    def _check_cores(self, shapes: Sequence[tuple[int, ...]]) -> None:
        if len(shapes) < 3:
            raise ValueError(f"a Tucker has at least two factors and a core tensor, got cores of shapes {list(shapes)}")
        ranks = tuple(shape[2] for shape in shapes[:-1])
        if ranks != shapes[-1]:
            raise ValueError(
                f"factors and core tensor do not belong together: the factors have ranks {ranks}, the core tensor has "
                f"shape {shapes[-1]}"
            )


def _full_ranks(sites: Sites) -> tuple[int, ...]:
    """Rank of each unfolding of a matrix in general position: no more than its rows, no more than its columns."""
    modes = [i * j for i, j in sites]
    total = math.prod(modes)
    return tuple(min(p, total // p) for p in modes)


def _core_shapes(sites: Sites, ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return (*((i, j, rank) for (i, j), rank in zip(sites, ranks, strict=True)), tuple(ranks))


def _checked_ranks(
    ranks: Sequence[int] | Mapping[Shape, Sequence[int]],
) -> tuple[int, ...] | dict[Shape, tuple[int, ...]]:
    if isinstance(ranks, Mapping):
        return {checked_key("ranks", shape): _checked_list(explicit) for shape, explicit in ranks.items()}
    return _checked_list(ranks)


def _checked_list(ranks: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(ranks, Sequence) or not all(is_count(rank) for rank in ranks):
        raise ValueError(f"ranks={ranks!r}: give one integer of at least 1 for each site, or max_rank for a cap on all")
    return tuple(ranks)


def _identity_cores(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Identity factors around the tensor itself; where one mode is larger than all others together, its factor takes the
    entries and the core tensor is the identity that pairs it with them."""
    n, modes = tensor.shape[0], tensor.shape[1:]
    large = next((k for k, (p, rank) in enumerate(zip(modes, ranks, strict=True)) if p > rank), None)
    cores = [torch.eye(rank, dtype=tensor.dtype, device=tensor.device).expand(n, -1, -1) for rank in ranks]
    if large is None:
        return [*cores, tensor]
    cores[large] = tensor.movedim(large + 1, 1).reshape(n, modes[large], -1)
    others = [rank for k, rank in enumerate(ranks) if k != large]
    pairing = torch.eye(ranks[large], dtype=tensor.dtype, device=tensor.device).reshape(ranks[large], *others)
    return [*cores, pairing.movedim(0, large).expand(n, *ranks)]
