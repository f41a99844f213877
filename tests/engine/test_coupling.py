"""What the coupling to the optimizer does around a step: state entries, checks that wait, and optimizers of others."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tnadapt import MPO, SVD, LoraOver, Scheduler, TrainedMatrix
from tnadapt.engine.step import _read_later

from .models import adapters, backward_through, trainable

PAIR = ("0.A", "0.B")


class At(Scheduler):
    """Expands the first pair at one step; 0 is at once."""

    def __init__(self, step: int) -> None:
        self.step = step

    def select(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> Iterable[str]:
        return PAIR if step == self.step else ()


# -- entries of the optimizer's state ---------------------------------------------------------------------------------


def as_distributed(optimizer: torch.optim.Optimizer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The state dict that an optimizer gives where there is a process group."""
    with monkeypatch.context() as patched:
        patched.setattr(dist, "is_initialized", lambda: True)
        return optimizer.state_dict()


def test_entries_that_there_are_stay_in_saved_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only expanded matrices without an entry get zeros; who was not stepped is not there."""
    model = adapters(12, 12, 12)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    LoraOver(model, optimizer, MPO(order=3), At(2))
    for _ in range(2):
        backward_through(model, 0, 1)  # nothing comes to the third layer
        optimizer.step()
        optimizer.zero_grad()
    entries = as_distributed(optimizer, monkeypatch)["state"]
    assert set(entries) == {0, 1, 2, 3}
    assert all(float(entry["exp_avg"].abs().max()) > 0 for entry in entries.values())


def test_entries_that_are_missing_are_shaped_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cores have none either: those of parameters that were stepped are to go by."""
    model = adapters(12, 12)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    LoraOver(model, optimizer, MPO(order=3), At(0))
    for parameter in trainable(model[1]):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    entries = as_distributed(optimizer, monkeypatch)["state"]
    assert set(entries) == {0, 1, 2, 3}
    for index, parameter in enumerate(trainable(model[0])):
        assert entries[index]["exp_avg"].shape == parameter.shape
        assert not entries[index]["exp_avg"].any()


def test_entries_of_other_shapes_are_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Adafactor's rows and columns."""
    model = adapters(12, 12)
    optimizer = torch.optim.Adafactor(trainable(model), lr=1e-2)
    LoraOver(model, optimizer, MPO(order=3), At(0))
    backward_through(model, 0, 1)
    optimizer.step()
    assert set(as_distributed(optimizer, monkeypatch)["state"]) == {2, 3}


def test_a_state_is_not_loaded_where_the_optimizer_lost_a_matrix() -> None:
    model = adapters(12, 12)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=3), At(0))
    backward_through(model, 0, 1)
    optimizer.step()
    state = copy.deepcopy(over.state_dict())
    del optimizer.param_groups[0]["params"][0]
    with pytest.raises(RuntimeError, match=r"does not hold the parameter of 0\.A"):
        over.load_state_dict(state)


# -- steps ------------------------------------------------------------------------------------------------------------


def test_gradients_that_carry_a_graph_step_like_others() -> None:
    def run(create_graph: bool) -> list[nn.Parameter]:
        model = adapters(12, 12)
        optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
        LoraOver(model, optimizer, MPO(order=3), At(0))
        for _ in range(2):
            backward_through(model, 0, 1, create_graph=create_graph)
            optimizer.step()
            optimizer.zero_grad()
        return trainable(model)

    assert all(map(torch.equal, run(True), run(False)))


def test_a_scale_is_known_during_the_step_only() -> None:
    model = adapters(12, 12)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2, fused=True)
    optimizer.grad_scale = torch.tensor(4.0)  # as GradScaler gives it
    over = LoraOver(model, optimizer, MPO(order=3), At(0))
    backward_through(model, 0, 1)
    optimizer.step()
    matrix = over.matrices["1.A"]
    assert matrix.gradient is matrix.parameter.grad


def test_the_rate_of_the_cores_is_that_of_the_first() -> None:
    model = adapters(12, 12)
    groups = [{"params": trainable(layer), "lr": rate} for layer, rate in zip(model, (1e-2, 1e-3), strict=True)]
    optimizer = torch.optim.SGD(groups, lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=3), core_lr=5e-3)
    backward_through(model, 0, 1)
    optimizer.step()
    assert over.core_rate() == 5e-3


# -- flags that are read a step later ---------------------------------------------------------------------------------


def flagged(finite: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[LoraOver, Callable[[], None]]:
    """A run of one step whose gradients were finite or not, as a device that is not waited for tells it; and one step more."""
    model = adapters(12, 12)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=3), At(0))
    backward_through(model, 0, 1)
    assert over._step is not None
    pull_back = over._step._pull_back
    with monkeypatch.context() as patched:
        patched.setattr(
            over._step, "_pull_back", lambda: [*pull_back(), _read_later([torch.tensor(True), torch.tensor(finite)])]
        )
        optimizer.step()
    return over, optimizer.step


def test_what_was_not_finite_is_said_by_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    over, step = flagged(False, monkeypatch)
    with pytest.raises(FloatingPointError, match="the step before held NaN"):
        step()
    step()
    assert over.step == 2


def test_what_was_finite_is_not_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    over, step = flagged(True, monkeypatch)
    step()
    assert over.step == 2


def test_what_was_not_finite_is_forgotten_with_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    over, step = flagged(False, monkeypatch)
    over.load_state_dict(copy.deepcopy(over.state_dict()))
    step()
    assert over.step == 2


def test_gradients_whose_squares_overflow_are_finite() -> None:
    model = adapters(12)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-200)
    over = LoraOver(model, optimizer, MPO(order=3), At(99))
    for parameter in trainable(model):
        parameter.grad = torch.full_like(parameter, 1e200)
    optimizer.step()
    assert over.step == 1


# -- optimizers of others ---------------------------------------------------------------------------------------------


class Descent(torch.optim.Optimizer):
    """Without state. Steps what is in its groups, or what it was made with; every step, or not."""

    def __init__(
        self, parameters: list[nn.Parameter], own_list: bool = False, dies_at: int = 0, rests_at: int = 0
    ) -> None:
        super().__init__(parameters, {"lr": 1e-2})
        self.own = list(parameters) if own_list else None
        self.dies_at, self.rests_at, self.calls = dies_at, rests_at, 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        self.calls += 1
        if self.calls == self.dies_at:
            raise ArithmeticError("in the optimizer")
        if self.calls == self.rests_at:
            return
        chosen: list[Tensor] = (
            [p for group in self.param_groups for p in group["params"]] if self.own is None else self.own
        )
        for parameter in chosen:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])


def test_whether_cores_move_is_looked_at_again_after_a_step_that_died() -> None:
    model = adapters(12, 12)
    optimizer = Descent(trainable(model), own_list=True, dies_at=1)
    LoraOver(model, optimizer, MPO(order=3), At(0))
    backward_through(model, 0, 1)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    with pytest.raises(RuntimeError, match="did not step the cores"):
        optimizer.step()


def test_an_optimizer_that_has_stepped_cores_may_rest() -> None:
    """One that gathers gradients over steps, say."""
    model = adapters(12, 12)
    optimizer = Descent(trainable(model), rests_at=2)
    over = LoraOver(model, optimizer, MPO(order=3), At(0))
    for _ in range(3):
        backward_through(model, 0, 1)
        optimizer.step()
        optimizer.zero_grad()
    assert over.step == 3


def test_groups_at_a_rate_of_zero_hide_nothing() -> None:
    """Their cores need not move, those of other groups must."""
    model = adapters(12, 12)
    optimizer = Descent(trainable(model[0]), own_list=True)
    optimizer.add_param_group({"params": trainable(model[1])})
    optimizer.param_groups[0]["lr"] = 0.0
    LoraOver(model, optimizer, MPO(order=3))
    backward_through(model, 0, 1)
    with pytest.raises(RuntimeError, match="did not step the cores"):
        optimizer.step()


@pytest.mark.parametrize("own_list", [False, True])
def test_steps_that_are_lost_to_rounding_prove_nothing(own_list: bool) -> None:
    """An optimizer is not blamed for a step that no core can show; one with its own list is found out at the next that moves."""
    model = adapters(12)
    optimizer = Descent(trainable(model), own_list=own_list)
    over = LoraOver(model, optimizer, SVD())  # whose cores have no zeros, which would move
    for parameter in trainable(model):
        parameter.grad = torch.full_like(parameter, 1e-20)
    optimizer.step()
    assert over.step == 1
    optimizer.zero_grad()
    backward_through(model, 0)
    with pytest.raises(RuntimeError, match="did not step the cores") if own_list else nullcontext():
        optimizer.step()


def test_an_optimizer_without_rates() -> None:
    class Unit(torch.optim.Optimizer):
        """Steps by a hundredth of the gradient, always."""

        def __init__(self, parameters: list[nn.Parameter]) -> None:
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=1e-2)

    def run(kind: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> tuple[list[nn.Parameter], LoraOver]:
        model = adapters(12, 12)
        optimizer = kind(trainable(model))
        over = LoraOver(model, optimizer, MPO(order=3), At(0))
        for _ in range(2):
            backward_through(model, 0, 1)
            optimizer.step()
            optimizer.zero_grad()
        return trainable(model), over

    (mine, over), (like, _) = run(Unit), run(Descent)
    assert all(map(torch.equal, mine, like))
    assert over.core_rate() is None


def test_an_optimizer_may_keep_the_gradients_it_was_given() -> None:
    """Their memory is not used for those of the next step."""

    class Averaged(torch.optim.Optimizer):
        """Steps along the mean of this gradient and the last one."""

        def __init__(self, parameters: list[nn.Parameter], copies: bool) -> None:
            super().__init__(parameters, {"lr": 1e-2})
            self.copies = copies

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    last = self.state[parameter].get("last", torch.zeros_like(parameter))
                    parameter.sub_((parameter.grad + last) / 2, alpha=group["lr"])
                    self.state[parameter]["last"] = parameter.grad.clone() if self.copies else parameter.grad

    def run(copies: bool) -> nn.ModuleList:
        model = adapters(12)
        optimizer = Averaged(trainable(model), copies)
        over = LoraOver(model, optimizer, MPO(order=3))
        for _ in range(4):
            backward_through(model, 0)
            optimizer.step()
            optimizer.zero_grad()
        assert len(over.expanded) == 2
        return model

    assert all(map(torch.equal, run(False).parameters(), run(True).parameters()))


class WithEntries(Descent):
    """Has entries of its own in its groups, and does something with them."""

    def __init__(self, parameters: list[nn.Parameter], change: Callable[[list[dict[str, Any]]], None]) -> None:
        super().__init__(parameters)
        self.change = change
        entries = {"weight_decay": 0.0, "shift": torch.zeros(1), "count": 0}
        self.defaults.update(entries)
        self.param_groups[0].update(entries)

    def step(self, closure: Callable[[], float] | None = None, *factors: float) -> None:
        loss = 1.0 if closure is None else closure()
        self.change(self.param_groups)
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            parameter.data.sub_(parameter.grad, alpha=1e-2 * math.prod(factors, start=float(loss > 0)))


def nothing(_: list[dict[str, Any]]) -> None:
    pass


@pytest.mark.parametrize("decay", [None, 0.1])
def test_state_in_groups_is_found_out(decay: float | None) -> None:
    """Cores are in a group for the step only: their count would start anew at every step."""
    model = adapters(12, 12)
    optimizer = WithEntries(trainable(model), lambda groups: groups[-1].update(count=groups[-1]["count"] + 1))
    LoraOver(model, optimizer, MPO(order=3), At(0), core_weight_decay=decay)
    backward_through(model, 0, 1)
    with pytest.raises(RuntimeError, match=r"keeps state in its parameter groups \('count'\)"):
        optimizer.step()


def test_entries_of_the_cores_group_may_be_others() -> None:
    """The decay, where the cores have one of their own, and what is only there."""
    model = adapters(12, 12)
    optimizer = WithEntries(trainable(model), lambda groups: groups[-1].update(seen=True))
    over = LoraOver(model, optimizer, MPO(order=3), core_weight_decay=0.1)
    backward_through(model, 0, 1)
    optimizer.step()
    assert over.step == 1


def test_arguments_of_a_step_are_handed_on() -> None:
    """Behind a closure, which is evaluated once."""
    calls = []

    def run(*arguments: Any) -> list[nn.Parameter]:
        model = adapters(12, 12)
        optimizer = WithEntries(trainable(model), nothing)
        LoraOver(model, optimizer, MPO(order=3), At(0))

        def closure() -> float:
            calls.append(1)
            optimizer.zero_grad()
            backward_through(model, 0, 1)
            return 1.0

        optimizer.step(closure, *arguments)
        return trainable(model)

    assert not torch.equal(run(3.0)[0], run()[0])
    assert all(map(torch.equal, run(1.0), run()))
    assert all(map(torch.equal, run(0.5, 6.0), run(3.0)))
    assert len(calls) == 6


# -- after a step -----------------------------------------------------------------------------------------------------


def test_gradients_of_the_past_do_not_come_back() -> None:
    """In a step that moves nothing, after the gradients were set to None."""
    model = adapters(12, 12)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    LoraOver(model, optimizer, MPO(order=3), At(0))
    backward_through(model, 0, 1)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert all(parameter.grad is None for parameter in trainable(model))


def test_what_a_step_was_given_is_let_go() -> None:
    model = adapters(12, 12)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    LoraOver(model, optimizer, MPO(order=3), At(0))

    def closure() -> float:
        backward_through(model, 0, 1)
        return 0.0

    known = weakref.ref(closure)
    optimizer.step(closure)
    del closure
    gc.collect()
    assert known() is None


def test_an_error_of_one_process_does_not_speak_of_ranks() -> None:
    model = adapters(12, 12)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    LoraOver(model, optimizer, MPO(order=3), At(0))
    backward_through(model, 0, 1)
    next(iter(trainable(model))).grad.fill_(float("nan"))
    with pytest.raises(FloatingPointError) as caught:
        optimizer.step()
    assert "ranks" not in "".join(getattr(caught.value, "__notes__", []))


# -- steps that move nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_steps_that_only_make_state_do_not_count(rate: float | Tensor) -> None:
    """As torch.distributed.checkpoint does them: all rates zero and all gradients too."""
    model = adapters(12, 12)
    optimizer = torch.optim.AdamW(trainable(model), lr=rate, foreach=False)
    over = LoraOver(model, optimizer, MPO(order=3), At(1))
    for parameter in trainable(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert (over.step, over.expanded) == (0, ())
    optimizer.zero_grad()
    backward_through(model, 0, 1)
    optimizer.step()
    assert (over.step, over.expanded) == (1, PAIR)
