"""Plain LoRA at rates that other papers tuned, to stand beside a paper that did not tune its LoRA.

None of this was measured here, and no two set-ups are equal in every detail: what differs is said with each figure. A gain over
a LoRA that is far below these figures may be the baseline's learning rate and not the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from support.config import Config


@dataclass(frozen=True)
class TunedLora:
    """What somebody else measured with LoRA."""

    model: str
    """Base model on the hub."""
    figure: str
    """LoRA's, in %."""
    rival: str
    """What was best in the same table."""
    setting: str
    """What was trained how."""
    source: str

    def __str__(self) -> str:
        return f"{self.figure} in {self.source} ({self.setting}; {self.rival})"


_BOARD = "PEFT's board, method_comparison/MetaMathQA, July 2026"
_GLUE = TunedLora(
    "google-t5/t5-base", "87.88 over five tasks", "the best method there has 88.30", "rate tuned", "AltLoRA, table 4"
)
#: By what is measured: a benchmark, or a task of GLUE.
TUNED_LORA: dict[str, tuple[TunedLora, ...]] = {
    "gsm8k": (
        TunedLora(
            "meta-llama/Llama-2-7b-hf",
            "59.3",
            "the best method there has 60.4",
            "100k examples of MetaMathQA, rank 8, rate and batch tuned",
            "LoRA-One, ICML 2025, section 6.2",
        ),
        TunedLora(
            "Qwen/Qwen3-0.6B",
            "49.60",
            "the best method there has 49.92",
            "MetaMathQA, rank 128, rate tuned, mean of three runs",
            "Learning Rate Matters, arXiv:2602.04998",
        ),
        TunedLora(
            "meta-llama/Llama-3.2-3B",
            "47.8",
            "one rate for all methods, runs differ by about 1 point",
            "20,000 examples of MetaMathQA, rank 32 on q_proj and v_proj",
            _BOARD,
        ),
    ),
    **dict.fromkeys(("mnli", "sst2", "cola", "qnli"), (_GLUE,)),
    "mrpc": (TunedLora(_GLUE.model, "86.03", _GLUE.rival + " over five tasks", _GLUE.setting, _GLUE.source),),
}


def tuned_lora(benchmark: str, config: Config) -> Sequence[TunedLora]:
    """What others measured with LoRA on ``benchmark`` and the model of ``config``."""
    return [each for each in TUNED_LORA.get(benchmark, ()) if each.model == config.model]
