"""How the cost of LoRA-Over grows, one factor at a time.

    python benchmarks/scaling.py                                # every factor, minutes
    python benchmarks/scaling.py --factors order bond           # some of them
    python benchmarks/scaling.py --device cuda                  # on a GPU (all but those of several ranks, which are on the CPU)
    python benchmarks/scaling.py --quick                        # two points per factor, seconds

For `matrices`, `rounds`, `order`, `bond` and `layers` the cost is that of the coupling alone: `optimizer.step()` with
LoraOver, which pulls gradients back, steps the cores and refolds, minus the same call on plain LoRA. Gradients are random
numbers, so nothing else is timed. For `accumulation` and `ranks` it is a whole training step's time over plain LoRA's,
minus one; for `dealt-out` it is that of a step with cores dealt out over the ranks over one with all cores on every rank. All points of a factor are timed in turn, in rounds; a cost is a median over rounds, with its quartiles.

Two fits by least squares: a power law (exponent 1: the cost doubles with the factor; 0: it does not depend on it), and a
line, whose intercept is what one pays whatever the factor.

Prints a Markdown table, writes the numbers with their provenance to benchmarks/results/scaling.json and a picture with a
panel per factor to benchmarks/results/scaling.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn
from devices import DEVICES, require, synchronize
from provenance import environment, read_json, write_json
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from tnadapt import MPO, Factorization, LoraOver, OverParamAdapter, Scheduler, Static, TrainedMatrix

RESULTS = Path(__file__).parent / "results"
RANK = 8
#: small enough that cores stay where they are, however often they are stepped with one gradient
RATE = 1e-7


@dataclass(frozen=True)
class Factor:
    """What is varied, over which values, and what is measured."""

    title: str
    values: tuple[int, ...]
    few: tuple[int, ...]
    measured: str


COUPLING, WHOLE = "ms of the coupling", "whole step / plain LoRA - 1"
DEALT_OUT = "whole step / all cores on every rank - 1"
FACTORS = {
    "matrices": Factor("expanded matrices (768x8, order 9)", (1, 4, 16, 64, 256), (1, 4), COUPLING),
    "rounds": Factor("rounds that expanded 64 matrices (768x8, order 9)", (1, 2, 4, 8, 16, 32), (1, 2), COUPLING),
    "order": Factor("order (32 matrices of 768x8)", (2, 4, 8, 16, 32), (2, 4), COUPLING),
    "bond": Factor("largest bond (8 matrices of 4096x8, order 9)", (8, 16, 32, 64, 128), (8, 16), COUPLING),
    "layers": Factor("layers (4 pairs of 768 each, order 9)", (2, 4, 8, 16, 32), (1, 2), COUPLING),
    "accumulation": Factor("accumulated micro-batches (small Llama, order 9)", (1, 2, 4, 8, 16), (1, 2), WHOLE),
    "ranks": Factor("ranks in DDP (gloo, 8 layers of 768, order 9)", (1, 2, 4), (1, 2), WHOLE),
    "dealt-out": Factor("ranks that share the cores (T5, 16x64 each, order 16)", (1, 2), (1, 2), DEALT_OUT),
}
#: factors that are measured with processes
RANKS = ("ranks", "dealt-out")


class InRounds(Scheduler):
    """Every matrix, in rounds at consecutive steps."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def select(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> Iterable[str]:
        return list(matrices)[step - 1 :: self.rounds] if 1 <= step <= self.rounds else ()


def pairs(count: int, width: int) -> nn.Module:
    """LoRA pairs without the layers around them."""
    torch.manual_seed(0)
    halves = [(nn.Linear(width, RANK, bias=False), nn.Linear(RANK, width, bias=False)) for _ in range(count)]
    return nn.ModuleList(OverParamAdapter(*half) for half in halves)


class Stepper:
    """A model whose gradients are random numbers, and its optimizer."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self.model, self.device = model.to(device), device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)

    def step(self) -> float:
        """Step the optimizer; the gradients stay. Returns seconds."""
        synchronize(self.device)
        started = time.perf_counter()
        self.optimizer.step()
        synchronize(self.device)
        return time.perf_counter() - started


class CouplingPoint:
    """One value of a factor: a plain and an expanded model that are alike."""

    def __init__(self, factor: str, value: int, device: str) -> None:
        factorization: Factorization = MPO(order=9)
        scheduler: Scheduler = Static()
        layers, width = 32, 768
        if factor == "matrices":
            layers, scheduler = 256, Static([f"{k}.B" for k in range(value)])
        elif factor == "rounds":
            scheduler = InRounds(value)
        elif factor == "order":
            factorization, scheduler = MPO(order=value), Static(r"\.B$")
        elif factor == "bond":
            layers, width, scheduler = 8, 4096, Static(r"\.B$")
            factorization = MPO(order=9, max_bond=value)
        elif factor == "layers":
            layers = 4 * value
        else:
            raise ValueError(f"{factor!r} is no factor of the coupling")
        self.plain, self.ours = (Stepper(pairs(layers, width), device) for _ in range(2))
        over = LoraOver(self.ours.model, self.ours.optimizer, factorization, scheduler)
        # expansion is no part of the cost of a step
        for _ in range(value + 2 if factor == "rounds" else 2):
            self.ours.step()
            self.plain.step()
        self.trained = over.trained_parameters - over.lora_parameters

    def cost(self) -> float:
        """Milliseconds of the coupling in one step."""
        return (self.ours.step() - self.plain.step()) * 1e3


class AccumulationPoint:
    """Whole steps of a small Llama with `value` micro-batches."""

    def __init__(self, value: int, device: str, small: bool) -> None:
        # takes seconds to import, and no other factor needs it
        from step_overhead import Case, Variant, build_base, make_batch

        layers, sequence = (1, 8) if small else (4, 64)
        case = Case("llama-3.1-8b/16", layers, 2 * value, 2, sequence, 9, 1, device, math.inf)
        base, targets, task = build_base(case)
        base.requires_grad_(False)
        self.batch = make_batch(case, base.config.vocab_size)
        self.plain, self.ours = (Variant(v, case, base, targets, task) for v in ("plain", "mpo"))
        for _ in range(2):
            self.cost()

    def cost(self) -> float:
        """Share of a step's time that LoRA-Over adds."""
        return self.ours.step(self.batch) / self.plain.step(self.batch) - 1.0


def interleaved(points: Mapping[int, Any], repeats: int, name: str) -> dict[int, list[float]]:
    """Costs of all points, taken in turn."""
    costs: dict[int, list[float]] = {value: [] for value in points}
    values = list(points)
    with tqdm(total=repeats * len(values), desc=name, unit="step") as bar:
        for k in range(repeats):
            turn = k % len(values)
            for value in values[turn:] + values[:turn]:
                costs[value].append(points[value].cost())
                bar.update()
    return costs


class Stack(nn.Module):
    """Frozen layers with adapters, for DDP."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(OverParamAdapter.from_linear(nn.Linear(width, width), RANK) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.nn.functional.gelu(layer(x)) + x
        return x


def ddp_worker(rank: int, world: int, folder: str, name: str, repeats: int, small: bool) -> None:
    """One rank: whole steps in two ways, in turn. The first rank writes its ratios.

    Nothing may hold the process group once it is destroyed: threads of gloo that live when the interpreter goes abort the
    process now and then. Models and optimizers do, in cycles, and so do the defaults of torch.distributed.nn where it is
    first imported (torch.optim does so late) after the group was made: it is imported at the top.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        ratios = ddp_ratios(rank, name, repeats, small)
        if rank == 0:
            write_json(Path(folder) / "ratios.json", ratios)
        dist.barrier()
    finally:
        gc.collect()
        dist.destroy_process_group()


def stacks(rank: int, small: bool) -> tuple[list[nn.Module], Callable[[nn.Module], torch.Tensor]]:
    """Two like stacks of layers, and their loss."""
    layers, width, rows = (1, 64, 4) if small else (8, 768, 512)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rank))
    return [Stack(layers, width) for _ in range(2)], lambda model: model(x).square().mean()


def t5s(rank: int) -> tuple[list[nn.Module], Callable[[nn.Module], torch.Tensor]]:
    """Two T5 with LoRA that share their base, and their loss."""
    # takes seconds to import, and no other factor needs it
    from peft import LoraConfig, get_peft_model
    from step_overhead import CASES, build_base, make_batch, share_base

    case = CASES["t5-cpu"]
    base, targets, task = build_base(case)
    base.requires_grad_(False)
    lora = LoraConfig(r=RANK, target_modules=targets, task_type=task)
    models = [get_peft_model(share_base(base), lora) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    torch.manual_seed(rank)
    batch = make_batch(case, base.config.vocab_size)
    return models, lambda model: model(**batch).loss


def ddp_ratios(rank: int, name: str, repeats: int, small: bool) -> list[float]:
    """Time of a whole step of the second of two ways to train over that of the first, minus one."""
    dealt = name == "dealt-out"
    models, loss = t5s(rank) if dealt and not small else stacks(rank, small)
    trained: list[nn.Module] = [DistributedDataParallel(model) for model in models]
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=RATE, fused=True) for m in trained
    ]
    order = 16 if dealt else 9
    LoraOver(trained[1], optimizers[1], MPO(order=order), shard=dealt)
    if dealt:
        LoraOver(trained[0], optimizers[0], MPO(order=order))
    ratios = []
    for k in range(repeats + 3):
        seconds = [0.0, 0.0]
        for which in (0, 1) if k % 2 else (1, 0):
            dist.barrier()
            started = time.perf_counter()
            loss(trained[which]).backward()
            optimizers[which].step()
            optimizers[which].zero_grad()
            seconds[which] = time.perf_counter() - started
        if k >= 3:
            ratios.append(seconds[1] / seconds[0] - 1.0)
    return ratios


def ddp_costs(name: str, worlds: Sequence[int], repeats: int, small: bool) -> dict[int, list[float]]:
    """Ratios by number of processes. Rounds of processes alternate, so that a busy spell hits all."""
    costs: dict[int, list[float]] = {world: [] for world in worlds}
    spells = 1 if small else 3
    with tqdm(total=spells * len(worlds), desc=name, unit="run") as bar:
        for _ in range(spells):
            for world in worlds:
                with tempfile.TemporaryDirectory() as folder:
                    torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
                        ddp_worker, (world, folder, name, -(-repeats // spells), small), nprocs=world
                    )
                    costs[world] += read_json(Path(folder) / "ratios.json")
                bar.update()
    return costs


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Least squares: intercept, slope and the share of the variance they explain."""
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    intercept = mean_y - slope * mean_x
    total = sum((b - mean_y) ** 2 for b in y)
    missed = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return intercept, slope, 1.0 - missed / total if total > 0 else 1.0


def summarize(name: str, costs: Mapping[int, list[float]]) -> dict[str, Any]:
    """Medians, quartiles and both fits of one factor."""
    points = []
    for value, series in costs.items():
        low, middle, high = statistics.quantiles(series, n=4) if len(series) > 1 else series * 3
        points.append({"value": value, "median": middle, "quartiles": [low, high]})
    x, y = [float(p["value"]) for p in points], [float(p["median"]) for p in points]
    intercept, slope, explained = line(x, y)
    # where noise made a cost negative there is no power law
    positive = all(cost > 0 for cost in y)
    log_factor, exponent, power_explained = (
        line([math.log(v) for v in x], [math.log(v) for v in y]) if positive else (math.nan,) * 3
    )
    return {
        "factor": name,
        **{k: v for k, v in dataclasses.asdict(FACTORS[name]).items() if k in ("title", "measured")},
        "points": points,
        "power_law": {"exponent": exponent, "factor": math.exp(log_factor), "r2": power_explained},
        "line": {"intercept": intercept, "slope": slope, "r2": explained},
    }


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    factor = FACTORS[name]
    values = factor.few if arguments.quick else factor.values
    repeats = 3 if arguments.quick else arguments.repeats
    if name in RANKS:
        return summarize(name, ddp_costs(name, values, repeats, arguments.quick))
    if name == "accumulation":
        points: dict[int, Any] = {v: AccumulationPoint(v, arguments.device, arguments.quick) for v in values}
    else:
        points = {v: CouplingPoint(name, v, arguments.device) for v in values}
    return summarize(name, interleaved(points, repeats, name))


def draw(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """A panel per factor: medians with quartiles, and the fitted line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 3.1 * rows), squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.set_axis_off()
    for axis, result in zip(axes.flat, results, strict=False):
        x = [p["value"] for p in result["points"]]
        y = [p["median"] for p in result["points"]]
        errors = [[max(0.0, p["median"] - p["quartiles"][0]) for p in result["points"]]]
        errors.append([max(0.0, p["quartiles"][1] - p["median"]) for p in result["points"]])
        axis.errorbar(x, y, yerr=errors, fmt="o", capsize=3, color="tab:blue", label="median, quartiles")
        fit = result["line"]
        axis.plot(x, [fit["intercept"] + fit["slope"] * v for v in x], color="tab:orange", label="line")
        if not math.isnan(result["power_law"]["exponent"]):
            law = result["power_law"]
            label = f"power law, exponent {law['exponent']:.2f}"
            axis.plot(x, [law["factor"] * v ** law["exponent"] for v in x], "--", color="tab:green", label=label)
        axis.set_xscale("log", base=2)
        if min(y) > 0:
            axis.set_yscale("log")
        axis.set_xticks(x, [str(v) for v in x])
        axis.set_xlabel(result["title"], fontsize=8)
        axis.set_ylabel(result["measured"], fontsize=8)
        axis.tick_params(labelsize=7, which="both")
        axis.legend(fontsize=6)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The table of the docs."""
    lines = [
        "| factor | from - to | cost at the first | at the last | exponent of a power law | line: fixed + per unit |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for result in results:
        first, last = result["points"][0], result["points"][-1]
        unit = (lambda v: f"{v:.3g} ms") if result["measured"] == COUPLING else (lambda v: f"{100 * v:.2g} %")
        fit = result["line"]
        lines.append(
            f"| {result['title']} | {first['value']} - {last['value']} | {unit(first['median'])} | {unit(last['median'])} | "
            f"{result['power_law']['exponent']:.2f} | {unit(fit['intercept'])} + {unit(fit['slope'])} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", nargs="+", choices=list(FACTORS), default=list(FACTORS))
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--quick", action="store_true", help="two points per factor, three repeats")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    require(arguments.device, "--device cuda")
    torch.set_num_threads(arguments.threads)
    names = [name for name in arguments.factors if not (name in RANKS and arguments.device == "cuda")]
    results = []
    for name in names:
        results.append(measure(name, arguments))
    console = Console(soft_wrap=True)
    console.print(f"\n<!-- scaling -->\n{markdown(results)}\n", markup=False, highlight=False)
    suffix = "" if arguments.device == "cpu" else f"-{arguments.device}"
    draw(results, arguments.output / f"scaling{suffix}.png")
    settings = {"device": arguments.device, "repeats": arguments.repeats, "threads": arguments.threads}
    file = arguments.output / f"scaling{suffix}.json"
    write_json(file, {"settings": settings, "factors": results, "provenance": environment(Path(__file__).parent)})
    console.print(f"written: {file}")


if __name__ == "__main__":
    main()
