"""A matrix as a tensor with one mode per site, and back.

Letters: n = batch, m = sites, i/j = rows/columns of a site. A row-major matrix as one row of numbers has its axes in the order
i_1 ... i_m j_1 ... j_m; the cores have theirs in the order i_1 j_1 ... i_m j_m.
"""

from __future__ import annotations

import math
from functools import lru_cache

from torch import Tensor

from tnadapt.factorizations.structure import Sites

__all__ = ["from_sites", "site_axes", "to_sites"]


def to_sites(matrices: Tensor, sites: Sites) -> Tensor:
    """[n, rows, cols] -> [n, i_1 j_1, ..., i_m j_m]: the order in which the cores have their modes. Differentiable."""
    sizes, axes, _, _ = site_axes(sites)
    split = matrices.reshape(matrices.shape[0], *sizes).permute(0, *axes)
    return split.reshape(matrices.shape[0], *[i * j for i, j in sites])


def from_sites(flat: Tensor, sites: Sites) -> Tensor:
    """The inverse of `to_sites`, from [n, i_1 j_1 * ... * i_m j_m]. Differentiable."""
    _, _, sizes, axes = site_axes(sites)
    split = flat.reshape(flat.shape[0], *sizes).permute(0, *axes)
    return split.reshape(flat.shape[0], math.prod(i for i, _ in sites), math.prod(j for _, j in sites))


@lru_cache(maxsize=1024)
def site_axes(sites: Sites) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Sizes of the axes of a row-major matrix and the order in which `permute` takes them to the sites, then the same for
    the way back. The batch is axis 0 and is not listed; axes of size 1 are left out."""
    by_rows = [(i, (k, 0)) for k, (i, _) in enumerate(sites)] + [(j, (k, 1)) for k, (_, j) in enumerate(sites)]
    matrix = [(size, axis) for size, axis in by_rows if size > 1]
    tensor = sorted(matrix, key=lambda entry: entry[1])
    there = tuple(1 + matrix.index(entry) for entry in tensor)
    back = tuple(1 + tensor.index(entry) for entry in matrix)
    return tuple(size for size, _ in matrix), there, tuple(size for size, _ in tensor), back
