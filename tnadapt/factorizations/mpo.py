"""Matrix product operators: the tensor train of a matrix (LoRA-Over, Eq. 3-4, Algorithm 1). SVD is the one of order 2.

Letters: n = batch, m = sites, i/j = rows/columns of a site, p = i*j, d = bond.
Core k is [d_{k-1}, i_k, j_k, d_k] with d_0 = d_m = 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from tnadapt.backends import Kernel
from tnadapt.factorizations.base import Factorization, check_cap, power_of_two_scale, spread_exponents
from tnadapt.factorizations.gauges import balance_chain, gradient_chain, random_rotations, rotate_chain
from tnadapt.factorizations.sites import to_sites
from tnadapt.factorizations.structure import Shape, Sites, Structure, full_bonds

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["GAUGES", "MPO", "SVD", "sweep_chain"]

#: How the freedom that contraction leaves is used; all gauges fold to the same matrix.
GAUGES = ("svd", "right", "identity", "spread", "balanced", "random", "gradient")


@dataclass(frozen=True, kw_only=True, repr=False)
class MPO(Factorization):
    """Matrix product operator of `order` sites; `order`, `sites`, `expansion` and `backend` as in `Factorization`. One of the
    first three must be given.

    >>> MPO(order=4).core_shapes((768, 8))
    ((1, 24, 2, 48), (48, 1, 1, 48), (48, 1, 1, 48), (48, 32, 4, 1))

    Attributes:
        max_bond: cap on the bond dimensions. Below full rank the factorization truncates; training keeps what is
            missing as a frozen residual.
        gauge: the basis that each bond is written in. All gauges fold to the same matrix.
            `"svd"` is Algorithm 1, which is left-canonical: all cores orthonormal but the last, which holds the singular
            values. `"right"` is its mirror image: all orthonormal but the first.
            `"identity"` makes all cores identities but one, which is the matrix itself, so that fold(unfold(W)) is
            bitwise W.
            `"spread"` is `"svd"` with the norm spread over the cores, evenly up to powers of two (skipped for a zero matrix,
            where no core would get a gradient).
            `"balanced"` is bi-canonical: the square roots of the singular values on both sides of every bond, as the
            authors of OPF (Gao et al. 2023) have it. A zero matrix keeps `"svd"`; see `balance_chain` for rank-deficient
            ones. The paper's "Normalization" is undefined; `"balanced"` is its likely meaning.
            `"random"` is `"svd"` with a random rotation of every bond: the control when gauges are compared.
            `"gradient"` writes the bonds in the singular vectors of a gradient that `unfold` is given, see `gradient_frame`.
        seed: of the rotations of `"random"`. The rotations depend only on the seed and the bonds, so all matrices of one
            structure have the same.

    Raises:
        ValueError: an argument that means nothing, with its value and what to give instead.
    """

    order: int | None = None
    max_bond: int | None = None
    gauge: str = "svd"
    seed: int = 0

    _GAUGES: ClassVar[tuple[str, ...]] = GAUGES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cap("max_bond", self.max_bond)
        self._check_gauge(self.gauge)
        self._check_seed(self.seed, self.gauge)
        if self.gauge == "identity" and self.max_bond is not None:
            raise ValueError(
                "gauge='identity' keeps the whole matrix in one core and cannot be truncated; drop max_bond, or take gauge='svd'"
            )
        if self.expansion is not None and self.max_bond is not None:
            raise ValueError(
                f"expansion={self.expansion!r} plans an exact chain, max_bond={self.max_bond} cuts it; drop one"
            )

    def __eq__(self, other: object) -> bool:
        """An SVD equals the MPO of order 2 with the same settings: they are one description."""
        if type(self) is not type(other) and not {type(self), type(other)} <= {MPO, SVD}:
            return NotImplemented
        return all(getattr(self, f.name) == getattr(other, f.name) for f in fields(MPO))

    def _label_parts(self) -> list[str]:
        parts = [] if self.max_bond is None else [f"max_bond={self.max_bond}"]
        parts += [] if self.gauge == "svd" else [f"gauge={self.gauge}"]
        return [*parts, f"seed={self.seed}"] if self.seed else parts

    @property
    def needs_gradient(self) -> bool:
        return self.gauge == "gradient"

    def structure(self, shape: Shape) -> Structure:
        sites = self._resolve_sites(shape)
        full = full_bonds(sites)
        inner = tuple(d if self.max_bond is None else min(d, self.max_bond) for d in full)
        return Structure(
            shape=shape,
            sites=sites,
            core_shapes=_core_shapes(sites, inner),
            exact=inner == full,
            # each step of the sweep holds U and S Vh of a matrix with no more entries than the matrix itself
            scratch=2 * math.prod(shape),
        )

    def _full_parameters(self, sites: Sites) -> int:
        return sum(math.prod(shape) for shape in _core_shapes(sites, full_bonds(sites)))

    # -- tensors ------------------------------------------------------------------------------------------------------

    def _unfold(self, matrices: Float[Tensor, "n rows cols"], structure: Structure) -> Sequence[Tensor]:
        tensor = to_sites(matrices, structure.sites)
        bonds = [shape[-1] for shape in structure.core_shapes[:-1]]
        if self.gauge == "identity":
            return _identity_chain(tensor, bonds)
        decompose = self.operations.chain_decompose
        if self.gauge == "right":
            mirrored = tensor.permute(0, *range(tensor.dim() - 1, 0, -1))
            return [core.transpose(1, 3) for core in reversed(sweep_chain(decompose, mirrored, bonds[::-1]))]
        if self.gauge == "balanced":
            return self._balanced(matrices, structure, bonds)
        cores = sweep_chain(decompose, tensor, bonds)
        if self.gauge == "random":
            return rotate_chain(cores, random_rotations(bonds, self.seed, like=tensor))
        return _spread_norm(cores) if self.gauge == "spread" else cores

    def _balanced(self, matrices: Tensor, structure: Structure, bonds: Sequence[int]) -> list[Tensor]:
        # brought near 1 by an even power of two, whose root is given to both ends: no rounding, no overflow of squares
        root = torch.exp2((power_of_two_scale(matrices).log2() / 2).ceil()).unsqueeze(-1)
        tensor = to_sites(matrices / root[..., 0].square(), structure.sites)
        cores = sweep_chain(self.operations.chain_decompose, tensor, bonds)
        if not structure.exact:
            # cutting a bond changes the singular values of those before it: a second sweep finds those of what is left
            kept = self._contract(cores).reshape(tensor.shape)
            cores = sweep_chain(self.operations.chain_decompose, kept, bonds)
        first, *middle, last = balance_chain(cores)
        return [first * root, *middle, last * root]

    def _unfold_along(
        self, matrices: Float[Tensor, "n rows cols"], gradients: Float[Tensor, "n rows cols"], structure: Structure
    ) -> Sequence[Tensor]:
        bonds = [shape[-1] for shape in structure.core_shapes[:-1]]
        slope = to_sites(gradients, structure.sites)

        def decompose(tensor: Tensor, inner: Sequence[int]) -> list[Tensor]:
            return gradient_chain(self.operations.svd, tensor, slope.reshape(tensor.shape), inner)

        return sweep_chain(decompose, to_sites(matrices, structure.sites), bonds)

    def _contract(self, fused: Sequence[Tensor]) -> Float[Tensor, "n numel"]:
        return self.operations.chain_contract(fused)

    def kernel(self, fused: Sequence[Tensor]) -> Kernel:
        return self.operations.chain_kernel(fused)

    def _sites_of(self, shapes: Sequence[tuple[int, ...]]) -> Sites:
        return tuple((i, j) for _, i, j, _ in shapes)

    def fused_shapes(self, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        return tuple((left, i * j, right) for left, i, j, right in shapes)

    def _check_cores(self, shapes: Sequence[tuple[int, ...]]) -> None:
        if len(shapes) < 2:
            raise ValueError(f"an MPO has at least two cores, got one of shape {shapes[0]}")
        bonds = [(shape[0], shape[-1]) for shape in shapes]
        if bonds[0][0] != 1 or bonds[-1][1] != 1:
            raise ValueError(
                f"the outer bonds of an MPO are 1, got {bonds[0][0]} and {bonds[-1][1]} in cores {list(shapes)}"
            )
        for k, ((_, right), (left, _)) in enumerate(itertools.pairwise(bonds)):
            if right != left:
                raise ValueError(
                    f"cores {k} and {k + 1} do not belong together: bond dimensions {right} and {left} differ in {list(shapes)}"
                )


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class SVD(MPO):
    """The paper's SVD factorization: the MPO of order 2, and equal to it. Settings as for `MPO`, without `order` and
    `expansion`.

    Raises:
        ValueError: more than two sites; otherwise as `MPO`.
    """

    order: int = field(default=2, init=False)
    expansion: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        given = self.sites
        explicit = [] if given is None else list(given.values()) if isinstance(given, Mapping) else [given]
        if any(len(sites) > 2 for sites in explicit):
            raise ValueError(f"sites={given!r}: an SVD has two sites; with more it is an MPO, write MPO(sites=...)")
        super().__post_init__()

    @property
    def label(self) -> str:
        sites = [] if self.sites is None else ["sites=…"]
        return f"SVD({', '.join([*sites, *self._label_parts()])})"


def sweep_chain(
    decompose: Callable[[Tensor, Sequence[int]], list[Tensor]], tensor: Tensor, bonds: Sequence[int]
) -> list[Tensor]:
    """Algorithm 1 without the SVDs whose result is known: sweeping on over a 1x1 site finds `Lambda V^T`, whose left
    singular vectors are unit vectors, so the exact core there is the identity.

    Args:
        decompose: sweeps over the other sites, from a tensor [n, p_1, ..., p_m] and its inner bonds to cores
            [n, d_left, p, d_right].
        tensor: [n, p_1, ..., p_m].
        bonds: the m - 1 inner bonds.
    """
    modes = tensor.shape[1:]
    kept = [k for k, p in enumerate(modes) if p > 1 or k == 0]
    if kept[-1] != len(modes) - 1:
        # 1x1 sites after the last proper one: all bonds there are 1 at full rank, and so are the cores
        kept.append(len(modes) - 1)
    inner = [min(bonds[a:b]) for a, b in itertools.pairwise(kept)]
    swept = decompose(tensor.reshape(tensor.shape[0], *[modes[k] for k in kept]), inner)
    cores: list[Tensor] = []
    for k in range(len(modes)):
        if k in kept:
            cores.append(swept[kept.index(k)])
        else:
            eye = torch.eye(bonds[k - 1], dtype=tensor.dtype, device=tensor.device)
            cores.append(eye[:, None, :].expand(tensor.shape[0], -1, 1, -1))
    return cores


def _core_shapes(sites: Sites, inner: Sequence[int]) -> tuple[tuple[int, int, int, int], ...]:
    bonds = (1, *inner, 1)
    return tuple((bonds[k], i, j, bonds[k + 1]) for k, (i, j) in enumerate(sites))


def _identity_chain(tensor: Tensor, bonds: Sequence[int]) -> list[Tensor]:
    """All cores identities (reshaped) but one, which holds the tensor. The one is where the full-rank bonds stop
    growing, so that every identity is square."""
    n, modes = tensor.shape[0], tensor.shape[1:]
    m = len(modes)
    lefts = [math.prod(modes[:k]) for k in range(m)]
    centre = max(k for k in range(m) if all(lefts[q] == ([1, *bonds])[q] for q in range(k + 1)))
    cores: list[Tensor] = []
    for k in range(m):
        left, right = (1 if k == 0 else bonds[k - 1]), (1 if k == m - 1 else bonds[k])
        if k == centre:
            cores.append(tensor.reshape(n, left, modes[k], right))
        else:
            eye = torch.eye(max(left, right), dtype=tensor.dtype, device=tensor.device)
            cores.append(eye.reshape(1, left, modes[k], right).expand(n, -1, -1, -1))
    return cores


def _spread_norm(cores: Sequence[Tensor]) -> list[Tensor]:
    """Cores of nearly one Frobenius norm, their product unchanged bit by bit; a zero matrix is left alone."""
    logs = torch.stack([core.flatten(1).norm(dim=1) for core in cores]).log2()
    factors = torch.exp2(spread_exponents(logs))
    return [core * factor[:, None, None, None] for core, factor in zip(cores, factors, strict=True)]
