"""How long a run pauses when matrices are expanded: 4 matrices per group of an 8B model.

    python benchmarks/expansion.py                              # Llama 3.1-8B, attention LoRA; CPU, and CUDA if there
    python benchmarks/expansion.py --per-group 32               # everything at once
    python benchmarks/expansion.py --quick                      # 4 layers and order 4, seconds

The LoRA matrices of a Llama 3.1-8B (rank 8, attention, 32 layers, 256 matrices in 8 groups) with random values; the base
model takes no part in an expansion and is not built. Timed is the decomposition and the making of the storage

- at the first step, when the optimizer knows nothing of the matrices yet;
- in mid-run with `handover="restart"`;
- in mid-run with `handover="warm"`, which pulls the moments of the matrices back to the cores;
- as a second round, which adds to the storage of the first (warm).

Goal: less than 10 s on a CPU, less than 1 s on a GPU. Prints a Markdown table and writes the numbers with their provenance
to benchmarks/results/expansion.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from devices import DEVICES, require, synchronize
from provenance import environment, write_json
from rich.console import Console
from torch import nn
from tqdm import tqdm

from tnadapt import MPO, LoraOver, OverParamAdapter, Scheduler, TrainedMatrix
from tnadapt.engine import Expanded

RESULTS = Path(__file__).parent / "results"
GOALS = {"cpu": 10.0, "cuda": 1.0}
RANK, WIDTH, KEYS = 8, 4096, 1024
PROJECTIONS = {"q_proj": (WIDTH, WIDTH), "k_proj": (WIDTH, KEYS), "v_proj": (WIDTH, KEYS), "o_proj": (WIDTH, WIDTH)}
WAYS = ("at the first step", "in mid-run, restart", "in mid-run, warm", "second round, warm")


class PerGroup(Scheduler):
    """The next `count` matrices of each group, at each of `steps`."""

    def __init__(self, count: int, steps: tuple[int, ...]) -> None:
        self.count, self.steps = count, steps

    def select(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> Iterable[str]:
        if step not in self.steps:
            return []
        waiting: dict[str, list[str]] = {}
        for name, matrix in matrices.items():
            if not matrix.expanded:
                waiting.setdefault(matrix.group, []).append(name)
        return [name for names in waiting.values() for name in names[: self.count]]


def adapters(layers: int, device: str) -> nn.Module:
    """The LoRA pairs of a Llama 3.1-8B, under its names, random and with random gradients."""
    torch.manual_seed(0)
    model, stack = nn.Module(), nn.ModuleList()
    for _ in range(layers):
        layer, attention = nn.Module(), nn.Module()
        for name, (d_in, d_out) in PROJECTIONS.items():
            lora_A, lora_B = nn.Linear(d_in, RANK, bias=False), nn.Linear(RANK, d_out, bias=False)
            attention.add_module(name, OverParamAdapter(lora_A, lora_B))
        layer.add_module("self_attn", attention)
        stack.append(layer)
    model.add_module("layers", stack)
    model.to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


@contextmanager
def timed_expansions(device: str) -> Iterator[list[tuple[float, int]]]:
    """Collects the seconds of each call that expands matrices, and how many it expands."""
    calls: list[tuple[float, int]] = []
    expand = Expanded.expand

    def timed(expanded: Expanded, names: Sequence[str], **kwargs: Any) -> None:
        synchronize(device)
        started = time.perf_counter()
        expand(expanded, names, **kwargs)
        synchronize(device)
        calls.append((time.perf_counter() - started, len(names)))

    with mock.patch.object(Expanded, "expand", timed):
        yield calls


def expand_once(way: str, model: nn.Module, device: str, order: int, per_group: int) -> tuple[float, int]:
    """Seconds of the last round, and how many matrices it expanded."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    if way != "at the first step":
        optimizer.step()
    steps = (1, 2) if way.startswith("second") else (1,)
    handover = "restart" if way.endswith("restart") else "warm"
    over = LoraOver(model, optimizer, MPO(order=order), PerGroup(per_group, steps), handover=handover)
    with timed_expansions(device) as calls:
        for _ in steps:
            calls.clear()  # one round may be several calls
            optimizer.step()
    over.fold()
    seconds, expanded = map(sum, zip(*calls, strict=True))
    return seconds, int(expanded)


def markdown(rows: list[dict[str, Any]], order: int) -> str:
    """The table of the docs."""
    lines = [
        f"| expansion, order {order} | device | matrices | s | quartiles | goal |",
        "|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['way']} | {row['device_name']} | {row['matrices']} | {row['seconds']:.3f} | "
        f"{row['quartiles'][0]:.3f} - {row['quartiles'][1]:.3f} | {row['goal']:g} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-group", type=int, default=4)
    parser.add_argument("--order", type=int, default=10)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=DEVICES, help="one alone, in place of all that are there")
    parser.add_argument("--quick", action="store_true", help="4 layers, order 4, 1 matrix per group, two repeats")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.layers, arguments.order, arguments.per_group, arguments.repeats = 4, 4, 1, 2
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if arguments.device:
        require(arguments.device, "--device cuda")
        devices = [arguments.device]
    seconds: dict[tuple[str, str], list[float]] = {(way, device): [] for device in devices for way in WAYS}
    matrices: dict[tuple[str, str], int] = {}
    with tqdm(total=len(seconds) * (arguments.repeats + 1), unit="expansion") as bar:
        for device in devices:
            model = adapters(arguments.layers, device)
            for k in range(arguments.repeats + 1):
                for way in WAYS:
                    taken, matrices[way, device] = expand_once(way, model, device, arguments.order, arguments.per_group)
                    if k > 0:  # the first one warms up
                        seconds[way, device].append(taken)
                    bar.update()
    names = {"cpu": f"CPU, {arguments.threads} threads"}
    if "cuda" in devices:
        names["cuda"] = torch.cuda.get_device_name()
    rows = []
    for (way, device), series in seconds.items():
        low, middle, high = statistics.quantiles(series, n=4) if len(series) > 1 else series * 3
        rows.append(
            {
                "way": way,
                "device": device,
                "device_name": names[device],
                "matrices": matrices[way, device],
                "seconds": middle,
                "quartiles": [low, high],
                "goal": GOALS[device],
            }
        )
    console = Console(soft_wrap=True)
    console.print(f"\n<!-- expansion -->\n{markdown(rows, arguments.order)}\n", markup=False, highlight=False)
    for device in devices:
        slowest = max(row["seconds"] for row in rows if row["device"] == device)
        verdict = "met" if slowest < GOALS[device] else "MISSED"
        console.print(f"goal on {device}: below {GOALS[device]:g} s; the slowest takes {slowest:.3f} s: {verdict}")
    settings = {k: v for k, v in vars(arguments).items() if k != "output"}
    file = arguments.output / "expansion.json"
    write_json(file, {"settings": settings, "rows": rows, "provenance": environment(Path(__file__).parent)})
    console.print(f"written: {file}")


if __name__ == "__main__":
    main()
