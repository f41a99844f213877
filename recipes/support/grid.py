"""The grid of learning rates: steps of 10^(1/4), as in "Learning Rate Matters" (arXiv:2602.04998)."""

from __future__ import annotations

import math

#: The factor between two rates, and where the grid ends.
RATE_STEP, LOWEST_RATE, HIGHEST_RATE = 10**0.25, 1e-7, 10.0


def on_grid(rate: float) -> float:
    """The rate of the grid that is nearest to ``rate``, with three digits."""
    return float(f"{10 ** (round(4 * math.log10(rate)) / 4):.2e}")


def beside(rate: float) -> list[float]:
    """The rates of the grid one step above and below that are within its ends."""
    return [lr for lr in (on_grid(rate * RATE_STEP), on_grid(rate / RATE_STEP)) if usable(lr)]


def same_rate(one: float, other: float) -> bool:
    """Whether no rate of the grid lies between the two."""
    return abs(math.log(one / other)) <= math.log(RATE_STEP) / 2


def usable(rate: float) -> bool:
    """Whether the rate lies within the ends of the grid."""
    return LOWEST_RATE <= rate <= HIGHEST_RATE
