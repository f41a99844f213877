"""Time of unfolding, folding and pulling back, for each factorization on each backend; and what gauges do at the start.

    python benchmarks/factorizations.py                # the paper's shapes, one matrix and 32 layers at once: minutes
    python benchmarks/factorizations.py --quick        # two shapes, seconds
    python benchmarks/factorizations.py --gauges       # the first steps from each gauge instead of the timings

Prints a Markdown table and writes the numbers with their provenance to benchmarks/results/factorizations.json
(gauges.json; --quick writes only where --output says).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tnadapt.backends import BACKENDS
from tnadapt.factorizations import CP, MPO, SVD, Factorization, Tucker
from tnadapt.factorizations.sites import from_sites, to_sites

RESULTS = Path(__file__).parent / "results"
RANK = 8
#: Sizes that the paper's models have beside the rank: T5-Base, Llama 2-7B, Llama 3.1-8B.
SIZES = (768, 3072, 4096, 11008, 1024, 14336)
LAYERS = 32
FACTORIZATIONS: dict[str, Callable[[str], Factorization]] = {
    "SVD": lambda backend: SVD(backend=backend),
    "MPO(order=9)": lambda backend: MPO(order=9, backend=backend),
    "MPO(order=16)": lambda backend: MPO(order=16, backend=backend),
    "Tucker": lambda backend: Tucker(backend=backend),
    "CP": lambda backend: CP(backend=backend),
    "CP(order=9)": lambda backend: CP(order=9, backend=backend),
}
#: One shape has explicit sites without 1x1 between, where the order of contraction matters.
UNEQUAL = ((4, 2), (32, 1), (2, 2), (8, 2), (16, 1))
UNEQUAL_SHAPE = (32768, 8)


def provenance() -> dict[str, Any]:
    """Where and with what the numbers were made."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(
            git("status", "--porcelain", "--", "../tnadapt", "../benchmarks/factorizations.py")
        ),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "numpy", "opt_einsum", "tensorly", "tensornetwork")
        },
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def median_ms(run: Callable[[], Any], seconds: float) -> float:
    """Median time of `run` after one call to warm up; at least three calls, then as many as fit into `seconds`."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def measure(factorization: Factorization, shape: tuple[int, int], batch: int, seconds: float) -> dict[str, float]:
    matrix = torch.randn(batch, *shape)
    grad = torch.randn(batch, *shape)
    cores = factorization.unfold(matrix)
    fused = factorization.fused_shapes(factorization.core_shapes(shape))
    kernel = factorization.kernel([core.view(batch, *own) for core, own in zip(cores, fused, strict=True)])
    sites = factorization.structure(shape).sites

    def fold() -> None:
        from_sites(kernel.contract(), sites)

    def fold_and_pull_back() -> None:
        fold()
        kernel.pull_back(to_sites(grad, sites).reshape(batch, -1))

    return {
        "unfold_ms": median_ms(lambda: factorization.unfold(matrix), seconds),
        "fold_ms": median_ms(fold, seconds),
        # what one optimizer step costs beside the optimizer: a fold and the pull-back from it
        "fold_and_pull_back_ms": median_ms(fold_and_pull_back, seconds),
    }


def timings(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    shapes = [(768, RANK), (RANK, 768)] if arguments.quick else [s for d in SIZES for s in ((d, RANK), (RANK, d))]
    batches = (1, 4) if arguments.quick else (1, LAYERS)
    jobs = [(name, make, shape) for shape in shapes for name, make in FACTORIZATIONS.items()]
    jobs.append(("MPO(sites=unequal)", lambda backend: MPO(sites=UNEQUAL, max_bond=64, backend=backend), UNEQUAL_SHAPE))
    rows = []
    for name, make, shape in tqdm(jobs, unit="case"):
        for batch in batches:
            for backend in arguments.backends:
                found = measure(make(backend), shape, batch, arguments.seconds)
                rows.append({"factorization": name, "shape": shape, "batch": batch, "backend": backend, **found})
    return rows


def timing_table(rows: list[dict[str, Any]], backends: list[str]) -> str:
    lines = ["Milliseconds for unfold / fold / fold and pull back; the fastest last number is bold.", ""]
    lines += [
        "| factorization | shape | batch | " + " | ".join(backends) + " |",
        "|---|---|---|" + "---|" * len(backends),
    ]
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["factorization"], tuple(row["shape"]), row["batch"]), {})[row["backend"]] = row
    for (name, shape, batch), by_backend in groups.items():
        best = min(row["fold_and_pull_back_ms"] for row in by_backend.values())
        cells = []
        for backend in backends:
            row = by_backend[backend]
            last = f"{row['fold_and_pull_back_ms']:.3g}"
            last = f"**{last}**" if row["fold_and_pull_back_ms"] == best else last
            cells.append(f"{row['unfold_ms']:.3g} / {row['fold_ms']:.3g} / {last}")
        lines.append(f"| {name} | {shape[0]}x{shape[1]} | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fastest(rows: list[dict[str, Any]]) -> str:
    """In how many cells of folding and pulling back torch is the fastest, and how much longer the others take."""
    cells: dict[tuple[str, tuple[int, ...], int], dict[str, float]] = {}
    for row in rows:
        cell = cells.setdefault((row["factorization"], tuple(row["shape"]), row["batch"]), {})
        cell[row["backend"]] = row["fold_and_pull_back_ms"]
    compared = [cell for cell in cells.values() if "torch" in cell and len(cell) > 1]
    first = sum(cell["torch"] == min(cell.values()) for cell in compared)
    lines = [f"Folding and pulling back, torch is the fastest in {first} of {len(compared)} cells."]
    for name in dict.fromkeys(row["backend"] for row in rows if row["backend"] != "torch"):
        ratios = [cell[name] / cell["torch"] for cell in compared if name in cell]
        if ratios:
            lines.append(
                f"{name} takes {statistics.median(ratios):.2f} times as long (median), {max(ratios):.1f} at most."
            )
    return "\n".join(lines)


def first_steps() -> list[dict[str, Any]]:
    """AdamW (lr 4.9e-4) through the cores of a 768x8 matrix under a steady gradient: how far the matrix has moved after
    1, 5 and 20 steps, relative to AdamW on the matrix itself."""
    rows = []
    torch.manual_seed(0)
    start, grad = torch.randn(768, RANK) / 768**0.5, torch.randn(768, RANK)
    candidates: dict[str, Factorization] = {
        f"MPO(order={order}, gauge={gauge})": MPO(order=order, gauge=gauge)
        for order in (2, 16)
        for gauge in ("svd", "right", "identity", "spread")
    }
    candidates |= {f"Tucker(gauge={gauge})": Tucker(gauge=gauge) for gauge in ("svd", "identity", "spread")}
    candidates |= {
        f"CP(order={order}, gauge={gauge})": CP(order=order, gauge=gauge)
        for order in (2, 16)
        for gauge in ("unit", "spread")
    }
    for label, begin in (("W = 0", torch.zeros_like(start)), ("W random", start)):
        lora = moved(None, begin, grad)
        for name, factorization in candidates.items():
            steps = moved(factorization, begin, grad)
            rows.append(
                {"factorization": name, "start": label, **{f"step_{k}": steps[k] / lora[k] for k in (1, 5, 20)}}
            )
    return rows


def moved(factorization: Factorization | None, begin: torch.Tensor, grad: torch.Tensor) -> dict[int, float]:
    """Distance from the start after each step; `factorization` None: the matrix is trained itself."""
    cores = [begin.clone()] if factorization is None else list(factorization.unfold(begin))
    optimizer = torch.optim.AdamW(cores, lr=4.9e-4, weight_decay=0.0)
    distances = {}
    for step in range(1, 21):
        grads = [grad] if factorization is None else factorization.pull_back(cores, grad)
        for core, g in zip(cores, grads, strict=True):
            core.grad = g
        optimizer.step()
        now = cores[0] if factorization is None else factorization.fold(cores)
        distances[step] = float((now - begin).norm())
    return distances


def gauge_table(rows: list[dict[str, Any]]) -> str:
    lines = ["How far the matrix moves, over how far AdamW on the matrix itself moves it.", ""]
    lines += ["| factorization | start | 1 step | 5 steps | 20 steps |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = " | ".join(f"{row[f'step_{k}']:.3g}" for k in (1, 5, 20))
        lines.append(f"| {row['factorization']} | {row['start']} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="two shapes, short measurements, nothing written by default"
    )
    parser.add_argument("--gauges", action="store_true", help="the first steps from each gauge instead of the timings")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--seconds", type=float, help="time for each number (0.2; with --quick 0.02)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="the JSON to write")
    arguments = parser.parse_args()
    if arguments.seconds is None:
        arguments.seconds = 0.02 if arguments.quick else 0.2
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = first_steps() if arguments.gauges else timings(arguments)
    print(gauge_table(rows) if arguments.gauges else f"{timing_table(rows, arguments.backends)}\n\n{fastest(rows)}")
    output = arguments.output
    if output is None and not arguments.quick:
        output = RESULTS / ("gauges.json" if arguments.gauges else "factorizations.json")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
