"""Plain loops with accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tnadapt import LoraOver

from .tiny import dataset, lora_model, lora_parameters, lora_weights, mpo, rounds

BATCHES = 8


def batches() -> list[dict[str, torch.Tensor]]:
    rows = dataset()
    return [{k: torch.stack([row[k] for row in rows[4 * b : 4 * b + 4]]) for k in rows[0]} for b in range(BATCHES)]


class Run:
    """A model, its optimizer and `LoraOver`, attached `before` or `after` prepare, or `never`."""

    def __init__(self, attach: str, **options: Any) -> None:
        self.accelerator = Accelerator(cpu=True, **options)
        self.rounds = rounds()
        model = lora_model()
        optimizer = torch.optim.AdamW(lora_parameters(model), lr=2e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        if attach == "before":
            self.over = LoraOver(model, optimizer, mpo(), self.rounds, core_lr=1e-2)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)
        if attach == "after":
            self.over = LoraOver(self.model, self.optimizer, mpo(), self.rounds, core_lr=1e-2)

    def steps(self, chosen: list[dict[str, torch.Tensor]]) -> None:
        self.model.train()
        for inputs in chosen:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(**inputs).loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


def without_accelerate(accumulate: int = 1) -> dict[str, torch.Tensor]:
    model = lora_model()
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=2e-2)
    over = LoraOver(model, optimizer, mpo(), rounds(), core_lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for k, inputs in enumerate(batches()):
        (model(**inputs).loss / accumulate).backward()
        if (k + 1) % accumulate:
            continue
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    over.detach()
    return lora_weights(model)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("attach", ["before", "after"])
def test_prepared_equals_bare(attach: str, accumulate: int) -> None:
    run = Run(attach, gradient_accumulation_steps=accumulate)
    run.steps(batches())
    assert run.over.step == BATCHES // accumulate
    assert [event.step for event in run.over.history] == ([3, 6] if accumulate == 1 else [3])
    assert equal(lora_weights(run.model), without_accelerate(accumulate))


def test_it_is_not_plain_lora() -> None:
    run = Run("never")
    run.steps(batches())
    assert not equal(lora_weights(run.model), without_accelerate())


@pytest.mark.parametrize("stop", [0, 3, 5])
@pytest.mark.parametrize("attach", ["before", "after"])
def test_save_state_and_load_state(tmp_path: Path, attach: str, stop: int) -> None:
    """Saved before the first step, after an expansion and between two."""
    first = Run(attach)
    first.steps(batches()[:stop])
    first.accelerator.save_state(str(tmp_path))
    first.steps(batches()[stop:])

    resumed = Run(attach)
    with torch.no_grad():
        for parameter in lora_parameters(resumed.model):
            parameter.add_(0.1)
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.over.step == stop
    assert resumed.over.history == [event for event in first.over.history if event.step <= stop]
    resumed.steps(batches()[stop:])
    assert equal(lora_weights(resumed.model), lora_weights(first.model))
    # with the scores of all steps, those before the save included
    assert resumed.rounds.rounds == first.rounds.rounds
    assert [chosen["step"] for chosen in first.rounds.rounds] == [3, 6]


def test_going_back_within_a_run(tmp_path: Path) -> None:
    run = Run("before")
    run.steps(batches()[:4])
    run.accelerator.save_state(str(tmp_path))
    run.steps(batches()[4:])
    ended = lora_weights(run.model)
    run.accelerator.load_state(str(tmp_path))
    assert run.over.step == 4
    run.steps(batches()[4:])
    assert equal(lora_weights(run.model), ended)
