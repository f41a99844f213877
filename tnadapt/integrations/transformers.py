"""HF Trainer and everything built on it (TRL): an optimizer that attaches `LoraOver` where the trainer makes its own, and a callback
that reports on it, or attaches it where a trainer takes no optimizer.

The recommended way is `optimizer_cls_and_kwargs=(LoraOverOptimizer, {...})`: it attaches before the trainer loads a checkpoint, so
resuming needs no further setting.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler
    from transformers.trainer_utils import SaveStrategy
except ImportError as error:
    raise ImportError(
        "tnadapt.integrations.transformers needs transformers: pip install 'tnadapt[transformers]'"
    ) from error

from tnadapt.assignment import FactorizationArgument
from tnadapt.card import describe, save_card
from tnadapt.engine import ranks
from tnadapt.integrations.checkpoints import (
    OPTIMIZER_FILE,
    OWN_FILE,
    TRAINER_STATE_FILE,
    checkpoint_fault,
    last_complete_checkpoint,
    read_state,
    require_whole,
)
from tnadapt.lora_over import FoldReport, LoraOver
from tnadapt.schedulers import Scheduler

__all__ = [
    "LoraOverCallback",
    "LoraOverOptimizer",
    "checkpoint_fault",
    "create_loraover_optimizer",
    "last_complete_checkpoint",
]

#: arguments of `LoraOver` beside model and optimizer
_OPTIONS = frozenset(inspect.signature(LoraOver).parameters) - {"model", "optimizer"}


def create_loraover_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    factorization: FactorizationArgument = None,
    scheduler: Scheduler | None = None,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """An optimizer of the trainable parameters of `model` with a `LoraOver` attached. `LoraOver.of(model)` returns the latter.

    Args:
        optimizer_cls: class of the optimizer, such as `torch.optim.AdamW`.
        factorization, scheduler: as for `LoraOver`.
        kwargs: further arguments of `LoraOver`, such as `core_lr`, and arguments of the optimizer, such as `lr`.
    """
    options = {key: value for key, value in kwargs.items() if key in _OPTIONS}
    others = {key: value for key, value in kwargs.items() if key not in _OPTIONS}
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], **others)
    LoraOver(model, optimizer, factorization, scheduler, **options)
    return optimizer


class LoraOverOptimizer:
    """What HF Trainer makes its optimizer with: `Trainer(..., optimizer_cls_and_kwargs=(LoraOverOptimizer, kwargs))`.

    `kwargs` are the arguments of `create_loraover_optimizer` but for the model; `optimizer_cls` is AdamW where it is left out. `lr`
    must be among them, and `weight_decay` where torch's default is not wanted: those of `TrainingArguments` have no effect. The
    trainer loads the optimizer's state after this, cores included. Add `LoraOverCallback()` for logs, and under FSDP also for
    checkpoints, whose optimizer files drop the cores.

    Raises:
        ValueError: `kwargs` lack `lr`.
    """

    def __call__(
        self, model: nn.Module, optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW, **kwargs: Any
    ) -> torch.optim.Optimizer:
        if "lr" not in kwargs:
            raise ValueError(
                "optimizer_cls_and_kwargs has no lr, and Trainer hands its own learning_rate to no optimizer that is made so: add "
                "the rate to the settings, as in {'lr': args.learning_rate, ...}"
            )
        return create_loraover_optimizer(model, optimizer_cls, replace=True, **kwargs)


class _Consolidation(TrainerCallback):  # type: ignore[misc]
    """Brings cores that are dealt out over ranks together before Trainer saves, which it does on one rank alone. Trainer calls it
    after all others, any of which may ask for a checkpoint."""

    def __init__(self, reporter: LoraOverCallback) -> None:
        self._reporter = reporter

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        over = self._reporter.over
        if control.should_save and over is not None and over.attached:
            over.consolidate(None if args.save_on_each_node else 0)

    on_epoch_end = on_step_end

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        over = self._reporter.over
        if args.save_strategy == SaveStrategy.BEST and over is not None and over.attached:
            # Trainer decides after the evaluation whether to save
            over.consolidate(None if args.save_on_each_node else 0)


def _has_state_in_optimizer_file(folder: Path) -> bool:
    return (folder / OPTIMIZER_FILE).is_file() and not (folder / OWN_FILE).is_file()


def _put_in_order(callback: LoraOverCallback) -> None:
    """Have Trainer call a callback before those that report logs, and consolidation last. Trainer puts reporters first and hands
    no callback the list."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            if callback in handler.callbacks:
                handler.callbacks.remove(callback)
                handler.callbacks.insert(0, callback)
                if not any(isinstance(other, _Consolidation) for other in handler.callbacks):
                    handler.callbacks.append(_Consolidation(callback))
            return
        frame = frame.f_back


class LoraOverCallback(TrainerCallback):  # type: ignore[misc]
    """Attaches `LoraOver` when training begins and folds when it ends. Without a factorization it finds the one that is attached
    already (see `LoraOverOptimizer`), reports on it, and leaves it to its owner to fold.

    Its state is saved in each checkpoint, with that of the optimizer (under FSDP in a file of its own, `tnadapt.pt`). On resume it is
    restored from `output_dir/checkpoint-STEP`, or from `resume_from`. If training is not resumed, every call of `train()` starts the
    rounds of the scheduler anew.

    It adds `core_learning_rate`, `expanded_matrices` and `largest_update_norm` (of an expanded matrix, in the last step) to the
    trainer's logs, and so to TensorBoard, W&B and the like. In each checkpoint and in `output_dir`, `tnadapt.json` and a section of
    `README.md` say how the adapter was trained.

    Args:
        factorization, scheduler: as for `LoraOver`; both None for what is attached already.
        resume_from: the checkpoint folder that the first call of `train()` resumes from, where it is not
            `output_dir/checkpoint-STEP`; the same that `train(resume_from_checkpoint=...)` is given.
        options: further arguments of `LoraOver`, such as `core_lr`.

    Attributes:
        over: the `LoraOver` while training, and after it.
        report: what `fold` gave at the end of training; None before.

    Raises:
        ValueError, FileNotFoundError: the checkpoint is damaged or incomplete, belongs to another adapter, or was saved
            without `LoraOver`. Raised before the first step; with `resume_from`, when the trainer is made.
        TypeError: a factorization or scheduler of one's own has settings that `tnadapt.json` cannot keep. Raised before the first
            step.
    """

    def __init__(
        self,
        factorization: FactorizationArgument = None,
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

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _put_in_order(self)
        if self._resume_from is not None:
            require_whole(self._resume_from)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _put_in_order(self)
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        folder = self._checkpoint(args, state)
        attached = LoraOver.of(model) if self._factorization is None else None
        # the file of the optimizer brings the state of what is attached to it, unless an engine wrote it that drops what it does not know
        brought = attached is not None and folder is not None and _has_state_in_optimizer_file(folder)
        saved = None if folder is None or brought else read_state(folder)
        if attached is None:
            self._attach(model, optimizer)
        else:
            self.over = attached
        self._resume_from, self.report = None, None
        assert self.over is not None
        # settings that no file can keep are an error now, and not when the first checkpoint is written
        describe(self.over)
        if saved is not None:
            self._load(saved, folder)
        sharded = any(ranks.is_sharded(matrix.parameter) for matrix in self.over.matrices.values())
        if args.save_total_limit == 1 and not args.save_only_model and sharded:
            warnings.warn(
                f"save_total_limit=1 under FSDP: Trainer deletes the last checkpoint before {OWN_FILE} is in the new one, so a run that "
                "is killed in between loses its cores; keep two (save_total_limit=2)",
                stacklevel=2,
            )
        first = self.over.scheduler.first_step()
        if not self.over.history and first is not None and first > state.max_steps > 0:
            warnings.warn(
                f"nothing will be expanded: {self.over.scheduler.label} has its first round at step {first}, and training has "
                f"{state.max_steps} steps; it would train without cores",
                stacklevel=2,
            )

    def _attach(self, model: Any, optimizer: Any) -> None:
        if self.over is not None:
            # a second call of train(), or another attempt of auto_find_batch_size: rounds start again
            self.over.detach()
            if self._scheduler is not None and self._fresh is not None:
                self._scheduler.load_state_dict(self._fresh)
        self.over = LoraOver(model, optimizer, self._factorization, self._scheduler, **self._options)

    def _load(self, saved: Any, folder: Path | None) -> None:
        assert self.over is not None
        try:
            self.over.load_state_dict(saved)
            changed = self.over.changed_outside()
            if changed:
                raise ValueError(
                    f"the cores in {folder} are not those of the adapter that training resumes with: {changed[0]} and "
                    f"{len(changed) - 1} other matrices differ from what their cores fold to; give LoraOverCallback the "
                    "folder that train(resume_from_checkpoint=...) was given as resume_from="
                )
        except BaseException:
            self.over.detach()
            raise

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        over = self.over
        if over is None or not over.attached or not state.log_history or "loss" not in state.log_history[-1]:
            return
        extra: dict[str, float | int | None] = {
            "core_learning_rate": over.core_rate(),
            "expanded_matrices": len(over.expanded),
        }
        norms = over.update_norms()
        if norms:
            extra["largest_update_norm"] = max(norms.values())
        state.log_history[-1].update(extra)
        logs = kwargs.get("logs")
        if isinstance(logs, dict):
            logs.update(extra)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.over is None or not self.over.attached:
            return
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            save_card(self.over, folder)
        own = self.over.state_dict()
        if args.save_only_model or not args.should_save or not folder.is_dir() or (folder / OPTIMIZER_FILE).is_file():
            return
        half = folder / (OWN_FILE + ".writing")
        torch.save(own, half)
        half.replace(folder / OWN_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.over is None or not self.over.attached:
            return
        with warnings.catch_warnings():
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                # the best adapter was asked for and is in the model now
                warnings.filterwarnings("ignore", message=".*changed outside the optimizer")
            if self._factorization is not None:
                self.report = self.over.fold()
        if args.should_save and args.output_dir and Path(args.output_dir).is_dir():
            # PEFT keeps what a README says when the adapter is saved there
            save_card(self.over, args.output_dir)

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path | None:
        """The checkpoint that training resumes from, whole and of its step; None for a run from the start."""
        step, given = state.global_step, self._resume_from
        if step == 0:
            if given is not None:
                raise ValueError(
                    f"LoraOverCallback has resume_from={str(given)!r}, but training starts at step 0; resume it with "
                    f"trainer.train(resume_from_checkpoint={str(given)!r})"
                )
            return None
        folder = given or Path(args.output_dir or ".") / f"checkpoint-{step}"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"training resumes at step {step}, but {folder} is not there, so the cores cannot be restored; give "
                "LoraOverCallback the folder that train(resume_from_checkpoint=...) was given as resume_from="
            )
        require_whole(folder)
        found = json.loads((folder / TRAINER_STATE_FILE).read_text())["global_step"]
        if found != step:
            raise ValueError(
                f"training resumes at step {step}, but {folder} was saved at step {found}; give LoraOverCallback and "
                "train(resume_from_checkpoint=...) the same folder"
            )
        return folder
