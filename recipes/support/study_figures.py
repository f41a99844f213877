"""The figures of a study."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.findings import REFERENCE, Finding, verdict
from support.pictures import save
from support.search import Arm, Study, Task

#: Columns of panels, and the height of a row and of what is around a panel's rows, in inches.
COLUMNS, ROW, AROUND = 3, 0.21, 0.75


def dot_grid(study: Study, path: Path) -> None:
    """For each task: its arms down, rates across, a dot for each rate tried; a ring around the best."""
    from matplotlib.colors import LogNorm

    tasks = list({lane.task.name: lane.task for lane in study.lanes if lane.table}.values())
    lanes = {
        task.name: {lane.arm.name: lane for lane in study.lanes if lane.task is task and lane.table} for task in tasks
    }
    if not tasks:
        return
    figure, axes = _panels([len(lanes[task.name]) for task in tasks])
    points = None
    for axis, task in zip(axes, tasks, strict=True):
        mine = lanes[task.name]
        reference = mine[REFERENCE].best(range(1)) if REFERENCE in mine else None
        scale = mine[REFERENCE].loss(reference, range(1)) if reference else 1.0
        for row, lane in enumerate(mine.values()):
            best = lane.best(range(1))
            rates: dict[float, float] = {}
            for (lr, steps), runs in lane.table.items():
                if 0 in runs and (best is None or steps == best[1]):
                    rates[lr] = runs[0].loss / scale
            drawn = [min(max(share, 0.5), 4.0) if math.isfinite(share) else 4.0 for share in rates.values()]
            points = axis.scatter(
                list(rates), [row] * len(rates), c=drawn, cmap="viridis_r", norm=LogNorm(0.5, 4.0), s=34, zorder=3
            )
            if best is not None:
                axis.scatter([best[0]], [row], s=90, facecolors="none", edgecolors="black", linewidths=1.2, zorder=4)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter("")
        _dress(axis, task, [lane.arm for lane in mine.values()], "learning rate")
    if points is not None:
        bar = figure.colorbar(points, ax=figure.subfigs[-1].axes, shrink=0.5, aspect=40, ticks=[0.5, 1, 2, 4])
        bar.ax.set_yticklabels(["half", "LoRA's best", "twice", "4x or more"], fontsize=7)
        bar.ax.minorticks_off()
    figure.suptitle("Loss by rate, first seed; a ring marks each arm's best rate", fontsize=10)
    save(figure, path)


def _panels(rows: Sequence[int]) -> tuple[Any, list[Any]]:
    """A panel for so many rows each, in columns of about equal height; the panels stand in the given order."""
    from matplotlib.figure import Figure

    heights = [ROW * count + AROUND for count in rows]
    columns = _shared_out(heights, min(COLUMNS, len(heights)))
    tallest = max(sum(column) for column in columns)
    figure = Figure(figsize=(4.4 * len(columns), tallest + 0.4), layout="constrained")
    figure.subfigures(1, len(columns), squeeze=False)
    axes: list[Any] = []
    for part, column in zip(figure.subfigs, columns, strict=True):
        # what a column has less than the tallest one stays empty below its panels
        rest = [tallest - sum(column)] if tallest - sum(column) > 0.1 else []
        made = part.subplots(len(column) + len(rest), 1, squeeze=False, height_ratios=[*column, *rest])[:, 0]
        if rest:
            made[-1].set_axis_off()
        axes += list(made[: len(column)])
    return figure, axes


def _shared_out(heights: Sequence[float], columns: int) -> list[list[float]]:
    """The heights in so many runs, of which the highest is as low as it can be."""
    if columns == 1:
        return [list(heights)]
    cuts = range(1, len(heights) - columns + 2)
    ways = [[list(heights[:cut]), *_shared_out(heights[cut:], columns - 1)] for cut in cuts]
    return min(ways, key=lambda way: max(map(sum, way)))


def _dress(axis: Any, task: Task, arms: Sequence[Arm], across: str) -> None:
    """Name what is seen: the task above, the arms down, and what goes across."""
    axis.set_yticks(range(len(arms)), [textwrap.fill(arm.label, 36) for arm in arms], fontsize=6.5, linespacing=0.9)
    axis.set_ylim(len(arms) - 0.3, -0.7)
    axis.set_title(task.label, fontsize=8)
    axis.set_xlabel(across, fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(alpha=0.25)


#: Differences up to this share of LoRA's loss are drawn to scale, larger ones by their logarithm; in percent.
TO_SCALE = 20


def forest(found: Mapping[tuple[str, str], Finding], tasks: Sequence[Task], path: Path) -> None:
    """For each task: the difference of each arm from the reference, with its interval, as a share of the reference's loss. The arm with
    the lowest is on top."""
    compared = {
        task.label: sorted(
            (
                each
                for (name, _), each in found.items()
                if name == task.name and each.apart and each.arm.name != REFERENCE
            ),
            key=lambda each: each.apart.mean if each.apart else 0.0,
        )
        for task in tasks
    }
    shown_tasks = [task for task in tasks if compared[task.label]]
    if not shown_tasks:
        return
    figure, axes = _panels([len(compared[task.label]) for task in shown_tasks])
    for axis, task in zip(axes, shown_tasks, strict=True):
        mine = compared[task.label]
        for row, finding in enumerate(mine):
            assert finding.apart is not None
            apart, scale = finding.apart, 100 / (finding.loss - finding.apart.mean)
            colour = {"better": "#0072B2", "worse": "#D55E00"}.get(verdict(finding), "0.45")
            axis.plot([scale * apart.low, scale * apart.high], [row, row], color=colour, lw=1.6)
            axis.plot([scale * apart.mean], [row], "o", color=colour, ms=4)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_xscale("symlog", linthresh=TO_SCALE)
        low, high = axis.get_xlim()
        fine = (
            (-20, -10, 0, 10, 20) if low > -2 * TO_SCALE and high < 2 * TO_SCALE else (-60, -20, 0, 20, 60, 250, 1000)
        )
        ticks = [tick for tick in fine if low <= tick <= high]
        axis.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
        axis.minorticks_off()
        _dress(axis, task, [each.arm for each in mine], "% of LoRA's loss")
    figure.suptitle("Loss less tuned LoRA's, 95 % of a bootstrap over seeds and answers: left is better", fontsize=10)
    save(figure, path)


def draw_steps(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Cosine and length by step, and the singular values at the end."""
    from matplotlib.figure import Figure

    if not rows:
        return
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for index, row in enumerate(rows):
        style = {"color": f"C{index}", "label": row["label"], "lw": 1.3}
        axes[0].plot(range(1, len(row["cosines"]) + 1), row["cosines"], **style)
        axes[1].plot(range(1, len(row["lengths"]) + 1), row["lengths"], **style)
        axes[2].plot(range(1, len(row["singular_values"]) + 1), row["singular_values"], marker="o", ms=3, **style)
    axes[0].set_title("Cosine with plain AdamW's step", fontsize=9)
    axes[1].set_title("Length, in parts of plain AdamW's", fontsize=9)
    axes[2].set_title("Singular values of BA, largest at 1", fontsize=9)
    for axis, label in zip(axes, ("step", "step", "number"), strict=True):
        axis.set_xlabel(label, fontsize=8)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7)
    axes[1].set_yscale("log")
    axes[2].set_yscale("log")
    axes[0].legend(fontsize=6)
    save(figure, path)
