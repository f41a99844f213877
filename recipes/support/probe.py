"""What steps through cores do beside plain LoRA's: their direction, their length, and the product that they lead to."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from transformers import TrainerCallback

from support.adapters import BETAS
from support.many import Job, load_recipe
from support.methods import METHODS
from support.running import adapted, hush
from support.training import train


class StepsBeside(TrainerCallback):
    """At every optimizer step, the step that AdamW would have taken of the same gradients on the matrices themselves.

    That AdamW has seen every gradient of the run, and starts each step at the matrices as they are.
    """

    def __init__(self, model: Any, weight_decay: float) -> None:
        self.matrices = {name: p for name, p in model.named_parameters() if "lora_" in name}
        self.plain = {name: p.detach().clone().requires_grad_() for name, p in self.matrices.items()}
        self.adamw = torch.optim.AdamW(self.plain.values(), lr=0.0, betas=BETAS, weight_decay=weight_decay)
        self.before: dict[str, Tensor] = {}
        self.cosines: list[float] = []
        """For each step: between all matrices' steps, taken as one vector each."""
        self.lengths: list[float] = []
        """For each step: the length of the step over that of AdamW's."""

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.adamw.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        for name, matrix in self.matrices.items():
            self.before[name] = matrix.detach().clone()
            self.plain[name].copy_(matrix)
            self.plain[name].grad = None if matrix.grad is None else matrix.grad.detach().clone()

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.adamw.step()
        taken = torch.cat([(matrix - self.before[name]).flatten() for name, matrix in self.matrices.items()])
        plain = torch.cat([(self.plain[name] - self.before[name]).flatten() for name in self.matrices])
        self.cosines.append(float(torch.cosine_similarity(taken, plain, dim=0)))
        self.lengths.append(float(taken.norm() / plain.norm()))


def singular_values(model: Any) -> list[float]:
    """Those of B A, each layer's divided by its largest, averaged over the layers."""
    spectra = []
    for module in model.modules():
        if isinstance(module, LoraLinear):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            values = torch.linalg.svdvals(b.detach().double() @ a.detach().double())[: a.shape[0]]
            spectra.append(values / values[0])
    return [float(value) for value in torch.stack(spectra).mean(0)]


def measure(job: Job) -> dict[str, list[float]]:
    """Train as ``job`` says, and watch."""
    hush()
    path, config = job
    recipe = load_recipe(path)
    with tempfile.TemporaryDirectory() as work:
        model, _, training = adapted(recipe, config, recipe.load(config)[0], Path(work), quiet=True)
        watch = StepsBeside(model, config.weight_decay)
        train(model, METHODS[config.method], training, [watch])
    rounded = {"cosines": watch.cosines, "lengths": watch.lengths, "singular_values": singular_values(model)}
    return {name: [float(f"{value:.4g}") for value in values] for name, values in rounded.items()}
