"""Cores dealt out over ranks (`shard=True`): who holds them, what is sent, and that nothing else changes.

The oracle is the run of one process that holds all cores. Bytes are counted at the collectives themselves.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from tnadapt import MPO, LoraOver, Static
from tnadapt.engine.owners import deal
from tnadapt.engine.ranks import local
from tnadapt.integrations.distributed import Checkpointed

from .models import (
    STEPS,
    batch,
    difference,
    drift,
    load_values,
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

STEPS_OF_RUN = range(1, STEPS + 1)
SAVED_AT = 5  # two of three expansions are behind, one is to come
WRAPPERS = ("ddp", "fsdp")


@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=30),
    count=st.integers(1, 8),
    already=st.integers(0, 30),
)
def test_ranks_hold_equal_shares_to_the_largest_matrix(sizes: list[int], count: int, already: int) -> None:
    names = [f"m{k}" for k in range(len(sizes))]
    known = dict(zip(names, sizes, strict=True))
    taken = deal(names[:already], {}, known, count)
    owners = {**taken, **deal(names[already:], taken, known, count)}
    assert owners.keys() == known.keys()
    loads = [sum(known[n] for n in names if owners[n] == rank) for rank in range(count)]
    assert max(loads) - min(loads) <= max(sizes)


def _wrapped(seed: int, wrapper: str) -> Any:
    model = net(seed)
    return DistributedDataParallel(model) if wrapper == "ddp" else shard(model, cpu_mesh())


def _runtime(start: Callable[[], None], wrapper: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    start()
    rank, world = place()
    model = _wrapped(rank, wrapper)
    optimizer = optimizer_of(trainable(model), kind)
    initial = whole_values(model)
    over = LoraOver(model, optimizer, MPO(order=4), scheduler(), shard=True, **options)
    train(model, optimizer, STEPS_OF_RUN, rank, world)
    held = [m.name for cohort in over._expanded.now.cohorts for m in cohort.matrices]
    return {**outcome(model, over), "initial": initial, "held": held, "expanded": over.expanded}


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_run_is_that_of_one_process(ranks: Ranks, wrapper: str, kind: str) -> None:
    results = ranks.run(_runtime, wrapper, kind, {})
    assert [event[0] for event in results[0]["history"]] == [2, 4, 6]
    assert drift(results) == 0, "ranks are equal bit by bit"
    assert difference(results[0], on_one_process(results[0]["initial"], kind=kind)) < 1e-9
    held = [name for result in results for name in result["held"]]
    assert sorted(held) == sorted(results[0]["expanded"]), "each matrix has one owner"
    assert all(result["held"] for result in results)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_matched_steps(two: Ranks, wrapper: str) -> None:
    results = two.run(_runtime, wrapper, "adamw", {"matched": True})
    model = net(0)
    load_values(model, results[0]["initial"])
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), scheduler(), matched=True)
    train(model, optimizer, STEPS_OF_RUN)
    assert drift(results) == 0
    assert difference(results[0], outcome(model, over)) < 1e-8  # steps are matched to 1e-7 of their length


@contextmanager
def _counting() -> Iterator[dict[str, int]]:
    """Bytes that collectives bring to this rank from others, by name of the function."""
    counts: dict[str, int] = {}
    originals = {
        name: getattr(dist, name) for name in ("all_gather", "all_gather_object", "broadcast_object_list", "broadcast")
    }

    def all_gather(into: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        counts["all_gather"] = counts.get("all_gather", 0) + (len(into) - 1) * tensor.nbytes
        return originals["all_gather"](into, tensor, *args, **kwargs)

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return originals[name](*args, **kwargs)

        return call

    try:
        dist.all_gather = all_gather
        for name in ("all_gather_object", "broadcast_object_list", "broadcast"):
            setattr(dist, name, counted(name))
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _bytes(start: Callable[[], None], wrapper: str) -> dict[str, Any]:
    start()
    rank, world = place()
    model = _wrapped(rank, wrapper)
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), Static(), shard=True)
    train(model, optimizer, range(1, 3), rank, world)
    loss_of(model, batch(3, rank, world)).backward()
    with _counting() as counts:
        optimizer.step()
    now = over._expanded.now
    return {
        "cores": sum(cohort.buffer.nbytes for cohort in now.cohorts),
        "state": sum(
            value.nbytes
            for cohort in now.cohorts
            for piece in cohort.pieces
            for value in piece.state.values()
            if value.dim() > 0
        ),
        "sizes": {n: 8 * sum(map(math.prod, MPO(order=4).core_shapes(m.shape))) for n, m in over.matrices.items()},
        "matrices": {n: 8 * math.prod(m.shape) for n, m in over.matrices.items()},
        "owners": dict(now.owners),
        "counts": counts,
    }


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_memory_falls_as_one_over_the_ranks_and_matrices_are_sent_once(ranks: Ranks, wrapper: str) -> None:
    results = ranks.run(_bytes, wrapper)
    sizes, matrices = results[0]["sizes"], results[0]["matrices"]
    total, largest = sum(sizes.values()), max(sizes.values())
    assert sum(result["cores"] for result in results) == total
    for result in results:
        assert abs(result["cores"] - total / ranks.world) <= largest
        assert result["state"] == 2 * result["cores"], "AdamW's moments are with the cores"
        assert result["owners"] == results[0]["owners"]
        # each owner's message is filled up to the longest
        loads = [sum(b for n, b in matrices.items() if result["owners"][n] == k) for k in range(ranks.world)]
        assert result["counts"] == {"all_gather": (ranks.world - 1) * max(loads)}
        assert max(loads) <= sum(matrices.values()) / ranks.world + max(matrices.values())


def _save(start: Callable[[], None], folder: str, wrapper: str) -> dict[str, Any]:
    start()
    rank, world = place()
    model = _wrapped(rank, wrapper)
    optimizer = optimizer_of(trainable(model))
    initial = whole_values(model)
    over = LoraOver(model, optimizer, MPO(order=4), scheduler(), shard=True)
    train(model, optimizer, range(1, SAVED_AT + 1), rank, world)
    optimizer.zero_grad()
    if wrapper == "fsdp":
        dcp.save(_state(model, optimizer, over), checkpoint_id=folder)
    else:
        over.consolidate(to=0)
        if rank == 0:
            torch.save({"values": whole_values(model), "optimizer": optimizer.state_dict()}, f"{folder}.pt")
    train(model, optimizer, range(SAVED_AT + 1, STEPS + 1), rank, world)
    return {**outcome(model, over), "initial": initial}


def _state(model: Any, optimizer: Any, over: LoraOver) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "over": Checkpointed(over),
    }


def _resume(start: Callable[[], None], folder: str, wrapper: str) -> dict[str, Any]:
    start()
    rank, world = place()
    model = _wrapped(50 + rank, wrapper)
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), scheduler(), shard=True)
    if wrapper == "fsdp":
        state = _state(model, optimizer, over)
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    else:
        saved = torch.load(f"{folder}.pt", weights_only=True)
        load_values(model.module, saved["values"])
        optimizer.load_state_dict(saved["optimizer"])
    assert over.step == SAVED_AT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(SAVED_AT + 1, STEPS + 1), rank, world)
    return outcome(model, over)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_resumed_on_as_many_ranks_bit_by_bit(two: Ranks, tmp_path: Path, wrapper: str) -> None:
    folder = str(tmp_path / "checkpoint")
    whole = two.run(_save, folder, wrapper)
    results = two.run(_resume, folder, wrapper)
    assert drift([*whole, *results]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_saved_on_four_ranks_and_resumed_on_two_and_on_one(
    two: Ranks, four: Ranks, tmp_path: Path, wrapper: str
) -> None:
    """The batch is summed in another order on another number of ranks, hence the rounding."""
    folder = str(tmp_path / "checkpoint")
    initial = four.run(_save, folder, wrapper)[0]["initial"]
    results = two.run(_resume, folder, wrapper)
    assert drift(results) == 0
    assert difference(results[0], on_one_process(initial)) < 1e-9
    model = net(70)
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), scheduler())
    if wrapper == "fsdp":
        state = _state(model, optimizer, over)
        dcp.load(state, checkpoint_id=folder, no_dist=True)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    else:
        saved = torch.load(f"{folder}.pt", weights_only=True)
        load_values(model, saved["values"])
        optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(SAVED_AT + 1, STEPS + 1))
    assert difference(outcome(model, over), on_one_process(initial)) < 1e-9


def test_saved_on_one_process_and_resumed_on_two(two: Ranks, tmp_path: Path) -> None:
    model = net(0)
    optimizer = optimizer_of(trainable(model))
    initial = whole_values(model)
    LoraOver(model, optimizer, MPO(order=4), scheduler())
    train(model, optimizer, range(1, SAVED_AT + 1))
    torch.save({"values": whole_values(model), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    results = two.run(_resume, str(tmp_path / "checkpoint"), "ddp")
    assert drift(results) == 0
    assert difference(results[0], on_one_process(initial)) < 1e-9


def _unconsolidated(start: Callable[[], None]) -> list[str]:
    start()
    rank, world = place()
    model = _wrapped(rank, "ddp")
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), shard=True)
    said = []
    for when in ("before any step", "after a step", "a step after consolidating"):
        if when != "before any step":
            train(model, optimizer, range(1, 2), rank, world)
        for ask in (over.state_dict, optimizer.state_dict):
            try:
                ask()
                said.append(f"{when}: nothing")
            except RuntimeError as error:
                said.append(f"{when}: {error}")
        over.consolidate()
        assert set(over.state_dict()["cores"]) | set(over.state_dict()["waiting"]) == set(over.expanded)
    return said


def test_a_state_without_the_cores_of_others_is_refused(two: Ranks) -> None:
    for said in two.run(_unconsolidated):
        assert said[:2] == ["before any step: nothing"] * 2
        assert all("dealt out over 2 ranks" in one and "consolidate()" in one for one in said[2:])


def _half_of_the_state(start: Callable[[], None]) -> str:
    start()
    rank, world = place()
    model = _wrapped(rank, "ddp")
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), shard=True)
    train(model, optimizer, range(1, 2), rank, world)
    over.consolidate(to=0)
    try:
        over.load_state_dict(over.state_dict())
    except ValueError as error:
        return str(error)
    return ""


def test_the_state_of_a_rank_that_did_not_save_is_refused(two: Ranks) -> None:
    first, second = two.run(_half_of_the_state)
    assert first == ""
    assert "lost cores" in second
    assert "consolidate()" in second


def _not_finite(start: Callable[[], None], wrapper: str) -> tuple[str, bool]:
    start()
    rank, world = place()
    model = _wrapped(rank, wrapper)
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), shard=True)
    train(model, optimizer, range(1, 3), rank, world)
    before = whole_values(model)
    loss_of(model, batch(3, rank, world)).backward()
    gradient = over.matrices["head.A"].parameter.grad
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    local.fill_(math.nan)
    try:
        optimizer.step()
    except FloatingPointError as error:
        after = whole_values(model)
        return str(error), all(torch.equal(before[n], after[n]) for n in before)
    return "", False


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_gradient_that_is_not_finite_stops_all_ranks(two: Ranks, wrapper: str) -> None:
    for message, untouched in two.run(_not_finite, wrapper):
        assert "head.A" in message
        assert "NaN" in message
        assert untouched


def _edited(start: Callable[[], None], wrapper: str) -> dict[str, Any]:
    start()
    rank, world = place()
    model = _wrapped(rank, wrapper)
    optimizer = optimizer_of(trainable(model))
    initial = whole_values(model)
    over = LoraOver(model, optimizer, MPO(order=4), shard=True)
    train(model, optimizer, range(1, 4), rank, world)
    other = whole_values(net(9))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wanted = other.get(name.removeprefix("module."))
            if wanted is not None and "lora_B" in name:
                if hasattr(parameter, "device_mesh"):
                    from torch.distributed.tensor import distribute_tensor

                    wanted = distribute_tensor(wanted, parameter.device_mesh, parameter.placements)
                parameter.copy_(wanted)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, range(4, 7), rank, world)
    said = [str(w.message) for w in caught if "changed outside" in str(w.message)]
    return {**outcome(model, over), "initial": initial, "said": said}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_edit_on_all_ranks_is_followed_by_all(two: Ranks, wrapper: str) -> None:
    results = two.run(_edited, wrapper)
    assert drift(results) == 0
    assert all(len(result["said"]) == 1 for result in results)
    model = net(0)
    load_values(model, results[0]["initial"])
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4))
    train(model, optimizer, range(1, 4))
    load_values(model, {n: v for n, v in whole_values(net(9)).items() if "lora_B" in n})
    with pytest.warns(UserWarning, match="changed outside"):
        train(model, optimizer, range(4, 7))
    assert difference(results[0], outcome(model, over)) < 1e-9


def _edited_where_others_own(start: Callable[[], None]) -> dict[str, Any]:
    """Each rank writes into its shards of the matrices whose cores another rank holds, and into no others."""
    start()
    rank, world = place()
    model = _wrapped(rank, "fsdp")
    optimizer = optimizer_of(trainable(model))
    initial = whole_values(model)
    over = LoraOver(model, optimizer, MPO(order=4), shard=True)
    train(model, optimizer, range(1, 4), rank, world)
    before = whole_values(model)
    with torch.no_grad():
        for name, owner in over._expanded.now.owners.items():
            if owner != rank:
                local(over.matrices[name].parameter).mul_(1.5)
    edited = whole_values(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, range(4, 7), rank, world)
    said = [str(w.message) for w in caught if "changed outside" in str(w.message)]
    return {**outcome(model, over), "initial": initial, "before": before, "edited": edited, "said": said}


def test_an_edit_where_the_owner_cannot_see_it_is_followed_by_all(two: Ranks) -> None:
    results = two.run(_edited_where_others_own)
    assert drift(results) == 0
    assert all(len(result["said"]) == 1 for result in results)
    first = results[0]
    assert all(not torch.equal(first["edited"][name], value) for name, value in first["before"].items())
    model = net(0)
    load_values(model, first["initial"])
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4))
    train(model, optimizer, range(1, 4))
    load_values(model, first["edited"])
    with pytest.warns(UserWarning, match="changed outside"):
        train(model, optimizer, range(4, 7))
    assert difference(first, outcome(model, over)) < 1e-9


class _Dies(torch.optim.AdamW):
    """Dies in one step after the cores were stepped, on every rank."""

    armed = False

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        if self.armed:
            self.armed = False
            raise MemoryError("after the update")
        return result


def _died(start: Callable[[], None], wrapper: str) -> dict[str, Any]:
    start()
    rank, world = place()
    model = _wrapped(rank, wrapper)
    optimizer = _Dies(trainable(model), lr=0.01, foreach=False)
    initial = whole_values(model)
    over = LoraOver(model, optimizer, MPO(order=4), shard=True)
    train(model, optimizer, range(1, 3), rank, world)
    optimizer.armed = True
    with suppress(MemoryError):
        train(model, optimizer, range(3, 4), rank, world)
    train(model, optimizer, range(4, 6), rank, world)
    return {**outcome(model, over), "initial": initial}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_after_a_step_that_died_ranks_are_equal_again(two: Ranks, wrapper: str) -> None:
    results = two.run(_died, wrapper)
    assert drift(results) == 0
    model = net(0)
    load_values(model, results[0]["initial"])
    optimizer = _Dies(trainable(model), lr=0.01, foreach=False)
    over = LoraOver(model, optimizer, MPO(order=4))
    train(model, optimizer, range(1, 3))
    optimizer.armed = True
    with pytest.raises(MemoryError):
        train(model, optimizer, range(3, 4))
    train(model, optimizer, range(4, 6))
    assert difference(results[0], outcome(model, over)) < 1e-9


def _unlike(start: Callable[[], None]) -> str:
    start()
    rank, world = place()
    model = _wrapped(rank, "ddp")
    optimizer = optimizer_of(trainable(model))
    LoraOver(model, optimizer, MPO(order=4), shard=rank == 0)
    try:
        train(model, optimizer, range(1, 2), rank, world)
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_that_attach_differently_are_told_apart(two: Ranks) -> None:
    assert all("ranks 0 and 1 differ in shard" in message for message in two.run(_unlike))


def _idle(start: Callable[[], None]) -> dict[str, Any]:
    """The head has no gradient in two of the steps."""
    start()
    rank, world = place()
    model = net(rank)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = optimizer_of(trainable(ddp))
    initial = whole_values(ddp)
    over = LoraOver(ddp, optimizer, MPO(order=4), shard=True)
    for step in range(1, 7):
        optimizer.zero_grad()
        loss_of(ddp, batch(step, rank, world)).backward()
        if step in (2, 5):
            model.head.lora_A.weight.grad = model.head.lora_B.weight.grad = None
        optimizer.step()
    return {**outcome(ddp, over), "initial": initial}


def test_matrices_that_rest(two: Ranks) -> None:
    results = two.run(_idle)
    assert drift(results) == 0
    model = net(0)
    load_values(model, results[0]["initial"])
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4))
    for step in range(1, 7):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        if step in (2, 5):
            model.head.lora_A.weight.grad = model.head.lora_B.weight.grad = None
        optimizer.step()
    assert difference(results[0], outcome(model, over)) < 1e-9


def test_without_ranks_nothing_is_dealt_out() -> None:
    model = net(0)
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), shard=True)
    train(model, optimizer, range(1, 3))
    over.consolidate()
    with pytest.raises(ValueError, match="to=1: give a rank from 0 to 0"):
        over.consolidate(to=1)
    assert over.config()["shard"] is True
    assert set(over.state_dict()["cores"]) == set(over.expanded)
    assert over._expanded.now.owners == {}
