"""Differences between two arms that trained with the same seeds and were evaluated on the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from support.search import Run

#: Draws of a bootstrap.
DRAWS = 2000


@dataclass(frozen=True)
class Difference:
    """The loss of one arm less that of another, in nats a token."""

    mean: float
    error: float
    """Standard error, of the bootstrap."""
    low: float
    high: float
    """The interval that holds 95 % of the bootstrap's draws."""
    seeds: int

    @property
    def better(self) -> bool:
        """Whether the first arm's loss is lower by two standard errors."""
        return self.mean < -2 * self.error

    @property
    def worse(self) -> bool:
        """Whether the first arm's loss is higher by two standard errors."""
        return self.mean > 2 * self.error


def difference(one: Sequence[Run], other: Sequence[Run]) -> Difference | None:
    """The difference ``one - other`` over the seeds that both have, with a bootstrap over seeds and answers.

    Seeds and answers are drawn anew, each with replacement and independently of one another; both arms get the same draw. With n
    seeds the spread of the drawn means is multiplied by sqrt(n / (n - 1)), by which a bootstrap of so few is too small.

    Returns:
        None where fewer than two seeds are common to both, or a run of them has no losses.

    Raises:
        ValueError: the two were evaluated on different answers.
    """
    pairs = [(a, b) for a in one for b in other if a.seed == b.seed and a.losses and b.losses]
    if len(pairs) < 2:
        return None
    tokens = np.array(pairs[0][0].tokens, dtype=float)
    if any(run.tokens != pairs[0][0].tokens for pair in pairs for run in pair):
        raise ValueError(f"runs of {pairs[0][0].arm} and {pairs[0][1].arm} were evaluated on different answers")
    apart = np.array([a.losses for a, _ in pairs]) - np.array([b.losses for _, b in pairs])  # (seeds, answers)
    seeds, answers = apart.shape
    mean = float(apart.sum() / (seeds * tokens.sum()))
    generator = np.random.default_rng(0)
    # how often each seed and each answer is drawn
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=DRAWS)
    of_answers = generator.multinomial(answers, np.full(answers, 1 / answers), size=DRAWS)
    drawn = np.einsum("ds,sa,da->d", of_seeds, apart, of_answers, optimize=True) / (seeds * (of_answers @ tokens))
    drawn = mean + (drawn - drawn.mean()) * (seeds / (seeds - 1)) ** 0.5
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Difference(mean, float(drawn.std()), float(low), float(high), seeds)
