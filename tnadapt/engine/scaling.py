"""By how much to scale steps of the cores so that matrices move by wanted lengths.

A step keeps its direction and is scaled by s > 0. How far the matrix moves is a polynomial in s of the order of the factorization, so
lengths of all sizes occur. The wanted one is between those at two scales; the scale is looked for between these on a
logarithmic axis, where a power is a straight line.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["cap_tolerance", "match_tolerance", "search_scale"]

#: relative accuracy to which a capped update ends at its cap, and a matched one at the length that it is matched to
_CAP_ACCURACY, _MATCH_ACCURACY = 1e-3, 1e-7
#: how often a step is scaled anew at most
_SCALINGS = 100


def cap_tolerance(wanted: Tensor) -> Tensor:
    """How far the length of a capped update may be from its cap, [n]."""
    return wanted * _CAP_ACCURACY


def match_tolerance(before: Tensor, wanted: Tensor) -> Tensor:
    """How far the length of a matched update may be from the wanted one, [n]: as far as rounding of matrix and cores leaves it.

    Args:
        before: the matrices, [n, numel].
        wanted: lengths of their updates, [n].
    """
    eps = torch.finfo(before.dtype).eps
    rounding: Tensor = torch.linalg.vector_norm(before, dim=1) * (4 * eps)
    return wanted * max(_MATCH_ACCURACY, 32 * eps) + rounding


def search_scale(
    length_at: Callable[[Tensor], Tensor], wanted: Tensor, scale: Tensor, tolerance: Tensor, only_shorten: bool
) -> Tensor:
    """Scales at which updates have their wanted lengths, [n].

    Args:
        length_at: how far matrices move at given scales, [n] to [n]; called for the scales that are returned last of all.
        wanted: lengths, [n].
        scale: where the search begins, [n].
        tolerance: how far a length may be from the wanted one, [n].
        only_shorten: whether updates that are too short at the first scale are left as they are.
    """
    found = length_at(scale)
    # a step that does not move the matrix has no direction
    off = (found > 0) & ((found - wanted > tolerance) if only_shorten else ((found - wanted).abs() > tolerance))
    one = torch.ones_like(wanted)
    # the largest scale at which the update is known to be too short, and the smallest at which it is too long
    low, high = torch.zeros_like(wanted), math.inf * one
    slope = one
    for _ in range(_SCALINGS):
        if not bool(off.any()):
            break
        too_long = found > wanted
        high, low = torch.where(too_long, scale, high), torch.where(too_long, low, scale)
        guess = scale * (wanted / found) ** (1 / slope)
        # what leaves the known interval is replaced by its middle
        middle = torch.where(low > 0, (low * high).sqrt(), high * 1e-2)
        middle = torch.where(high.isfinite(), middle, low * 4)
        guess = torch.where((guess > low) & (guess < high), guess, middle)
        # a length of zero, as the first step of a warm-up has it, leaves the cores where they were
        guess = torch.where(off, torch.where(wanted > 0, guess, 0.0), scale)
        before, scale, known = scale, guess, found
        found = length_at(scale)
        # where a length does not change any more with the scale, rounding is in the way
        allowed = torch.where(found == known, 4 * tolerance, tolerance)
        off = off & (wanted > 0) & ((found - wanted).abs() > allowed)
        # the line through the last two points on the logarithmic axes; rounding may tilt it to nonsense
        slope = ((found / known).log() / (scale / before).log()).nan_to_num(1.0, 1.0, 1.0)
        slope = torch.where(slope > 0.1, slope, one)
    return scale
