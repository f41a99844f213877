"""A matrix as a tensor with one mode per site, and back.

Letters: n = batch, m = sites, i/j = rows/columns of a site. A row-major matrix as one row of numbers has its axes in the order
i_1 ... i_m j_1 ... j_m; the cores have theirs in the order i_1 j_1 ... i_m j_m.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from tnadapt.factorizations.structure import Sites

__all__ = ["from_sites", "rows_from_sites", "rows_to_sites", "to_sites"]


def to_sites(matrices: Tensor, sites: Sites) -> Tensor:
    """[n, rows, cols] -> [n, i_1 j_1, ..., i_m j_m]: the order in which the cores have their modes. Differentiable."""
    sizes, axes, _, _ = _plan(sites)
    split = matrices.reshape(matrices.shape[0], *sizes).permute(0, *axes)
    return split.reshape(matrices.shape[0], *[i * j for i, j in sites])


def from_sites(flat: Tensor, sites: Sites) -> Tensor:
    """The inverse of `to_sites`, from [n, i_1 j_1 * ... * i_m j_m]. Differentiable."""
    _, _, sizes, axes = _plan(sites)
    split = flat.reshape(flat.shape[0], *sizes).permute(0, *axes)
    return split.reshape(flat.shape[0], math.prod(i for i, _ in sites), math.prod(j for _, j in sites))


def rows_to_sites(rows: Tensor, sites: Sites, out: Tensor) -> None:
    """`to_sites` of matrices as rows [n, rows * cols], contiguous, written to `out` of that shape."""
    sizes, axes, _, _ = _plan(sites)
    _permute_into(rows, sizes, axes, out)


def rows_from_sites(flat: Tensor, sites: Sites, out: Tensor) -> None:
    """The inverse of `rows_to_sites`."""
    _, _, sizes, axes = _plan(sites)
    _permute_into(flat, sizes, axes, out)


@lru_cache(maxsize=1024)
def _plan(sites: Sites) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Sizes of the axes and what `permute` takes behind the batch, there and back. Axes of size 1 are left out."""
    by_rows = [(i, (k, 0)) for k, (i, _) in enumerate(sites)] + [(j, (k, 1)) for k, (_, j) in enumerate(sites)]
    matrix = [(size, axis) for size, axis in by_rows if size > 1]
    tensor = sorted(matrix, key=lambda entry: entry[1])
    there = tuple(1 + matrix.index(entry) for entry in tensor)
    back = tuple(1 + tensor.index(entry) for entry in matrix)
    return tuple(size for size, _ in matrix), there, tuple(size for size, _ in tensor), back


def _permute_into(source: Tensor, sizes: Sequence[int], axes: Sequence[int], out: Tensor) -> None:
    n = source.shape[0]
    split = source.view(n, *sizes)
    target = out.view(n, *[sizes[axis - 1] for axis in axes])
    if axes and axes[-1] == len(axes):
        word = _word(source, out, sizes[-1])
        split, target = split.view(word), target.view(word)
    target.copy_(split.permute(0, *axes))


def _word(source: Tensor, out: Tensor, run: int) -> torch.dtype:
    """The widest dtype of which runs of `run` numbers are made: the same memory is moved in fewer pieces."""
    if source.device.type in ("cpu", "cuda"):
        for word in (torch.complex128, torch.complex64):
            ratio = word.itemsize // source.dtype.itemsize
            if ratio > 1 and not any(n % ratio for n in (run, source.storage_offset(), out.storage_offset())):
                return word
    return source.dtype
