"""CP (canonical polyadic): a sum of R products of one vector per site (discussed in LoRA-Over, Table 8; not evaluated).

Letters: n = batch, m = sites, i/j = rows/columns of a site, p = i*j, R = rank, P = all p together.
Core k is the factor [i_k, j_k, R].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from tnadapt.backends import Kernel
from tnadapt.backends.contractions import cp_split
from tnadapt.factorizations.base import Factorization, check_cap, power_of_two_scale, spread_exponents
from tnadapt.factorizations.sites import to_sites
from tnadapt.factorizations.structure import Shape, Sites, Structure

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["CP", "CP_GAUGES"]

CP_GAUGES = ("unit", "spread")


@dataclass(frozen=True, kw_only=True, repr=False)
class CP(Factorization):
    """CP decomposition of `order` sites; `order`, `sites`, `expansion` and `backend` as in `Factorization`.

    Without `rank` it is exact and in closed form. R is the product of all modes but the largest. Component r has unit vectors
    in these modes, which single out their r-th entry, and the factor of the largest mode holds the matrix itself. The default
    order is 2. Every 1x1 site between the ends adds R scales, a depth that costs next to nothing.

    >>> CP().core_shapes((768, 8))
    ((24, 2, 48), (32, 4, 48))

    Attributes:
        rank: number of components, for every shape. Below the exact rank, CP approximates: in closed form by SVD if only two
            sites have more than one entry, otherwise by alternating least squares. Training keeps what is missing as a
            frozen residual.
        max_rank: cap on the number of components, for shapes of different exact rank.
        gauge: `"unit"` has columns of norm 1 in all factors but that of the largest mode, which holds the weights.
            `"spread"` shares each component's weight out over its vectors, evenly up to powers of two; components of
            weight zero are left as they are.
        max_scratch: how many numbers folding or decomposing one matrix may need at once. `structure` refuses more.

    Raises:
        ValueError: an argument that means nothing, with its value and what to give instead.
    """

    rank: int | None = None
    max_rank: int | None = None
    gauge: str = "unit"
    max_scratch: int = 2**28

    _GAUGES: ClassVar[tuple[str, ...]] = CP_GAUGES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cap("rank", self.rank)
        check_cap("max_rank", self.max_rank)
        check_cap("max_scratch", self.max_scratch)
        self._check_gauge(self.gauge)
        if self.rank is not None and self.max_rank is not None:
            raise ValueError(f"rank={self.rank} and max_rank={self.max_rank} both set the rank; drop one")
        truncation = "rank" if self.rank is not None else "max_rank" if self.max_rank is not None else None
        if self.expansion is not None and truncation is not None:
            raise ValueError(f"expansion={self.expansion!r} plans an exact CP, {truncation} cuts it; drop one")

    def _label_parts(self) -> list[str]:
        parts = [f"{name}={value}" for name in ("rank", "max_rank") if (value := getattr(self, name)) is not None]
        return parts if self.gauge == "unit" else [*parts, f"gauge={self.gauge}"]

    def structure(self, shape: Shape) -> Structure:
        sites = self._resolve_sites(shape)
        full = _exact_rank(sites)
        rank = full if self.max_rank is None else min(full, self.max_rank)
        if self.rank is not None:
            if self.rank > full:
                raise ValueError(
                    f"rank={self.rank} is above the exact rank {full} of a {shape[0]}x{shape[1]} matrix on the sites "
                    f"{list(sites)}; give a rank up to {full}, or max_rank for a cap over several shapes"
                )
            rank = self.rank
        scratch = _scratch([i * j for i, j in sites], rank, rank == full)
        if scratch > self.max_scratch:
            raise ValueError(
                f"{self.label} of a {shape[0]}x{shape[1]} matrix has rank {rank} on the sites {list(sites)} and needs "
                f"{scratch:.3g} numbers of scratch ({scratch * 4 / 2**30:.3g} GiB in float32), above "
                f"max_scratch={self.max_scratch}; give a smaller rank, or sites with one large mode, or an MPO, whose "
                "scratch stays that of the matrix"
            )
        return Structure(
            shape=shape,
            sites=sites,
            core_shapes=tuple((i, j, rank) for i, j in sites),
            exact=rank == full,
            scratch=scratch,
        )

    def _full_parameters(self, sites: Sites) -> int:
        return _exact_rank(sites) * sum(i * j for i, j in sites)

    # -- tensors ------------------------------------------------------------------------------------------------------

    def _unfold(self, matrices: Float[Tensor, "n rows cols"], structure: Structure) -> Sequence[Tensor]:
        if structure.exact:
            swept = _unit_vectors(to_sites(matrices, structure.sites))
        else:
            # least squares work with squares of entries: brought near 1, they neither overflow nor vanish
            scale = power_of_two_scale(matrices)
            swept = self._approximate(to_sites(matrices / scale, structure.sites), structure.core_shapes[0][-1])
            largest = _largest([i * j for i, j in structure.sites])
            swept[largest] = swept[largest] * scale
        return _spread_components(swept) if self.gauge == "spread" else swept

    def _approximate(self, tensor: Tensor, rank: int) -> list[Tensor]:
        """Factors of fewer components than the exact ones; 1x1 sites take no part, theirs are ones."""
        n, modes = tensor.shape[0], tensor.shape[1:]
        proper = [k for k, p in enumerate(modes) if p > 1]
        inner = tensor.reshape(n, *[modes[k] for k in proper])
        found = self._two_modes(inner, rank) if len(proper) == 2 else self.operations.cp_decompose(inner, rank)
        return [found[proper.index(k)] if k in proper else tensor.new_ones(n, 1, rank) for k in range(len(modes))]

    def _two_modes(self, matrix: Tensor, rank: int) -> list[Tensor]:
        """With two modes the best approximation is the truncated SVD, and there is nothing to iterate."""
        u, s, vh = self.operations.svd(matrix, rank)
        factors = [u, vh.transpose(1, 2)]
        largest = _largest(matrix.shape[1:])
        factors[largest] = factors[largest] * s.unsqueeze(1)
        return factors

    def _contract(self, fused: Sequence[Tensor]) -> Float[Tensor, "n numel"]:
        return self.operations.cp_contract(fused)

    def kernel(self, fused: Sequence[Tensor]) -> Kernel:
        return self.operations.cp_kernel(fused)

    def _sites_of(self, shapes: Sequence[tuple[int, ...]]) -> Sites:
        return tuple((i, j) for i, j, _ in shapes)

    def fused_shapes(self, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        return tuple((i * j, rank) for i, j, rank in shapes)

    def _core_dims(self, count: int) -> Sequence[int]:
        return [3] * count

    def _check_cores(self, shapes: Sequence[tuple[int, ...]]) -> None:
        if len(shapes) < 2:
            raise ValueError(f"a CP has at least two factors, got one of shape {shapes[0]}")
        ranks = [shape[2] for shape in shapes]
        if len(set(ranks)) > 1:
            raise ValueError(f"the factors do not belong together: they have ranks {ranks}, where CP has one")


def _largest(modes: Sequence[int]) -> int:
    return max(range(len(modes)), key=lambda k: modes[k])


def _exact_rank(sites: Sites) -> int:
    """Product of all modes but the largest."""
    modes = [i * j for i, j in sites]
    return math.prod(modes) // max(modes)


def _scratch(modes: Sequence[int], rank: int, exact: bool) -> int:
    """Numbers that folding (the Khatri-Rao products of both halves) and, where not exact, alternating least squares
    (that of all modes but the smallest proper one) hold at once."""
    split = cp_split(tuple(modes))
    fold = rank * (math.prod(modes[:split]) + math.prod(modes[split:]))
    proper = [p for p in modes if p > 1]
    if exact or len(proper) <= 2:
        return max(fold, 2 * math.prod(modes))
    return max(fold, rank * (math.prod(proper) // min(proper)))


def _unit_vectors(tensor: Tensor) -> list[Tensor]:
    """The exact CP: component r belongs to the r-th entry of all modes but the largest, in row-major order."""
    n, modes = tensor.shape[0], tensor.shape[1:]
    largest = _largest(modes)
    rank = math.prod(modes) // modes[largest]
    component, stride = torch.arange(rank, device=tensor.device), rank
    factors: list[Tensor] = []
    for k, p in enumerate(modes):
        if k == largest:
            factors.append(tensor.movedim(k + 1, 1).reshape(n, p, rank))
            continue
        stride //= p
        entry = component // stride % p
        vectors = entry == torch.arange(p, device=tensor.device).unsqueeze(1)
        factors.append(vectors.to(tensor.dtype).expand(n, -1, -1))
    return factors


def _spread_components(factors: Sequence[Tensor]) -> list[Tensor]:
    """Each component's vectors at nearly one norm, the products unchanged bit by bit."""
    logs = torch.stack([factor.norm(dim=1) for factor in factors]).log2()
    shares = torch.exp2(spread_exponents(logs.flatten(1))).reshape(logs.shape)
    return [factor * share.unsqueeze(1) for factor, share in zip(factors, shares, strict=True)]
