"""Pictures of a run: loss curves, which matrix was expanded when, methods side by side, a score against a factor."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tables import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = Sequence[tuple[float, float]]


def loss_curves(path: Path, curves: Mapping[str, Curve], title: str = "Training loss") -> Path:
    """Draw one line of (step, loss) per name."""
    figure, axes = _figure(1, (7, 4))
    _draw_curves(axes[0], curves, title)
    return _save(figure, path)


def expansion_map(path: Path, matrices: Sequence[Mapping[str, Any]], steps: int, title: str) -> Path:
    """Draw layers × modules, once for the A matrices and once for B; the colour tells the step of the expansion.

    Args:
        path: the PNG to write.
        matrices: per LoRA matrix its ``kind`` ("A" or "B"), ``layer``, ``module``, and ``expanded_at``, a step or None.
        steps: the length of the run, where the colour scale ends.
        title: stands above both halves.
    """
    layers = sorted({_layer(matrix) for matrix in matrices})
    columns = list(dict.fromkeys(_column(matrix) for matrix in matrices))
    figure, axes = _figure(2, (3 + 0.9 * len(columns) * 2, 2.2 + 0.32 * len(layers)))
    image: Any = None
    for axis, kind in zip(axes, ("A", "B"), strict=True):
        grid = [[float("nan")] * len(columns) for _ in layers]
        for matrix in matrices:
            if matrix["kind"] == kind and matrix["expanded_at"] is not None:
                grid[layers.index(_layer(matrix))][columns.index(_column(matrix))] = matrix["expanded_at"]
        image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=max(1, steps), origin="lower")
        axis.set_facecolor("0.88")
        axis.set_title(f"{kind} matrices")
        axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
        axis.set_yticks(range(len(layers)), [str(layer) if layer >= 0 else "–" for layer in layers])
        axis.set_ylabel("layer")
        for row, values in enumerate(grid):
            for column, step in enumerate(values):
                if step == step and len(layers) * len(columns) <= 200:
                    axis.text(column, row, f"{step:.0f}", ha="center", va="center", fontsize=7, color="white")
    figure.colorbar(image, ax=axes, label="expanded at step (grey: never)")
    figure.suptitle(title)
    return _save(figure, path)


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
    return _save(figure, path)


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
    return _save(figure, path)


def _layer(matrix: Mapping[str, Any]) -> int:
    layer = matrix["layer"]
    return -1 if layer is None else int(layer)


def _column(matrix: Mapping[str, Any]) -> str:
    return str(matrix["module"]).rpartition(".")[2]


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


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)
    return path
