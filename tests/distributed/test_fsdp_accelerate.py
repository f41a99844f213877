"""FSDP2 through accelerate: prepared, accumulated, clipped, stepped, saved and loaded by an `Accelerator`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tnadapt import MPO, LoraOver, Static

from .models import (
    STEPS,
    batch,
    difference,
    drift,
    load_values,
    loss_of,
    net,
    optimizer_of,
    outcome,
    place,
    scheduler,
    trainable,
    whole_values,
)
from .ranks import Ranks

pytest.importorskip("accelerate")

from accelerate import Accelerator

from .accelerated import OPTIONS, fresh, on_cpu_ranks, plugin

CLIP = 0.1  # below the norm of nearly every gradient
SAVED_AT = 5  # two of three expansions are behind, one is to come


def _prepared(accelerator: Accelerator, seed: int, choice: Any, early: bool = False) -> tuple[Any, Any, LoraOver]:
    """Model and optimizer of an accelerator, with `LoraOver` attached before they are prepared (`early`) or after."""
    model: Any = net(seed)
    optimizer: Any = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), choice()) if early else None
    model, optimizer = accelerator.prepare(model, optimizer)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model, optimizer, over or LoraOver(model, optimizer, MPO(order=4), choice())


def _train(accelerator: Accelerator, model: Any, optimizer: Any, steps: range) -> None:
    """Two batches a step, clipped, the way accelerate's documentation has it."""
    for step in steps:
        for part in batch(step, *place()).chunk(2):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, part))
                if accelerator.sync_gradients:
                    assert accelerator.clip_grad_norm_(model.parameters(), CLIP) > 0
                optimizer.step()
                optimizer.zero_grad()


def _on_one_process(initial: dict[str, torch.Tensor], choice: Any = scheduler) -> dict[str, Any]:
    model = net(0)
    load_values(model, initial)
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), choice())
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(trainable(model), CLIP)
        optimizer.step()
    return outcome(model, over)


def _runs(start: Callable[[], None], early: bool, options: dict[str, Any]) -> dict[str, Any]:
    start()
    with on_cpu_ranks():
        accelerator = Accelerator(fsdp_plugin=plugin(**options), gradient_accumulation_steps=2)
        assert accelerator.is_fsdp2
        model, optimizer, over = _prepared(accelerator, place()[0], scheduler, early)
        initial = whole_values(model)
        _train(accelerator, model, optimizer, range(1, 4))
        cores = outcome(model, over)["cores"]
        _train(accelerator, model, optimizer, range(4, STEPS + 1))
        return {**outcome(model, over), "initial": initial, "cores of step 3": cores}


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("early", [True, False], ids=["before prepare", "after"])
def test_expansions_at_runtime(two: Ranks, early: bool, how: str) -> None:
    results = two.run(_runs, early, OPTIONS[how])
    first = results[0]
    assert [event[0] for event in first["history"]] == [2, 4, 6]
    assert drift(results) == 0
    assert difference(first, _on_one_process(first["initial"])) < 1e-9
    assert len(first["cores of step 3"]) == 4
    for name, cores in first["cores of step 3"].items():
        moved = [float((now - then).abs().max()) for now, then in zip(first["cores"][name], cores, strict=True)]
        assert min(moved) > 1e-3


@pytest.mark.slow
def test_expansions_on_four_ranks(four: Ranks) -> None:
    results = four.run(_runs, True, {})
    assert drift(results) == 0
    assert difference(results[0], _on_one_process(results[0]["initial"])) < 1e-9


def _mixed(start: Callable[[], None], early: bool) -> dict[str, Any]:
    start()
    with on_cpu_ranks(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accelerator = Accelerator(fsdp_plugin=plugin(), gradient_accumulation_steps=2, mixed_precision="bf16")
        model, optimizer, over = _prepared(accelerator, place()[0], scheduler, early)
        assert {m.parameter.dtype for m in over.matrices.values()} == {
            torch.float32
        }  # accelerate widens what is trained
        _train(accelerator, model, optimizer, range(1, STEPS + 1))
        assert not [w for w in caught if "changed outside" in str(w.message)]
        return outcome(model, over)


@pytest.mark.parametrize("early", [True, False], ids=["before prepare", "after"])
def test_mixed_precision(two: Ranks, early: bool) -> None:
    results = two.run(_mixed, early)
    assert [event[0] for event in results[0]["history"]] == [2, 4, 6]
    assert drift(results) == 0
    assert all(core.dtype == torch.float32 for cores in results[0]["cores"].values() for core in cores)


def _saves(start: Callable[[], None], folder: str, kind: str, choice: Any) -> dict[str, Any]:
    start()
    with on_cpu_ranks():
        accelerator = Accelerator(fsdp_plugin=plugin(state_dict_type=kind), gradient_accumulation_steps=2)
        model, optimizer, over = _prepared(accelerator, place()[0], choice)
        accelerator.register_for_checkpointing(over)
        initial = whole_values(model)
        _train(accelerator, model, optimizer, range(1, SAVED_AT + 1))
        accelerator.save_state(folder)
        _train(accelerator, model, optimizer, range(SAVED_AT + 1, STEPS + 1))
        return {**outcome(model, over), "initial": initial}


def _resumes(start: Callable[[], None], folder: str, kind: str, choice: Any) -> dict[str, Any]:
    start()
    with on_cpu_ranks():
        accelerator = Accelerator(fsdp_plugin=plugin(state_dict_type=kind), gradient_accumulation_steps=2)
        model, optimizer, over = _prepared(accelerator, 50 + place()[0], choice)
        accelerator.register_for_checkpointing(over)
        accelerator.load_state(folder)
        assert over.step == SAVED_AT
        assert not over.changed_outside()
        _train(accelerator, model, optimizer, range(SAVED_AT + 1, STEPS + 1))
        return outcome(model, over)


@pytest.mark.parametrize("choice", [scheduler, Static], ids=["runtime", "static"])
@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_a_saved_and_loaded_state_goes_on_to_the_same_end(two: Ranks, tmp_path: Path, kind: str, choice: Any) -> None:
    folder = str(tmp_path / "checkpoint")
    saved = two.run(_saves, folder, kind, choice)
    resumed = two.run(_resumes, folder, kind, choice)
    assert drift(saved) == 0
    assert drift(resumed) == 0
    assert difference(resumed[0], saved[0]) == 0
    assert difference(resumed[0], _on_one_process(saved[0]["initial"], choice)) < 1e-9


def _unaided(start: Callable[[], None]) -> tuple[str, str]:
    start()
    with fresh(MASTER_ADDR="localhost"):
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin())
        model: Any = net(0)
        model, _ = accelerator.prepare(model, optimizer_of(trainable(model)))
        return accelerator.distributed_type.name, type(model).__name__


def test_what_accelerate_does_on_cpu_ranks_by_itself(two: Ranks) -> None:
    """Once it does FSDP2 there, `on_cpu_ranks` is not needed any more."""
    assert two.run(_unaided) == [("MULTI_CPU", "DistributedDataParallel")] * 2
