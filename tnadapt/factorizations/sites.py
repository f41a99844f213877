"""A matrix as a tensor with one mode per site, and back.

Letters: n = batch, m = sites, i/j = rows/columns of a site.
"""

from __future__ import annotations

import math

from torch import Tensor

from tnadapt.factorizations.structure import Sites

__all__ = ["from_sites", "to_sites"]


def to_sites(matrices: Tensor, sites: Sites) -> Tensor:
    """[n, rows, cols] -> [n, i_1 j_1, ..., i_m j_m]: the order in which the cores have their modes."""
    n, m = matrices.shape[0], len(sites)
    split = matrices.reshape(n, *[i for i, _ in sites], *[j for _, j in sites])
    order = [axis for k in range(m) for axis in (1 + k, 1 + m + k)]
    return split.permute(0, *order).reshape(n, *[i * j for i, j in sites])


def from_sites(flat: Tensor, sites: Sites) -> Tensor:
    """The inverse of `to_sites`, from [n, i_1 j_1 * ... * i_m j_m]."""
    n, m = flat.shape[0], len(sites)
    split = flat.reshape(n, *[size for site in sites for size in site])
    order = [1 + 2 * k for k in range(m)] + [2 + 2 * k for k in range(m)]
    return split.permute(0, *order).reshape(n, math.prod(i for i, _ in sites), math.prod(j for _, j in sites))
