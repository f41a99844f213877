"""α-LoRA in the Trainer: the rows of the frozen weights are rescaled, with a step of α between the adapter's steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tnadapt import RowRescale

FILE = "alpha.safetensors"


class RowSteps(TrainerCallback):
    """After each step of the adapter, α takes one on a mini-batch that is drawn anew from the training examples.

    Its state is no part of the model, so it is kept beside each checkpoint. α's rate is the adapter's, decay included.
    """

    STATE = "alpha.pt"

    def __init__(
        self, model: Any, draw: Callable[[random.Random], dict[str, torch.Tensor]], lr: float, seed: int
    ) -> None:
        self.model, self.draw, self.seed = model, draw, seed
        self.rescale = RowRescale(model, optimizer=lambda alphas: torch.optim.AdamW(alphas, lr=lr, weight_decay=0.0))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.rescale.optimizer is not None
        for group in self.rescale.optimizer.param_groups:
            group["lr"] = kwargs["optimizer"].param_groups[0]["lr"]
        rng = random.Random(f"{self.seed}/{state.global_step}")
        self.rescale.step(lambda: self.model(**self.draw(rng)).loss)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.save(self.rescale.state_dict(), self._path(args, state))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:
            return
        path = self._path(args, state)
        if not path.exists():
            raise ValueError(f"{path} is missing, so that α-LoRA cannot go on; delete {path.parent} and resume again")
        self.rescale.load_state_dict(torch.load(path, weights_only=True))

    def _path(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.STATE
