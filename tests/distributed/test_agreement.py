"""What ranks tell each other: values of the first, whether they may differ, and nothing where there is no process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tnadapt import MPO, LoraOver, Static
from tnadapt.engine.ranks import _carrier, broadcast_from_first, local

from .models import batch, loss_of, net, optimizer_of, place, train, trainable
from .ranks import Failed, Ranks
from .test_fsdp import cpu_mesh, shard


def _broadcast(start: Callable[[], None], in_a_group: bool) -> list[list[float]]:
    start()
    rank = dist.get_rank()
    values = [torch.full((2,), 1.0 + rank), torch.full((3,), 10.0 + rank)]
    broadcast_from_first(values, dist.new_group([0, 1]) if in_a_group else None)
    return [value.tolist() for value in values]


@pytest.mark.parametrize("in_a_group", [False, True])
def test_values_are_those_of_the_first_rank(two: Ranks, in_a_group: bool) -> None:
    assert two.run(_broadcast, in_a_group) == [[[1.0] * 2, [10.0] * 3]] * 2


@pytest.mark.parametrize(
    ("backends", "device", "carrier"),
    [
        ("cuda:nccl", "cpu", "cuda"),
        ("cuda:nccl", "cuda:1", "cuda:1"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda:1", "cuda:1"),
        ("cpu:gloo", "cuda:1", "cpu"),
        ("xpu:xccl,cuda:nccl", "cpu", "xpu"),
    ],
)
def test_what_a_backend_cannot_send_goes_by_a_device_that_it_can(
    monkeypatch: pytest.MonkeyPatch, backends: str, device: str, carrier: str
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    assert _carrier(torch.device(device)) == torch.device(carrier)


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


def _with_a_warm_up(start: Callable[[], None]) -> int:
    """A step at a rate of zero, where all that the first rank has of the gradients is zero."""
    start()
    rank, _ = place()
    model = shard(net(0), cpu_mesh())
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


def test_without_a_process_group_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective without a process group")

    for name in (
        "broadcast",
        "all_reduce",
        "all_gather",
        "all_gather_object",
        "broadcast_object_list",
        "get_world_size",
    ):
        monkeypatch.setattr(dist, name, never)
    model = net(0)
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), Static(r"A$"))
    train(model, optimizer, range(1, 4))
    entries = optimizer.state_dict()["state"]
    assert len(entries) == 4  # of the matrices that are not expanded; zeros for the others are for checkpoints of ranks
    over.fold()
