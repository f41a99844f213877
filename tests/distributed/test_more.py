"""Folding and expanding again, low precision, skipped steps and asynchronous checkpoints, on ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tnadapt import MPO, LoraOver, Static, TaylorRuntime
from tnadapt.engine.ranks import broadcast_from_first, local
from tnadapt.integrations.distributed import Checkpointed

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
from .ranks import Failed, Ranks
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
def test_folded_and_expanded_again(two: Ranks, engine: str) -> None:
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
def test_bfloat16(two: Ranks, engine: str) -> None:
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


def _nonfinite_shard(start: Callable[[], None], expanded: bool) -> str:
    start()
    rank, world = place()
    model = shard(net(rank), cpu_mesh())
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(
        model, optimizer, MPO(order=4), Static() if expanded else TaylorRuntime(top_n=3, split=1, every=100)
    )
    train(model, optimizer, range(1, 2), rank, world)
    loss_of(model, batch(2, rank, world)).backward()
    if rank == 1:
        model.head.lora_B.weight.grad.to_local()[0, 0] = torch.nan  # type: ignore[union-attr, operator]
    before = whole_values(model)
    try:
        optimizer.step()
    except FloatingPointError as error:
        assert over.step == 1
        assert all(torch.equal(value, before[name]) for name, value in whole_values(model).items())
        return str(error)
    return ""


@pytest.mark.parametrize("expanded", [True, False])
def test_a_bad_gradient_in_one_shard_is_an_error_on_all(two: Ranks, expanded: bool) -> None:
    assert all("head.B" in message for message in two.run(_nonfinite_shard, expanded))


def _saved_while_training(start: Callable[[], None], folder: str) -> float:
    start()
    rank, world = place()
    model = shard(net(rank), cpu_mesh())
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), scheduler())
    train(model, optimizer, range(1, 6), rank, world)
    kept = outcome(model, over)["cores"]
    saving = dcp.async_save({"over": Checkpointed(over)}, checkpoint_id=folder, process_group=dist.new_group())
    train(model, optimizer, range(6, 8), rank, world)
    saving.result()  # type: ignore[union-attr]
    other = shard(net(5 + rank), cpu_mesh())
    fresh = LoraOver(other, optimizer_of(trainable(other)), MPO(order=4), scheduler())
    dcp.load({"over": Checkpointed(fresh)}, checkpoint_id=folder)
    assert fresh.step == 5
    members = fresh.state_dict()["cores"]
    return max(float((a - b).abs().max()) for n in kept for a, b in zip(members[n]["cores"], kept[n], strict=True))


def test_an_asynchronous_checkpoint_holds_the_moment_it_was_made(two: Ranks, tmp_path: Path) -> None:
    assert two.run(_saved_while_training, str(tmp_path / "checkpoint")) == [0.0, 0.0]


def _with_a_warm_up(start: Callable[[], None]) -> int:
    """A step at a rate of zero, where all that the first rank has of the gradients is zero."""
    start()
    rank, _ = place()
    model = _wrapped("fsdp", net(0))
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    over = LoraOver(model, optimizer, MPO(order=4), Static())
    loss_of(model, batch(0)).backward()
    for parameter in trainable(model):
        if rank == 0 and parameter.grad is not None:
            local(parameter.grad).zero_()
    optimizer.step()
    return over.step


def test_whether_a_step_moves_nothing_is_agreed_on(two: Ranks) -> None:
    assert two.run(_with_a_warm_up) == [1, 1]


def _broadcast(start: Callable[[], None], in_a_group: bool) -> list[list[float]]:
    start()
    rank = dist.get_rank()
    values = [torch.full((2,), 1.0 + rank), torch.full((3,), 10.0 + rank)]
    broadcast_from_first(values, dist.new_group([0, 1]) if in_a_group else None)
    return [value.tolist() for value in values]


@pytest.mark.parametrize("in_a_group", [False, True])
def test_values_are_those_of_the_first_rank(two: Ranks, in_a_group: bool) -> None:
    assert two.run(_broadcast, in_a_group) == [[[1.0] * 2, [10.0] * 3]] * 2


def _after_rounding(start: Callable[[], None], error: float) -> int:
    """Adapters that start with zeros as B, and with what rounding may make of A on the second rank, or more than that."""
    start()
    rank, _ = place()
    model = net(0)
    for layer in [*model.layers, model.head]:
        with torch.no_grad():
            layer.lora_B.weight.zero_()
            layer.lora_A.weight.mul_(1 + rank * error)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=4), Static())
    loss_of(model, batch(0)).backward()
    optimizer.step()
    return len(over.expanded)


def test_ranks_may_differ_by_rounding(two: Ranks) -> None:
    assert two.run(_after_rounding, 2.0**-52) == [8, 8]


def test_ranks_may_not_differ_by_more(two: Ranks) -> None:
    with pytest.raises(
        Failed, match=r"ranks hold different values of layers\.0\.A, layers\.1\.A, layers\.2\.A and 1 more"
    ):
        two.run(_after_rounding, 1e-13)


def _at_rest(start: Callable[[], None]) -> float:
    """Steps at a rate of zero of adapters whose B is zero; what is warned of is raised."""
    start()
    model = net(0)
    for layer in [*model.layers, model.head]:
        nn.init.zeros_(layer.lora_B.weight)
    shard(model, cpu_mesh())
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    LoraOver(model, optimizer, MPO(order=4), Static())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            loss_of(model, batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return max(float(value.abs().max()) for name, value in whole_values(model).items() if "lora_B" in name)


def test_zeros_that_rest_are_not_an_edit(two: Ranks) -> None:
    assert two.run(_at_rest) == [0.0, 0.0]
