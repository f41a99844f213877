"""Whole runs, drawn at random: each checks itself after every move (`machine`), and is compared with autograd and with itself.

A failure prints the shortest plan that Hypothesis finds for it; `Run(plan).go()` repeats it. `make fuzz` draws anew, as many runs
as it is told to, and prints the seed that draws them again.
"""

from __future__ import annotations

import os

import pytest
import torch
from engine.models import same
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from .machine import Run
from .plans import HOSTILE, Call, Edit, Fail, Plan, Reload, Setting, Step, plans
from .reference import Reference

#: runs of each test; where nothing is said, those of the suite's profile, always the same
RUNS = int(os.environ.get("RUNS", 0))

many = settings(max_examples=RUNS or max(settings().max_examples, 24))
#: one in ten of these, and in the suite without the search for a shorter plan, which takes minutes
few = settings(max_examples=max(RUNS // 10, 2), phases=tuple(Phase) if RUNS else (Phase.generate,))
#: what autograd in float64 cannot follow
ROUNDS = ("steps inside autocast", "caps the updates of bfloat16")

#: the shortest runs of each kind
FIXED: list[tuple[str, Plan]] = [
    ("clears gradients in a post hook", Plan(Setting(hook="zero_grad"), (Step(), Step()))),
    ("clears gradients in a post hook", Plan(Setting(hook="zero_grad"), (Step(zero="zeros"), Step(zero="zeros")))),
    ("edits below the rounding of the dtype", Plan(Setting(dtype=torch.bfloat16), (Step(), Edit("entry", 1), Step()))),
    (
        "edits below the rounding of the dtype",
        Plan(
            Setting(dtype=torch.bfloat16, optimizer=Call("AdamW", {"lr": 1e-3})),
            (Step(), Step(), Edit("back", 0), Step()),
        ),
    ),
    ("goes on after the optimizer failed", Plan(Setting(subclass=True), (Step(), Fail("before", "restore"), Step()))),
    ("goes on after the optimizer failed", Plan(Setting(subclass=True), (Step(), Fail("after", "restore"), Step()))),
    (
        "goes on after the optimizer failed",
        Plan(Setting(subclass=True), (Step(), Fail("before", "accumulate"), Step())),
    ),
    ("goes on after the optimizer failed", Plan(Setting(subclass=True), (Step(), Fail("after", "accumulate"), Step()))),
    ("goes on after the optimizer failed", Plan(Setting(subclass=True), (Step(), Fail("before", "go on"), Step()))),
    (
        "clears gradients in a post hook",
        Plan(Setting(subclass=True, hook="zero_grad"), (Step(), Fail("after", "recover"), Step(zero="keep"))),
    ),
    (
        "clears gradients in a post hook",
        Plan(Setting(subclass=True, hook="zero_grad"), (Step(), Fail("after", "accumulate"), Step(zero="keep"))),
    ),
    ("saves in a post hook", Plan(Setting(hook="save"), (Step(), Step()))),
    ("looks in hooks", Plan(Setting(hook="look"), (Step(), Step()))),
    (
        "has steps without gradients",
        Plan(
            Setting(scheduler=Call("TaylorRuntime", {"top_n": 1, "split": 1, "every": 2}), handover="restart"),
            (Step(), Step(used=()), Step()),
        ),
    ),
    (
        "steps inside autocast",
        Plan(
            Setting(dtype=torch.float32, scheduler=Call("Static", {"which": r"0.up.A$"}), wrapped_step="autocast"),
            (Step(), Step()),
        ),
    ),
    (
        "caps the updates of bfloat16",
        Plan(Setting(dtype=torch.bfloat16, max_update=0.5), (Step(), Reload(), Step(), Step())),
    ),
]


def ends_alike(plan: Plan) -> None:
    """Twice the same bits; where the plan saves and reloads, the second run does not."""
    one, other = Run(plan), Run(plan, reload=False)
    one.go()
    other.go()
    for move, mine, its in zip(plan.moves, one.trace, other.trace, strict=True):
        for what, value in mine.items():
            assert same(value, its[what]), f"{what} differ after {move}"


@many
@given(plan=plans())
def test_a_run_is_the_same_twice_and_after_a_reload(plan: Plan) -> None:
    ends_alike(plan)


@many
@given(plan=plans(exact=True))
def test_a_run_follows_autograd(plan: Plan) -> None:
    Run(plan, reference=Reference).go()


@pytest.mark.parametrize(("hostile", "plan"), [pytest.param(*f, id=f"{f[0]}-{k}") for k, f in enumerate(FIXED)])
def test_nothing_goes_wrong_in_silence_though_the_loop(hostile: str, plan: Plan) -> None:
    assert hostile in HOSTILE
    ends_alike(plan)
    if plan.setting.dtype == torch.float64 and not any(getattr(m, "then", "") == "restore" for m in plan.moves):
        Run(plan, reference=Reference).go()


def test_a_round_after_a_reload_joins_cores_that_rest() -> None:
    """What rests in the first step after loading has not been looked at when matrices that are trained join it."""
    rounds = Call("TaylorRuntime", {"top_n": 3, "split": 2, "every": 1, "reset": True})
    setting = Setting(scheduler=rounds, optimizer=Call("SGD", {"lr": 0.02}))
    ends_alike(Plan(setting, (Step(), Reload(), Step(used=(0,)), Step())))


def test_an_edit_within_rounding_after_a_reload_is_no_edit() -> None:
    """A step that moves no `A` but by rounding, and is taken back after loading."""
    ends_alike(
        Plan(
            Setting(hidden=(4, 8), zero_start=True, optimizer=Call("SGD", {"lr": 1e-3})),
            (Step(), Reload(), Edit("back", 0), Edit("back", 4), Step()),
        )
    )


def test_an_edit_within_rounding_before_a_reload_is_lost_in_it() -> None:
    """What is saved holds no copy of what was written last."""
    ends_alike(
        Plan(
            Setting(hidden=(8, 5, 8), rank=3, zero_start=True, optimizer=Call("SGD", {"lr": 0.02})),
            (Step(), *[Edit("back", which) for which in (0, 2, 4)], Reload(), Step()),
        )
    )


@pytest.mark.parametrize("hostile", HOSTILE)
@few
@given(data=st.data())
def test_a_run_is_the_same_twice_though_the_loop(hostile: str, data: st.DataObject) -> None:
    ends_alike(data.draw(plans(hostile=hostile)))


@pytest.mark.parametrize("hostile", [h for h in HOSTILE if h not in ROUNDS])
@few
@given(data=st.data())
def test_a_run_follows_autograd_though_the_loop(hostile: str, data: st.DataObject) -> None:
    Run(data.draw(plans(exact=True, hostile=hostile)), reference=Reference).go()
