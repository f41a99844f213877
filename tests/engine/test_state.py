"""A run that is saved and resumed ends where the uninterrupted run ends; damaged states change nothing."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from tnadapt import MPO, SVD, LoraOver, Static, TaylorRuntime
from tnadapt.engine import Expanded

from .models import Experts, everything, expert_loss, llama, same, train, trainable, values


def through_a_file(state: Any) -> Any:
    """Saved and read as checkpoints are."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW-for-loop": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=False),
    "AdamW-foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=True),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "SGD-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=3e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=3e-3),
}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "static": Static,
    "runtime": lambda: TaylorRuntime(top_n=2, split=2, every=3),  # rounds at steps 3 and 6
}


@pytest.mark.parametrize(("saved", "here"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("max_bond", [None, 2])
def test_a_state_of_another_dtype_is_converted_as_torch_converts_its_own(saved, here, max_bond):
    def build(dtype):
        model = Experts(dtype=dtype)
        optimizer = torch.optim.AdamW(trainable(model), lr=3e-3)
        return model, optimizer, LoraOver(model, optimizer, MPO(order=4, max_bond=max_bond))

    def step(model, optimizer, k):
        optimizer.zero_grad()
        expert_loss(model, k).backward()
        optimizer.step()

    model, optimizer, over = build(saved)
    for k in range(3):
        step(model, optimizer, k)
    again, again_optimizer, again_over = build(here)
    again.load_state_dict(model.state_dict())
    again_optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    entries = again_over.state_dict()["cores"]
    assert entries
    for name, entry in entries.items():
        was = over.state_dict()["cores"][name]
        known = [*entry["cores"], *(one["exp_avg"] for one in entry["state"])]
        before = [*was["cores"], *(one["exp_avg"] for one in was["state"])]
        if max_bond is not None:
            known.append(entry["residual"])
            before.append(was["residual"])
        for one, other in zip(known, before, strict=True):
            assert one.dtype == here
            assert torch.equal(one, other.to(here))
    step(again, again_optimizer, 3)
    assert again_over.step == 4


@pytest.mark.parametrize("number", [numpy.float64, numpy.float32, torch.tensor])
def test_rates_of_other_libraries_do_not_get_into_checkpoints(number):
    """A grid of NumPy gives such numbers, and `torch.load(weights_only=True)` reads none of them."""
    model = Experts()
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-3)
    rates = {"core_lr": number(2e-3), "core_weight_decay": number(0.5), "max_update": number(4.0)}
    over = LoraOver(model, optimizer, MPO(order=4), **rates)
    expert_loss(model, 0).backward()
    optimizer.step()
    through_a_file(optimizer.state_dict())
    described = json.loads(json.dumps(over.config()))
    for name, value in rates.items():
        assert type(described[name]) is float
        assert described[name] == float(value)


@pytest.mark.parametrize("saved_at", [0, 2, 3, 5, 8])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_ends_where_uninterrupted_ends(name, scheduler, saved_at):
    def build() -> tuple[nn.Module, torch.optim.Optimizer, LoraOver]:
        model = Experts(dtype=torch.float32)
        optimizer = OPTIMIZERS[name](trainable(model))
        return model, optimizer, LoraOver(model, optimizer, MPO(order=4), SCHEDULERS[scheduler](), core_lr=2e-3)

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            expert_loss(model, step).backward()
            optimizer.step()

    model, optimizer, over = build()
    go(model, optimizer, range(saved_at))
    adapter, state = copy.deepcopy(model.state_dict()), through_a_file(optimizer.state_dict())
    go(model, optimizer, range(saved_at, 10))

    again, again_optimizer, again_over = build()
    if saved_at % 2:  # in either order
        again_optimizer.load_state_dict(state)
        again.load_state_dict(adapter)
    else:
        again.load_state_dict(adapter)
        again_optimizer.load_state_dict(state)
    assert again_over.step == saved_at
    go(again, again_optimizer, range(saved_at, 10))
    assert over.expanded
    assert same(values(model), values(again))
    assert same(over.state_dict(), again_over.state_dict())
    assert over.history == again_over.history


def test_resumed_llama():
    def build() -> tuple[Any, torch.optim.Optimizer, LoraOver]:
        model = llama(zero_start=True)
        optimizer = torch.optim.AdamW(trainable(model), lr=3e-3, weight_decay=0.1)
        return model, optimizer, LoraOver(model, optimizer, MPO(order=16), TaylorRuntime(top_n=2, split=2, every=2))

    model, optimizer, over = build()
    train(model, optimizer, range(3))
    adapter, state = copy.deepcopy(model.state_dict()), through_a_file(optimizer.state_dict())
    train(model, optimizer, range(3, 6))
    again, again_optimizer, again_over = build()
    again.load_state_dict(adapter)
    again_optimizer.load_state_dict(state)
    train(again, again_optimizer, range(3, 6))
    assert len(over.expanded) == len(over.matrices)
    assert same(values(model), values(again))
    assert same(over.state_dict(), again_over.state_dict())


def test_truncated_cores_keep_their_residual():
    def build() -> tuple[Any, torch.optim.Optimizer, LoraOver]:
        model = Experts()
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        return model, optimizer, LoraOver(model, optimizer, SVD(max_bond=2))

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            expert_loss(model, step).backward()
            optimizer.step()

    model, optimizer, over = build()
    go(model, optimizer, range(3))
    adapter, state = copy.deepcopy(model.state_dict()), through_a_file(optimizer.state_dict())
    assert state["tnadapt"]["cores"]["experts.0.A"]["residual"].abs().max() > 1e-3
    go(model, optimizer, range(3, 6))
    again, again_optimizer, again_over = build()
    again.load_state_dict(adapter)
    again_optimizer.load_state_dict(state)
    go(again, again_optimizer, range(3, 6))
    assert same(values(model), values(again))
    assert same(over.state_dict(), again_over.state_dict())


@pytest.mark.parametrize("name", ["AdamW-foreach", "NAdam", "Adafactor"])
def test_matrices_that_were_idle_before_the_save(name):
    """Members of one round that have taken different numbers of steps."""
    plan = [(0, 1, 2), (0, 2), (0, 1, 2), (0, 1, 2), (1,), (0, 1, 2)]

    def build() -> tuple[nn.Module, torch.optim.Optimizer, LoraOver]:
        model = Experts(dtype=torch.float32)
        optimizer = OPTIMIZERS[name](trainable(model))
        return model, optimizer, LoraOver(model, optimizer, MPO(order=4))

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            expert_loss(model, step, plan[step]).backward()
            optimizer.step()

    model, optimizer, over = build()
    go(model, optimizer, range(3))
    adapter, state = copy.deepcopy(model.state_dict()), through_a_file(optimizer.state_dict())
    go(model, optimizer, range(3, 6))
    again, again_optimizer, again_over = build()
    again.load_state_dict(adapter)
    again_optimizer.load_state_dict(state)
    go(again, again_optimizer, range(3, 6))
    assert same(values(model), values(again))
    assert same(over.state_dict(), again_over.state_dict())


def test_eight_bit_adam_resumes():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="8-bit Adam is bitsandbytes'; it is in the dev extra")

    def build() -> tuple[Any, Any, LoraOver]:
        torch.manual_seed(0)
        model = Experts(dtype=torch.float32)
        optimizer = bitsandbytes.optim.AdamW8bit(trainable(model), lr=1e-2, min_8bit_size=16)
        return model, optimizer, LoraOver(model, optimizer, MPO(order=3), TaylorRuntime(top_n=3, split=2, every=2))

    def go(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            expert_loss(model, step).backward()
            optimizer.step()

    model, optimizer, over = build()
    go(model, optimizer, range(3))
    adapter, state = copy.deepcopy(model.state_dict()), through_a_file(optimizer.state_dict())
    members = state["tnadapt"]["cores"]
    assert any(s["state1"].dtype == torch.uint8 for entry in members.values() for s in entry["state"])
    go(model, optimizer, range(3, 6))
    again, again_optimizer, again_over = build()
    again.load_state_dict(adapter)
    again_optimizer.load_state_dict(state)
    go(again, again_optimizer, range(3, 6))
    assert over.step == again_over.step == 6
    assert len(over.expanded) == 6
    assert same(values(model), values(again))
    assert same(over.state_dict(), again_over.state_dict())


def test_an_optimizer_that_loads_in_its_own_way_gets_it_back():
    class Own(torch.optim.SGD):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.param_groups[0]["lr"] = state_dict["param_groups"][0]["lr"]

    model = Experts()
    optimizer = Own(trainable(model), lr=0.5)
    over = LoraOver(model, optimizer, MPO(order=3))
    assert optimizer.load_state_dict != Own.load_state_dict.__get__(optimizer)
    over.detach()
    assert optimizer.load_state_dict == Own.load_state_dict.__get__(optimizer)


def test_state_of_a_plain_lora_run_loads():
    plain = Experts()
    plain_optimizer = torch.optim.AdamW(trainable(plain), lr=1e-2)
    expert_loss(plain, 0).backward()
    plain_optimizer.step()
    model = Experts()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    over = LoraOver(model, optimizer, SVD(), Static(r"\.A$"))
    optimizer.load_state_dict(through_a_file(plain_optimizer.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert len(optimizer.state) == 6
    expert_loss(model, 0).backward()
    optimizer.step()
    assert (over.step, len(over.expanded)) == (1, 3)


def test_a_plain_state_in_mid_run_is_said():
    model = Experts()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    plain = copy.deepcopy(optimizer).state_dict()
    LoraOver(model, optimizer, SVD())
    expert_loss(model, 0).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="no tnadapt part"):
        optimizer.load_state_dict(plain)


def test_state_with_cores_loads_into_a_plain_optimizer():
    model = Experts()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    over = LoraOver(model, optimizer, SVD())
    expert_loss(model, 0).backward()
    optimizer.step()
    over.detach()
    assert "tnadapt" not in optimizer.state_dict()
    state = over.state_dict()
    assert state["cores"].keys() == over.matrices.keys()
    torch.optim.AdamW(trainable(model), lr=1e-3).load_state_dict({**optimizer.state_dict(), "tnadapt": state})


def test_a_state_whose_part_was_taken_out_is_noticed():
    """By code that writes the keys of a state one by one, and knows torch's two."""
    _, optimizer, over = running()
    kept = through_a_file({key: optimizer.state_dict()[key] for key in ("state", "param_groups")})
    _, again, again_over = running(steps=0)
    with pytest.warns(UserWarning, match=r"its tnadapt part has been taken out: give that to over.load_state_dict"):
        again.load_state_dict(kept)
    # with that part loaded before, there is nothing to say
    again_over.load_state_dict(through_a_file(over.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(kept)
    assert again_over.step == over.step > 0


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_loading_before_the_first_step_changes_nothing(scheduler):
    """accelerate saves and loads once when it prepares an optimizer."""
    ends = []
    for rounds in (0, 2):
        model = Experts()
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        over = LoraOver(model, optimizer, SVD(), SCHEDULERS[scheduler]())
        for _ in range(rounds):
            optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
        for step in range(4):
            optimizer.zero_grad()
            expert_loss(model, step).backward()
            optimizer.step()
        ends.append((values(model), over.state_dict(), over.history))
    assert same(ends[0], ends[1])


def test_loading_copies_what_is_trained_on():
    """Training goes on in tensors of its own: a state that was loaded stays what it was. Entries of Adafactor, rows and
    columns, have other shapes than the cores."""
    model = Experts()
    optimizer = torch.optim.Adafactor(trainable(model), lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=3))
    expert_loss(model, 0).backward()
    optimizer.step()
    state = copy.deepcopy(over.state_dict())
    kept = copy.deepcopy(state)
    assert "row_var" in member(state)["state"][0]
    over.load_state_dict(state)
    optimizer.step()
    assert not same(over.state_dict(), kept)
    assert same(state, kept)


def test_own_state_without_the_optimizer():
    model = Experts()
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    over = LoraOver(model, optimizer, SVD())
    expert_loss(model, 0).backward()
    optimizer.step()
    state = through_a_file(over.state_dict())
    expert_loss(model, 1).backward()
    optimizer.step()
    assert not same(state, over.state_dict())
    over.load_state_dict(state)
    assert same(state, over.state_dict())


def test_looking_for_edits_after_a_load_keeps_no_graph():
    """What the cores fold to is compared with matrices that require gradients, and is kept until the next step."""
    _, _, over = running()
    over.load_state_dict(copy.deepcopy(over.state_dict()))
    assert over.changed_outside() == ()
    assert {cohort.written.requires_grad for cohort in over._expanded.now.cohorts} == {False}


# -- damaged states -----------------------------------------------------------------------------------------------------


def running(scheduler: Any = None, factorization: Any = None, count: int = 3, steps: int = 3) -> Any:
    model = Experts(count)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    scheduler = scheduler or TaylorRuntime(top_n=2, split=2, every=2)
    over = LoraOver(model, optimizer, factorization or MPO(order=3), scheduler)
    for step in range(steps):
        optimizer.zero_grad()
        expert_loss(model, step, tuple(range(count))).backward()
        optimizer.step()
    return model, optimizer, over


def member(state: Any) -> Any:
    return next(iter(state["cores"].values()))


def cut_core(state: Any) -> None:
    entry = member(state)
    entry["cores"][0] = entry["cores"][0][..., :1].clone()


def spoil_core(state: Any) -> None:
    entry = member(state)
    entry["cores"] = [core.clone() for core in entry["cores"]]
    entry["cores"][1].view(-1)[0] = float("nan")


def cut_moment(state: Any) -> None:
    entry = member(state)
    entry["state"] = [{**part, "exp_avg": part["exp_avg"][:1].clone()} for part in entry["state"]]


def spoil_moment(state: Any) -> None:
    entry = member(state)
    entry["state"] = [{**part, "exp_avg": part["exp_avg"] * float("nan")} for part in entry["state"]]


DAMAGE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no history": (lambda s: s.pop("history"), "lacks history"),
    "no step": (lambda s: s.pop("step"), "lacks step"),
    "nothing expanded": (lambda s: s.pop("cores"), "lacks cores"),
    "no rates": (lambda s: s["rates"].pop("base"), "damaged"),
    "no cohort": (lambda s: member(s).pop("cohort"), "damaged"),
    "cohort as a word": (lambda s: member(s).update(cohort="first"), "damaged.*the cohort of"),
    "no cores": (lambda s: member(s).pop("cores"), "damaged"),
    "no state": (lambda s: member(s).pop("state"), "damaged"),
    "one core": (lambda s: member(s).update(cores=member(s)["cores"][:1]), "cores"),
    "one state": (lambda s: member(s).update(state=member(s)["state"][:1]), "damaged"),
    "other version": (lambda s: s.update(version=99), "format version 99.*reads 2"),
    "strange waiting": (lambda s: s.update(waiting=["nobody.B"]), "nobody.B"),
    "strange member": (lambda s: s["cores"].update({"nobody.B": member(s)}), "nobody.B.*own|saved from"),
    "core shape": (cut_core, "cores .* of experts.*resume with the factorization"),
    "core NaN": (spoil_core, "hold NaN or infinity.*earlier checkpoint"),
    "moment shape": (cut_moment, "damaged"),
    "moment NaN": (spoil_moment, "NaN or infinity"),
    "no scheduler state": (lambda s: s["scheduler"].pop("state"), "damaged"),
    "no scores": (lambda s: s["scheduler"]["state"].pop("scores"), "scores"),
    "more rounds than split": (lambda s: s["scheduler"]["state"].update(rounds_done=7), "split=2"),
    "history of nothing": (lambda s: s.update(history=[{}]), "damaged"),
    "step as a word": (lambda s: s.update(step="three"), "damaged"),
    "a rank that there was not": (lambda s: member(s).update(owner=1), "from rank 1 of 1"),
    "a rank below zero": (lambda s: member(s).update(owner=-1), "from rank -1 of 1"),
    **{
        f"a scale of {scale}": (
            lambda s, scale=scale: member(s).update(scale=torch.tensor(scale)),
            r"scale of the steps of experts.* is damaged",
        )
        for scale in (0.0, -1.0, float("nan"), float("inf"), (1.0, 1.0))
    },
}


@pytest.mark.parametrize("through", ["optimizer", "over"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_states_are_refused_whole(damage, through):
    _, other_optimizer, other = running()
    assert other.expanded
    model, optimizer, over = running()
    expert_loss(model, 5).backward()
    state = through_a_file(other_optimizer.state_dict())
    state["param_groups"][0]["lr"] = 77.0
    spoil, said = DAMAGE[damage]
    spoil(state["tnadapt"])
    before = everything(model, optimizer, over)
    load = optimizer.load_state_dict if through == "optimizer" else over.load_state_dict
    with pytest.raises(ValueError, match=f"(?s){said}"):
        load(state if through == "optimizer" else state["tnadapt"])
    after = everything(model, optimizer, over)
    for key, value in before.items():
        assert same(value, after[key]), f"{key} changed"
    optimizer.step()
    assert over.step == 4


RESIDUALS: dict[str, Callable[[Any], Any]] = {
    "missing": lambda entry: entry.update(residual=None),
    "of another shape": lambda entry: entry.update(residual=entry["residual"][:1].clone()),
    "NaN": lambda entry: entry.update(residual=entry["residual"] * float("nan")),
}


@pytest.mark.parametrize("damage", RESIDUALS)
def test_a_damaged_residual_of_truncated_cores_is_refused(damage):
    model, optimizer, over = running(Static(), SVD(max_bond=2))
    state = copy.deepcopy(over.state_dict())
    RESIDUALS[damage](state["cores"]["experts.0.A"])
    before = everything(model, optimizer, over)
    with pytest.raises(ValueError, match=r"residual of experts\.0\.A is damaged"):
        over.load_state_dict(state)
    after = everything(model, optimizer, over)
    for key, value in before.items():
        assert same(value, after[key]), f"{key} changed"


def test_no_memory_for_the_cores_of_a_state_leaves_everything_as_it_was(monkeypatch):
    """The scheduler has loaded its part by then, of a run that is further on."""
    other, other_optimizer, further = running()
    for _ in range(3):
        expert_loss(other, 5).backward()
        other_optimizer.step()
    state = copy.deepcopy(further.state_dict())
    model, optimizer, over = running()
    before = everything(model, optimizer, over)
    assert not same(state["scheduler"], before["over"]["scheduler"])

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(Expanded, "load_state", full)
        with pytest.raises(torch.OutOfMemoryError):
            over.load_state_dict(state)
    after = everything(model, optimizer, over)
    for key, value in before.items():
        assert same(value, after[key]), f"{key} changed"


def test_a_state_that_torch_refuses_leaves_the_cores_alone():
    model, optimizer, over = running()
    state = through_a_file(optimizer.state_dict())
    state["param_groups"][0]["params"].append(99)
    expert_loss(model, 5).backward()
    optimizer.step()
    before = everything(model, optimizer, over)
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(state)
    after = everything(model, optimizer, over)
    for key, value in before.items():
        assert same(value, after[key]), f"{key} changed"
    del state["tnadapt"]
    state["param_groups"][0]["params"].pop()
    with pytest.warns(UserWarning, match="no tnadapt part"):
        optimizer.load_state_dict(state)
    assert same(before["over"], over.state_dict())


@pytest.mark.parametrize(
    ("build", "said"),
    [
        ({"scheduler": Static()}, "scheduler TaylorRuntime, this run has Static"),
        ({"factorization": MPO(order=4)}, r"MPO\(order=4\)"),
        ({"factorization": SVD(gauge="identity")}, "MPO"),
        ({"count": 1}, r"experts\.[12].*model"),
    ],
)
def test_states_of_other_runs(build, said):
    _, other_optimizer, _ = running()
    model, optimizer, over = running(**build)
    before = everything(model, optimizer, over)
    state = other_optimizer.state_dict()["tnadapt"]
    with pytest.raises(ValueError, match=said):
        over.load_state_dict(state)
    after = everything(model, optimizer, over)
    for key, value in before.items():
        assert same(value, after[key]), f"{key} changed"


def test_another_factorization_is_noticed_before_anything_is_expanded():
    def fresh(order: int) -> LoraOver:
        model = Experts()
        return LoraOver(model, torch.optim.AdamW(trainable(model)), MPO(order=order), TaylorRuntime(2, 2, 2))

    with pytest.raises(ValueError, match=r"MPO\(order=3\).*MPO\(order=4\)"):
        fresh(4).load_state_dict(fresh(3).state_dict())
