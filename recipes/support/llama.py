"""The settings of LoRA-Over (arXiv:2605.16470) for its two Llamas: hyper-parameters, learning rates and printed results.

Baselines that the paper does not tune itself come from GoRA (arXiv:2502.12171): plain LoRA's rate for Llama 3.1 is GoRA's. For
Llama 2 no published rate of plain LoRA is known in this setting, so ``--lr`` is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from support.config import GenerationConfig, Rates

LLAMA_31, LLAMA_2 = "paper", "paper-llama2"
#: Preset -> model on the hub.
MODELS = {LLAMA_31: "meta-llama/Llama-3.1-8B", LLAMA_2: "meta-llama/Llama-2-7b-hf"}

_COMMON: dict[str, Any] = {
    "micro_batch": 8,
    "top_n": 30,
    "every": 50,
    "dtype": "bfloat16",
    "activation_checkpointing": True,
    "eval_batch": 64,
    "temperature": 0.8,
    "top_p": 0.95,
    "save_every": 200,
}
_OF_MODEL: dict[str, dict[str, Any]] = {
    LLAMA_31: {"batch": 64, "weight_decay": 5e-4, "max_length": 512, "order": 10},
    LLAMA_2: {"batch": 32, "weight_decay": 0.0, "max_length": 1024, "order": 9, "targets": "all-linear"},
}


@dataclass(frozen=True)
class LlamaConfig(GenerationConfig):
    """The settings of the recipes for a Llama; the defaults are the laptop preset."""

    def check(self) -> None:
        super().check()
        if self.model in MODELS.values():
            import torch

            if not torch.cuda.is_available():
                raise ValueError(f"{self.model} needs a GPU and there is none; use --preset laptop, or a small --model")


def settings(preset: str, **changes: Any) -> dict[str, Any]:
    """The fields of a paper preset: what holds for its model, and what a task changes."""
    return {"preset": preset, "model": MODELS[preset], **_COMMON, **_OF_MODEL[preset], **changes}


def rates(every_matrix: float, rest: float, lora: float | None = None) -> Rates:
    """Learning rates by method.

    Args:
        every_matrix: of LoRA-Over-SVD and -MPO, and of the cores of MPO_P and MPO_R.
        rest: of the matrices that MPO_P and MPO_R have not expanded.
        lora: of plain LoRA.
    """
    plain: Rates = {} if lora is None else {"lora": (lora, None)}
    return {
        **plain,
        "lora-over-svd": (every_matrix, None),
        "lora-over-mpo": (every_matrix, None),
        "lora-over-mpo-p": (rest, every_matrix),
        "lora-over-mpo-r": (rest, every_matrix),
    }


#: Method -> preset -> (MT-Bench's first turn, GSM8K in %, HumanEval's pass@1 in %), as the paper prints them.
_PRINTED: Mapping[str, Mapping[str, tuple[str, str, str]]] = {
    "Full fine-tuning": {LLAMA_2: ("5.30", "59.36", "35.31"), LLAMA_31: ("5.88", "73.69", "51.63")},
    "LoRA": {LLAMA_2: ("5.61", "42.08", "14.76"), LLAMA_31: ("6.15", "67.78", "43.09")},
    "LoRA, equal parameters": {LLAMA_2: ("5.89", "48.07", "17.32"), LLAMA_31: ("6.23", "72.24", "43.66")},
    "PiSSA": {LLAMA_2: ("5.30", "44.54", "16.02"), LLAMA_31: ("6.08", "68.56", "44.10")},
    "rsLoRA": {LLAMA_2: ("5.25", "45.62", "16.01"), LLAMA_31: ("6.18", "68.36", "45.78")},
    "OLoRA": {LLAMA_2: ("5.30", "43.29", "17.22"), LLAMA_31: ("6.13", "68.54", "43.29")},
    "LoRA+": {LLAMA_2: ("5.71", "52.11", "18.17"), LLAMA_31: ("6.35", "71.29", "44.51")},
    "LoRA-GA": {LLAMA_2: ("5.95", "53.60", "19.81"), LLAMA_31: ("5.99", "71.39", "43.29")},
    "AdaLoRA": {LLAMA_2: ("5.57", "50.72", "17.80"), LLAMA_31: ("6.19", "70.63", "41.46")},
    "DoRA": {LLAMA_2: ("5.97", "53.07", "19.75"), LLAMA_31: ("6.24", "69.17", "43.70")},
    "LoRA-Over-SVD": {LLAMA_2: ("5.23", "45.01", "15.22"), LLAMA_31: ("6.01", "68.92", "42.60")},
    "LoRA-Over-MPO": {LLAMA_2: ("5.63", "49.51", "17.32"), LLAMA_31: ("6.12", "72.14", "43.15")},
    "LoRA-Over-MPO_P": {LLAMA_2: ("5.66", "50.13", "17.68"), LLAMA_31: ("6.16", "72.73", "43.34")},
    "LoRA-Over-MPO_R": {LLAMA_2: ("5.92", "54.21", "19.96"), LLAMA_31: ("6.26", "73.95", "44.84")},
}
#: The same for the two further ranks that the paper tries.
_PRINTED_AT_RANK: Mapping[int, Mapping[str, Mapping[str, tuple[str, str, str]]]] = {
    32: {"LoRA-Over-MPO_R": {LLAMA_2: ("5.81", "55.46", "20.83"), LLAMA_31: ("6.23", "74.98", "45.44")}},
    128: {"LoRA-Over-MPO_R": {LLAMA_2: ("5.94", "56.13", "23.65"), LLAMA_31: ("6.31", "75.29", "46.15")}},
}
_BENCHMARKS = ("mtbench", "gsm8k", "humaneval")


def printed(benchmark: str, config: GenerationConfig) -> dict[str, str]:
    """The paper's figures of ``mtbench``, ``gsm8k`` or ``humaneval`` by label, for a paper preset and one of the paper's ranks."""
    if config.preset not in MODELS:
        return {}
    column = _BENCHMARKS.index(benchmark)
    table = _PRINTED if config.rank == 8 else _PRINTED_AT_RANK.get(config.rank, {})
    return {label: figures[config.preset][column] for label, figures in table.items()}
