"""The idea of LoRA-Over in one picture."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.55"


class Picture(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format="png")
        return stream.getvalue()


def idea() -> Figure:
    """A LoRA layer above; below, one of its matrices as a chain of cores that the optimizer steps."""
    figure = Picture(figsize=(8, 4.6), dpi=120, layout="constrained", facecolor="white")
    axis = figure.subplots()
    axis.set_xlim(0, 16)
    axis.set_ylim(0, 9.2)
    axis.set_axis_off()
    _box(axis, 1.0, 6.2, 3.4, 2.0, "W", GREY, "frozen")
    _text(axis, 5.1, 7.2, "+")
    _box(axis, 5.8, 6.2, 1.2, 2.0, "B", BLUE)
    _box(axis, 7.5, 6.8, 3.4, 0.9, "A", BLUE)
    _text(axis, 11.2, 7.5, "the model: plain LoRA at every moment,\nin forward, backward, saving, serving", 9, "left")
    for k, x in enumerate((2.3, 5.1, 7.9, 10.7)):
        _box(axis, x, 1.6, 1.4, 1.4, f"$T^{{({k + 1})}}$", ORANGE)
        if k:
            axis.plot([x - 1.4, x], [2.3, 2.3], color=ORANGE, linewidth=2, zorder=0)
            _text(axis, x - 0.7, 2.65, f"$d_{k}$", 9)
        for y, end in ((3.0, 3.4), (1.6, 1.2)):
            axis.plot([x + 0.7, x + 0.7], [y, end], color=ORANGE, linewidth=2)
    _text(axis, 12.6, 2.3, "the cores: more parameters,\nstepped by your optimizer", 9, "left")
    _arrow(axis, (5.9, 6.0), (4.4, 3.6))
    _text(axis, 4.75, 4.9, "1  pull the gradient\nback to the cores", 9, "right")
    _arrow(axis, (8.6, 3.6), (6.9, 6.0))
    _text(axis, 8.2, 4.9, "3  fold the cores\ninto the matrix", 9, "left")
    _text(axis, 7.2, 0.5, "2  optimizer.step()", 9)
    return figure


def _box(axis: Axes, x: float, y: float, width: float, height: float, label: str, colour: str, note: str = "") -> None:
    style = "round,pad=0,rounding_size=0.15"
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor="none"))
    axis.text(x + width / 2, y + height / 2, label, color="white", ha="center", va="center", fontsize=13)
    if note:
        axis.text(x + width / 2, y + 0.3, note, color="white", ha="center", va="center", fontsize=9)


def _text(axis: Axes, x: float, y: float, text: str, size: float = 14, align: str = "center") -> None:
    axis.text(x, y, text, ha=align, va="center", fontsize=size, color="0.15")


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, color="0.25", linewidth=1.5))
