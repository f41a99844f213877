"""Pictures of several runs: methods side by side, a score against a factor. Those of one run are `tnadapt.pictures`'."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tables import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = Sequence[tuple[float, float]]


def comparison(
    path: Path,
    scores: Mapping[str, float],
    curves: Mapping[str, Curve],
    score: str = "accuracy",
    shown: Callable[[float], str] = percent,
) -> Path:
    """Draw a bar per score, in the colour of the curve of that name, and the loss curves beside the bars."""
    figure, axes = _figure(2, (11, 4.2))
    colours = {name: f"C{index}" for index, name in enumerate(curves)}
    for index, (name, value) in enumerate(scores.items()):
        axes[0].bar(index, value, color=colours.get(name, "0.6"), width=0.6)
        axes[0].text(index, value, shown(value), ha="center", va="bottom")
    axes[0].set_xticks(range(len(scores)), list(scores), rotation=15, ha="right")
    axes[0].set_ylabel(score)
    axes[0].yaxis.set_major_formatter(lambda value, _: shown(value))
    axes[0].set_ylim(bottom=0)
    axes[0].set_title(score.capitalize())
    _draw_curves(axes[1], curves, "Training loss")
    return save(figure, path)


def score_against(
    path: Path, factor: str, lines: Mapping[str, Sequence[tuple[Any, float]]], logarithmic: bool = False
) -> Path:
    """Draw a score, given as shares, against the values of a factor, one line per name.

    Values that are no numbers are placed side by side in the order in which they come.
    """
    figure, axes = _figure(1, (7, 4))
    numeric = all(isinstance(value, int | float) for points in lines.values() for value, _ in points)
    for name, points in lines.items():
        places = [value if numeric else str(value) for value, _ in points]
        axes[0].plot(places, [100 * score for _, score in points], "o-", label=name)
    if logarithmic and numeric:
        axes[0].set_xscale("log")
        values = sorted({value for points in lines.values() for value, _ in points})
        axes[0].set_xticks(values, [f"{value:g}" for value in values])
        axes[0].minorticks_off()
    axes[0].set_xlabel(factor)
    axes[0].set_ylabel("accuracy in %")
    axes[0].grid(alpha=0.3)
    axes[0].legend()
    return save(figure, path)


def _draw_curves(axis: Any, curves: Mapping[str, Curve], title: str) -> None:
    for index, (name, curve) in enumerate(curves.items()):
        axis.plot([step for step, _ in curve], [loss for _, loss in curve], color=f"C{index}", label=name)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    if curves:
        axis.legend()


def _figure(count: int, size: tuple[float, float]) -> tuple[Figure, Sequence[Any]]:
    """A figure with ``count`` axes side by side, made without the global state of pyplot and so without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)
    return path
