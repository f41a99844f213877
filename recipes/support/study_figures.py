"""The figures of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.findings import REFERENCE, Finding, verdict
from support.pictures import save
from support.search import Arm, Study, Task


def dot_grid(study: Study, path: Path) -> None:
    """For each task: arms down, rates across, a dot for each rate tried; a ring around the best."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    tasks = list({lane.task.name: lane.task for lane in study.lanes if lane.table}.values())
    arms = list({lane.arm.name: lane.arm for lane in study.lanes if lane.table}.values())
    if not tasks:
        return
    figure = Figure(figsize=(3.1 * len(tasks) + 2.6, 0.27 * len(arms) + 1.6), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    points = None
    for axis, task in zip(axes, tasks, strict=True):
        lanes = {lane.arm.name: lane for lane in study.lanes if lane.task is task}
        reference = lanes[REFERENCE].best(range(1)) if REFERENCE in lanes else None
        scale = lanes[REFERENCE].loss(reference, range(1)) if reference else 1.0
        for row, arm in enumerate(arms):
            lane = lanes.get(arm.name)
            if lane is None or not lane.table:
                continue
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
        _dress(axis, task, arms, "learning rate")
    axes[0].invert_yaxis()
    if points is not None:
        bar = figure.colorbar(points, ax=axes, fraction=0.02, ticks=[0.5, 1, 2, 4])
        bar.ax.set_yticklabels(["half", "LoRA's best", "twice", "4x or more"], fontsize=7)
        bar.ax.minorticks_off()
    figure.suptitle("Loss by rate, first seed; a ring marks each arm's best rate", fontsize=10)
    save(figure, path)


def _dress(axis: Any, task: Task, arms: Sequence[Arm], across: str) -> None:
    """Name what is seen: the task above, the arms down, and what goes across."""
    axis.set_yticks(range(len(arms)), [arm.label for arm in arms], fontsize=7)
    axis.set_title(task.label, fontsize=8)
    axis.set_xlabel(across, fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(alpha=0.25)


def forest(found: Mapping[tuple[str, str], Finding], tasks: Sequence[Task], path: Path) -> None:
    """For each task: the difference of each arm from the reference, with its interval, as a share of the reference's loss."""
    from matplotlib.figure import Figure

    shown_tasks = [task for task in tasks if any(name == task.name and f.apart for (name, _), f in found.items())]
    arms = list({f.arm.name: f.arm for f in found.values() if f.apart is not None and f.arm.name != REFERENCE}.values())
    if not shown_tasks or not arms:
        return
    figure = Figure(figsize=(2.9 * len(shown_tasks) + 2.6, 0.27 * len(arms) + 1.4), layout="constrained")
    axes = figure.subplots(1, len(shown_tasks), squeeze=False, sharey=True)[0]
    for axis, task in zip(axes, shown_tasks, strict=True):
        for row, arm in enumerate(arms):
            finding = found.get((task.name, arm.name))
            if finding is None or finding.apart is None:
                continue
            apart, scale = finding.apart, 100 / (finding.loss - finding.apart.mean)
            colour = {"better": "#0072B2", "worse": "#D55E00"}.get(verdict(finding), "0.45")
            axis.plot([scale * apart.low, scale * apart.high], [row, row], color=colour, lw=1.6)
            axis.plot([scale * apart.mean], [row], "o", color=colour, ms=4)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_xscale("symlog", linthresh=20)
        low, high = axis.get_xlim()
        ticks = [tick for tick in (-50, -20, -10, 0, 10, 20, 50, 100) if low <= tick <= high]
        axis.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
        axis.minorticks_off()
        _dress(axis, task, arms, "% of LoRA's loss")
    axes[0].invert_yaxis()
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
