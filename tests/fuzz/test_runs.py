"""Whole runs, drawn at random: each checks itself after every move (`machine`), and is compared with autograd and with itself.

A failure prints the shortest plan that Hypothesis finds for it. Paste it above the test as `@example(plan=...)` to keep it. `make
fuzz` draws anew, as many runs as it is told to.
"""

from __future__ import annotations

import os

from engine.models import same
from hypothesis import given, settings

from .machine import Run
from .plans import Plan, plans
from .reference import Reference

#: runs of each test; the profile of the suite decides where nothing is said
RUNS = int(os.environ.get("RUNS", 0)) or settings().max_examples

many = settings(max_examples=RUNS)


def ends_alike(plan: Plan) -> None:
    """Twice the same bits; where the plan saves and reloads, the second run does not."""
    one, other = Run(plan).go(), Run(plan, reload=False).go()
    for move, mine, its in zip(plan.moves, one.trace, other.trace, strict=True):
        for what, value in mine.items():
            assert same(value, its[what]) if what != "expanded" else value == its[what], f"{what} differs after {move}"


@many
@given(plan=plans())
def test_a_run_is_the_same_twice_and_after_a_reload(plan: Plan) -> None:
    ends_alike(plan)


@many
@given(plan=plans(exact=True))
def test_a_run_follows_autograd(plan: Plan) -> None:
    Run(plan, reference=Reference).go()


@many
@given(plan=plans(hard=True))
def test_a_run_with_hostile_moves_is_the_same_twice(plan: Plan) -> None:
    ends_alike(plan)
