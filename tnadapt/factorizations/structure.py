"""The structure of a factorization, as integers only: sites, bonds, core shapes, parameter counts.

A matrix of `rows x cols` is split into m sites; site k has `i_k` rows and `j_k` columns, with `prod(i) = rows` and
`prod(j) = cols`. Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "Shape",
    "Sites",
    "SitesArgument",
    "Structure",
    "checked_key",
    "checked_sites",
    "full_bonds",
    "is_count",
    "near_square",
    "nearest_sites",
    "paper_sites",
    "resolve_sites",
]

Shape = tuple[int, int]
Sites = tuple[tuple[int, int], ...]
#: Sites for one shape, or a mapping from shape to sites.
SitesArgument = Sequence[tuple[int, int]] | Mapping[Shape, Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Structure:
    """What a factorization of one shape consists of.

    Attributes:
        shape: `(rows, cols)` of the matrix.
        sites: `(i_k, j_k)` of each site.
        core_shapes: shape of each core, without batch dimensions.
        exact: whether cores of these shapes can represent every matrix; otherwise what they miss is a residual.
        scratch: numbers (not bytes) that decomposing one matrix needs beside the matrix and its cores.
    """

    shape: Shape
    sites: Sites
    core_shapes: tuple[tuple[int, ...], ...]
    exact: bool
    scratch: int

    @property
    def num_parameters(self) -> int:
        """Numbers in all cores together."""
        return sum(math.prod(shape) for shape in self.core_shapes)

    @property
    def added_parameters(self) -> int:
        """Parameters above those of the matrix (LoRA-Over, Eq. 6)."""
        return self.num_parameters - self.shape[0] * self.shape[1]

    @property
    def expansion(self) -> float:
        """Parameters of the cores over those of the matrix."""
        return self.num_parameters / (self.shape[0] * self.shape[1])


def near_square(n: int) -> tuple[int, int]:
    """The two factors of `n` nearest to its square root, smaller first; 1 and `n` for a prime.

    >>> near_square(768), near_square(769)
    ((24, 32), (1, 769))
    """
    small = math.isqrt(n)
    while n % small:
        small -= 1
    return small, n // small


def paper_sites(shape: Shape, order: int) -> Sites:
    """The paper's split into `order` sites: each dimension's two near-square factors at the ends, 1x1 between.

    >>> paper_sites((768, 8), 4)
    ((24, 2), (1, 1), (1, 1), (32, 4))
    """
    (row_first, row_last), (col_first, col_last) = near_square(shape[0]), near_square(shape[1])
    return ((row_first, col_first), *[(1, 1)] * (order - 2), (row_last, col_last))


def full_bonds(sites: Sites) -> tuple[int, ...]:
    """Inner bond dimensions at full rank (LoRA-Over, Eq. 4): `d_k = min(prod of modes up to k, prod of those after)`.

    >>> full_bonds(((24, 2), (1, 1), (32, 4)))
    (48, 48)
    """
    modes = [i * j for i, j in sites]
    return tuple(min(math.prod(modes[:k]), math.prod(modes[k:])) for k in range(1, len(modes)))


def checked_sites(sites: SitesArgument) -> Sites | dict[Shape, Sites]:
    """A copy of explicit sites that nobody else can change.

    Raises:
        ValueError: fewer than two sites, or one that is not a pair of integers of at least 1; a key that is no shape.
    """
    if isinstance(sites, Mapping):
        return {checked_key("sites", shape): _checked_list(explicit) for shape, explicit in sites.items()}
    return _checked_list(sites)


def checked_key(name: str, shape: object) -> Shape:
    """A key of the per-shape argument `name`; one that is no shape would never be found.

    Raises:
        ValueError: it is not a pair of integers of at least 1.
    """
    if not isinstance(shape, tuple) or len(shape) != 2 or not all(is_count(size) for size in shape):
        raise ValueError(f"{name} has the key {shape!r}; keys are shapes of matrices, (rows, cols), such as (768, 8)")
    return shape[0], shape[1]


def _checked_list(sites: Sequence[tuple[int, int]]) -> Sites:
    pairs = tuple(tuple(site) for site in sites)
    if len(pairs) < 2 or any(len(pair) != 2 or any(not is_count(size) for size in pair) for pair in pairs):
        raise ValueError(
            f"sites={list(sites)!r}: give at least two (rows, cols) pairs of integers of at least 1, "
            "such as [(24, 2), (32, 4)] for a 768x8 matrix"
        )
    return tuple((pair[0], pair[1]) for pair in pairs)


def is_count(value: object) -> bool:
    """Whether `value` is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def nearest_sites(shape: Shape, target: float, orders: Iterable[int], count: Callable[[Sites], int]) -> Sites:
    """The sites whose number of parameters, `count(sites)`, is nearest to `target` times that of the matrix.

    The choice is among all splits of both dimensions over two ends, with 1x1 sites between up to each of `orders`. Of
    equally near ones the fewest sites win, then the paper's split.
    """
    wanted = target * shape[0] * shape[1]
    best: tuple[float, int, bool] | None = None
    chosen: Sites = ()
    for order in orders:
        usual = paper_sites(shape, order)
        for i in _divisors(shape[0]):
            for j in _divisors(shape[1]):
                sites: Sites = ((i, j), *[(1, 1)] * (order - 2), (shape[0] // i, shape[1] // j))
                key = (abs(count(sites) - wanted), order, sites != usual)
                if best is None or key < best:
                    best, chosen = key, sites
    return chosen


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def resolve_sites(shape: Shape, order: int | None, sites: SitesArgument | None) -> Sites:
    """The sites that hold for `shape`: the explicit ones where `sites` has them, else the paper's split into `order` sites.

    Raises:
        ValueError: a dimension below 1, explicit sites that do not multiply to the shape, or none and no order.
    """
    rows, cols = shape
    if rows < 1 or cols < 1:
        raise ValueError(f"a matrix of {rows}x{cols} has no entries to factorize; both dimensions must be at least 1")
    explicit = sites.get(shape) if isinstance(sites, Mapping) else sites
    if explicit is None:
        if order is None:
            listed = ", ".join(f"{i}x{j}" for i, j in sites or ())
            raise ValueError(
                f"sites lists none for a {rows}x{cols} matrix (only for {listed}); add them, or state the order of the shapes "
                "that are not listed, such as order=9"
            )
        return paper_sites(shape, order)
    chosen = _checked_list(explicit)
    row_product, col_product = math.prod(i for i, _ in chosen), math.prod(j for _, j in chosen)
    if (row_product, col_product) != (rows, cols):
        row_split, col_split = near_square(rows), near_square(cols)
        raise ValueError(
            f"sites {list(chosen)} multiply to {row_product}x{col_product}, but the matrix is {rows}x{cols}; give sites "
            f"such as {[(row_split[0], col_split[0]), (row_split[1], col_split[1])]}, or a mapping "
            f"{{({rows}, {cols}): [...]}} when several shapes are expanded"
        )
    return chosen
