"""The same run by autograd alone: cores are leaves that torch's optimizer holds for good, in groups of their own.

Gradients of the cores are those of their contraction as `oracle.contract` writes it down, by autograd. Which matrices are
expanded when, it reads from the history of `LoraOver`; the cores of a matrix it makes with the factorization itself, from what
the matrix was before the step (a decomposition is not unique, and the tests of factorizations hold what it must be).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from oracle import contract
from torch import Tensor

from .machine import Run, backward, make_model

__all__ = ["Reference"]

TOLERANCE = 1e-9


class Reference:
    """Follows a `Run`; elementwise optimizers and float64 only."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.model = make_model(run.setting)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        optimizer_class: Any = getattr(torch.optim, run.setting.optimizer.name)
        options = {k: v for k, v in run.setting.optimizer.options.items() if k not in ("foreach", "fused")}
        # each parameter, and later the cores of each matrix, is a group
        self.optimizer = optimizer_class([{"params": [p]} for p in self.parameters.values()], **options, foreach=False)
        self.groups = dict(zip(self.parameters, self.optimizer.param_groups, strict=True))
        self.cores: dict[str, list[Tensor]] = {}
        self.missing: dict[str, Tensor] = {}
        self.events = 0

    # -- what the run tells -------------------------------------------------------------------------------------------

    def zero(self, style: str) -> None:
        if style == "zeros":
            for p in self.parameters.values():
                if p.grad is not None:
                    p.grad.zero_()
        elif style != "keep":
            self.model.zero_grad()

    def backward(self, number: int, used: tuple[int, ...] | None) -> None:
        backward(self.model, number, used)

    def edit(self, raw: str, value: Tensor) -> None:
        with torch.no_grad():
            self.parameters[raw].copy_(value)

    def attach(self) -> None:
        self.events = 0

    def detach(self) -> None:
        self._fold(list(self.cores))

    def follow(self, before: Mapping[str, Tensor], edited: Iterable[str]) -> None:
        """Expand and fold what `LoraOver` did; matrices were `before`."""
        over = self.run.over
        if over is None:
            return
        for name in edited:
            raw = self.run.raw_name(name)
            self._fold([raw])
            self._expand(raw, before[raw])
        new, self.events = over.history[self.events :], len(over.history)
        for event in new:
            names = [self.run.raw_name(name) for name in event.names]
            if event.action == "fold":
                self._fold(names)
                continue
            for raw in names:
                self._expand(raw, before[raw])

    def step(self) -> None:
        setting = self.run.setting
        for raw, group in self.groups.items():
            group.update(self.run.hyper[raw])
            group["foreach"] = False
            if "fused" in group:
                group["fused"] = False
            if raw in self.cores:
                group["lr"] *= setting.core_ratio or 1.0
                if setting.core_weight_decay is not None and "weight_decay" in group:
                    group["weight_decay"] = setting.core_weight_decay
        for raw, cores in self.cores.items():
            grad = self.parameters[raw].grad
            pulled = [None] * len(cores) if grad is None else torch.autograd.grad(self._contracted(raw), cores, grad)
            for core, gradient in zip(cores, pulled, strict=True):
                core.grad = gradient
        self.optimizer.step()
        with torch.no_grad():
            for raw, cores in self.cores.items():
                if cores[0].grad is not None:
                    self.parameters[raw].copy_(self._contracted(raw))

    def compare(self, where: str) -> None:
        for raw, found in self.run.values().items():
            wanted = self.parameters[raw].detach()
            apart = float((found - wanted).abs().max())
            assert apart <= TOLERANCE * (1 + float(wanted.abs().max())), f"{raw} is {apart:.1e} from autograd {where}"

    # -- cores --------------------------------------------------------------------------------------------------------

    def _contracted(self, raw: str) -> Tensor:
        return contract(self.run.factorization, self.cores[raw]) + self.missing[raw]

    def _expand(self, raw: str, value: Tensor) -> None:
        parameter = self.parameters[raw]
        known = self.optimizer.state.pop(parameter, {}).get("momentum_buffer")
        self.cores[raw] = [core.clone().requires_grad_() for core in self.run.factorization.unfold(value)]
        self.missing[raw] = value - contract(self.run.factorization, self.cores[raw]).detach()
        self.groups[raw]["params"] = self.cores[raw]
        setting = self.run.setting
        if setting.handover == "warm" and known is not None and not setting.subclass:
            pulled = torch.autograd.grad(self._contracted(raw), self.cores[raw], known)
            for core, moment in zip(self.cores[raw], pulled, strict=True):
                self.optimizer.state[core] = {"momentum_buffer": moment.clone()}

    def _fold(self, names: Iterable[str]) -> None:
        for raw in names:
            for core in self.cores.pop(raw):
                self.optimizer.state.pop(core, None)
            self.groups[raw]["params"] = [self.parameters[raw]]
