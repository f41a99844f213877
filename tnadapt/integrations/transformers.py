"""A callback for HF Trainer and everything built on it (TRL), where the trainer makes the model or the optimizer itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("LoraOverCallback needs transformers: pip install 'tnadapt[transformers]'") from error

from tnadapt.factorizations import Factorization
from tnadapt.lora_over import FoldReport, LoraOver
from tnadapt.schedulers import Scheduler

__all__ = ["LoraOverCallback"]

_OPTIMIZER_FILE = "optimizer.pt"
_STATE_KEY = "tnadapt"


class LoraOverCallback(TrainerCallback):  # type: ignore[misc]
    """Attaches `LoraOver` when training begins and folds when it ends.

    Its state is saved with the optimizer's in each checkpoint and is restored on resume. Logs get the rate of the cores
    and the number of expanded matrices.

    Args:
        factorization, scheduler: as for `LoraOver`.
        resume_from: the checkpoint folder that training resumes from, where it is not `output_dir/checkpoint-STEP`.
        options: further arguments of `LoraOver`, such as `core_lr`.

    Attributes:
        over: the `LoraOver` while training, and after it.
        report: what `fold` gave at the end of training; None before.
    """

    def __init__(
        self,
        factorization: Factorization,
        scheduler: Scheduler | None = None,
        *,
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        self._factorization = factorization
        self._scheduler = scheduler
        self._resume_from = None if resume_from is None else Path(resume_from)
        self._options = options
        self._fresh = None if scheduler is None else scheduler.state_dict()
        self.over: LoraOver | None = None
        self.report: FoldReport | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.over is not None:
            # a second call of train(), or another attempt of auto_find_batch_size: rounds start again
            self.over.detach()
            if self._scheduler is not None and self._fresh is not None:
                self._scheduler.load_state_dict(self._fresh)
        saved = self._saved_state(args, state)
        self.over = LoraOver(
            kwargs["model"], kwargs["optimizer"], self._factorization, self._scheduler, **self._options
        )
        if saved is not None:
            self.over.load_state_dict(saved)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        over = self.over
        if over is None or not over.attached or not state.log_history or "loss" not in state.log_history[-1]:
            return
        extra = {"core_learning_rate": over.core_rate(), "expanded_matrices": len(over.expanded)}
        state.log_history[-1].update(extra)
        logs = kwargs.get("logs")
        if isinstance(logs, dict):
            logs.update(extra)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.over is not None and self.over.attached:
            self.report = self.over.fold()

    def _saved_state(self, args: TrainingArguments, state: TrainerState) -> Any:
        """The tnadapt part of the checkpoint that training resumes from; None for a run from the start."""
        if state.global_step == 0:
            return None
        folder = self._resume_from or Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        file = folder / _OPTIMIZER_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"training resumes at step {state.global_step}, but {file} is not there, so the cores cannot be restored; "
                "give LoraOverCallback the folder as resume_from=, and save checkpoints without save_only_model"
            )
        saved = torch.load(file, map_location="cpu", weights_only=True).get(_STATE_KEY)
        if saved is None:
            raise ValueError(
                f"{file} was saved without LoraOver, so there are no cores to resume from; start a new run from that adapter"
            )
        return saved
