"""How far a matrix jumps when it is expanded in mid-run, for each way of handing over its optimizer state.

    python benchmarks/handover.py

Fine-tunes the embedded model as plain LoRA for some steps, then expands every matrix, and goes on. For each order and
hand-over it prints the norm of a matrix's update (median over matrices), averaged over the ten steps before the
expansion, at the first step after it, at most in the ten after it, and averaged over those ten; and what plain LoRA does
in the same steps. All in one run, with the same data and seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from provenance import environment, write_json
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from tnadapt import MPO, Factorization, LoraOver, Scheduler, find_lora_matrices

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from recipes.embedded.word_problems import generate  # noqa: E402

WINDOW = 10


class AllAt(Scheduler):
    """Every matrix at one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def select(self, step: int, matrices: Any) -> list[str]:
        return list(matrices) if step == self.step else []


def batches(count: int, size: int) -> list[dict[str, torch.Tensor]]:
    """Batches of word problems, loss on every token that is not padding."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes/embedded/model")
    problems = generate("composed", "train", count * size)
    texts = [f"Q: {p['question']}\nA: {p['answer']}{tokenizer.eos_token}" for p in problems]
    made = []
    for start in range(0, len(texts), size):
        batch = dict(tokenizer(texts[start : start + size], return_tensors="pt", padding=True))
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        made.append({key: batch[key] for key in ("input_ids", "attention_mask", "labels")})
    return made


def update_norms(
    data: list[dict[str, torch.Tensor]], factorization: Factorization | None, handover: str, at: int, lr: float
) -> list[list[float]]:
    """Norm of every matrix's update at every step."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(ROOT / "recipes/embedded/model", dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    if factorization is not None:
        LoraOver(model, optimizer, factorization, AllAt(at), handover=handover)
    matrices = [matrix.parameter for matrix in find_lora_matrices(model)[0].values()]
    norms: list[list[float]] = []
    for batch in data:
        before = [p.detach().clone() for p in matrices]
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        norms.append([float((p.detach() - b).norm()) for p, b in zip(matrices, before, strict=True)])
    return norms


def summary(norms: list[list[float]], at: int) -> dict[str, float]:
    """Medians over matrices; `at` is the step of the expansion, counted from 1."""
    per_matrix = list(zip(*norms, strict=True))
    before = [statistics.mean(m[at - 1 - WINDOW : at - 1]) for m in per_matrix]
    after = [m[at - 1 : at - 1 + WINDOW] for m in per_matrix]
    return {
        "before": statistics.median(before),
        "first": statistics.median(a[0] / b for a, b in zip(after, before, strict=True)),
        "largest": statistics.median(max(a) / b for a, b in zip(after, before, strict=True)),
        "mean": statistics.median(statistics.mean(a) / b for a, b in zip(after, before, strict=True)),
        "worst": max(max(a) / b for a, b in zip(after, before, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", type=int, default=25, help="step of the expansion")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--orders", type=int, nargs="+", default=[2, 4, 9, 16])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/handover.json")
    arguments = parser.parse_args()
    if arguments.at <= WINDOW:
        parser.error(f"--at must be above {WINDOW}, to have as many steps before the expansion")
    data = batches(arguments.at - 1 + WINDOW, arguments.batch)
    cases: list[tuple[str, Factorization | None, str]] = [("plain LoRA", None, "")]
    cases += [(f"MPO order {o}", MPO(order=o), h) for o in arguments.orders for h in ("restart", "warm")]
    rows = [
        {"case": name, "handover": h, **summary(update_norms(data, f, h, arguments.at, arguments.lr), arguments.at)}
        for name, f, h in tqdm(cases, unit="run")
    ]
    table = Table(title=f"update of a matrix, relative to the mean of the {WINDOW} steps before step {arguments.at}")
    for column in ("", "hand-over", "first step", f"mean of {WINDOW}", f"largest of {WINDOW}", "largest, worst matrix"):
        table.add_column(column, justify="right" if column not in ("", "hand-over") else "left")
    for row in rows:
        table.add_row(row["case"], row["handover"], *(f"{row[k]:.2f}" for k in ("first", "mean", "largest", "worst")))
    Console().print(table)
    settings = {"at": arguments.at, "lr": arguments.lr, "batch": arguments.batch}
    write_json(arguments.output, {"settings": settings, "rows": rows, "provenance": environment(ROOT)})


if __name__ == "__main__":
    main()
