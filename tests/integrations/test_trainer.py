"""HF Trainer as it is, with an optimizer that `LoraOver` is attached to."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, get_cosine_schedule_with_warmup

from tnadapt import LoraOver

from .tiny import STEPS, arguments, dataset, lora_model, lora_parameters, lora_weights, loss_of, mpo, rounds

RATE = 2e-2
CORE_RATE = 1e-2

Calls = list[dict[str, Any]]
MakeOptimizer = Callable[[torch.nn.Module], torch.optim.Optimizer]
MakeSchedule = Callable[[torch.optim.Optimizer], Any]


def adamw(**options: Any) -> MakeOptimizer:
    return lambda model: torch.optim.AdamW(lora_parameters(model), lr=RATE, **options)


def named_adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=RATE)


def grouped_sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    """B at four times A's rate, as LoRA+ has it."""
    sides: dict[str, list[torch.nn.Parameter]] = {"A": [], "B": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sides["A" if "lora_A" in name else "B"].append(parameter)
    groups = [{"params": sides["A"]}, {"params": sides["B"], "lr": 4 * 0.3}]
    return torch.optim.SGD(groups, lr=0.3, momentum=0.9)


def falling(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.2 * step))


def per_group(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """One function for each group: fails where the number of groups is not the user's."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.9**step])


def one_cycle(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=STEPS + 1)


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=STEPS)


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def record_calls(model: torch.nn.Module) -> Calls:
    """What the trainer calls the model with, in order."""
    calls: Calls = []

    def hook(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            calls.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()})

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


def bare_loop(
    model: torch.nn.Module,
    calls: Calls,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    accumulate: int = 1,
    max_norm: float = 0.0,
    bf16: bool = False,
) -> None:
    model.train()
    autocast: Any = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    for k, kwargs in enumerate(calls):
        with autocast:
            loss = model(**kwargs).loss
        loss.backward()
        if (k + 1) % accumulate:
            continue
        if max_norm:
            torch.nn.utils.clip_grad_norm_(lora_parameters(model), max_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


class Watch(TrainerCallback):
    """What others see while the trainer trains: groups and gradients."""

    def __init__(self) -> None:
        self.groups: set[int] = set()
        self.without_gradient: list[int] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.groups.add(len(kwargs["optimizer"].param_groups))
        if any(p.grad is None or not bool(p.grad.any()) for p in lora_parameters(kwargs["model"]) if p.dim() == 2):
            self.without_gradient.append(state.global_step)


def train_both(
    folder: Path,
    make_optimizer: MakeOptimizer,
    make_schedule: MakeSchedule | None = None,
    bare_schedule: MakeSchedule = constant,
    schedule_first: bool = False,
    accumulate: int = 1,
    max_norm: float = 0.0,
    bf16: bool = False,
    **changes: Any,
) -> tuple[float, float]:
    """Train with Trainer and with a bare loop on the same batches; the largest difference of their weights, and the
    largest difference from plain LoRA in the same loop."""
    model = lora_model()
    bare, plain = copy.deepcopy(model), copy.deepcopy(model)
    before, loss_before = lora_weights(model), loss_of(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    calls = record_calls(model)

    optimizer, watch = make_optimizer(model), Watch()
    groups = len(optimizer.param_groups)
    schedule = make_schedule(optimizer) if make_schedule and schedule_first else None
    over = LoraOver(model, optimizer, mpo(), rounds(), core_lr=CORE_RATE)
    if make_schedule and not schedule_first:
        schedule = make_schedule(optimizer)
    args = arguments(
        folder,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=max_norm,
        bf16=bf16,
        **{"lr_scheduler_type": "constant", **changes},
    )
    trainer = Trainer(model, args, train_dataset=dataset(), optimizers=(optimizer, schedule), callbacks=[watch])
    trainer.train()

    assert over.step == STEPS
    assert [(event.step, event.action) for event in over.history] == [(3, "expand"), (6, "expand")]
    assert watch.groups == {groups}
    # A has none while B is zero, which it is until a step with a rate
    assert set(watch.without_gradient) <= ({0, 1} if "warmup_steps" in changes else {0})
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    after = lora_weights(model)
    assert all(not torch.equal(after[name], before[name]) for name in after)
    assert len(over.expanded) == len(over.matrices)
    assert not over.changed_outside()
    assert loss_of(model) < loss_before - 0.03
    over.fold()

    optimizer = make_optimizer(bare)
    over = LoraOver(bare, optimizer, mpo(), rounds(), core_lr=CORE_RATE)
    bare_loop(bare, calls, optimizer, (make_schedule or bare_schedule)(optimizer), accumulate, max_norm, bf16)
    over.detach()
    optimizer = make_optimizer(plain)
    bare_loop(plain, calls, optimizer, (make_schedule or bare_schedule)(optimizer), accumulate, max_norm, bf16)
    return largest_difference(after, lora_weights(bare)), largest_difference(after, lora_weights(plain))


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert set(left) == set(right)
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        pytest.param(adamw(foreach=False, weight_decay=0.1), id="for-loop"),
        pytest.param(adamw(foreach=True), id="foreach"),
        pytest.param(adamw(fused=True), id="fused"),
        pytest.param(named_adamw, id="named-parameters"),
        pytest.param(grouped_sgd, id="groups-with-rates"),
    ],
)
def test_trainer_trains_what_a_bare_loop_trains(tmp_path: Path, make_optimizer: MakeOptimizer) -> None:
    from_bare, from_plain = train_both(tmp_path, make_optimizer)
    assert from_bare == 0.0
    assert from_plain > 1e-3


def test_accumulation_clipping_and_cosine(tmp_path: Path) -> None:
    from_bare, from_plain = train_both(
        tmp_path,
        adamw(),
        bare_schedule=cosine,
        accumulate=2,
        max_norm=0.3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
    )
    assert from_bare == 0.0
    assert from_plain > 1e-3


def test_clipping_reaches_the_cores(tmp_path: Path) -> None:
    """Clipping acts on the matrices' gradients before they are pulled back: SGD steps by less."""
    moved = []
    for max_norm in (0.0, 1e-3):
        model = lora_model()
        start = lora_weights(model)
        optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
        LoraOver(model, optimizer, mpo())
        args = arguments(tmp_path, max_steps=2, max_grad_norm=max_norm, lr_scheduler_type="constant")
        Trainer(model, args, train_dataset=dataset(), optimizers=(optimizer, None)).train()
        moved.append(largest_difference(lora_weights(model), start))
    assert 0 < moved[1] < moved[0] / 20


@pytest.mark.parametrize("schedule_first", [True, False], ids=["made-before", "made-after"])
@pytest.mark.parametrize("make_schedule", [falling, one_cycle])
def test_schedules_passed_in(tmp_path: Path, make_schedule: MakeSchedule, schedule_first: bool) -> None:
    from_bare, from_plain = train_both(tmp_path, adamw(), make_schedule, schedule_first=schedule_first)
    assert from_bare == 0.0
    assert from_plain > 1e-3


def test_a_function_per_group(tmp_path: Path) -> None:
    assert train_both(tmp_path, grouped_sgd, per_group, schedule_first=True)[0] == 0.0


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    from_bare, _ = train_both(tmp_path, adamw(), activation_checkpointing=True)
    assert from_bare == 0.0


def test_bf16_autocast(tmp_path: Path) -> None:
    from_bare, from_plain = train_both(tmp_path, adamw(), bf16=True)
    assert from_bare == 0.0
    assert from_plain > 1e-3


def test_rates_of_the_cores_follow_the_schedule(tmp_path: Path) -> None:
    model = lora_model()
    optimizer = adamw()(model)
    over = LoraOver(model, optimizer, mpo(), core_lr=CORE_RATE)
    rates: list[tuple[float, float | None]] = []

    class Rates(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rates.append((kwargs["optimizer"].param_groups[0]["lr"], over.core_rate()))

    args = arguments(tmp_path, lr_scheduler_type="cosine")
    Trainer(model, args, train_dataset=dataset(), optimizers=(optimizer, None), callbacks=[Rates()]).train()
    assert len(rates) == STEPS
    for step, (rate, core_rate) in enumerate(rates):
        assert rate == pytest.approx(RATE * (1 + math.cos(math.pi * step / STEPS)) / 2)
        assert core_rate == pytest.approx(rate * CORE_RATE / RATE)
