"""What the runs of an arm on a task say: its best rate, its loss there, and how far it is from the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean

from support.paired import Difference, difference
from support.search import Arm, Lane, Point, Run, Study, Task

#: What every arm is compared with, but for those that name another.
REFERENCE = "lora"
#: A rate is good where the loss is at most this much above the arm's best, as a share of it.
GOOD = 0.1


@dataclass(frozen=True)
class Finding:
    """What the runs of an arm on a task say."""

    task: Task
    arm: Arm
    point: Point
    """The best rate and number of steps."""
    tried: tuple[int, ...]
    """The numbers of steps that were tried."""
    inside: bool
    """Whether the neighbours of that rate were tried with the same seeds."""
    runs: tuple[Run, ...]
    """At the best point, by seed."""
    good: tuple[float, float, bool, bool]
    """The lowest and the highest good rate, and whether a worse one was tried below and above."""
    apart: Difference | None
    """From the reference, where both have two seeds or more."""

    @property
    def loss(self) -> float:
        return mean(run.loss for run in self.runs)

    @property
    def accuracy(self) -> float | None:
        found = [run.accuracy for run in self.runs if run.accuracy is not None]
        return mean(found) if found else None


def findings(study: Study) -> dict[tuple[str, str], Finding]:
    """By task and arm; arms without a run that trained are left out.

    An arm that has not tried all numbers of steps that the reference has is compared with what the reference reached in those that
    both have.
    """
    found: dict[tuple[str, str], Finding] = {}
    lanes = {(lane.task.name, lane.arm.name): lane for lane in study.lanes}
    for lane in study.lanes:
        reference = lanes.get((lane.task.name, lane.arm.beside))
        beside = None
        if reference is not None and reference is not lane:
            beside = finding_of(reference.of_steps(lane.tried), None)
        if (finding := finding_of(lane, beside)) is not None:
            found[lane.task.name, lane.arm.name] = finding
    return found


def finding_of(lane: Lane, reference: Finding | None) -> Finding | None:
    """What the lane's runs say, with as many seeds as its optimum and both neighbours have."""
    most = max((len(runs) for runs in lane.table.values()), default=0)
    counts = [count for count in range(most, 0, -1) if lane.settled(range(count))]
    seeds = range(counts[0]) if counts else range(1)
    point = lane.best(seeds)
    if point is None:
        return None
    runs = tuple(lane.table[point][seed] for seed in seeds)
    apart = difference(runs, reference.runs) if reference is not None else None
    return Finding(lane.task, lane.arm, point, lane.tried, bool(counts), runs, good_rates(lane, point), apart)


def good_rates(lane: Lane, best: Point, seed: int = 0) -> tuple[float, float, bool, bool]:
    """The rates next to the best one, without a gap, whose loss with one seed is nearly as low.

    Returns:
        The lowest and the highest, and whether a worse rate was tried below and above.
    """
    tried = sorted(lr for lr, steps in lane.table if steps == best[1] and seed in lane.table[lr, steps])
    limit = (1 + GOOD) * lane.table[best][seed].loss
    place = tried.index(best[0])
    low = high = place
    while low > 0 and lane.table[tried[low - 1], best[1]][seed].loss <= limit:
        low -= 1
    while high < len(tried) - 1 and lane.table[tried[high + 1], best[1]][seed].loss <= limit:
        high += 1
    return tried[low], tried[high], low > 0, high < len(tried) - 1


def shown(apart: Difference | None) -> str:
    """A difference and the interval that holds 95 % of the bootstrap."""
    return "–" if apart is None else f"{apart.mean:+.4f} [{apart.low:+.4f}, {apart.high:+.4f}]"


def verdict(finding: Finding) -> str:
    """Better, worse or neither than the reference, by two standard errors."""
    if finding.arm.name == REFERENCE:
        return "reference"
    if finding.apart is None:
        return "one seed"
    return "better" if finding.apart.better else "worse" if finding.apart.worse else "equal"


def good(finding: Finding) -> str:
    """The range of good rates in decades, the two outer half steps included; ``≥`` where it was not seen to end."""
    low, high, below, above = finding.good
    decades = math.log10(high / low) + 0.25
    return f"{'' if below and above else '≥ '}{decades:.2f}"
