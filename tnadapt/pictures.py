"""Pictures of one's own run. Every function draws one figure and returns it: `expansion_map(over).savefig("map.png")`.

Needs matplotlib when a picture is drawn, not when this module is imported. Colours are those of Okabe and Ito and the map cividis,
which readers with a colour vision deficiency can tell apart.
"""

from __future__ import annotations

import importlib
import io
import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tnadapt.lora_over import Event, LoraOver
from tnadapt.matrices import find_lora_matrices
from tnadapt.schedulers import TaylorRuntime

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "expansion_map", "loss_curves", "score_trajectories", "singular_values", "spectra", "update_norms"]

Curve = Sequence[tuple[float, float]]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")
_NEVER = "0.85"  # light grey
_MAP = "cividis"
#: cells of an expansion map above which the steps are not written into them
_MANY_CELLS = 240


def expansion_map(run: LoraOver | Mapping[str, int | None], steps: int | None = None) -> Figure:
    """Which matrices were expanded and when: layers × modules, the A and the B matrices side by side; colour is the step.

    Args:
        run: the `LoraOver` of the run, or the step of the first expansion of each matrix by name, None for never.
        steps: length of the run, at which the colours end. By default the steps of the `LoraOver`, or the last expansion.

    Raises:
        ValueError: there are no matrices.
    """
    if isinstance(run, LoraOver):
        steps = run.step if steps is None else steps
        run = expansions(run)
    if not run:
        raise ValueError("expansion_map: there are no matrices to show")
    cells = {name: _cell(name) for name in run}
    layers = sorted({layer for layer, _, _ in cells.values()})
    columns = list(dict.fromkeys(column for _, column, _ in cells.values()))
    sides = sorted({side for _, _, side in cells.values()})
    reached = [step for step in run.values() if step is not None]
    last = max([steps or 0, *reached, 1])
    size = (2.2 + len(sides) * max(2.4, 0.62 * len(columns)), 2.4 + 0.3 * len(layers))
    figure, axes = _figure(1, len(sides), size)
    image: Any = None
    for axis, side in zip(axes, sides, strict=True):
        grid = [[math.nan] * len(columns) for _ in layers]
        for name, (layer, column, of) in cells.items():
            if of == side and (step := run[name]) is not None:
                grid[layers.index(layer)][columns.index(column)] = step
        image = axis.imshow(grid, aspect="auto", cmap=_MAP, vmin=0, vmax=last, origin="lower", interpolation="nearest")
        axis.set_facecolor(_NEVER)
        axis.set_title(f"{side} matrices")
        axis.set_xticks(range(len(columns)), _short(columns), rotation=40, ha="right", rotation_mode="anchor")
        every = max(1, len(layers) // 16)
        axis.set_yticks(range(0, len(layers), every), [str(x) if x >= 0 else "–" for x in layers[::every]])
        for row, values in enumerate(grid if len(layers) * len(columns) <= _MANY_CELLS else []):
            for k, value in enumerate(values):
                if not math.isnan(value):
                    colour = "white" if value < 0.55 * last else "black"
                    axis.text(k, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="step of expansion (grey: never)")
    when = _span(reached, "at step {}", "from step {} to {}")
    _title(figure, f"{len(reached)} of {len(run)} matrices were expanded{when}")
    return figure


def score_trajectories(run: LoraOver | TaylorRuntime) -> Figure:
    """The scores that `TaylorRuntime` ranked by, one panel per group and one line per matrix.

    A line ends in a dot in the round that chose its matrix; grey lines are of matrices that were never chosen.

    Raises:
        TypeError: the scheduler is another one, which has no rounds.
        ValueError: no round has taken place.
    """
    scheduler = run.scheduler if isinstance(run, LoraOver) else run
    if not isinstance(scheduler, TaylorRuntime):
        raise TypeError(f"score_trajectories shows the rounds of TaylorRuntime, got {type(scheduler).__name__}")
    if not scheduler.rounds:
        raise ValueError(
            f"score_trajectories: {scheduler.label} has had no round yet, the first is at step {scheduler.every}"
        )
    lines: dict[str, list[tuple[float, float]]] = {}
    chosen: dict[str, tuple[float, float]] = {}
    for number in scheduler.rounds:
        for name, score in number["scores"].items():
            if name not in chosen:
                lines.setdefault(name, []).append((number["step"], score))
        chosen |= {name: lines[name][-1] for name in number["selected"] if name in lines}
    groups: dict[str, list[str]] = {}
    for name in sorted(lines, key=_group):
        groups.setdefault(_group(name), []).append(name)
    width = min(4, len(groups))
    figure, axes = _figure(-(-len(groups) // width), width, (1 + 3 * width, 0.9 + 2.2 * -(-len(groups) // width)))
    rounds = sorted({number["step"] for number in scheduler.rounds})
    colours = dict(zip(rounds, (_COLOURS[k % len(_COLOURS)] for k in range(len(rounds))), strict=True))
    for axis, (label, names) in zip(axes, zip(_short(groups), groups.values(), strict=True), strict=False):
        for name in sorted(names, key=lambda name: name in chosen):
            xs, ys = zip(*lines[name], strict=True)
            end = chosen.get(name)
            axis.plot(xs, ys, color=_NEVER if end is None else colours[int(end[0])], linewidth=1.4)
            if end is not None:
                axis.plot(*end, "o", color=colours[int(end[0])], markersize=5)
        axis.set_title(label, fontsize=10)
        axis.set_xticks(rounds if len(rounds) <= 8 else [rounds[0], rounds[-1]])
        if all(score > 0 for name in names for _, score in lines[name]):
            axis.set_yscale("log")
    _finish_grid(axes, len(groups), width, "step", "score")
    count = len(rounds)
    _title(
        figure,
        f"Scores by group over {count} round{'s' * (count > 1)}: a dot ends the line of a matrix when it is chosen, grey never is",
    )
    return figure


def spectra(model: nn.Module) -> dict[str, Tensor]:
    """Singular values of `B @ A` of every LoRA pair by module, in float64 on the CPU and without LoRA's scale alpha/r.

    Call it before and after training, and give both to `singular_values`.

    Raises:
        ValueError: the model has no LoRA pairs.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for matrix in find_lora_matrices(model)[0].values():
        pairs.setdefault(matrix.name.rpartition(".")[0], {})[matrix.kind] = matrix.value.to("cpu", torch.float64)
    found = {}
    for module, pair in pairs.items():
        if {"A", "B"} <= pair.keys():
            # with B = Q R and A^T = P S, the singular values of B A are those of the small matrix R S^T
            left, right = torch.linalg.qr(pair["B"]).R, torch.linalg.qr(pair["A"].mT).R
            found[module] = torch.linalg.svdvals(left @ right.mT)
    if not found:
        raise ValueError("spectra: the model has no LoRA pairs")
    return found


def singular_values(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Figure:
    """Singular values of `B @ A` before and after training: one panel per type of module, the median over its layers as
    a line and their range as a band.

    Args:
        before: what `spectra` gave before training.
        after: what it gave afterwards, for the same modules.

    Raises:
        ValueError: the modules differ.
    """
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise ValueError(f"singular_values: {odd[0]} is in one of the two only; give spectra of the same model")
    groups: dict[str, list[str]] = {}
    for module in after:
        groups.setdefault(_cell(f"{module}.A")[1], []).append(module)
    width = min(4, len(groups))
    rows = -(-len(groups) // width)
    figure, axes = _figure(rows, width, (1 + 3 * width, 1.2 + 2.2 * rows))
    ranks = []
    for axis, (label, modules) in zip(axes, zip(_short(groups), groups.values(), strict=True), strict=False):
        for values, name, colour, dash in ((before, "before", _COLOURS[1], "--"), (after, "after", _COLOURS[0], "-")):
            columns = list(zip(*(values[module].tolist() for module in modules), strict=False))
            x = range(1, len(columns) + 1)
            if all(value == 0 for column in columns for value in column):
                axis.plot([], [], dash, color=colour, label=f"{name}: all zero")
                continue
            axis.plot(x, [median(c) for c in columns], dash, color=colour, marker="o", markersize=3, label=name)
            axis.fill_between(
                x, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2, linewidth=0
            )
        axis.set_ylim(bottom=0)
        axis.set_title(f"{label} ({len(modules)} layer{'s' * (len(modules) > 1)})", fontsize=10)
        axis.xaxis.set_major_locator(_matplotlib("ticker").MaxNLocator(integer=True))
        ranks += [effective_rank(after[module]) for module in modules]
    axes[0].legend(fontsize=8)
    _finish_grid(axes, len(groups), width, "index", "singular value")
    _title(
        figure,
        f"Singular values of BA: median and range over layers; median effective rank after training {median(ranks):.1f}",
    )
    return figure


def effective_rank(values: Tensor) -> float:
    """Exponential of the entropy of the normalized singular values (Roy and Vetterli 2007); 0 for a zero matrix."""
    total = float(values.sum())
    if total == 0:
        return 0.0
    shares = values / total
    return float(torch.exp(torch.special.entr(shares).sum()))


def update_norms(recorded: Mapping[int, Mapping[str, float]]) -> Figure:
    """How far every expanded matrix moved in each step: matrices × steps, colour is the Frobenius norm of the update.

    Args:
        recorded: what `over.update_norms()` gave, by step: `norms[over.step] = over.update_norms()` after `optimizer.step()`.

    Raises:
        ValueError: no norm was recorded.
    """
    names = list(dict.fromkeys(name for norms in recorded.values() for name in norms))
    positive = [value for norms in recorded.values() for value in norms.values() if value > 0]
    if not positive:
        raise ValueError("update_norms: no matrix has moved; record over.update_norms() after each optimizer.step()")
    steps = sorted(recorded)
    names.sort(key=lambda name: (_cell(name)[1:], _cell(name)[0]))
    grid = [[recorded[step].get(name) or math.nan for step in steps] for name in names]
    blocks: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        blocks.setdefault(_group(name), []).append(row)
    height = max(2.5 + 0.24 * len(blocks), min(9.0, 2.5 + 0.12 * len(names)))
    figure, [axis] = _figure(1, 1, (8.5, height))
    scale = _matplotlib("colors").LogNorm(min(positive), max(max(positive), min(positive) * 1.001))
    edges = [steps[0] - 0.5, *((a + b) / 2 for a, b in itertools.pairwise(steps)), steps[-1] + 0.5]
    image = axis.pcolormesh(edges, [k - 0.5 for k in range(len(names) + 1)], grid, cmap=_MAP, norm=scale)
    axis.set_facecolor(_NEVER)
    labels = [f"{label} ({len(rows)})" for label, rows in zip(_short(blocks), blocks.values(), strict=True)]
    axis.set_yticks([sum(rows) / len(rows) for rows in blocks.values()], labels, fontsize=9)
    for rows in blocks.values():
        axis.axhline(rows[-1] + 0.5, color="white", linewidth=1.2)
    axis.set_xlabel("step")
    axis.set_ylabel("group (matrices in it), by layer from below")
    figure.colorbar(image, ax=axis, aspect=40, label="norm of the update (grey: not expanded)")
    _title(figure, f"Update of {len(names)} expanded matrices per step: {min(positive):.1e} to {max(positive):.1e}")
    return figure


def loss_curves(curves: Mapping[str, Curve], history: Iterable[Event] = ()) -> Figure:
    """Loss over steps, one line per run, with a mark at every step that expanded or folded matrices.

    Args:
        curves: points (step, loss) by the name of the run.
        history: `over.history` of the run that the marks are of.

    Raises:
        ValueError: there is no point to draw.
    """
    drawn = {name: sorted(points) for name, points in curves.items() if len(points)}
    if not drawn:
        raise ValueError("loss_curves: there are no points to draw; give {'name of the run': [(step, loss), ...]}")
    figure, [axis] = _figure(1, 1, (8, 4.2))
    for k, (name, points) in enumerate(drawn.items()):
        style = _DASHES[k // len(_COLOURS) % len(_DASHES)]
        axis.plot(*zip(*points, strict=True), style, color=_COLOURS[k % len(_COLOURS)], label=name, linewidth=1.6)
    events = list(history)
    for k, event in enumerate(events):
        axis.axvline(event.step, color="0.45", linewidth=1, linestyle="--" if event.action == "expand" else ":")
        if len(events) <= 12:
            text = f" {'+' if event.action == 'expand' else '−'}{len(event.names)}"
            height = 0.97 - 0.07 * (k % 3)
            axis.text(
                event.step, height, text, transform=axis.get_xaxis_transform(), va="top", fontsize=9, color="0.25"
            )
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9)
    actions = {event.action for event in events}
    marks = {"expand": "; dashed: matrices expanded (+)", "fold": "; dotted: matrices folded (−)"}
    _title(figure, "Training loss" + "".join(mark for action, mark in marks.items() if action in actions))
    return figure


def expansions(over: LoraOver) -> dict[str, int | None]:
    """Step of the first expansion of each matrix of a run, None for never."""
    found: dict[str, int | None] = dict.fromkeys(over.matrices)
    for event in over.history:
        for name in event.names if event.action == "expand" else ():
            found[name] = event.step if found[name] is None else found[name]
    return found


# -- drawing -------------------------------------------------------------------------------------------------------------


def _matplotlib(part: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{part}")
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'tnadapt[pictures]'") from error


@cache
def _picture_class() -> type[Figure]:
    base: type[Figure] = _matplotlib("figure").Figure

    class Picture(base):  # type: ignore[valid-type,misc]
        """A figure that a notebook shows whether or not pyplot is in use."""

        def _repr_png_(self) -> bytes:
            stream = io.BytesIO()
            self.savefig(stream, format="png")
            return stream.getvalue()

    return Picture


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row; made without pyplot, so that no display is needed and nothing stays open."""
    figure = _picture_class()(figsize=size, dpi=120, layout="constrained")
    return figure, [axis for row in figure.subplots(rows, columns, squeeze=False) for axis in row]


def _title(figure: Figure, text: str) -> None:
    """A title above all panels, in as many lines as the width of the figure asks for."""
    figure.suptitle(textwrap.fill(text, int(9.5 * figure.get_figwidth())))


def _finish_grid(axes: Sequence[Axes], used: int, columns: int, x: str, y: str) -> None:
    """Hide the panels that are not used, and label the outer ones of the others."""
    for k, axis in enumerate(axes):
        if k >= used:
            axis.set_visible(False)
            continue
        axis.grid(alpha=0.25)
        if k % columns == 0:
            axis.set_ylabel(y)
        if k + columns >= used:
            axis.set_xlabel(x)


def _cell(name: str) -> tuple[int, str, str]:
    """Layer (-1 where there is none), module with the layer's number replaced by `*`, and side of a matrix."""
    *path, side = name.split(".")
    number = next((k for k, part in enumerate(path) if part.isdigit()), None)
    if number is None:
        return -1, ".".join(path), side
    return int(path[number]), ".".join([*path[:number], "*", *path[number + 1 :]]), side


def _short(names: Iterable[str]) -> list[str]:
    """The shortest ends of dotted names that tell them all apart."""
    paths = [name.split(".") for name in names]
    for length in range(1, max((len(path) for path in paths), default=0) + 1):
        ends = [".".join(path[-length:]) for path in paths]
        if len(set(ends)) == len(ends) and not any(set(end.split(".")) <= {"*", "A", "B"} for end in ends):
            return ends
    return [".".join(path) for path in paths]


def _group(name: str) -> str:
    """The name of a matrix with the number of its layer replaced by `*`."""
    _, column, side = _cell(name)
    return f"{column}.{side}"


def _span(steps: Sequence[int], one: str, many: str) -> str:
    if not steps:
        return ""
    first, last = min(steps), max(steps)
    return ", " + (one.format(first) if first == last else many.format(first, last))
