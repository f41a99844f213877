"""Where the time of one optimizer step goes, phase by phase, beside the forward and backward pass.

    python benchmarks/profile_step.py                           # T5-Base shape, 3+3 layers, batch 16x64, and the worst case
    python benchmarks/profile_step.py --case t5-gpu             # the cases of step_overhead.py; the -gpu ones need CUDA,
                                                                # or --device cpu
    python benchmarks/profile_step.py --trace trace.json        # also a trace of one step, for chrome://tracing or Perfetto
    python benchmarks/profile_step.py --quick                   # a few steps of the worst case, seconds; others much smaller

All matrices are expanded. Every phase of the step is timed by a stopwatch that stops while an inner phase runs, so the
phases add up to the step; on a GPU the device is waited for at both ends of a phase, which a real step never does. Steps
with and without the stopwatches alternate with plain LoRA's, so that what the watches cost shows. Medians over steps.

Beside it, what one step makes the device do: torch operators, and on a GPU kernels, copies, and the lines at which the host waits
for the device, of which an ordinary step should have none. Those of the step are counted without the forward and backward pass.

Prints a Markdown table and writes the numbers with their provenance to benchmarks/results/profile_step.json.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from devices import DEVICES, require, synchronize, traffic
from provenance import environment, write_json
from rich.console import Console
from step_overhead import CASES, Case, Variant, frozen_base, make_batch, on
from torch import Tensor
from tqdm import tqdm

from tnadapt.engine import Step, cores
from tnadapt.engine.cores import Batch

RESULTS = Path(__file__).parent / "results"

SCHEDULE = "schedule, and be able to undo"
#: (where a function is, its name, the phase it belongs to), in the order of a step
PHASES: list[tuple[Any, str, str]] = [
    (Step, "_resolve", "find parameters and groups"),
    (Step, "_moves_nothing", "find parameters and groups"),
    (Step, "_follow_edits", "compare with outside changes"),
    (Step, "_warn_of_switches", SCHEDULE),
    (Step, "_decide", SCHEDULE),
    (cores, "_rows", "stack gradients"),
    (Batch, "pull_back", "pull back"),
    (Step, "_require_finite_plain", "check gradients"),
    (Step, "_loan_of", "lend cores"),
    (Step, "_lend", "lend cores"),
    (Step, "_prepare", SCHEDULE),
    (Batch, "fold", "refold"),
    (Batch, "refold", "norms, and write matrices"),
    (Step, "_finish", "take cores back"),
]
STEP = "the optimizer itself, on cores and the rest"
ORDER = [*dict.fromkeys(label for _, _, label in PHASES), STEP]


class Watch:
    """Time per phase, an inner phase not counted in the outer one."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self._running: list[str] = []
        self._since = 0.0
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, label: str) -> Iterator[None]:
        self._lap()
        self._running.append(label)
        try:
            yield
        finally:
            self._lap()
            self._running.pop()

    def _lap(self) -> None:
        self._wait()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def around(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(label):
                return function(*args, **kwargs)

        return timed


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Put stopwatches around every phase."""
    patches = [mock.patch.object(at, name, watch.around(getattr(at, name), label)) for at, name, label in PHASES]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def forward_backward(variant: Variant, batch: dict[str, Tensor]) -> float:
    """Fill the gradients of one step; returns its seconds."""
    synchronize(variant.case.device)
    started = time.perf_counter()
    variant.forward_backward(batch)
    synchronize(variant.case.device)
    return time.perf_counter() - started


def optimizer_step(variant: Variant) -> float:
    synchronize(variant.case.device)
    started = time.perf_counter()
    variant.optimizer.step()
    synchronize(variant.case.device)
    seconds = time.perf_counter() - started
    variant.optimizer.zero_grad()
    return seconds


def profile(name: str, case: Case, repeats: int, warmup: int, trace: Path | None) -> dict[str, Any]:
    base, targets, task = frozen_base(case)
    # T5's loss takes a view of the labels, which must be in one piece for that
    batch = {key: value.contiguous() for key, value in make_batch(case, base.config.vocab_size).items()}
    plain, ours = (Variant(v, case, base, targets, task) for v in ("plain", "mpo"))
    assert ours.over is not None
    series: dict[str, list[float]] = defaultdict(list)
    phases: list[dict[str, float]] = []
    for k in tqdm(range(warmup + repeats), desc=name, unit="step"):
        passes = forward_backward(plain, batch)
        alone = optimizer_step(plain)
        forward_backward(ours, batch)
        unwatched = optimizer_step(ours)
        forward_backward(ours, batch)
        watch = Watch(lambda: synchronize(case.device))
        with watched(watch), watch.phase(STEP):
            optimizer_step(ours)
        if k >= warmup:
            series["forward and backward"].append(passes)
            series["plain step"].append(alone)
            series["step"].append(unwatched)
            phases.append(watch.seconds)
    if trace is not None:
        forward_backward(ours, batch)
        with torch.profiler.profile() as profiler:
            optimizer_step(ours)
        profiler.export_chrome_trace(str(trace))
    work = {
        "optimizer.step()": lambda: ours.optimizer.step(),
        "optimizer.step() of plain LoRA": lambda: plain.optimizer.step(),
        "forward and backward of plain LoRA": lambda: plain.forward_backward(batch),
    }
    for variant in (plain, ours):
        forward_backward(variant, batch)
    done = [{"of": what, **vars(traffic(each, case.device))} for what, each in work.items()]
    medians = {label: statistics.median(seconds) for label, seconds in series.items()}
    rows = [{"phase": label, "seconds": statistics.median(p.get(label, 0.0) for p in phases)} for label in ORDER]
    cohorts = len(ours.over._expanded.now.cohorts)
    return {
        "case": name,
        "model": case.model,
        "batch": [case.batch, case.sequence],
        "order": case.order,
        "matrices": len(ours.over.expanded),
        "cohorts": cohorts,
        "device": case.device,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        **{f"{label.replace(' ', '_')}_seconds": seconds for label, seconds in medians.items()},
        "rows": rows,
        "traffic": done,
    }


def markdown(result: dict[str, Any]) -> str:
    """The table of the docs."""
    whole = result["forward_and_backward_seconds"] + result["plain_step_seconds"]
    total = sum(row["seconds"] for row in result["rows"])
    lines = [
        f"{result['case']}: {result['matrices']} matrices in {result['cohorts']} cohorts, order {result['order']}, batch "
        f"{result['batch'][0]}x{result['batch'][1]}, {result['threads']} threads.",
        "",
        "| phase | ms | of a whole step of plain LoRA |",
        "|---|---:|---:|",
    ]
    lines += [
        f"| {row['phase']} | {row['seconds'] * 1e3:.2f} | {row['seconds'] / whole:.1%} |" for row in result["rows"]
    ]
    lines += [
        f"| **`optimizer.step()`, watched** | {total * 1e3:.2f} | {total / whole:.1%} |",
        f"| `optimizer.step()`, unwatched | {result['step_seconds'] * 1e3:.2f} | {result['step_seconds'] / whole:.1%} |",
        f"| `optimizer.step()` of plain LoRA | {result['plain_step_seconds'] * 1e3:.2f} | "
        f"{result['plain_step_seconds'] / whole:.1%} |",
        f"| forward and backward of plain LoRA | {result['forward_and_backward_seconds'] * 1e3:.2f} | "
        f"{result['forward_and_backward_seconds'] / whole:.1%} |",
        "",
        "| in one step | operators | kernels | copies and fills | waits of the host |",
        "|---|---:|---:|---:|---|",
    ]

    def shown(value: Any) -> str:
        return "–" if value is None else str(value) if isinstance(value, int) else ", ".join(value) or "none"

    lines += [
        f"| {row['of']} | {' | '.join(shown(row[key]) for key in ('operators', 'launches', 'copies', 'waits'))} |"
        for row in result["traffic"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="may be given several times")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--trace", type=Path, help="file for a trace of one step of the last case")
    parser.add_argument("--device", choices=DEVICES, help="in place of that of the case")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="three steps of the worst case; of a --case at a few hundredths of its size",
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = arguments.case or (["t5-cpu-short"] if arguments.quick else ["t5-cpu", "t5-cpu-short"])
    repeats, warmup = (3, 2) if arguments.quick else (arguments.repeats, arguments.warmup)
    warnings.filterwarnings("ignore", message="TaylorRuntime: top_n")
    console = Console(soft_wrap=True)
    results = []
    for name in names:
        case = on(CASES[name], arguments.device, arguments.quick and bool(arguments.case))
        require(case.device, f"case {name}")
        trace = arguments.trace if name == names[-1] else None
        results.append(profile(name, case, repeats, warmup, trace))
        console.print(f"\n<!-- profile-{name} -->\n{markdown(results[-1])}\n", markup=False, highlight=False)
    file = arguments.output / "profile_step.json"
    write_json(file, {"cases": results, "provenance": environment(Path(__file__).parent)})
    console.print(f"written: {file}")


if __name__ == "__main__":
    main()
