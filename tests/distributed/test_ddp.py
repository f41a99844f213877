"""DistributedDataParallel: the same choices and cores on every rank, and the run of one process on the global batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tnadapt import MPO, LoraOver, Static

from .models import (
    STEPS,
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

STEPS_OF_RUN = range(1, STEPS + 1)


def _runtime(start: Callable[[], None], kind: str) -> dict[str, Any]:
    start()
    rank, world = place()
    model = net(rank)  # different adapters on each rank: DDP broadcasts the first one's
    optimizer = optimizer_of(trainable(model), kind)
    ddp = DistributedDataParallel(model)
    initial = whole_values(ddp)
    over = LoraOver(ddp, optimizer, MPO(order=4), scheduler())
    train(ddp, optimizer, STEPS_OF_RUN, rank, world)
    return {**outcome(ddp, over), "initial": initial}


@pytest.mark.parametrize("kind", ["adamw", "foreach", "fused", "sgd"])
def test_expansions_at_runtime(ranks: Ranks, kind: str) -> None:
    results = ranks.run(_runtime, kind)
    assert [event[0] for event in results[0]["history"]] == [2, 4, 6]
    assert drift(results) == 0
    assert difference(results[0], on_one_process(results[0]["initial"], kind=kind)) < 1e-9


def _static_before_the_group(start: Callable[[], None]) -> dict[str, Any]:
    torch.manual_seed(torch.initial_seed())
    import os

    model = net(int(os.environ["RANK"]))
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), Static())  # neither a process group nor a wrapper yet
    start()
    rank, world = place()
    ddp = DistributedDataParallel(model)
    initial = whole_values(ddp)
    train(ddp, optimizer, STEPS_OF_RUN, rank, world)
    return {**outcome(ddp, over), "initial": initial}


def test_attached_before_the_process_group_exists(ranks: Ranks) -> None:
    results = ranks.run(_static_before_the_group)
    assert len(results[0]["cores"]) == 8
    assert drift(results) == 0
    assert difference(results[0], on_one_process(results[0]["initial"], Static)) < 1e-9


def _accumulating(start: Callable[[], None]) -> dict[str, Any]:
    start()
    rank, world = place()
    model = net(rank)
    optimizer = optimizer_of(trainable(model))
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    initial = whole_values(ddp)
    over = LoraOver(ddp, optimizer, MPO(order=4), scheduler())
    for step in STEPS_OF_RUN:
        optimizer.zero_grad()
        first, second = batch(step, rank, world).chunk(2)
        with ddp.no_sync():
            (loss_of(ddp, first) / 2).backward()
        (loss_of(ddp, second) / 2).backward()
        optimizer.step()
    return {**outcome(ddp, over), "initial": initial}


def test_accumulation_without_synchronisation(ranks: Ranks) -> None:
    results = ranks.run(_accumulating)
    assert drift(results) == 0
    assert difference(results[0], on_one_process(results[0]["initial"])) < 1e-9


def _two_groups(start: Callable[[], None], attached_to: str) -> dict[str, Any] | str:
    """Ranks 0 and 1 (of two: each one alone) train one model, the others another."""
    start()
    rank, world = place()
    half = world // 2
    groups = [dist.new_group(list(range(k * half, (k + 1) * half))) for k in range(2)]
    mine = groups[rank // half]
    model = net(10 * (rank // half) + rank)
    optimizer = optimizer_of(trainable(model))
    ddp = DistributedDataParallel(model, process_group=mine)
    initial = whole_values(ddp)
    over = LoraOver(ddp, optimizer, MPO(order=4), scheduler(), process_group=mine if attached_to == "group" else None)
    try:
        train(ddp, optimizer, STEPS_OF_RUN, rank % half, half)
    except RuntimeError as error:
        assert over.step == 1
        assert not over.expanded
        return str(error)
    return {**outcome(ddp, over), "initial": initial}


def test_process_groups_that_are_not_the_world(ranks: Ranks) -> None:
    results: list[Any] = ranks.run(_two_groups, "group")
    half = ranks.world // 2
    for members in (results[:half], results[half:]):
        assert drift(members) == 0
        assert difference(members[0], on_one_process(members[0]["initial"])) < 1e-9
    assert results[0]["values"]["head.lora_A.weight"].ne(results[-1]["values"]["head.lora_A.weight"]).any()


def test_models_that_differ_are_reported_on_every_rank(two: Ranks) -> None:
    messages = two.run(_two_groups, "world")
    assert all("different values" in message and "process_group=" in message for message in messages)


def _disagreeing(start: Callable[[], None], how: str) -> tuple[str, bool]:
    start()
    rank, world = place()
    model = net(0)
    if how == "names" and rank == 1:
        model.layers[2].lora_A.weight.requires_grad_(False)
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4 if how != "order" or rank == 0 else 2), Static())
    if how == "state":
        train(model, optimizer, range(1, 2))
        state = over.state_dict()
        over.detach()
        over = LoraOver(model, optimizer, MPO(order=4), Static())
        if rank == 0:
            over.load_state_dict(state)
    before = whole_values(model)
    try:
        train(model, optimizer, range(1, 3), rank, world)
    except RuntimeError as error:
        return str(error), all(torch.equal(before[name], value) for name, value in whole_values(model).items())
    return "", False


@pytest.mark.parametrize(
    ("how", "said"),
    [("names", "matrices: .*layers.2.A"), ("order", "factorization: "), ("state", "steps taken: 1 and 0")],
)
def test_ranks_that_disagree(two: Ranks, how: str, said: str) -> None:
    import re

    for message, untouched in two.run(_disagreeing, how):
        assert re.search(said, message)
        assert untouched


class _FailsOnRankOne(Static):
    def due(self, step: int) -> bool:
        return True

    def select(self, step: int, matrices: Any) -> Any:
        if step == 2 and dist.get_rank() == 1:
            raise ZeroDivisionError("no scores")
        return ()


def _failing_scheduler(start: Callable[[], None]) -> str:
    start()
    model = net(0)
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), _FailsOnRankOne())
    with contextlib.suppress(StopIteration):
        try:
            train(model, optimizer, range(1, 4))
        except Exception as error:
            assert over.step == 1
            return repr(error)
    return ""


def test_a_scheduler_that_fails_on_one_rank_stops_all(two: Ranks) -> None:
    first, second = two.run(_failing_scheduler)
    assert "failed on rank 1 at step 2" in first
    assert "no scores" in first
    assert second == "ZeroDivisionError('no scores')"


class _ByRank(Static):
    """A scheduler that would choose differently on each rank."""

    def due(self, step: int) -> bool:
        return step in (2, 3)

    def select(self, step: int, matrices: Any) -> Any:
        return [list(matrices)[2 * (step % 2) + dist.get_rank()]] if self.due(step) else ()


def _different_choices(start: Callable[[], None]) -> dict[str, Any]:
    start()
    rank, world = place()
    model = net(rank)
    optimizer = optimizer_of(trainable(model))
    ddp = DistributedDataParallel(model)
    over = LoraOver(ddp, optimizer, MPO(order=4), _ByRank())
    train(ddp, optimizer, STEPS_OF_RUN, rank, world)
    return outcome(ddp, over)


def test_the_first_rank_chooses(two: Ranks) -> None:
    results = two.run(_different_choices)
    assert results[0]["history"] == [(2, "expand", ("layers.0.A",)), (3, "expand", ("layers.1.A",))]
    assert drift(results) == 0


def _changed_on_one_rank(start: Callable[[], None]) -> dict[str, Any] | str:
    start()
    rank, world = place()
    model = net(rank)
    optimizer = optimizer_of(trainable(model))
    ddp = DistributedDataParallel(model)
    LoraOver(ddp, optimizer, MPO(order=4), Static())
    train(ddp, optimizer, range(1, 4), rank, world)
    if rank == 1:
        with torch.no_grad():
            model.head.lora_A.weight.mul_(1.1)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            train(ddp, optimizer, range(4, 6), rank, world)
        except RuntimeError as error:
            return str(error)
    return ""


def test_a_matrix_that_one_rank_changes_is_an_error_on_all(two: Ranks) -> None:
    assert all("different values of head.A" in str(message) for message in two.run(_changed_on_one_rank))
