"""Time and memory of training α-LoRA and TT-LoRA beside plain LoRA, interleaved in one run.

    python benchmarks/layers.py
    python benchmarks/layers.py --quick     # a small model, to see it work in seconds

The model has T5-Base's shape with two layers a side and random weights; every variant is a copy of it that shares the frozen
base. A round times one step of each variant, in an order that rotates. A ratio is a variant's time over plain LoRA's of the
same round; the table gives medians with quartiles.

For α-LoRA a round times a step of the adapter, `s`, and a step of α on a mini-batch of its own, `a`. With the period T,

- a step of the adapter takes `s + a / T` altogether. α has one mini-batch more in T steps, so that this is about `1 + 1 / T`
  of LoRA's step even if scaling itself cost nothing;
- a mini-batch takes `(T s + a) / (T + 1)`, which compares runs that see the same number of mini-batches.

Both times are given: of the clock, and of the processor. On a machine that others use too the second is the steadier one.

TT-LoRA has rank 8 and the near-square factors of each dimension as modes, or three factors of each.

Memory is the peak of torch's CPU allocations in one step above what is there before it, with the optimizer's state made.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from provenance import environment, write_json
from rich.console import Console
from step_overhead import T5_LINEARS, share_base
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import T5Config, T5ForConditionalGeneration

from tnadapt import RowRescale, TTLoraLinear, add_adapters

RESULTS = Path(__file__).parent / "results"
PERIODS = (20, 1)
GOAL = 1.05  # times LoRA, at T = 20
VARIANTS = ("LoRA", "α-LoRA", "TT-LoRA, 2 + 2 modes", "TT-LoRA, 3 + 3 modes")
TARGETS = rf"\.({'|'.join(T5_LINEARS)})$"
#: three factors of each dimension of T5-Base, and of the small model
MODES = {768: (8, 8, 12), 3072: (12, 16, 16), 64: (4, 4, 4), 128: (4, 4, 8)}


#: of the clock and of the processor
Seconds = tuple[float, ...]


def now() -> Seconds:
    return time.perf_counter(), time.process_time()


def build_base(quick: bool) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    width, inner, heads = (64, 128, 4) if quick else (768, 3072, 12)
    config = T5Config(
        d_model=width,
        d_kv=width // heads,
        d_ff=inner,
        num_layers=2,
        num_heads=heads,
        vocab_size=2048,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).requires_grad_(False)


class Variant:
    """One way to train: a model, its optimizer, and α where there is one."""

    def __init__(self, name: str, base: nn.Module, batch: dict[str, Tensor]) -> None:
        self.name, self.batch = name, batch
        self.model = share_base(base)
        torch.manual_seed(1)
        if name.startswith("TT-LoRA"):
            self._add_tensor_trains(three=name.endswith("3 + 3 modes"))
        else:
            add_adapters(self.model, TARGETS, rank=8, alpha=16)
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.rescale: RowRescale | None = None
        if name == "α-LoRA":
            self.rescale = RowRescale(
                self.model, optimizer=lambda alphas: torch.optim.AdamW(alphas, lr=1e-4, fused=True), every=1
            )
        self.trained = sum(p.numel() for p in trained)
        if self.rescale is not None:
            self.trained += sum(alpha.numel() for alpha in self.rescale.alphas.values())

    def _add_tensor_trains(self, three: bool) -> None:
        if not three:
            add_adapters(self.model, TARGETS, kind=TTLoraLinear, rank=8)
            return
        linear = {
            n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and n.endswith(tuple(T5_LINEARS))
        }
        by_shape: dict[tuple[int, int], list[str]] = {}
        for name, layer in linear.items():
            by_shape.setdefault((layer.out_features, layer.in_features), []).append(name)
        for (rows, cols), names in by_shape.items():
            add_adapters(self.model, names, kind=TTLoraLinear, rank=8, shape=(MODES[rows], MODES[cols]))

    def loss(self) -> Tensor:
        return self.model(**self.batch).loss  # type: ignore[no-any-return]

    def step(self) -> tuple[Seconds, Seconds]:
        """A step of the adapter, and one of α."""
        started = now()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        between = now()
        if self.rescale is not None:
            self.rescale.step(self.loss)
        return tuple(b - a for a, b in zip(started, between, strict=True)), tuple(
            b - a for a, b in zip(between, now(), strict=True)
        )

    def peak_bytes(self) -> int:
        """Largest sum of allocations in a step of the adapter and, where there is one, of α, above what was there before."""
        self.step()  # makes the optimizer's state
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            self.step()
        changes = sorted(
            (event.start_ns(), event.nbytes())
            for event in recorded.profiler.kineto_results.events()
            if event.name() == "[memory]"
        )
        now = peak = 0
        for _, change in changes:
            now += change
            peak = max(peak, now)
        return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="width 64, batch 2x16, two repeats")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.batch, arguments.sequence, arguments.repeats = 2, 16, 2
    base = build_base(arguments.quick)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2048, (arguments.batch, arguments.sequence), generator=generator)
    batch = {"input_ids": ids, "labels": ids[:, :8].contiguous()}
    variants = [Variant(name, base, batch) for name in VARIANTS]
    peaks = {variant.name: variant.peak_bytes() for variant in variants}  # warms up, too
    times: dict[str, list[tuple[Seconds, Seconds]]] = {variant.name: [] for variant in variants}
    with tqdm(total=arguments.repeats * len(variants), unit="step") as bar:
        for k in range(arguments.repeats):
            turn = k % len(variants)
            for variant in variants[turn:] + variants[:turn]:
                times[variant.name].append(variant.step())
                bar.update()
    rows = [row for variant in variants for row in _rows(variant, times, peaks[variant.name])]
    _show(rows, arguments)
    settings = {k: v for k, v in vars(arguments).items() if k != "output"}
    file = arguments.output / "layers.json"
    write_json(file, {"settings": settings, "rows": rows, "provenance": environment(Path(__file__).parent)})
    Console().print(f"written: {file}")


def _rows(variant: Variant, times: dict[str, list[tuple[Seconds, Seconds]]], peak: int) -> list[dict[str, Any]]:
    """The rows of a variant: one, or for α-LoRA one for each period."""
    rows = []
    for period in PERIODS if variant.rescale is not None else (None,):
        # without a period, the seconds of α are zero
        share = 0.0 if period is None else 1 / period
        clock, processor = (
            statistics.quantiles(
                (own[k] + share * alpha[k]) / plain[k]
                for (own, alpha), (plain, _) in zip(times[variant.name], times["LoRA"], strict=True)
            )
            for k in (0, 1)
        )
        rows.append(
            {
                "variant": variant.name if period is None else f"{variant.name}, T = {period}",
                "step_ratio": clock[1],
                "step_ratio_quartiles": [clock[0], clock[2]],
                "processor_ratio": processor[1],
                "processor_ratio_quartiles": [processor[0], processor[2]],
                "batch_ratio": processor[1] / (1 + share),
                "seconds": statistics.median(own[0] for own, _ in times[variant.name]),
                "alpha_seconds": statistics.median(alpha[0] for _, alpha in times[variant.name]),
                "trained_parameters": variant.trained,
                "peak_bytes": peak,
            }
        )
    return rows


def _show(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    plain = rows[0]
    lines = [
        f"{'Small shape' if arguments.quick else 'T5-Base shape'}, 2+2 layers, batch {arguments.batch}x{arguments.sequence}, {arguments.threads} thread(s); LoRA takes "
        f"{plain['seconds'] * 1000:.0f} ms a step and {plain['peak_bytes'] / 2**20:.0f} MiB.",
        "",
        "| variant | a step, clock | quartiles | a step, processor | quartiles | a mini-batch, processor | trained numbers | memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['variant']} | {row['step_ratio']:.3f} | {_range(row['step_ratio_quartiles'])} | "
        f"{row['processor_ratio']:.3f} | {_range(row['processor_ratio_quartiles'])} | {row['batch_ratio']:.3f} | "
        f"{row['trained_parameters']:,} | {row['peak_bytes'] / plain['peak_bytes']:.3f} |"
        for row in rows
    ]
    console = Console(soft_wrap=True)
    console.print("\n<!-- layers -->\n" + "\n".join(lines) + "\n", markup=False, highlight=False)
    alpha = next(row for row in rows if row["variant"] == "α-LoRA, T = 20")
    for what in ("step", "processor", "batch"):
        verdict = "met" if alpha[f"{what}_ratio"] <= GOAL else "MISSED"
        console.print(
            f"goal ({what}): α-LoRA, T = 20, at most {GOAL}; it takes {alpha[f'{what}_ratio']:.3f}: {verdict}"
        )


def _range(quartiles: list[float]) -> str:
    return f"{quartiles[0]:.3f} - {quartiles[1]:.3f}"


if __name__ == "__main__":
    main()
