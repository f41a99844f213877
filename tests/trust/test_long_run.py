"""Thousands of steps with expansions and foldings in between: nothing accumulates, and the matrices are what cores fold to."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch
from engine.models import Experts, expert_loss, trainable

from tnadapt import MPO, LoraOver
from tnadapt.schedulers import Budget, Scheduler

EVERY = 5


class Random(Scheduler):
    """Releases and expands at random."""

    def __init__(self) -> None:
        self.draw = random.Random(0)

    def due(self, step: int) -> bool:
        return step > 0 and step % EVERY == 0

    def release(self, step: int, matrices: Any) -> list[str]:
        return [name for name, matrix in matrices.items() if matrix.expanded and self.draw.random() < 0.4]

    def select(self, step: int, matrices: Any) -> list[str]:
        # called after those released are folded; one may come back at once
        return [name for name, matrix in matrices.items() if not matrix.expanded and self.draw.random() < 0.4]


SCHEDULERS = {
    "random": Random,
    "budget": lambda: Budget(added_parameters=300, every=EVERY, decay=0.5, margin=1.0),
}
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=3e-3),
}


def require_folded(over: LoraOver) -> int:
    """Every matrix that was stepped is bit for bit what its cores fold to; how many there are.

    Expanding alone writes no matrix: one that has had no gradient since agrees to rounding."""
    exact = 0
    for cohort in over._expanded.now.cohorts:
        fold = cohort.key.factorization.fold
        folded = [(member, fold([core[None] for core in member.cores])[0]) for member in cohort.members()]
        for member, value in folded:
            if member.matrix.parameter.grad is not None:
                assert torch.equal(member.matrix.parameter.detach(), value), member.matrix.name
                exact += 1
    assert over.changed_outside() == ()
    return exact


def alive(over: LoraOver) -> dict[str, int]:
    """Tensors, their bytes, and Python objects but for the history, while nothing is expanded."""
    over.fold(over.expanded)
    gc.collect()
    objects = gc.get_objects()
    # exact types: other tests leave tensors without memory behind, those of torch.compile
    tensors = [o for o in objects if type(o) in (torch.Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    # an event is an object with attributes, among which is a tuple
    return {
        "tensors": len(tensors),
        "bytes": sum(storages.values()),
        "objects": len(objects) - 3 * len(over.history),
    }


def train(optimizer_name: str, scheduler_name: str, steps: int, check_every: int) -> None:
    model = Experts(dtype=torch.float32)
    optimizer = OPTIMIZERS[optimizer_name](trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), SCHEDULERS[scheduler_name]())
    counts: list[dict[str, int]] = []
    seen = checked = 0
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        # which experts matter changes, so that budgets move
        used = ((0, 1, 2), (0, 1), (1, 2), (0, 2))[step // 20 % 4]
        expert_loss(model, step % 50, used).backward()
        optimizer.step()
        if step % check_every == 0:
            seen = max(seen, require_folded(over))
            checked += 1
        if step % (steps // 5) == 0:
            optimizer.zero_grad()
            counts.append(alive(over))
    actions = [event.action for event in over.history]
    assert min(actions.count("expand"), actions.count("fold")) >= steps // 60
    assert seen >= 2
    assert checked == steps // check_every
    assert over.step == steps
    # by the second count everything that is imported late, by whichever test, is there
    first, last = counts[1], counts[-1]
    print(f"{scheduler_name}, {optimizer_name}: {len(actions)} events, first {first}, last {last}")
    # which matrices have just been folded, and so have no moments of their own, differs a little
    for key, slack in (("tensors", 12), ("bytes", 2000), ("objects", 300)):
        assert last[key] <= first[key] + slack, key


@pytest.mark.parametrize(("optimizer", "scheduler"), [("AdamW", "budget"), ("Adafactor", "random")])
def test_three_hundred_steps(optimizer: str, scheduler: str) -> None:
    train(optimizer, scheduler, 300, check_every=4)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_ten_thousand_steps(scheduler: str) -> None:
    train("AdamW", scheduler, 10_000, check_every=7)
