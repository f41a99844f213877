"""What DDP and FSDP2 have in common: folding and expanding again, low precision, and steps that a GradScaler skips."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tnadapt import MPO, LoraOver, Static

from .models import (
    batch,
    difference,
    drift,
    loss_of,
    net,
    on_one_process,
    optimizer_of,
    outcome,
    place,
    scheduler,
    train,
    trainable,
    whole_values,
)
from .ranks import Ranks
from .test_fsdp import cpu_mesh, shard

ENGINES = pytest.mark.parametrize("engine", ["ddp", "fsdp"])


def _wrapped(engine: str, model: Any) -> nn.Module:
    return DistributedDataParallel(model) if engine == "ddp" else shard(model, cpu_mesh())


class _Cycle(Static):
    """Everything from step 0; the first layer is folded at step 3 and expanded again at step 6."""

    def due(self, step: int) -> bool:
        return step in (0, 3, 6)

    def release(self, step: int, matrices: Any) -> Iterable[str]:
        return [name for name in matrices if name.startswith("layers.0.")] if step == 3 else ()

    def select(self, step: int, matrices: Any) -> Iterable[str]:
        return matrices if step == 0 else [name for name, m in matrices.items() if not m.expanded] if step == 6 else ()


def _cycle(start: Callable[[], None], engine: str) -> dict[str, Any]:
    start()
    rank, world = place()
    model = _wrapped(engine, net(rank))
    optimizer = optimizer_of(trainable(model))
    initial = whole_values(model)
    over = LoraOver(model, optimizer, MPO(order=4), _Cycle())
    train(model, optimizer, range(1, 10), rank, world)
    return {**outcome(model, over), "initial": initial}


@ENGINES
def test_a_layer_is_folded_and_expanded_again(two: Ranks, engine: str) -> None:
    results = two.run(_cycle, engine)
    assert [event[:2] for event in results[0]["history"]] == [(0, "expand"), (3, "fold"), (6, "expand")]
    assert drift(results) == 0
    assert difference(results[0], on_one_process(results[0]["initial"], _Cycle)) < 1e-9


def _low_precision(start: Callable[[], None], engine: str) -> dict[str, Any]:
    start()
    rank, world = place()
    model = _wrapped(engine, net(rank).to(torch.bfloat16))
    optimizer = optimizer_of(trainable(model), "foreach")
    over = LoraOver(model, optimizer, MPO(order=4), scheduler())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 9):
            optimizer.zero_grad()
            loss_of(model, batch(step, rank, world).bfloat16()).backward()
            optimizer.step()
    assert not [w for w in caught if "changed outside" in str(w.message)]
    return outcome(model, over)


@ENGINES
def test_bfloat16_matrices_stay_the_same_on_all_ranks(two: Ranks, engine: str) -> None:
    results = two.run(_low_precision, engine)
    assert len(results[0]["history"]) == 3
    assert drift(results) == 0


def _overflows(start: Callable[[], None], engine: str) -> dict[str, Any]:
    start()
    rank, world = place()
    model = _wrapped(engine, net(rank).float())
    optimizer = optimizer_of(trainable(model), "fused")
    over = LoraOver(model, optimizer, MPO(order=4), scheduler())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
    for step in range(1, 9):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch(step, rank, world).float())).backward()
        grad: Any = over.matrices["head.B"].parameter.grad
        if step in (3, 5) and (engine == "ddp" or rank == 1):  # with shards, on one rank only
            (grad if engine == "ddp" else grad.to_local())[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert over.step == 6
    return outcome(model, over)


@ENGINES
def test_overflows_are_skipped_by_all(two: Ranks, engine: str) -> None:
    results = two.run(_overflows, engine)
    assert len(results[0]["history"]) == 3
    assert drift(results) == 0
