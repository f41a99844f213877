"""torch.distributed.checkpoint with FSDP2: saved on some ranks, resumed on others, to the same end."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tnadapt import MPO, LoraOver, Static, TaylorRuntime
from tnadapt.integrations.distributed import Checkpointed

from .models import (
    STEPS,
    difference,
    drift,
    load_values,
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

SAVED_AT = 5  # two of three expansions are behind, one is to come


def _scheduler(choice: str) -> Static | TaylorRuntime:
    return {"runtime": scheduler, "static": Static, "half": lambda: Static(r"A$")}[choice]()


def _attached(seed: int, choice: str, kind: str) -> tuple[Any, Any, LoraOver]:
    model = shard(net(seed), cpu_mesh())
    optimizer = optimizer_of(trainable(model), kind)
    return model, optimizer, LoraOver(model, optimizer, MPO(order=4), _scheduler(choice))


def _state(model: Any, optimizer: Any, over: LoraOver) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "over": Checkpointed(over),
    }


def _save(start: Callable[[], None], folder: str, choice: str, kind: str, keep_gradients: bool) -> dict[str, Tensor]:
    start()
    rank, world = place()
    model, optimizer, over = _attached(rank, choice, kind)
    initial = whole_values(model)
    train(model, optimizer, range(1, SAVED_AT + 1), rank, world)
    if not keep_gradients:
        optimizer.zero_grad()
    dcp.save(_state(model, optimizer, over), checkpoint_id=folder)
    return initial


def _resume(start: Callable[[], None], folder: str, choice: str, kind: str) -> dict[str, Any]:
    start()
    rank, world = place()
    model, optimizer, over = _attached(50 + rank, choice, kind)
    state = _state(model, optimizer, over)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])  # strict
    assert not [w for w in caught if "tnadapt" in str(w.message)]
    assert over.step == SAVED_AT
    train(model, optimizer, range(SAVED_AT + 1, STEPS + 1), rank, world)
    return outcome(model, over)


def _end_of(initial: dict[str, Tensor], choice: str, kind: str) -> dict[str, Any]:
    return on_one_process(initial, lambda: _scheduler(choice), kind)


@pytest.mark.parametrize(
    ("choice", "kind", "keep_gradients"),
    [
        # each value with two of another; the other combinations take longer than the suite may
        ("runtime", "foreach", False),
        ("runtime", "sgd", True),
        ("static", "foreach", True),
        ("half", "sgd", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("runtime", "foreach", True),
                ("runtime", "sgd", False),
                ("static", "foreach", False),
                ("static", "sgd", False),
                ("static", "sgd", True),
                ("half", "foreach", False),
                ("half", "foreach", True),
                ("half", "sgd", True),
            ]
        ),
    ],
)
def test_resumed_on_as_many_ranks(two: Ranks, tmp_path: Path, choice: str, kind: str, keep_gradients: bool) -> None:
    folder = str(tmp_path / "checkpoint")
    initial = two.run(_save, folder, choice, kind, keep_gradients)[0]
    results = two.run(_resume, folder, choice, kind)
    assert drift(results) == 0
    assert difference(results[0], _end_of(initial, choice, kind)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["runtime", pytest.param("static", marks=pytest.mark.slow)])
def test_saved_on_two_ranks_and_resumed_on_four(two: Ranks, four: Ranks, tmp_path: Path, choice: str) -> None:
    folder = str(tmp_path / "checkpoint")
    initial = two.run(_save, folder, choice, "fused", False)[0]
    results = four.run(_resume, folder, choice, "fused")
    assert drift(results) == 0
    assert difference(results[0], _end_of(initial, choice, "fused")) < 1e-9


def test_resumed_without_ranks(two: Ranks, tmp_path: Path) -> None:
    """The same checkpoint continues on one process, without a process group and without shards."""
    folder = str(tmp_path / "checkpoint")
    initial = two.run(_save, folder, "runtime", "adamw", False)[0]
    model = net(70)
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), scheduler())
    state = _state(model, optimizer, over)
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, range(SAVED_AT + 1, STEPS + 1))
    assert difference(outcome(model, over), _end_of(initial, "runtime", "adamw")) < 1e-9


def _saved_bare(start: Callable[[], None], folder: str, choice: str) -> None:
    start()
    rank, world = place()
    model, optimizer, over = _attached(rank, choice, "adamw")
    train(model, optimizer, range(1, SAVED_AT + 1), rank, world)
    dcp.save({"over": over}, checkpoint_id=folder)


def _loaded_bare(start: Callable[[], None], folder: str, choice: str) -> tuple[str, int]:
    start()
    rank, _ = place()
    _, _, over = _attached(rank, choice, "adamw")
    try:
        dcp.load({"over": over}, checkpoint_id=folder)
    except (ValueError, CheckpointException) as error:
        return f"{type(error).__name__}: {error}", over.step
    return "", over.step


@pytest.mark.parametrize("choice", ["runtime", "static"])
def test_without_checkpointed_cores_are_not_lost_silently(two: Ranks, tmp_path: Path, choice: str) -> None:
    folder = str(tmp_path / "checkpoint")
    two.run(_saved_bare, folder, choice)
    for message, step in two.run(_loaded_bare, folder, choice):
        assert step == 0
        # with rounds behind it, entries are missing; with Static(), only cores are
        assert ("Checkpointed(over)" if choice == "static" else "Missing key") in message


def test_a_state_of_something_else_is_refused() -> None:
    model = net(0)
    over = LoraOver(model, optimizer_of(trainable(model)), MPO(order=4))
    with pytest.raises(ValueError, match=r"no state of Checkpointed\(over\)"):
        Checkpointed(over).load_state_dict({"tnadapt": b""})
    other = net(1)
    optimizer = optimizer_of(trainable(other))
    saved = Checkpointed(LoraOver(other, optimizer, MPO(order=2)))
    train(other, optimizer, range(1, 2))
    with pytest.raises(ValueError, match="order"):
        Checkpointed(over).load_state_dict(saved.state_dict())
    assert over.step == 0


def test_the_entry_is_a_copy_on_the_cpu() -> None:
    model = net(0)
    optimizer = optimizer_of(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4))
    train(model, optimizer, range(1, 3))
    values = whole_values(model)
    saved = Checkpointed(over).state_dict()
    fresh = net(1)
    load_values(fresh, values)
    other = LoraOver(fresh, optimizer_of(trainable(fresh)), MPO(order=4))
    Checkpointed(other).load_state_dict(saved)
    assert other.expanded == over.expanded
    assert not other.changed_outside()
    cores = saved["tnadapt"][0]["cores"]["head.A"]["cores"]
    assert all(core.device.type == "cpu" and torch.isfinite(core).all() for core in cores)


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
