"""What an optimizer step costs where most adapters rest: experts of which few have gradients in any one step.

    python benchmarks/experts.py            # 48 experts, 4 of them active, chosen anew in each step

Times `optimizer.step()` alone, of plain LoRA and of LoRA-Over, in turn on the same choices; the ratio is of neighbouring steps. Step
counts of the experts drift apart, which is the hard case: every expert soon has a past of its own.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from provenance import environment, write_json
from torch import nn
from tqdm import tqdm

from tnadapt import MPO, LoraOver, OverParamAdapter

RESULTS = Path(__file__).parent / "results"
#: times plain LoRA's optimizer step
GOAL = 3.0


class Experts:
    """A stack of adapters with an optimizer, and gradients for those that are chosen."""

    def __init__(self, count: int, order: int | None, size: int = 256, rank: int = 8) -> None:
        torch.manual_seed(0)
        pairs = [OverParamAdapter.from_linear(nn.Linear(size, size), rank=rank, alpha=16) for _ in range(count)]
        self.layers = nn.ModuleList(pairs)
        trained = [p for p in self.layers.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.over = None if order is None else LoraOver(self.layers, self.optimizer, MPO(order=order))

    def step(self, chosen: list[int]) -> float:
        """Seconds of one optimizer step in which the chosen experts have gradients."""
        self.optimizer.zero_grad()
        for k in chosen:
            for parameter in self.layers[k].parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.ones_like(parameter)
        started = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - started


def measure(count: int, active: int, order: int, warmup: int, repeats: int) -> dict[str, Any]:
    """Medians in milliseconds, and the median ratio with its quartiles."""
    plain, over = Experts(count, None), Experts(count, order)
    draw = random.Random(0)
    times: list[tuple[float, float]] = []
    for step in tqdm(range(warmup + repeats), desc=f"{active} of {count} experts, order {order}", unit="step"):
        chosen = list(range(count)) if step == 0 else draw.sample(range(count), active)
        pair = plain.step(chosen), over.step(chosen)
        if step >= warmup:
            times.append(pair)
    ratios = [b / a for a, b in times]
    return {
        "experts": count,
        "active": active,
        "order": order,
        "plain_ms": statistics.median(a for a, _ in times) * 1e3,
        "over_ms": statistics.median(b for _, b in times) * 1e3,
        "ratio": statistics.median(ratios),
        "quartiles": [statistics.quantiles(ratios, n=4)[k] for k in (0, 2)],
        "goal": GOAL,
    }


def main() -> None:
    """Measure, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs; nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.quick else torch.get_num_threads())
    warmup, repeats = (2, 3) if arguments.quick else (400, 300)
    rows = [measure(48, 4, order, warmup, repeats) for order in (2, 4, 9)]
    for row in rows:
        print(
            f"{row['active']} of {row['experts']} experts, order {row['order']}: plain LoRA {row['plain_ms']:.2f} ms, "
            f"LoRA-Over {row['over_ms']:.2f} ms, ratio {row['ratio']:.2f} "
            f"({row['quartiles'][0]:.2f} - {row['quartiles'][1]:.2f}; goal {row['goal']:g})"
        )
    if not arguments.quick:
        write_json(RESULTS / "experts.json", {"rows": rows, "environment": environment(Path(__file__).parent)})


if __name__ == "__main__":
    main()
