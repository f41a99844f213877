"""Tensor rings: a chain whose ends are joined (Zhao, Zhou, Xie, Zhang, Cichocki 2016, arXiv:1606.05535).

Letters: n = batch, m = sites, i/j = rows/columns of a site, p = i*j, d = bond, r = bond that closes the ring.
Core k is [d_{k-1}, i_k, j_k, d_k] with d_0 = d_m = r.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from tnadapt.backends import AutogradKernel, Kernel
from tnadapt.factorizations.base import Factorization, check_cap
from tnadapt.factorizations.mpo import sweep_chain
from tnadapt.factorizations.sites import to_sites
from tnadapt.factorizations.structure import Shape, Sites, Structure, near_square

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["TensorRing"]


@dataclass(frozen=True, kw_only=True, repr=False)
class TensorRing(Factorization):
    """Tensor ring of `order` sites; `order`, `sites`, `expansion` and `backend` as in `Factorization`. One of the first three
    must be given.

    The bond that an MPO has after its first site, `R = min(p_1, the others)`, is split into its two factors nearest to the
    square root, `R = r d_1`: `d_1` leads on to the second site and `r` around to the last. With the other bonds at full
    rank, `d_k = min(d_{k-1} p_k, r * the modes after k)`, the ring is exact for every matrix. A 1x1 site then adds `d_1^2`
    numbers, where an MPO's adds `R^2`. Where R is prime, `r` is 1 and the ring is an MPO.

    >>> TensorRing(order=3).core_shapes((768, 8))
    ((6, 24, 2, 8), (8, 1, 1, 8), (8, 32, 4, 6))

    Attributes:
        max_bond: cap on all bonds, r too. Below full rank the ring truncates, and training keeps what is missing as a frozen
            residual.

    Raises:
        ValueError: an argument that means nothing, with its value and what to give instead.
    """

    order: int | None = None
    max_bond: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cap("max_bond", self.max_bond)
        if self.expansion is not None and self.max_bond is not None:
            raise ValueError(
                f"expansion={self.expansion!r} plans an exact ring, max_bond={self.max_bond} cuts it; drop one"
            )

    def _label_parts(self) -> list[str]:
        return [] if self.max_bond is None else [f"max_bond={self.max_bond}"]

    def structure(self, shape: Shape) -> Structure:
        sites = self._resolve_sites(shape)
        full, bonds = _bonds(sites, None), _bonds(sites, self.max_bond)
        return Structure(
            shape=shape,
            sites=sites,
            core_shapes=_core_shapes(sites, bonds),
            exact=bonds == full,
            # U and S Vh of the first site, then what is left of the matrix beside that of the next
            scratch=2 * math.prod(shape),
        )

    def _full_parameters(self, sites: Sites) -> int:
        return sum(math.prod(shape) for shape in _core_shapes(sites, _bonds(sites, None)))

    # -- tensors ------------------------------------------------------------------------------------------------------

    def _unfold(self, matrices: Float[Tensor, "n rows cols"], structure: Structure) -> Sequence[Tensor]:
        """TR-SVD (algorithm 1 there): the first site by an SVD, the others by a chain's sweep that carries r at its end."""
        tensor = to_sites(matrices, structure.sites)
        n, (first, *others) = tensor.shape[0], tensor.shape[1:]
        ring, bonds = structure.core_shapes[0][0], [shape[-1] for shape in structure.core_shapes[:-1]]
        u, s, vh = self.operations.svd(tensor.reshape(n, first, -1), ring * bonds[0])
        opening = u.reshape(n, first, ring, bonds[0]).movedim(2, 1)
        rest = (s.unsqueeze(-1) * vh).reshape(n, ring, bonds[0], -1).permute(0, 2, 3, 1)
        if len(others) == 1:
            return [opening, rest.contiguous()]
        # d_1 counts as rows of the second site and r as columns of the last
        modes = [bonds[0] * others[0], *others[1:-1], others[-1] * ring]
        second, *inner, last = sweep_chain(self.operations.chain_decompose, rest.reshape(n, *modes), bonds[1:])
        return [
            opening,
            second.reshape(n, bonds[0], others[0], -1),
            *inner,
            last.reshape(n, -1, others[-1], ring),
        ]

    def _contract(self, fused: Sequence[Tensor]) -> Float[Tensor, "n numel"]:
        first, *middle, last = fused
        n, ring = first.shape[0], first.shape[1]
        partial = first
        for core in middle:
            partial = self.operations.contract("nrxd,ndpe->nrxpe", partial, core).reshape(n, ring, -1, core.shape[3])
        return self.operations.contract("nrxd,ndpr->nxp", partial, last).reshape(n, -1)

    def kernel(self, fused: Sequence[Tensor]) -> Kernel:
        return AutogradKernel(self._contract, fused)

    def _sites_of(self, shapes: Sequence[tuple[int, ...]]) -> Sites:
        return tuple((i, j) for _, i, j, _ in shapes)

    def fused_shapes(self, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        return tuple((left, i * j, right) for left, i, j, right in shapes)

    def _check_cores(self, shapes: Sequence[tuple[int, ...]]) -> None:
        if len(shapes) < 2:
            raise ValueError(f"a tensor ring has at least two cores, got one of shape {shapes[0]}")
        for k, shape in enumerate(shapes):
            after = (k + 1) % len(shapes)
            if shape[-1] != shapes[after][0]:
                raise ValueError(
                    f"cores {k} and {after} do not belong together: bond dimensions {shape[-1]} and {shapes[after][0]} "
                    f"differ in {list(shapes)}"
                )


def _bonds(sites: Sites, cap: int | None) -> tuple[int, ...]:
    """`(r, d_1, ..., d_{m-1})`, each at most `cap`."""

    def capped(bond: int) -> int:
        return bond if cap is None else min(bond, cap)

    modes = [i * j for i, j in sites]
    ring, first = (capped(bond) for bond in near_square(min(modes[0], math.prod(modes[1:]))))
    bonds = [first]
    for k in range(1, len(modes) - 1):
        bonds.append(capped(min(bonds[-1] * modes[k], math.prod(modes[k + 1 :]) * ring)))
    return (ring, *bonds)


def _core_shapes(sites: Sites, bonds: Sequence[int]) -> tuple[tuple[int, int, int, int], ...]:
    around = (*bonds, bonds[0])
    return tuple((around[k], i, j, around[k + 1]) for k, (i, j) in enumerate(sites))
