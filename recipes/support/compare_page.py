"""The page of a comparison: which method, at which rate, by how much, at what cost, and what cannot be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

from support.findings import good_rates, shown
from support.paired import Difference, difference
from support.provenance import write_text
from support.search import Lane, Point, Run
from support.tables import Table, percent

if TYPE_CHECKING:
    from compare import Comparison

Tuned = tuple[Lane, Point]


def compared_runs(lane: Lane, point: Point, seeds: Sequence[int]) -> list[Run]:
    """The runs at the point whose seed takes part in the comparison."""
    return [run for seed, run in sorted(lane.table[point].items()) if seed in seeds]


def ranked(tuned: Sequence[Tuned], seeds: Sequence[int]) -> list[Tuned]:
    """By the mean loss over common seeds; those without a seed are left out.

    Those that were left behind with fewer seeds come last. In a round that is not over, seeds differ by one.
    """
    counts = [len(compared_runs(lane, point, seeds)) for lane, point in tuned]
    most = max(counts, default=0)
    front = [each for each, count in zip(tuned, counts, strict=True) if count and count >= most - 1]
    rest = [each for each, count in zip(tuned, counts, strict=True) if 0 < count < most - 1]
    return _by_loss(front, seeds) + _by_loss(rest, seeds)


def _by_loss(tuned: Sequence[Tuned], seeds: Sequence[int]) -> list[Tuned]:
    common = [seed for seed in seeds if all(seed in lane.table[point] for lane, point in tuned)]
    return sorted(tuned, key=lambda each: each[0].loss(each[1], common)) if common else []


def against_leader(tuned: Sequence[Tuned], seeds: Sequence[int]) -> list[tuple[Lane, Point, Difference | None]]:
    """Those that have a seed, the leader first, each with its difference from the leader.

    The difference is None with fewer than two seeds in common.
    """
    ordered = ranked(tuned, seeds)
    leading = compared_runs(*ordered[0], seeds) if ordered else []
    return [(lane, point, difference(compared_runs(lane, point, seeds), leading)) for lane, point in ordered]


def verdict(tuned: Sequence[Tuned], seeds: Sequence[int]) -> list[str]:
    """What the comparison says, in sentences; the recommendation comes first."""
    compared = against_leader(tuned, seeds)
    if not compared:
        return ["Nothing can be recommended yet: no method has been trained with a seed of the comparison."]
    leader, at, _ = compared[0]
    leading = compared_runs(leader, at, seeds)
    others = [(lane, point, apart) for lane, point, apart in compared[1:] if apart is not None]
    behind = [each for each in others if each[2].worse]
    close = [each for each in others if not each[2].worse]
    unknown = [lane for lane, _ in tuned if lane is not leader and all(lane is not each[0] for each in others)]
    lines = []
    if unknown:
        lines.append(
            f"{leader.arm.label} has the lowest loss so far, and too few seeds to recommend it: {_labels(unknown)} "
            f"{'has' if len(unknown) == 1 else 'have'} fewer than two in common with it."
        )
    elif close:
        cheapest = min(
            [(leader, at), *[(lane, point) for lane, point, _ in close]], key=lambda each: _cost(each, seeds)
        )
        lines.append(
            f"**Too close to tell**: {leader.arm.label} and {_labels([lane for lane, _, _ in close])}. Take {cheapest[0].arm.label} at a rate of {cheapest[1][0]:g}, "
            "which is the cheapest of them."
        )
    else:
        lines.append(
            f"**Take {leader.arm.label} at a rate of {at[0]:g}.** Its loss is lower than that of every other method here."
        )
    for lane, _, apart in close:
        lines.append(f"{lane.arm.label} against {leader.arm.label}: {shown(apart)} nats a token, which may be chance.")
    for lane, _, apart in behind:
        share = 100 * apart.mean / mean(run.loss for run in leading)
        lines.append(
            f"{lane.arm.label} is worse than {leader.arm.label} by {shown(apart)} nats a token, {share:.0f} %."
        )
    return lines


def _labels(lanes: Sequence[Lane]) -> str:
    return ", ".join(lane.arm.label for lane in lanes)


def _cost(tuned: Tuned, seeds: Sequence[int]) -> tuple[int, float]:
    runs = compared_runs(*tuned, seeds)
    return (runs[0].trained, median(run.seconds for run in runs))


def write(comparison: Comparison, config: Any, over: bool, folder: Path) -> Path:
    """Print the comparison and write ``folder/comparison.md``, whose path is returned."""
    lanes, seeds = comparison.study.lanes, comparison.seeds
    tuned = [(lane, best) for lane in lanes if (best := lane.best([comparison.tuning])) is not None]
    order = ranked(tuned, seeds) or tuned
    rows = [_row(lane, point, comparison) for lane, point in [*order, *(each for each in tuned if each not in order)]]
    rows += [
        (
            lane.arm.label,
            "–",
            "failed" if lane.error else "failed at every rate" if lane.table else "not run",
            *"––––––",
        )
        for lane in lanes
        if lane.best([comparison.tuning]) is None
    ]
    columns = ("method", "rate", "loss", "accuracy", "good rates", "trained", "train s", "GPU memory", "seeds")
    table = Table(
        lanes[0].task.label,
        columns,
        rows,
        "Loss on held-out answers, nats a token: mean ± standard deviation over seeds.",
    )
    table.show()
    lines = verdict(tuned, seeds)
    untold = doubts(comparison, over)
    for line in lines:
        print(line.replace("**", ""))
    body = [f"# Which adapter? {lanes[0].task.label}\n", *(f"- {line}" for line in lines), "", table.markdown()]
    body += ["![loss by rate](rates.png)\n", "## What this cannot tell\n", *(f"- {line}" for line in untold)]
    settings = [
        (name, str(value))
        for name, value in config.settings().items()
        if name not in ("method", "lr", "core_lr", "seed")
    ]
    body += ["\n## Settings\n", Table("", ("option", "value"), settings).markdown()]
    _draw(comparison, folder / "rates.png")
    write_text(folder / "comparison.md", "\n".join(body))
    return folder / "comparison.md"


def doubts(comparison: Comparison, over: bool) -> list[str]:
    """What the comparison leaves open, in sentences."""
    lanes, tuning = comparison.study.lanes, [comparison.tuning]
    said = []
    if not over:
        said.append("The budget ended before all was run; the same command goes on, with the budget anew.")
    said += [
        f"{lane.arm.label} failed, and the same command tries it again: {lane.error}" for lane in lanes if lane.error
    ]
    edges = [lane for lane in lanes if lane.best(tuning) is not None and lane.settled(tuning) is None]
    if edges:
        said.append(f"Without a worse rate on both sides, so that another rate may be better: {_labels(edges)}.")
    said += [
        f"The rates were chosen with one seed (seed {comparison.tuning}); a neighbour of the best rate may be as good.",
        "The loss is that of the validation split, and the method that leads was chosen by it; report a number on a test split.",
        "Other ranks, targets, batches and numbers of steps were not tried.",
    ]
    return said


def _row(lane: Lane, point: Point, comparison: Comparison) -> Sequence[str]:
    runs = compared_runs(lane, point, comparison.seeds)
    taken = runs or [lane.table[point][comparison.tuning]]
    losses = [run.loss for run in taken]
    low, high, below, above = good_rates(lane, point, comparison.tuning)
    accuracies = [run.accuracy for run in taken if run.accuracy is not None]
    return (
        lane.arm.label,
        f"{point[0]:g}",
        f"{mean(losses):.4f}" + (f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""),
        percent(mean(accuracies) if accuracies else None),
        f"{'' if below and above else '≥ '}{math.log10(high / low) + 0.25:.2f} decades",
        f"{taken[0].trained:,}",
        f"{median(run.seconds for run in taken):.0f}",
        f"{max(run.peak for run in taken) / 2**30:.1f} GiB" if any(run.peak for run in taken) else "–",
        str(len(runs)),
    )


def _draw(comparison: Comparison, path: Path) -> None:
    from matplotlib.figure import Figure

    from support.pictures import save

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for index, lane in enumerate(comparison.study.lanes):
        points = sorted(
            (lr, runs[comparison.tuning].loss)
            for (lr, _), runs in lane.table.items()
            if comparison.tuning in runs and math.isfinite(runs[comparison.tuning].loss)
        )
        marker = "osD^vP*X<>"[index % 10]
        axis.plot(
            [lr for lr, _ in points],
            [loss for _, loss in points],
            f"{marker}-",
            color=f"C{index % 10}",
            label=lane.arm.label,
        )
        best = lane.best([comparison.tuning])
        if best is not None:
            further = compared_runs(lane, best, comparison.seeds)
            axis.plot(
                [best[0]] * len(further),
                [run.loss for run in further],
                marker,
                color=f"C{index % 10}",
                alpha=0.45,
                mfc="none",
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("loss on held-out answers, nats a token")
    axis.set_title("Each method over rates; hollow: further seeds at its best rate")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    save(figure, path)
