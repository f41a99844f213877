"""FSDP2 (`fully_shard`): matrices that are sharded unevenly, gathered, pulled back alike and written as shards."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from tnadapt import MPO, LoraOver, Static, TaylorRuntime

from .models import (
    OFFLOAD,
    STEPS,
    Net,
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


def shard(model: Net, mesh: Any = None, **options: Any) -> Net:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)  # type: ignore[no-any-return]


def cpu_mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _runtime(start: Callable[[], None], kind: str, **options: Any) -> dict[str, Any]:
    start()
    rank, world = place()
    model = shard(net(rank), cpu_mesh(), **options)  # the shards of different seeds make one matrix
    optimizer = optimizer_of(trainable(model), kind)
    initial = whole_values(model)
    over = LoraOver(model, optimizer, MPO(order=4), scheduler())
    train(model, optimizer, STEPS_OF_RUN, rank, world)
    assert all(isinstance(m.parameter, DTensor) for m in over.matrices.values())
    return {**outcome(model, over), "initial": initial}


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in ("adamw", "foreach", "fused", "sgd")},
    **{f"{kind}, shards on the CPU": (kind, {"offload_policy": OFFLOAD}) for kind in ("adamw", "fused")},
}


@pytest.mark.parametrize("run", RUNS)
def test_expansions_at_runtime(ranks: Ranks, run: str) -> None:
    kind, options = RUNS[run]
    results = ranks.run(partial(_runtime, **options), kind)
    assert [event[0] for event in results[0]["history"]] == [2, 4, 6]
    assert drift(results) == 0
    assert difference(results[0], on_one_process(results[0]["initial"], kind=kind)) < 1e-9


def test_the_run_is_not_that_of_plain_lora(two: Ranks) -> None:
    result = two.run(_runtime, "adamw")[0]
    plain = on_one_process(result["initial"], lambda: TaylorRuntime(top_n=3, split=3, every=100))
    assert max(float((result["values"][n] - plain["values"][n]).abs().max()) for n in plain["values"]) > 1e-4


def _elementwise(start: Callable[[], None]) -> dict[str, Any]:
    start()
    rank, world = place()
    model = shard(net(rank), cpu_mesh())
    optimizer = optimizer_of(trainable(model))
    initial = whole_values(model)
    over = LoraOver(model, optimizer, MPO(order=4), _elementwise_scheduler())
    train(model, optimizer, STEPS_OF_RUN, rank, world)
    return {**outcome(model, over), "initial": initial}


def _elementwise_scheduler() -> TaylorRuntime:
    return TaylorRuntime(top_n=3, split=3, every=2, reduction="elementwise", average=True)


def test_elementwise_scores_of_shards_are_those_of_the_matrix(ranks: Ranks) -> None:
    results = ranks.run(_elementwise)
    assert drift(results) == 0
    assert difference(results[0], on_one_process(results[0]["initial"], _elementwise_scheduler)) < 1e-9


def _static_then_sharded(start: Callable[[], None]) -> dict[str, Any]:
    """Attached before the process group and before sharding; the optimizer's parameters are replaced as accelerate does."""
    import os

    model = net(int(os.environ["RANK"]))
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), Static())
    start()
    rank, world = place()
    before = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shard(model, cpu_mesh())
    replaced = {id(before[name]): p for name, p in model.named_parameters() if name in before}
    for group in optimizer.param_groups:
        group["params"] = [replaced[id(p)] for p in group["params"]]
    initial = whole_values(model)
    train(model, optimizer, STEPS_OF_RUN, rank, world)
    return {**outcome(model, over), "initial": initial}


def test_attached_before_the_parameters_are_replaced(ranks: Ranks) -> None:
    results = ranks.run(_static_then_sharded)
    assert len(results[0]["cores"]) == 8
    assert drift(results) == 0
    assert difference(results[0], on_one_process(results[0]["initial"], Static)) < 1e-9


def _not_followed(start: Callable[[], None]) -> str:
    model = net(0)
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), Static())
    start()
    shard(model, cpu_mesh())
    try:
        train(model, optimizer, range(1, 2))
    except RuntimeError as error:
        assert over.step == 0
        return str(error)
    return ""


def test_an_optimizer_left_with_the_old_parameters_is_an_error(two: Ranks) -> None:
    assert all("does not hold the parameter of layers.0.A" in message for message in two.run(_not_followed))


def _accumulating(start: Callable[[], None]) -> dict[str, Any]:
    start()
    rank, world = place()
    model = shard(net(rank), cpu_mesh())
    optimizer = optimizer_of(trainable(model))
    initial = whole_values(model)
    over = LoraOver(model, optimizer, MPO(order=4), scheduler())
    for step in STEPS_OF_RUN:
        optimizer.zero_grad()
        first, second = batch(step, rank, world).chunk(2)
        model.set_requires_gradient_sync(False)  # type: ignore[operator]
        (loss_of(model, first) / 2).backward()
        model.set_requires_gradient_sync(True)  # type: ignore[operator]
        (loss_of(model, second) / 2).backward()
        optimizer.step()
    return {**outcome(model, over), "initial": initial}


def test_accumulation_without_synchronisation(ranks: Ranks) -> None:
    results = ranks.run(_accumulating)
    assert drift(results) == 0
    assert difference(results[0], on_one_process(results[0]["initial"])) < 1e-9


def _meshes(start: Callable[[], None], kind: str) -> dict[str, Any]:
    """Four ranks: two meshes of two that train different models, or one of replicas of shards (HSDP)."""
    start()
    rank, _ = place()
    if kind == "hybrid":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        model = shard(net(rank % 2), mesh)
        group, part, parts = None, rank, 4
    else:
        whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("job", "shard"))
        mesh = whole["shard"]
        model = shard(net(rank), mesh)
        group, part, parts = mesh.get_group(), rank % 2, 2
    optimizer = optimizer_of(trainable(model))
    initial = whole_values(model)
    over = LoraOver(model, optimizer, MPO(order=4), scheduler(), process_group=group)
    train(model, optimizer, STEPS_OF_RUN, part, parts)
    return {**outcome(model, over), "initial": initial}


@pytest.mark.slow
def test_meshes_that_are_not_the_world(four: Ranks) -> None:
    results = four.run(_meshes, "jobs")
    for members in (results[:2], results[2:]):
        assert drift(members) == 0
        assert difference(members[0], on_one_process(members[0]["initial"])) < 1e-9
    assert results[0]["values"]["head.lora_A.weight"].ne(results[2]["values"]["head.lora_A.weight"]).any()


@pytest.mark.slow
def test_replicas_of_shards(four: Ranks) -> None:
    results = four.run(_meshes, "hybrid")
    assert drift(results) == 0
    assert difference(results[0], on_one_process(results[0]["initial"])) < 1e-9


def _evaluated_in_between(start: Callable[[], None]) -> dict[str, Any]:
    """FSDP2 keeps the root's parameters gathered after a forward without backward, here before the step."""
    start()
    rank, world = place()
    model = shard(net(rank), cpu_mesh())
    optimizer = optimizer_of(trainable(model))
    initial = whole_values(model)
    over = LoraOver(model, optimizer, MPO(order=4), scheduler())
    for step in STEPS_OF_RUN:
        optimizer.zero_grad()
        loss_of(model, batch(step, rank, world)).backward()
        with torch.no_grad():
            model(batch(step, rank, world))
        optimizer.step()
        model.reshard()  # type: ignore[operator]
    return {**outcome(model, over), "initial": initial}


def test_gathered_parameters_at_the_step(two: Ranks) -> None:
    results = two.run(_evaluated_in_between)
    assert drift(results) == 0
    assert difference(results[0], on_one_process(results[0]["initial"])) < 1e-9


def _changed_shard(start: Callable[[], None]) -> tuple[dict[str, Any], list[str]]:
    """One rank's shard is written: all ranks must see it, or they would wait for each other."""
    start()
    rank, world = place()
    model = shard(net(rank), cpu_mesh())
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), Static())
    train(model, optimizer, range(1, 4), rank, world)
    with torch.no_grad():
        if rank == world - 1:
            model.head.lora_B.weight.to_local().mul_(1.1)  # type: ignore[attr-defined]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, range(4, 7), rank, world)
    return outcome(model, over), [str(w.message) for w in caught]


def test_a_shard_that_was_changed_is_unfolded_anew(two: Ranks) -> None:
    results = two.run(_changed_shard)
    assert drift([result for result, _ in results]) == 0
    for _, messages in results:
        assert any("head.B changed outside the optimizer" in message for message in messages)


def _collectives(start: Callable[[], None]) -> list[int]:
    """Collectives of the optimizer's step when 2, 4 and 6 matrices of one shape (and the head) are expanded."""
    start()
    rank, world = place()
    model = shard(net(rank), cpu_mesh())
    optimizer = optimizer_of(trainable(model))
    LoraOver(model, optimizer, MPO(order=4), Static())
    from torch.distributed.tensor.debug import CommDebugMode

    counts = []
    for step in range(1, 4):
        optimizer.zero_grad()
        loss_of(model, batch(step, rank, world)).backward()
        with CommDebugMode() as mode:
            optimizer.step()
        counts.append(sum(n for kind, n in mode.get_comm_counts().items() if "all_gather" in str(kind)))
    return counts


def test_one_gather_per_cohort(two: Ranks) -> None:
    # shapes: A [3, 10] of layers and head, B [10, 3] of the layers, B [7, 3] of the head
    assert all(counts[1:] == [3, 3] for counts in two.run(_collectives))


def _initialising_step(start: Callable[[], None]) -> dict[str, Any]:
    """get_optimizer_state_dict steps an optimizer without state once, with zero gradients at rate zero."""
    start()
    rank, world = place()
    model = shard(net(rank), cpu_mesh())
    optimizer = optimizer_of(trainable(model))
    initial = whole_values(model)
    over = LoraOver(model, optimizer, MPO(order=4), TaylorRuntime(top_n=3, split=3, every=2))
    assert not optimizer.state
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.state
    assert over.step == 0
    assert not over.scheduler.state_dict()["scores"]
    optimizer.state.clear()
    train(model, optimizer, STEPS_OF_RUN, rank, world)
    return {**outcome(model, over), "initial": initial}


def test_the_initialising_step_of_checkpoints_is_ignored(two: Ranks) -> None:
    results = two.run(_initialising_step)
    assert drift(results) == 0
    assert difference(results[0], on_one_process(results[0]["initial"])) < 1e-9


def _initialised_live(start: Callable[[], None]) -> dict[str, Any]:
    """With every matrix expanded from step 0 the optimizer has no state of its own, before the first step and later."""
    start()
    rank, world = place()
    model = shard(net(rank), cpu_mesh())
    optimizer = optimizer_of(trainable(model))
    initial = whole_values(model)
    over = LoraOver(model, optimizer, MPO(order=4), Static())
    for steps in (range(1, 5), range(5, STEPS + 1)):
        count = over.step
        get_optimizer_state_dict(model, optimizer)
        assert over.step == count
        train(model, optimizer, steps, rank, world)
        optimizer.zero_grad()
    return {**outcome(model, over), "initial": initial}


def test_checkpoints_of_a_live_run_change_nothing(two: Ranks) -> None:
    results = two.run(_initialised_live)
    assert drift(results) == 0
    assert difference(results[0], on_one_process(results[0]["initial"], Static)) < 1e-9


def _bad_sharding(start: Callable[[], None], kind: str) -> str:
    start()
    model = net(0)
    mesh = cpu_mesh()
    weight = model.head.lora_A.weight.detach()
    placement = {"partial": Partial(), "shard": Shard(1), "replicate": Replicate()}[kind]
    if kind == "partial":
        sharded = DTensor.from_local(weight, mesh, [placement], run_check=False)
    else:
        sharded = distribute_tensor(weight, mesh, [placement])
    model.head.lora_A.weight = nn.Parameter(sharded)
    try:
        LoraOver(model, optimizer_of(trainable(model)), MPO(order=4))
    except TypeError as error:
        return str(error)
    return ""


def test_a_sharding_that_cannot_be_gathered_is_refused(two: Ranks) -> None:
    for message in two.run(_bad_sharding, "partial"):
        assert "head.A cannot be trained" in message
        assert "fully_shard" in message
    assert two.run(_bad_sharding, "shard") == ["", ""]
    assert two.run(_bad_sharding, "replicate") == ["", ""]


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


def test_zeros_that_do_not_move_are_not_taken_for_an_edit(two: Ranks) -> None:
    assert two.run(_at_rest) == [0.0, 0.0]
