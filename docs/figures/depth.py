"""What depth does to a steady gradient and to noise: the experiment behind the page on mathematics, and its picture."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from idea import BLUE, GREY, ORANGE, Picture

from tnadapt import MPO

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A matrix of T5-Base at the paper's rate. Its near-square split gives 1x1 sites whose cores are BOND x BOND.
SHAPE, BOND, RATE, STEPS = (768, 8), 48, 4.9e-4, 30
#: the largest singular value of a square matrix of random signs, over the square root of its size
EDGE = 2.0


class Walk(NamedTuple):
    """Sizes of the updates of a matrix, and how far a core at a 1x1 site is from the identity that it starts at."""

    updates: list[float]
    distances: list[float]


def walk(order: int, steady: bool, steps: int = STEPS, seed: int = 0) -> Walk:
    """AdamW on the cores of a random matrix, or on the matrix itself at order 1, under gradients that do not depend on it.

    Args:
        steady: one random gradient at all steps, or a new one at each.
    """
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(SHAPE, generator=draw) / SHAPE[0] ** 0.5
    gradient = torch.randn(SHAPE, generator=draw)
    mpo = MPO(order=max(order, 2))
    cores = [matrix.clone()] if order == 1 else list(mpo.unfold(matrix))
    optimizer = torch.optim.AdamW(cores, lr=RATE, weight_decay=0.0)
    places, distances = [matrix], []
    for _ in range(steps):
        gradient = gradient if steady else torch.randn(SHAPE, generator=draw)
        gradients = [gradient] if order == 1 else mpo.pull_back(cores, gradient)
        for core, its in zip(cores, gradients, strict=True):
            core.grad = its.clone()
        optimizer.step()
        places.append(cores[0].clone() if order == 1 else mpo.fold(cores))
        if order > 2:
            middle = cores[1].reshape(BOND, BOND)
            distances.append(float(torch.linalg.matrix_norm(middle - torch.eye(BOND), ord=2)))
    return Walk([float((after - before).norm()) for before, after in pairwise(places)], distances)


def predicted(step: int, steady: bool) -> float:
    """Spectral norm of what a middle core has moved after `step` steps of sign descent."""
    return float(RATE * EDGE * BOND**0.5 * (step if steady else step**0.5))


def depth() -> Figure:
    """Left, how far a middle core goes; right, how large the updates of the matrix become."""
    figure = Picture(figsize=(9, 3.6), dpi=120, layout="constrained", facecolor="white")
    far, large = figure.subplots(1, 2)
    steps = range(1, STEPS + 1)
    for steady, colour, name in ((True, ORANGE, "steady gradient"), (False, BLUE, "noise")):
        plain = walk(1, steady).updates
        far.plot(steps, walk(8, steady).distances, color=colour, label=f"{name}, measured")
        law = "t" if steady else "√t"
        far.plot(steps, [predicted(t, steady) for t in steps], ":", color=colour, label=f"{name}: 2√D η {law}")
        for order, line in ((4, ":"), (8, "--"), (16, "-")):
            ratio = [own / its for own, its in zip(walk(order, steady).updates, plain, strict=True)]
            large.plot(steps, ratio, line, color=colour, label=f"{name}, order {order}")
    far.set(title="A middle core leaves the identity", xlabel="step t", ylabel="spectral norm of the distance")
    large.axhline(1.0, color=GREY, linewidth=0.8)
    large.set(title="Size of the matrix's update over plain LoRA's", xlabel="step t", yscale="log")
    for axis in (far, large):
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return figure
