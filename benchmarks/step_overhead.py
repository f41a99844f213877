"""Time per optimizer step and peak memory of LoRA-Over beside plain LoRA, interleaved in one run.

    python benchmarks/step_overhead.py --case t5-cpu            # T5-Base shape, 3+3 layers, batch 16x64
    python benchmarks/step_overhead.py --case t5-cpu-short      # 2+2 layers, one 32-token sequence per step: the worst case
    python benchmarks/step_overhead.py --case llama31-cpu       # a sixteenth of Llama 3.1-8B's width: does it run
    python benchmarks/step_overhead.py --case llama31-gpu       # Llama 3.1-8B, attention LoRA, 512 tokens, batch 64
    python benchmarks/step_overhead.py --case llama2-gpu --case t5-gpu --case t5-gpu-short

Every variant is a copy of one model with random weights that shares the frozen base, so that an 8B model is in memory
once. A round times one step of each variant, in an order that rotates; a ratio is a variant's time over plain LoRA's of the
same round, and the table gives the median of the ratios with their quartiles. The `-gpu` cases need CUDA.

Variants: plain PEFT LoRA; tnadapt with SVD, MPO, MPO with matched steps, and MPO expanded in rounds (timed after the last one); the paper's way,
autograd through one contraction per matrix in each forward (torch parametrizations); PEFT's DoRA and AdaLoRA.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from provenance import environment, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from tnadapt import MPO, SVD, Factorization, LoraOver, Scheduler, Static, TaylorRuntime

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """A model shape and a batch. `batch` is the whole batch of a step, in micro-batches of `micro`."""

    model: str
    layers: int
    batch: int
    micro: int
    sequence: int
    order: int
    rounds: int
    device: str
    goal: float | None  # times plain LoRA


CASES = {
    "t5-cpu": Case("t5-base", 3, 16, 16, 64, 16, 3, "cpu", 1.05),
    "t5-cpu-short": Case("t5-base", 2, 1, 1, 32, 16, 2, "cpu", 1.30),
    "llama31-cpu": Case("llama-3.1-8b/16", 4, 4, 4, 64, 10, 4, "cpu", None),
    "llama31-gpu": Case("llama-3.1-8b", 32, 64, 8, 512, 10, 8, "cuda", 1.02),
    "llama2-gpu": Case("llama-2-7b", 32, 32, 4, 1024, 9, 8, "cuda", 1.02),
    "t5-gpu": Case("t5-base", 12, 32, 32, 128, 16, 8, "cuda", 1.10),
    "t5-gpu-short": Case("t5-base", 12, 1, 1, 32, 16, 8, "cuda", 1.25),
}

T5_LINEARS = ["q", "k", "v", "o", "wi", "wo"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LLAMA = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def build_base(case: Case) -> tuple[PreTrainedModel, list[str], str]:
    """The base model with random weights, its LoRA targets and PEFT task type."""
    torch.manual_seed(0)
    if case.model == "t5-base":
        config = T5Config(
            d_model=768,
            d_kv=64,
            d_ff=3072,
            num_layers=case.layers,
            num_heads=12,
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
    )
    dtype = torch.bfloat16 if case.device == "cuda" else torch.float32
    with torch.device(case.device):
        model = LlamaForCausalLM(config).to(dtype)
    return model, ATTENTION if llama3 else ALL_LLAMA, "CAUSAL_LM"


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


class Variant:
    """One way to train: a model, its optimizer, and what happens in a step."""

    def __init__(self, name: str, case: Case, base: PreTrainedModel, targets: list[str], task: str) -> None:
        self.name, self.case = name, case
        self.after_step: Callable[[int], None] = lambda step: None
        model = share_base(base)
        lora: dict[str, Any] = {"target_modules": targets, "task_type": task}
        torch.manual_seed(1)
        if name == "adalora":
            config: Any = AdaLoraConfig(
                init_r=12, target_r=8, lora_alpha=16, tinit=2, tfinal=10, deltaT=1, total_step=100_000, **lora
            )
        else:
            config = LoraConfig(r=8, lora_alpha=16, use_dora=name == "dora", **lora)
        self.model = get_peft_model(model, config)
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
        }
        if name in schedule:
            self.over = LoraOver(self.model, self.optimizer, *schedule[name], matched=name.endswith("matched"))
        if name == "adalora":
            self.after_step = self.model.base_model.update_and_allocate
        self.steps = 0

    @property
    def trained(self) -> int:
        """Numbers that this way trains."""
        plain = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return plain if self.over is None else self.over.trained_parameters

    def step(self, batch: dict[str, Tensor]) -> float:
        """One optimizer step; returns its seconds."""
        synchronize(self.case)
        started = time.perf_counter()
        for start in range(0, self.case.batch, self.case.micro):
            micro = {key: value[start : start + self.case.micro] for key, value in batch.items()}
            with torch.autocast(self.case.device, torch.bfloat16, enabled=self.case.device == "cuda"):
                loss = self.model(**micro).loss
            (loss * self.case.micro / self.case.batch).backward()
        self.optimizer.step()
        self.after_step(self.steps)
        self.optimizer.zero_grad()
        synchronize(self.case)
        self.steps += 1
        return time.perf_counter() - started


def synchronize(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()


def make_batch(case: Case, vocabulary: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (case.batch, case.sequence), generator=generator).to(case.device)
    labels = ids[:, :8].contiguous() if case.model == "t5-base" else ids
    return {"input_ids": ids, "labels": labels}


def peak_memory(case: Case, variant: Variant, batch: dict[str, Tensor]) -> int | None:
    """Peak bytes of one more step above what is allocated for the others; CUDA only."""
    if case.device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    variant.step(batch)
    return torch.cuda.max_memory_allocated()


def run_case(name: str, case: Case, variants: list[str], repeats: int, warmup: int) -> dict[str, Any]:
    """Time all variants of a case, interleaved."""
    base, targets, task = build_base(case)
    base.requires_grad_(False)
    if case.device == "cuda" and case.batch > 1:
        base.gradient_checkpointing_enable()
    batch = make_batch(case, base.config.vocab_size)
    built = [Variant(v, case, base, targets, task) for v in variants]
    tokens = case.batch * case.sequence
    times: dict[str, list[float]] = {v: [] for v in variants}
    rounds = max(warmup, case.rounds + 1)
    with tqdm(total=(rounds + repeats) * len(built), desc=name, unit="step") as bar:
        for k in range(rounds + repeats):
            turn = k % len(built)
            for variant in built[turn:] + built[:turn]:
                seconds = variant.step(batch)
                if k >= rounds:
                    times[variant.name].append(seconds)
                bar.update()
    rows = []
    for variant in built:
        ratios = sorted(t / p for t, p in zip(times[variant.name], times["plain"], strict=True))
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        rows.append(
            {
                "variant": variant.name,
                "ratio": statistics.median(ratios),
                "ratio_quartiles": [quartiles[0], quartiles[2]],
                "seconds": statistics.median(times[variant.name]),
                "tokens_per_second": tokens / statistics.median(times[variant.name]),
                "trained_parameters": variant.trained,
                "peak_bytes": peak_memory(case, variant, batch),
            }
        )
    return {"case": name, **asdict(case), "repeats": repeats, "threads": torch.get_num_threads(), "rows": rows}


def show(result: dict[str, Any], console: Console) -> None:
    table = Table(
        title=f"{result['case']}: {result['model']}, {result['layers']} layers, {result['batch']}x{result['sequence']}"
    )
    for column in (
        "variant",
        "time / plain LoRA",
        "quartiles",
        "s / step",
        "tokens / s",
        "trained parameters",
        "peak GiB",
    ):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in result["rows"]:
        low, high = row["ratio_quartiles"]
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
        table.add_row(
            row["variant"],
            f"{row['ratio']:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{row['seconds']:.4f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['trained_parameters']:,}",
            peak,
        )
    console.print(table)
    ours = [row["ratio"] for row in result["rows"] if row["variant"] in ("svd", "mpo", "mpo-r")]
    if ours and result["goal"] is not None:
        verdict = "met" if max(ours) <= result["goal"] else "MISSED"
        console.print(
            f"goal: at most {result['goal']:.2f}x plain LoRA; the slowest of ours takes {max(ours):.3f}x: {verdict}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="may be given several times")
    parser.add_argument(
        "--variants", nargs="+", default=["plain", "svd", "mpo", "mpo-r", "paper's way", "dora", "adalora"]
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if "plain" not in arguments.variants:
        parser.error("the variants must include plain, which the ratios are relative to")
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="TaylorRuntime: top_n")
    console = Console()
    for name in arguments.case or ["t5-cpu", "t5-cpu-short"]:
        case = CASES[name]
        if case.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit(f"case {name} needs CUDA, which this machine has not; the -cpu cases run anywhere")
        result = run_case(name, case, arguments.variants, arguments.repeats, arguments.warmup)
        show(result, console)
        arguments.output.mkdir(parents=True, exist_ok=True)
        file = arguments.output / f"step_overhead-{name}.json"
        write_json(file, {**result, "provenance": environment(Path(__file__).parent)})
        console.print(f"written: {file}")
        if case.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
