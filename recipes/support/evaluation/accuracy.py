"""How many answers are right, with the interval that the number of problems leaves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accuracy:
    """``right`` answers out of ``total``."""

    right: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.total or self.total == 0:
            raise ValueError(
                f"{self.right} right of {self.total}: expected 0 <= right <= total and at least one problem"
            )

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.right / self.total

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's score interval for the share, treating the problems as independent draws.

        Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
        """
        # imported here: it takes as long as all else that the command line of a recipe needs
        from scipy.stats import binomtest  # type: ignore[import-untyped]

        found = binomtest(self.right, self.total).proportion_ci(confidence, method="wilson")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.share:.2%} ({self.right} of {self.total}; 95 % interval {low:.2%} to {high:.2%})"
