"""Time per optimizer step and memory of every way to train, beside plain LoRA, interleaved in one run.

    python benchmarks/step_overhead.py --case t5-cpu            # T5-Base shape, 3+3 layers, batch 16x64
    python benchmarks/step_overhead.py --case t5-cpu-short      # 2+2 layers, one 32-token sequence per step: the worst case
    python benchmarks/step_overhead.py --case llama31-cpu       # a sixteenth of Llama 3.1-8B's width: does it run
    python benchmarks/step_overhead.py --case llama31-gpu       # Llama 3.1-8B, attention LoRA, 512 tokens, batch 64
    python benchmarks/step_overhead.py --case llama2-gpu --case t5-gpu --case t5-gpu-short
    python benchmarks/step_overhead.py --case llama31-gpu --device cpu --quick      # to see a case work anywhere, in seconds

Every variant is a copy of one model with random weights that shares the frozen base, so that an 8B model is in memory
once. A round times one step of each variant, in an order that rotates; a ratio is a variant's time over plain LoRA's of the
same round, and the table gives the median of the ratios with their quartiles. The `-gpu` cases need CUDA; `--device` puts a case elsewhere.

Variants: plain PEFT LoRA; tnadapt with SVD, MPO, MPO with matched steps, and MPO expanded in rounds (timed after the last one); the paper's way,
autograd through one contraction per matrix in each forward (torch parametrizations); PEFT's DoRA and AdaLoRA; α-LoRA; TT-LoRA of rank 8,
with two or three modes for each dimension; full fine-tuning of the same layers, and OPF, which trains them through MPOs of order 2.
OPF's ratios are to full fine-tuning.

A round of α-LoRA times a step of the adapter, `s`, and a step of α on a mini-batch of its own, `a`. With the period T = 20 and LoRA's
step as 1, its rows are

- `between α's steps`: `s`, what scaling the rows costs;
- `T = 20`: `s + a / T`, a step of the adapter with its share of α's. That is about 1.05 even if scaling cost nothing, because α has a
  mini-batch more in twenty steps;
- `T = 20, by mini-batch`: `(T s + a) / (T + 1)`, which compares runs that see equally many mini-batches.

Memory: `kept` is what a way to train adds to the frozen base between two steps (trained numbers, state of the optimizer, buffers; for full
fine-tuning and OPF the weights themselves, too), `peak` what one step needs above that at most. Both are sums of what torch's allocator
gives and takes back, as its profiler records them on the CPU and `torch.cuda.memory_stats` on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from devices import DEVICES, require, synchronize, watched_memory
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from provenance import environment, write_json
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from tnadapt import (
    MPO,
    SVD,
    Factorization,
    LoraOver,
    RowRescale,
    Scheduler,
    Static,
    TaylorRuntime,
    TTLoraLinear,
    add_adapters,
    finders,
)

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """A model shape and a batch. `batch` is the whole batch of a step, in micro-batches of `micro`; with `recompute`, activations
    are computed again in the backward pass."""

    model: str
    layers: int
    batch: int
    micro: int
    sequence: int
    order: int
    rounds: int
    device: str
    goal: float | None  # times plain LoRA
    recompute: bool = False


CASES = {
    "t5-cpu": Case("t5-base", 3, 16, 16, 64, 16, 3, "cpu", 1.05),
    "t5-cpu-short": Case("t5-base", 2, 1, 1, 32, 16, 2, "cpu", 1.30),
    "llama31-cpu": Case("llama-3.1-8b/16", 4, 4, 4, 64, 10, 4, "cpu", None),
    "llama31-gpu": Case("llama-3.1-8b", 32, 64, 8, 512, 10, 8, "cuda", 1.02, recompute=True),
    "llama2-gpu": Case("llama-2-7b", 32, 32, 4, 1024, 9, 8, "cuda", 1.02, recompute=True),
    "t5-gpu": Case("t5-base", 12, 32, 32, 128, 16, 8, "cuda", 1.10),
    "t5-gpu-short": Case("t5-base", 12, 1, 1, 32, 16, 8, "cuda", 1.25),
}
VARIANTS = (
    "plain", "svd", "mpo", "mpo-r", "paper's way", "dora", "adalora",
    "α-lora", "tt-lora, 2 + 2 modes", "tt-lora, 3 + 3 modes", "full", "opf",
)  # fmt: skip
#: what a variant is compared with, where that is not plain LoRA
BESIDE = {"opf": "full"}
PERIOD = 20
ALPHA_GOAL = 1.05

#: rounds of measurements that are made whatever they take
ROUNDS = 5

T5_LINEARS = ["q", "k", "v", "o", "wi", "wo"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LLAMA = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def on(case: Case, device: str | None, quick: bool) -> Case:
    """The case on another device, and with `quick` at a few hundredths of its size."""
    if quick:
        model = case.model.partition("/")[0]
        batch = min(case.batch, 2)
        case = replace(
            case,
            model=f"{model}/{12 if model == 't5-base' else 16}",
            layers=1,
            batch=batch,
            micro=1 if case.micro < case.batch else batch,
            sequence=16,
            order=4,
            rounds=1,
            goal=None,
        )
    return replace(case, device=device or case.device)


def build_base(case: Case) -> tuple[PreTrainedModel, list[str], str]:
    """The base model with random weights, its LoRA targets and PEFT task type."""
    torch.manual_seed(0)
    if case.model.startswith("t5-base"):
        shrink = 12 if case.model.endswith("/12") else 1
        config = T5Config(
            d_model=768 // shrink,
            d_kv=64,
            d_ff=3072 // shrink,
            num_layers=case.layers,
            num_heads=12 // shrink,
            vocab_size=32128,
            decoder_start_token_id=0,
        )
        if case.device == "cpu":
            config.vocab_size = 2048
        return T5ForConditionalGeneration(config).to(case.device), T5_LINEARS, "SEQ_2_SEQ_LM"
    shrink = 16 if case.model.endswith("/16") else 1
    llama3 = case.model.startswith("llama-3.1")
    config = LlamaConfig(
        hidden_size=4096 // shrink,
        intermediate_size=(14336 if llama3 else 11008) // shrink,
        num_hidden_layers=case.layers,
        num_attention_heads=32 // (4 if shrink > 1 else 1),
        num_key_value_heads=(8 if llama3 else 32) // (4 if shrink > 1 else 1),
        vocab_size=(128256 if llama3 else 32000) // shrink,
        tie_word_embeddings=False,
        use_cache=False,
    )
    dtype = torch.bfloat16 if case.device == "cuda" else torch.float32
    with torch.device(case.device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    return model, ATTENTION if llama3 else ALL_LLAMA, "CAUSAL_LM"


def frozen_base(case: Case) -> tuple[PreTrainedModel, list[str], str]:
    """As `build_base`, ready to be shared by variants."""
    base, targets, task = build_base(case)
    base.requires_grad_(False)
    if case.recompute:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return base, targets, task


def share_base(model: nn.Module) -> Any:
    """A copy of the modules of `model` around the same parameters and buffers."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=dict(shared))


class ContractedEachForward(nn.Module):
    """The paper's way: a LoRA weight that is contracted from its cores whenever it is read, with autograd through it."""

    def __init__(self, factorization: Factorization) -> None:
        super().__init__()
        self.factorization = factorization

    def forward(self, *cores: Tensor) -> Tensor:
        return self.factorization.fold(cores)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        return self.factorization.unfold(weight)


def three_modes(dimension: int) -> tuple[int, int, int]:
    """Three factors with the smallest sum."""
    factors = [k for k in range(1, dimension + 1) if dimension % k == 0]
    triples = [(a, b, dimension // (a * b)) for a in factors for b in factors if a <= b and dimension % (a * b) == 0]
    return min((triple for triple in triples if triple[1] <= triple[2]), key=sum)


def with_tensor_trains(model: nn.Module, targets: list[str], three: bool) -> nn.Module:
    """`model` with TT-LoRA of rank 8 on its targets, with three modes for each dimension or with two."""
    by_shape: dict[tuple[int, int], list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in targets:
            by_shape.setdefault((layer.out_features, layer.in_features), []).append(name)
    for shape, names in by_shape.items():
        modes = tuple(three_modes(dimension) for dimension in shape) if three else None
        add_adapters(model, names, kind=TTLoraLinear, rank=8, shape=modes)
    return model


def with_trained_weights(model: nn.Module, targets: list[str]) -> nn.Module:
    """`model` with the weights of its targets as copies that are trained."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in targets:
            layer.weight = nn.Parameter(layer.weight.detach().clone())
    return model


def with_lora(name: str, model: nn.Module, targets: list[str], task: str) -> nn.Module:
    """`model` with PEFT's adapters of rank 8."""
    lora: dict[str, Any] = {"target_modules": targets, "task_type": task}
    if name == "adalora":
        config: Any = AdaLoraConfig(
            init_r=12, target_r=8, lora_alpha=16, tinit=2, tfinal=10, deltaT=1, total_step=100_000, **lora
        )
    else:
        config = LoraConfig(r=8, lora_alpha=16, use_dora=name == "dora", **lora)
    return get_peft_model(model, config)


class Variant:
    """One way to train: a model, its optimizer, and what happens in a step."""

    def __init__(self, name: str, case: Case, base: PreTrainedModel, targets: list[str], task: str) -> None:
        self.name, self.case = name, case
        self.after_step: Callable[[int], None] = lambda step: None
        model = share_base(base)
        torch.manual_seed(1)
        if name.startswith("tt-lora"):
            self.model = with_tensor_trains(model, targets, three=name.endswith("3 + 3 modes"))
        elif name in ("full", "opf"):
            self.model = with_trained_weights(model, targets)
        else:
            self.model = with_lora(name, model, targets, task)
        if name == "paper's way":
            for module in list(self.model.modules()):
                if isinstance(module, nn.Linear) and module.weight.requires_grad:
                    parametrize.register_parametrization(module, "weight", ContractedEachForward(MPO(order=case.order)))
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.over: LoraOver | None = None
        schedule: dict[str, tuple[Factorization, Scheduler]] = {
            "svd": (SVD(), Static()),
            "mpo": (MPO(order=case.order), Static()),
            "mpo, matched": (MPO(order=case.order), Static()),
            "mpo-r": (MPO(order=case.order), TaylorRuntime(top_n=case.layers, split=case.rounds, every=1)),
            # the cost of a step does not depend on the gauge, and this one needs no SVD of the large weights
            "opf": (MPO(order=2, gauge="identity"), Static()),
        }
        if name in schedule:
            finder = finders.full_weights() if name == "opf" else None
            self.over = LoraOver(
                self.model, self.optimizer, *schedule[name], matched=name.endswith("matched"), matrices=finder
            )
        if name == "adalora":
            self.after_step = self.model.base_model.update_and_allocate
        self.rescale: RowRescale | None = None
        if name == "α-lora":
            self.rescale = RowRescale(
                self.model, optimizer=lambda alphas: torch.optim.AdamW(alphas, lr=1e-4, fused=True)
            )
        self.steps = 0

    @property
    def trained(self) -> int:
        """Numbers that this way trains."""
        plain = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        alphas = 0 if self.rescale is None else sum(alpha.numel() for alpha in self.rescale.alphas.values())
        return alphas + (plain if self.over is None else self.over.trained_parameters)

    def step(self, batch: dict[str, Tensor]) -> float:
        """One optimizer step; returns its seconds."""
        synchronize(self.case.device)
        started = time.perf_counter()
        self.forward_backward(batch)
        self.optimizer.step()
        self.after_step(self.steps)
        self.optimizer.zero_grad()
        synchronize(self.case.device)
        self.steps += 1
        return time.perf_counter() - started

    def forward_backward(self, batch: dict[str, Tensor]) -> None:
        """Gradients of all micro-batches of a step."""
        for start in range(0, self.case.batch, self.case.micro):
            micro = {key: value[start : start + self.case.micro] for key, value in batch.items()}
            with torch.autocast(self.case.device, torch.bfloat16, enabled=self.case.device == "cuda"):
                loss = self.model(**micro).loss
            (loss * self.case.micro / self.case.batch).backward()

    def alpha_step(self, batch: dict[str, Tensor]) -> float:
        """One step of α on a micro-batch; returns its seconds, 0 where there is no α."""
        if self.rescale is None:
            return 0.0
        micro = {key: value[: self.case.micro] for key, value in batch.items()}

        def loss() -> Tensor:
            with torch.autocast(self.case.device, torch.bfloat16, enabled=self.case.device == "cuda"):
                return self.model(**micro).loss  # type: ignore[no-any-return]

        synchronize(self.case.device)
        started = time.perf_counter()
        self.rescale.step(loss)
        synchronize(self.case.device)
        return time.perf_counter() - started


def make_batch(case: Case, vocabulary: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (case.batch, case.sequence), generator=generator).to(case.device)
    labels = ids[:, :8].contiguous() if case.model.startswith("t5-base") else ids
    return {"input_ids": ids, "labels": labels}


@dataclass
class Built:
    """A variant that has made some steps; bytes that it keeps, and the peaks of one step, and of one of α, above these."""

    variant: Variant
    kept: int
    peak: int
    alpha_peak: int


def build(
    names: list[str], case: Case, base: PreTrainedModel, targets: list[str], task: str, warmup: int
) -> list[Built]:
    """The variants after some steps, and after all rounds where there are such."""
    batch = make_batch(case, base.config.vocab_size)
    built = []
    for name in tqdm(names, desc="build", unit="variant"):
        with watched_memory(case.device) as whole:
            variant = Variant(name, case, base, targets, task)
            for _ in range(max(warmup, case.rounds + 1) if name == "mpo-r" else warmup):
                variant.step(batch)
                variant.alpha_step(batch)
        with watched_memory(case.device) as step:
            variant.step(batch)
        with watched_memory(case.device) as alpha_step:
            variant.alpha_step(batch)
        built.append(Built(variant, whole.kept, step.peak, alpha_step.peak))
    return built


def run_case(
    name: str, case: Case, variants: list[str], repeats: int, warmup: int, within: float = float("inf")
) -> dict[str, Any]:
    """Time all variants of a case, interleaved. After `within` seconds no round of measurements begins but the first few."""
    started = time.perf_counter()
    base, targets, task = frozen_base(case)
    batch = make_batch(case, base.config.vocab_size)
    built = build(variants, case, base, targets, task, warmup)
    times: dict[str, list[float]] = {v: [] for v in variants}
    alpha_times: dict[str, list[float]] = {v: [] for v in variants}
    with tqdm(total=repeats * len(built), desc=name, unit="step") as bar:
        for k in range(repeats):
            if k >= ROUNDS and time.perf_counter() - started > within:
                repeats = k
                break
            turn = k % len(built)
            for one in built[turn:] + built[:turn]:
                times[one.variant.name].append(one.variant.step(batch))
                alpha_times[one.variant.name].append(one.variant.alpha_step(batch))
                bar.update()
    rows = []
    for one in built:
        own_name = one.variant.name
        beside = BESIDE.get(own_name, "plain")
        for label, seconds, peak in labelled(one, times[own_name], alpha_times[own_name]):
            ratios = sorted(t / p for t, p in zip(seconds, times[beside], strict=True))
            quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
            rows.append(
                {
                    "variant": label,
                    "beside": beside,
                    "ratio": statistics.median(ratios),
                    "ratio_quartiles": [quartiles[0], quartiles[2]],
                    "seconds": statistics.median(seconds),
                    "tokens_per_second": case.batch * case.sequence / statistics.median(seconds),
                    "trained_parameters": one.variant.trained,
                    "kept_bytes": one.kept,
                    "peak_bytes": peak,
                }
            )
    return {"case": name, **asdict(case), "repeats": repeats, "threads": torch.get_num_threads(), "rows": rows}


def labelled(one: Built, own: list[float], alpha: list[float]) -> list[tuple[str, list[float], int]]:
    """Name, seconds and peak of the rows that a variant has in the table: one, or for α-LoRA those that the head of this file
    lists."""
    name, case = one.variant.name, one.variant.case
    if one.variant.rescale is None:
        return [(name, own, one.peak)]
    share = case.micro / case.batch  # α's mini-batch, in mini-batches of the adapter
    a_step = [s + a / PERIOD for s, a in zip(own, alpha, strict=True)]
    a_mini_batch = [(PERIOD * s + a) / (PERIOD + share) for s, a in zip(own, alpha, strict=True)]
    larger = max(one.peak, one.alpha_peak)
    return [
        (f"{name}, between α's steps", own, one.peak),
        (f"{name}, T = {PERIOD}", a_step, larger),
        (f"{name}, T = {PERIOD}, by mini-batch", a_mini_batch, larger),
    ]


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table, as Markdown for the docs, and whether goals are met."""
    title = f"{result['case']}: {result['model']}, {result['layers']} layers, {result['batch']}x{result['sequence']}"
    lines = [
        f"{title}, {result['threads']} thread(s)",
        "",
        "| variant | time | quartiles | beside | s / step | tokens / s | trained numbers | kept MiB | peak MiB |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {row['variant']} | {row['ratio']:.3f} | {low:.3f} - {high:.3f} | {row['beside']} | {row['seconds']:.4f} | "
            f"{row['tokens_per_second']:,.0f} | {row['trained_parameters']:,} | {row['kept_bytes'] / 2**20:,.1f} | "
            f"{row['peak_bytes'] / 2**20:,.1f} |"
        )
    console.print("\n" + "\n".join(lines) + "\n", markup=False, highlight=False, soft_wrap=True)
    ours = [row["ratio"] for row in result["rows"] if row["variant"] in ("svd", "mpo", "mpo-r")]
    if ours and result["goal"] is not None:
        verdict = "met" if max(ours) <= result["goal"] else "MISSED"
        console.print(
            f"goal: at most {result['goal']:.2f}x plain LoRA; the slowest of ours takes {max(ours):.3f}x: {verdict}"
        )
    for row in result["rows"]:
        if row["variant"].startswith(f"α-lora, T = {PERIOD}"):
            verdict = "met" if row["ratio"] <= ALPHA_GOAL else "MISSED"
            console.print(f"goal: {row['variant']}, at most {ALPHA_GOAL}; it takes {row['ratio']:.3f}: {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="may be given several times")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument(
        "--within", type=float, default=float("inf"), help="seconds after which a case ends, if five rounds are done"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=DEVICES, help="in place of that of the case")
    parser.add_argument("--quick", action="store_true", help="cases at a few hundredths of their size, two repeats")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.warmup = 2, 1
    missing = {BESIDE.get(variant, "plain") for variant in arguments.variants} - set(arguments.variants)
    if missing:
        parser.error(f"the variants must include {', '.join(sorted(missing))}, which ratios are relative to")
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="TaylorRuntime: top_n")
    console = Console()
    for name in arguments.case or ["t5-cpu", "t5-cpu-short"]:
        case = on(CASES[name], arguments.device, arguments.quick)
        require(case.device, f"case {name}")
        result = run_case(name, case, arguments.variants, arguments.repeats, arguments.warmup, arguments.within)
        show(result, console)
        arguments.output.mkdir(parents=True, exist_ok=True)
        file = arguments.output / f"step_overhead-{name}.json"
        write_json(file, {**result, "provenance": environment(Path(__file__).parent)})
        console.print(f"written: {file}")
        if case.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
