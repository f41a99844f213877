"""What each gauge of an MPO does to the first twenty updates of a matrix.

    python benchmarks/gauges.py            # about a minute; writes results/gauge_updates.json and docs/factorizations/gauges.png
    python benchmarks/gauges.py --quick    # one seed and order, written only where --output says

A 768x8 matrix is trained by AdamW, as it is (plain LoRA) and through its cores, under gradients that do not depend on where the
matrix is: a steady one, G, and a noisy one, G plus new normal noise of the same norm at every step. The singular values of
G halve from one to the next. The matrix starts at zero, at random, or at a hundredth of that. For every gauge, order, start and kind of gradient this
gives, as medians over seeds,

- the size of each update, `||W_t - W_{t-1}||`, over that of plain LoRA;
- after the last update, the decrease of the loss `<G, W>` over that of plain LoRA.

The seed draws the matrix, G, the noise and the rotations of the gauge "random". The gauge "gradient" is given the first gradient.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from provenance import environment, write_json
from torch import Tensor
from tqdm import tqdm

from tnadapt.factorizations import GAUGES, MPO

ROOT = Path(__file__).parent.parent
SHAPE, STEPS, LR = (768, 8), 20, 4.9e-4
GRADIENTS = ("steady", "noisy")
#: size of the entries at the start, over those of a random LoRA matrix; small is a B after a few steps
STARTS = {"zero": 0.0, "small": 0.01, "random": 1.0}


def draw_matrix(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator) / SHAPE[0] ** 0.5


def gradients(seed: int, kind: str) -> tuple[Tensor, list[Tensor]]:
    """G of norm 1, and the gradient of every step."""
    generator = torch.Generator().manual_seed(1000 + seed)
    u, v = (torch.linalg.qr(torch.randn(size, SHAPE[1], generator=generator)).Q for size in SHAPE)
    steady = (u * 0.5 ** torch.arange(SHAPE[1])) @ v.mT
    steady = steady / steady.norm()
    if kind == "steady":
        return steady, [steady] * STEPS
    noise = torch.randn(STEPS, *SHAPE, generator=generator)
    return steady, [steady + n / n.norm() for n in noise]


def path(factorization: MPO | None, start: Tensor, slopes: Sequence[Tensor]) -> list[Tensor]:
    """The matrix before the first step and after each; `factorization` None: the matrix is trained itself."""
    along = {"gradient": slopes[0]} if factorization is not None and factorization.needs_gradient else {}
    cores = [start.clone()] if factorization is None else list(factorization.unfold(start, **along))
    optimizer = torch.optim.AdamW(cores, lr=LR, weight_decay=0.0)
    places = [start]
    for slope in slopes:
        grads = [slope] if factorization is None else factorization.pull_back(cores, slope)
        for core, grad in zip(cores, grads, strict=True):
            core.grad = grad.clone()
        optimizer.step()
        places.append(cores[0].clone() if factorization is None else factorization.fold(cores))
    return places


def sizes(places: Sequence[Tensor]) -> list[float]:
    return [float((after - before).norm()) for before, after in pairwise(places)]


def measure(order: int, gauge: str, start: str, kind: str, seeds: int) -> dict[str, Any]:
    """Medians over seeds."""
    updates, decreases = [], []
    for seed in range(seeds):
        begin = STARTS[start] * draw_matrix(seed)
        steady, slopes = gradients(seed, kind)
        mpo = MPO(order=order, gauge=gauge, seed=seed if gauge == "random" else 0)
        lora, own = path(None, begin, slopes), path(mpo, begin, slopes)
        updates.append([a / b for a, b in zip(sizes(own), sizes(lora), strict=True)])
        decreases.append(float((steady * (own[-1] - begin)).sum() / (steady * (lora[-1] - begin)).sum()))
    return {
        "order": order,
        "gauge": gauge,
        "start": start,
        "gradient": kind,
        "update": [statistics.median(column) for column in zip(*updates, strict=True)],
        "decrease": statistics.median(decreases),
        "decrease_range": [min(decreases), max(decreases)],
    }


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """A row of panels per order, a column per start and kind of gradient, a line per gauge."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    orders = list(dict.fromkeys(row["order"] for row in rows))
    columns = [(start, kind) for start in STARTS for kind in GRADIENTS]
    figure, axes = plt.subplots(
        len(orders), len(columns), figsize=(2.5 * len(columns), 2.4 * len(orders)), squeeze=False, sharex=True
    )
    for r, order in enumerate(orders):
        for c, (start, kind) in enumerate(columns):
            axis = axes[r][c]
            for row in rows:
                if (row["order"], row["start"], row["gradient"]) == (order, start, kind):
                    style = {"random": ":", "right": "--", "identity": "-."}.get(row["gauge"], "-")
                    axis.plot(range(1, STEPS + 1), row["update"], style, label=row["gauge"], linewidth=1.4)
            axis.axhline(1.0, color="black", linewidth=0.6)
            axis.set_yscale("log")
            axis.tick_params(labelsize=7, which="both")
            axis.set_title(f"order {order}, W {start}, {kind} gradient", fontsize=8)
            if r == len(orders) - 1:
                axis.set_xlabel("update", fontsize=8)
        axes[r][0].set_ylabel("size of the update over plain LoRA's", fontsize=7)
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Update 1, update 20 and the decrease of the loss, for each gauge and order."""
    columns = [(start, kind) for start in STARTS for kind in GRADIENTS]
    lines = [
        "| order, gauge | " + " | ".join(f"W {start}, {kind}" for start, kind in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    cells = {(row["order"], row["gauge"], row["start"], row["gradient"]): row for row in rows}
    for order, gauge in dict.fromkeys((row["order"], row["gauge"]) for row in rows):
        found = [cells[order, gauge, *column] for column in columns]
        numbers = [f"{row['update'][0]:.2f} → {row['update'][-1]:.2f} ({row['decrease']:.2f})" for row in found]
        lines.append(f"| {order}, `{gauge}` | {' | '.join(numbers)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, nargs="+", default=[2, 9, 16])
    parser.add_argument("--gauges", nargs="+", default=list(GAUGES), choices=list(GAUGES))
    parser.add_argument("--seeds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one seed, order 2")
    parser.add_argument("--output", type=Path, help="folder for both files instead of results and docs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.orders, arguments.seeds = [2], 1
    torch.set_num_threads(1)
    cases = [(o, g, s, k) for o in arguments.orders for g in arguments.gauges for s in STARTS for k in GRADIENTS]
    rows = [measure(*case, arguments.seeds) for case in tqdm(cases, unit="case")]
    print("First update → last update over plain LoRA's (decrease of the loss over plain LoRA's).\n")
    print(table(rows))
    if arguments.quick and arguments.output is None:
        return
    data, picture = arguments.output, arguments.output
    if arguments.output is None:
        data, picture = ROOT / "benchmarks/results", ROOT / "docs/factorizations"
    settings = {"shape": SHAPE, "steps": STEPS, "lr": LR, "seeds": arguments.seeds}
    write_json(data / "gauge_updates.json", {"settings": settings, "rows": rows, "provenance": environment(ROOT)})
    draw(rows, picture / "gauges.png")


if __name__ == "__main__":
    main()
