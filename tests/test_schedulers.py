"""What is expanded and when."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tnadapt import (
    MPO,
    SVD,
    Budget,
    LoraOver,
    LossAblation,
    OverParamAdapter,
    Scheduler,
    Static,
    TaylorRuntime,
    find_lora_matrices,
)
from tnadapt.finders import named_parameters
from tnadapt.matrices import TrainedMatrix
from tnadapt.schedulers import by_group, register_scheduler, round_sizes
from tnadapt.schedulers.base import _SCHEDULERS


class Layers(nn.Module):
    def __init__(self, count: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(
            OverParamAdapter.from_linear(nn.Linear(8, 6, dtype=dtype), rank=2) for _ in range(count)
        )


def matrices_of(count: int = 4, dtype: torch.dtype = torch.float64) -> dict[str, TrainedMatrix]:
    found, _ = find_lora_matrices(Layers(count, dtype))
    for matrix in found.values():
        nn.init.normal_(matrix.parameter)
    return found


def give_gradients(matrices: dict[str, TrainedMatrix], step: int, idle: tuple[str, ...] = ()) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    for name, matrix in matrices.items():
        gradient = torch.randn(matrix.shape, generator=generator, dtype=torch.float64).to(matrix.parameter.dtype)
        matrix.parameter.grad = None if name in idle else gradient
    return {name: m.parameter.grad for name, m in matrices.items() if m.parameter.grad is not None}


def mark(matrices: dict[str, TrainedMatrix], names: list[str]) -> None:
    expanded = {name for name, matrix in matrices.items() if matrix.expanded}.union(names)
    for matrix in matrices.values():
        matrix.roster = lambda: expanded


# -- rounds -------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 60))
def test_rounds_sum_to_n_whatever_the_split(top_n, split, size):
    sizes = round_sizes(top_n, split, size)
    assert len(sizes) == split
    assert sum(sizes) == min(top_n, size)
    assert max(sizes) - min(sizes) <= 1
    assert all(n >= 0 for n in sizes)


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [((9, 8, 12), [2, 1, 1, 1, 1, 1, 1, 1]), ((4, 2, 9), [2, 2]), ((2, 4, 9), [1, 0, 1, 0]), ((9, 2, 3), [2, 1])],
)
def test_rounds_by_hand(arguments, sizes):
    assert round_sizes(*arguments) == sizes


def run(scheduler: TaylorRuntime, matrices: dict[str, TrainedMatrix], steps: int) -> dict[int, list[str]]:
    chosen: dict[int, list[str]] = {}
    for step in range(1, steps + 1):
        give_gradients(matrices, step)
        scheduler.observe(step, matrices)
        names = list(scheduler.select(step, matrices)) if scheduler.due(step) else []
        if names:
            mark(matrices, names)
            chosen[step] = names
    return chosen


def test_rounds_come_every_so_many_steps_and_reach_n_in_each_group():
    matrices = matrices_of(7)
    scheduler = TaylorRuntime(top_n=5, split=3, every=2)
    scheduler.attach(matrices)
    chosen = run(scheduler, matrices, 12)
    assert {step: len(names) for step, names in chosen.items()} == {2: 4, 4: 4, 6: 2}
    for members in by_group(matrices).values():
        assert sum(m.expanded for m in members) == 5
    names = [name for round_names in chosen.values() for name in round_names]
    assert len(set(names)) == len(names)
    assert [r["step"] for r in scheduler.rounds] == [2, 4, 6]
    assert [r["selected"] for r in scheduler.rounds] == list(chosen.values())


def test_due_only_where_a_round_may_be():
    scheduler = TaylorRuntime(top_n=1, split=1, every=3)
    assert [step for step in range(10) if scheduler.due(step)] == [3, 6, 9]
    run(scheduler, matrices_of(2), 3)
    assert not any(scheduler.due(step) for step in range(10))


# -- scores -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("reduction", ["inner", "elementwise"])
def test_scores_by_hand(reduction, average):
    matrices, idle_at_2 = matrices_of(3), ("layers.1.B",)
    scheduler = TaylorRuntime(top_n=1, split=1, every=9, reduction=reduction, average=average)
    expected = dict.fromkeys(matrices, 0.0)
    for step in (1, 2, 3):
        for name, gradient in give_gradients(matrices, step, idle_at_2 if step == 2 else ()).items():
            product = gradient * matrices[name].parameter.detach()
            total = 0.0
            for entry in product.flatten().tolist():
                total += entry if reduction == "inner" else abs(entry)
            expected[name] += abs(total)
        scheduler.observe(step, matrices)
    if average:
        expected = {name: score / (2 if name in idle_at_2 else 3) for name, score in expected.items()}
    assert scheduler.scores() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reduction", ["inner", "elementwise"])
@pytest.mark.parametrize("kind", [TaylorRuntime, Budget])
def test_kernels_of_convolutions_are_scored_and_expanded(kind, reduction):
    """A parameter of more than two dimensions has one score, whatever its shape."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, (2, 3)), nn.Conv1d(4, 8, 3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    amount = {"top_n": 3, "split": 1} if kind is TaylorRuntime else {"added_parameters": 10**6, "decay": 0.0}
    scheduler = kind(every=2, reduction=reduction, **amount)
    over = LoraOver(model, optimizer, MPO(order=2), scheduler, matrices=named_parameters("weight"))
    for _ in range(2):
        optimizer.zero_grad()
        sum(layer(torch.ones(1, 4, *[4] * (layer.weight.dim() - 2))).square().sum() for layer in model).backward()
        optimizer.step()
    assert set(over.expanded) == {"0.weight", "1.weight", "2.weight"}
    steps = 2 if kind is TaylorRuntime else 1
    expected = {}
    for k, layer in enumerate(model):
        product = (layer.weight.detach() * layer.weight.grad).flatten()
        expected[f"{k}.weight"] = steps * abs(float((product if reduction == "inner" else product.abs()).sum()))
    assert scheduler.scores() == pytest.approx(expected, rel=1e-5)


def test_the_highest_scores_of_each_group_are_chosen():
    matrices = matrices_of(5)
    scheduler = TaylorRuntime(top_n=2, split=1, every=2)
    run(scheduler, matrices, 1)
    give_gradients(matrices, 2)
    scheduler.observe(2, matrices)
    scores = scheduler.scores()
    chosen = set(scheduler.select(2, matrices))
    for members in by_group(matrices).values():
        best = sorted((m.name for m in members), key=lambda name: scores[name])[-2:]
        assert {m.name for m in members} & chosen == set(best)


def test_equal_scores_go_by_the_order_of_the_model():
    matrices = matrices_of(4)
    for matrix in matrices.values():
        matrix.parameter.grad = torch.zeros_like(matrix.parameter)
    scheduler = TaylorRuntime(top_n=2, split=1, every=1)
    scheduler.observe(1, matrices)
    assert set(scheduler.select(1, matrices)) == {f"layers.{k}.{side}" for k in (0, 1) for side in "AB"}


def test_matrices_without_a_score_count_as_zero():
    """Idle ones come after those that matter, and before those that matter as little by the order of the model."""
    matrices = matrices_of(3)
    give_gradients(matrices, 1, idle=("layers.0.A", "layers.0.B"))
    matrices["layers.2.A"].parameter.grad.zero_()
    scheduler = TaylorRuntime(top_n=2, split=1, every=1)
    scheduler.observe(1, matrices)
    # A: 0 is idle, 2 scores zero; B: 0 is idle
    assert list(scheduler.select(1, matrices)) == ["layers.1.A", "layers.0.A", *_by_score(scheduler, "B", (1, 2))]


def _by_score(scheduler: TaylorRuntime, side: str, layers: tuple[int, ...]) -> list[str]:
    scores = scheduler.scores()
    return sorted((f"layers.{k}.{side}" for k in layers), key=lambda name: -scores[name])


def test_a_round_without_any_score_is_an_error():
    """Nothing but the order of the model could decide it."""
    matrices = matrices_of(3)
    scheduler = TaylorRuntime(top_n=2, split=2, every=2)
    for step in (1, 2):
        give_gradients(matrices, step, idle=tuple(matrices))
        scheduler.observe(step, matrices)
    with pytest.raises(
        ValueError, match=r"TaylorRuntime: .* at step 2, but none of the 6 .* layers\.0\.A.*backward\(\)"
    ):
        scheduler.select(2, matrices)
    assert scheduler.rounds_done == 0
    give_gradients(matrices, 4)
    scheduler.observe(4, matrices)
    assert len(list(scheduler.select(4, matrices))) == 2


def test_scores_of_what_is_expanded_decide_nothing():
    matrices = matrices_of(3)
    scheduler = TaylorRuntime(top_n=2, split=2, every=1)
    waiting = ("layers.1.A", "layers.1.B", "layers.2.A", "layers.2.B")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        give_gradients(matrices, 1, idle=waiting)
        scheduler.observe(1, matrices)
        mark(matrices, list(scheduler.select(1, matrices)))
    assert [name for name, m in matrices.items() if m.expanded] == ["layers.0.A", "layers.0.B"]
    with pytest.raises(ValueError, match=r"none of the 4 to choose from, such as layers.1.A"):
        scheduler.select(2, matrices)


def test_groups_without_any_score_are_warned_of():
    matrices = matrices_of(3)
    give_gradients(matrices, 1, idle=("layers.0.A", "layers.1.A", "layers.2.A"))
    scheduler = TaylorRuntime(top_n=1, split=1, every=1)
    scheduler.observe(1, matrices)
    with pytest.warns(
        UserWarning, match=r"in 1 groups had a gradient.*step 1.*layers\.\*\.A \(layers\.0\.A\)"
    ) as caught:
        assert list(scheduler.select(1, matrices)) == ["layers.0.A", *_by_score(scheduler, "B", (0, 1, 2))[:1]]
    assert len(caught) == 1


def test_a_group_that_is_taken_whole_needs_no_score():
    matrices = matrices_of(2)
    give_gradients(matrices, 1, idle=("layers.0.A", "layers.1.A"))
    scheduler = TaylorRuntime(top_n=2, split=1, every=1)
    scheduler.observe(1, matrices)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(scheduler.select(1, matrices))) == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_gradients_are_an_error_at_the_next_round(bad):
    matrices = matrices_of(2)
    give_gradients(matrices, 1)
    matrices["layers.1.A"].parameter.grad[0, 0] = bad
    scheduler = TaylorRuntime(top_n=1, split=1, every=1)
    scheduler.observe(1, matrices)
    with pytest.raises(ValueError, match=r"TaylorRuntime: the score of layers\.1\.A is not finite at step 1"):
        scheduler.select(1, matrices)


def test_scores_keep_no_graph():
    """With gradients that are differentiable themselves, a sum over steps would keep the graph of every step."""
    matrices = matrices_of(1)
    for matrix in matrices.values():
        (matrix.parameter.grad,) = torch.autograd.grad(
            matrix.parameter.square().sum(), matrix.parameter, create_graph=True
        )
        assert matrix.parameter.grad.requires_grad
    scheduler = TaylorRuntime(1, 1, 2)
    scheduler.observe(1, matrices)
    assert len(scheduler.state_dict()["scores"]) == 2
    assert not any(score.requires_grad for score in scheduler.state_dict()["scores"].values())


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("reset", [None, False, True])
def test_reset(reset, average):
    matrices = matrices_of(4)
    options = {} if reset is None else {"reset": reset}
    scheduler = TaylorRuntime(top_n=4, split=4, every=2, average=average, **options)
    run(scheduler, matrices, 2)
    assert (scheduler.scores() == {}) == (reset is True)
    gradients = give_gradients(matrices, 3)
    before = scheduler.scores()
    scheduler.observe(3, matrices)
    for name, score in scheduler.scores().items():
        if not matrices[name].expanded:
            now = abs(float((gradients[name] * matrices[name].parameter.detach()).sum()))
            if reset:
                assert score == pytest.approx(now)
            else:
                assert score == pytest.approx((2 * before[name] + now) / 3 if average else before[name] + now)


def test_expanded_matrices_are_not_scored_and_gradients_not_written():
    matrices = matrices_of(2)
    mark(matrices, ["layers.0.A"])
    gradients = {name: g.clone() for name, g in give_gradients(matrices, 1).items()}
    scheduler = TaylorRuntime(top_n=1, split=1, every=2)
    scheduler.observe(1, matrices)
    assert set(scheduler.scores()) == {"layers.0.B", "layers.1.A", "layers.1.B"}
    assert all(torch.equal(matrices[name].parameter.grad, g) for name, g in gradients.items())


def test_scale_of_a_grad_scaler_is_taken_out():
    matrices = matrices_of(2)
    give_gradients(matrices, 1)
    plain, scaled = TaylorRuntime(1, 1, 2), TaylorRuntime(1, 1, 2)
    plain.observe(1, matrices)
    for matrix in matrices.values():
        matrix.parameter.grad.mul_(1024.0)
        matrix.grad_scale = torch.tensor(1024.0)
    scaled.observe(1, matrices)
    assert scaled.scores() == pytest.approx(plain.scores(), rel=1e-6)


def test_low_precision_is_summed_in_single_precision():
    matrices = matrices_of(1, torch.bfloat16)
    gradients = give_gradients(matrices, 1)
    scheduler = TaylorRuntime(1, 1, 2)
    scheduler.observe(1, matrices)
    for name, score in scheduler.scores().items():
        exact = abs(float((gradients[name].double() * matrices[name].parameter.detach().double()).sum()))
        assert score == pytest.approx(exact, rel=1e-4, abs=1e-5)


# -- settings and state -------------------------------------------------------------------------------------------------


def test_small_groups_are_warned_of_once_and_expanded_whole():
    matrices = matrices_of(2)
    scheduler = TaylorRuntime(top_n=3, split=1, every=1)
    with pytest.warns(UserWarning, match=r"top_n=3.*2 of 2 groups.*layers\.\*\.A \(2\).*whole") as caught:
        scheduler.attach(matrices)
    assert len(caught) == 1
    assert len(run(scheduler, matrices, 1)[1]) == 4


def test_the_warning_points_at_whoever_attaches():
    model = Layers(2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.warns(UserWarning, match="top_n=3") as caught:
        LoraOver(model, optimizer, SVD(), TaylorRuntime(top_n=3, split=1, every=1))
    assert [warning.filename for warning in caught] == [__file__]


def test_groups_that_are_large_enough_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TaylorRuntime(top_n=2, split=1, every=1).attach(matrices_of(2))


@pytest.mark.parametrize("name", ["average", "reset", "expand_after_update"])
def test_a_text_switches_nothing_on(name):
    with pytest.raises(TypeError, match=f"TaylorRuntime: {name}='no' must be True or False"):
        TaylorRuntime(1, 1, 1, **{name: "no"})


@pytest.mark.parametrize("name", ["top_n", "split", "every"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_bad_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name}=.*at least 1"):
        TaylorRuntime(**{"top_n": 1, "split": 1, "every": 1, name: value})


def test_unknown_reduction():
    with pytest.raises(ValueError, match="reduction='max' is unknown; choose one of inner, elementwise"):
        TaylorRuntime(1, 1, 1, reduction="max")


def test_label_of_runtime():
    assert TaylorRuntime(9, 8, 50).label == "TaylorRuntime(top_n=9, split=8, every=50)"
    # what a state is compared by names every setting that was changed
    after = TaylorRuntime(9, 8, 50, expand_after_update=True)
    assert after.label == "TaylorRuntime(top_n=9, split=8, every=50, expand_after_update=True)"


@pytest.mark.parametrize("steps", [1, 2])
def test_a_scheduler_serves_one_run(steps):
    """Steps 1 and 2: with scores and no round yet, and with a round whose scores were dropped."""
    matrices = matrices_of(3)
    scheduler = TaylorRuntime(top_n=2, split=2, every=2, reset=True)
    scheduler.attach(matrices)
    run(scheduler, matrices, steps)
    with pytest.raises(ValueError, match=f"has {steps // 2} of 2 rounds behind it"):
        scheduler.attach(matrices)


@pytest.mark.parametrize(
    "make", [lambda: TaylorRuntime(top_n=1, split=2, every=2), lambda: Budget(added_parameters=10**4, every=2)]
)
def test_a_scheduler_that_keeps_a_state_serves_one_run_at_a_time(make):
    """Two that observe through it would add up their scores and share its rounds."""

    def attached(scheduler):
        model = Layers(2)
        return LoraOver(model, torch.optim.SGD(model.parameters(), lr=0.1), MPO(order=3), scheduler)

    scheduler = make()
    first = attached(scheduler)
    with pytest.raises(
        ValueError, match=r"decides for a LoraOver that is attached to another optimizer; .* make a new one"
    ):
        attached(scheduler)
    assert first.attached
    first.detach()
    assert attached(scheduler).attached
    # the last one is garbage now, though its hooks make a cycle
    assert attached(scheduler).attached


def test_a_scheduler_without_a_state_serves_many():
    scheduler = Static()
    models = [Layers(1) for _ in range(2)]
    overs = [LoraOver(m, torch.optim.SGD(m.parameters(), lr=0.1), MPO(order=3), scheduler) for m in models]
    assert all(over.attached for over in overs)


@pytest.mark.parametrize("average", [False, True])
def test_state_of_runtime_goes_on_as_if_never_stopped(average):
    whole, matrices = TaylorRuntime(4, 4, 2, average=average), matrices_of(5)
    halves, again = TaylorRuntime(4, 4, 2, average=average), matrices_of(5)
    expected = run(whole, matrices, 8)
    first = run(halves, again, 5)
    resumed = TaylorRuntime(4, 4, 2, average=average)
    resumed.load_state_dict(halves.state_dict())
    second = {}
    for step in range(6, 9):
        give_gradients(again, step)
        resumed.observe(step, again)
        if resumed.due(step):
            second[step] = list(resumed.select(step, again))
            mark(again, second[step])
    assert {**first, **second} == expected
    assert resumed.rounds == whole.rounds
    assert resumed.scores() == whole.scores()
    finished = TaylorRuntime(4, 4, 2)
    finished.load_state_dict(resumed.state_dict())
    assert not any(one.due(step) for one in (whole, resumed, finished) for step in range(20))


def test_a_state_is_a_copy():
    scheduler, matrices = TaylorRuntime(2, 2, 2), matrices_of(3)
    run(scheduler, matrices, 1)
    state = scheduler.state_dict()
    kept = {name: score.clone() for name, score in state["scores"].items()}
    run(scheduler, matrices, 2)
    assert all(torch.equal(state["scores"][name], score) for name, score in kept.items())
    assert state["rounds_done"] == 0
    assert state["rounds"] == []


@pytest.mark.parametrize("key", ["rounds_done", "scores", "counts", "rounds"])
def test_damaged_state(key):
    scheduler = TaylorRuntime(1, 1, 1)
    state = {k: v for k, v in TaylorRuntime(1, 1, 1).state_dict().items() if k != key}
    with pytest.raises(ValueError, match=f"lacks {key}"):
        scheduler.load_state_dict(state)


def test_state_of_another_split():
    other = TaylorRuntime(3, 3, 1)
    run(other, matrices_of(4), 3)
    with pytest.raises(ValueError, match="3 rounds behind it, but split=2"):
        TaylorRuntime(3, 2, 1).load_state_dict(other.state_dict())


# -- descriptions ---------------------------------------------------------------------------------------------------------

SMALL = st.integers(1, 50)
SETTINGS: dict[type[Scheduler], dict[str, st.SearchStrategy[Any]]] = {
    TaylorRuntime: {
        "top_n": SMALL,
        "split": SMALL,
        "every": SMALL,
        "reduction": st.sampled_from(["inner", "elementwise"]),
        "average": st.booleans(),
        "reset": st.booleans(),
        "expand_after_update": st.booleans(),
    },
    Static: {
        "which": st.one_of(
            st.none(), st.sampled_from([r"\.A$", "q_proj"]), st.lists(st.text(max_size=9), max_size=4, unique=True)
        ),
        "fold_after": st.one_of(st.none(), SMALL),
        "refresh_every": st.one_of(st.none(), SMALL),
    },
    LossAblation: {"scores": st.dictionaries(st.text(max_size=9), st.floats(-9, 9), max_size=4), "top_n": SMALL},
    Budget: {
        "added_parameters": SMALL,
        "every": SMALL,
        "until": st.one_of(st.none(), st.integers(50, 99)),
        "decay": st.floats(0, 0.99),
        "margin": st.floats(1, 9),
        "per_group": st.booleans(),
    },
}


@st.composite
def schedulers(draw: st.DrawFn) -> Scheduler:
    cls = draw(st.sampled_from(list(SETTINGS)))
    return cls(**{name: draw(values) for name, values in SETTINGS[cls].items()})


@given(schedulers())
def test_descriptions_round_trip(scheduler):
    data = scheduler.to_dict()
    assert set(data) == {"type", *SETTINGS[type(scheduler)]} | (
        {"reduction"} if isinstance(scheduler, Budget) else set()
    )
    again = Scheduler.from_dict(json.loads(json.dumps(data)))
    assert type(again) is type(scheduler)
    assert again.to_dict() == data
    assert (again.label, again.first_step()) == (scheduler.label, scheduler.first_step())
    assert repr(again) == repr(scheduler)


@given(schedulers().filter(lambda one: not isinstance(one, LossAblation)))
def test_repr_is_how_it_is_written(scheduler):
    assert eval(repr(scheduler)).to_dict() == scheduler.to_dict()


@pytest.mark.parametrize(
    ("scheduler", "shown"),
    [
        (TaylorRuntime(9, 8, 5), "TaylorRuntime(top_n=9, split=8, every=5)"),
        (TaylorRuntime(9, 8, 5, reset=True), "TaylorRuntime(top_n=9, split=8, every=5, reset=True)"),
        (Static(), "Static()"),
        (LossAblation({"a": 1.0, "b": 2.0}, 1), "LossAblation(scores={… 2 matrices}, top_n=1)"),
        (Budget(100, 5), "Budget(added_parameters=100, every=5)"),
    ],
)
def test_repr(scheduler, shown):
    assert repr(scheduler) == shown


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            {"type": "Random"},
            ValueError,
            "scheduler 'Random' is unknown; the known ones are Budget, .*register_scheduler",
        ),
        ({"type": "MPO", "order": 9}, ValueError, "scheduler 'MPO' is unknown"),
        ({"top_n": 9}, ValueError, "has no 'type'"),
        (Static(), TypeError, "to_dict"),
        (
            {"type": "Static", "top_n": 9},
            ValueError,
            "Static has no setting top_n; its settings are which, fold_after, refresh_every",
        ),
        ({"type": "TaylorRuntime", "top_n": 9}, TypeError, "split"),
        ({"type": "TaylorRuntime", "top_n": 0, "split": 1, "every": 1}, ValueError, "top_n=0"),
    ],
)
def test_bad_descriptions(data, error, message):
    with pytest.raises(error, match=message):
        Scheduler.from_dict(data)


def test_a_scheduler_of_ones_own_is_described_too(monkeypatch):
    monkeypatch.setattr(_SCHEDULERS, "_classes", dict(_SCHEDULERS._classes))

    class Late(Scheduler):
        def __init__(self, step: int, share: float = 0.5) -> None:
            self.step, self.share = step, share

        def select(self, step, matrices):
            return ()

    class Forgets(Scheduler):
        def __init__(self, step: int) -> None:
            self._step = step

        def select(self, step, matrices):
            return ()

    assert repr(Late(3)) == "Late(step=3)"
    assert register_scheduler(Late) is Late
    assert Scheduler.from_dict(Late(3).to_dict()).to_dict() == {"type": "Late", "step": 3, "share": 0.5}
    with pytest.raises(TypeError, match="Forgets does not keep its argument step"):
        Forgets(3).to_dict()
    with pytest.raises(TypeError, match=r"takes a subclass of Scheduler.*not an instance"):
        register_scheduler(Late(3))


FIRST: list[tuple[Callable[[], Scheduler], int]] = [
    (Static, 0),
    (lambda: LossAblation({}, 1), 0),
    (lambda: TaylorRuntime(1, 1, 7), 7),
    (lambda: Budget(100, 6), 6),
]


@pytest.mark.parametrize(("make", "first"), FIRST)
def test_first_step(make, first):
    assert make().first_step() == first
    assert next(step for step in range(20) if make().due(step)) == first


@given(added=st.lists(st.integers(-50, 50), min_size=1, max_size=6).filter(lambda counts: max(counts) > 0))
def test_a_budget_is_shared_by_groups_in_proportion_to_what_they_add(added):
    """Also where truncated structures have fewer numbers than their matrices, and as many fewer as others have more."""
    matrices = {str(k): SimpleNamespace(group=str(k), added_parameters=count) for k, count in enumerate(added)}
    shares = [share for share, _ in Budget(1000, 5, per_group=True)._shares(matrices)]
    whole = sum(count for count in added if count > 0)
    assert shares == [1000 * count // whole if count > 0 else 0 for count in added]


def test_a_budget_that_ends_before_it_begins():
    with pytest.raises(ValueError, match="until=3 is before the first decision at step every=5"):
        Budget(100, 5, until=3)
    assert Budget(100, 5, until=5).due(5)


def test_expanding_after_the_update_is_an_attribute():
    assert not any(make().after_update for make, _ in FIRST)
    assert TaylorRuntime(1, 1, 1, expand_after_update=True).after_update


# -- static -------------------------------------------------------------------------------------------------------------

A0, A1, B0, B1 = "layers.0.A", "layers.1.A", "layers.0.B", "layers.1.B"


@pytest.mark.parametrize(
    ("which", "names", "label"),
    [
        (None, [A0, B0, A1, B1], "Static()"),
        (r"\.A$", [A0, A1], r"Static('\\.A$')"),
        (r"layers\.1", [A1, B1], r"Static('layers\\.1')"),
        ([B1, A0], [A0, B1], "Static(2 names)"),
        ({B1, A1, A0, B0}, [A0, B0, A1, B1], "Static(4 names)"),
        ((name for name in [B0]), [B0], "Static(1 names)"),
    ],
)
def test_static(which, names, label):
    scheduler, matrices = Static(which), matrices_of(2)
    scheduler.attach(matrices)
    assert list(scheduler.select(0, matrices)) == names
    assert list(scheduler.select(1, matrices)) == []
    assert [step for step in range(4) if scheduler.due(step)] == [0]
    assert scheduler.label == label
    assert scheduler.state_dict() == {}


@pytest.mark.parametrize(
    ("which", "said"),
    [
        ("nothing", "pattern 'nothing' matches none of the 4"),
        ([], "empty list"),
        (["layers.9.A"], r"layers\.9\.A is not among the 4"),
    ],
)
def test_static_that_matches_nothing(which, said):
    with pytest.raises(ValueError, match=said):
        Static(which).attach(matrices_of(2))


@pytest.mark.parametrize(
    ("which", "error", "said"),
    [
        ("(", ValueError, "'\\(' is not a regular expression"),
        ([A0, 3], TypeError, "give a regular expression, names of matrices"),
        (3, TypeError, "which=3: give a regular expression"),
        (re.compile("A$"), TypeError, "give a regular expression, names of matrices"),
        (["a.A", "b.A", "a.A"], ValueError, "which has a.A more than once"),
    ],
)
def test_static_of_what_is_no_name(which, error, said):
    with pytest.raises(error, match=said):
        Static(which)


@given(fold_after=st.integers(1, 6), steps=st.integers(0, 9))
def test_static_trains_through_cores_up_to_a_step_and_as_plain_lora_from_there(fold_after, steps):
    """At every step the cores are there, or the matrix moves as SGD itself moves it."""
    torch.manual_seed(steps)
    layer = OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    over = LoraOver(layer, optimizer, MPO(order=4), Static(r"A$", fold_after=fold_after))
    for step in range(1, steps + 1):
        x = torch.randn(3, 12, dtype=torch.float64)
        optimizer.zero_grad()
        (layer(x) - x).square().mean().backward()
        plain = layer.lora_A.weight.detach() - 0.1 * layer.lora_A.weight.grad
        optimizer.step()
        assert (layer.lora_A.weight - plain).abs().max() < 1e-15 or step <= fold_after
        assert bool(over.expanded) == (step <= fold_after)
    assert [event.step for event in over.history] == [0] + [fold_after + 1] * (steps > fold_after)


def test_a_run_that_is_resumed_with_another_end_of_the_cores_says_so():
    def attached(scheduler):
        layer = OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4)
        return LoraOver(layer, torch.optim.SGD(layer.parameters(), lr=0.1), MPO(order=4), scheduler)

    saved = attached(Static(r"A$", fold_after=5)).state_dict()
    with pytest.warns(UserWarning, match=r"Static\('A\$', fold_after=5\), this run has scheduler Static\('A\$'\)"):
        attached(Static(r"A$")).load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached(Static(r"A$", fold_after=5)).load_state_dict(saved)
    assert [Static(fold_after=5).label, Static(["x"], 5).label] == [
        "Static(fold_after=5)",
        "Static(1 names, fold_after=5)",
    ]


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_static_refuses_a_step_that_is_none(value):
    with pytest.raises(ValueError, match=f"fold_after={value} must be a step"):
        Static(fold_after=value)
    with pytest.raises(ValueError, match=f"refresh_every={value} must be steps"):
        Static(refresh_every=value)


@pytest.mark.parametrize("handover", ["warm", "restart"])
@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("gauge", ["svd", "gradient"])
def test_cores_that_are_made_anew_are_those_of_folding_and_attaching_again(gauge, matched, handover):
    """Bit for bit, and with a reload in the middle; without `refresh_every` the run is another."""

    def train(every, again_after=(), reload_after=None):
        torch.manual_seed(0)
        drawn = torch.Generator().manual_seed(1)
        layer = OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4)
        made = torch.optim.AdamW(layer.parameters(), lr=0.01)
        settings = {"matched": matched, "handover": handover}

        def attached(refresh_every=None):
            scheduler = Static(r"A$", fold_after=8, refresh_every=refresh_every)
            return LoraOver(layer, made, MPO(order=4, gauge=gauge), scheduler, **settings)

        over = attached(every)
        for step in range(1, 11):
            x = torch.randn(3, 12, generator=drawn)
            made.zero_grad()
            (layer(x) - x).square().mean().backward()
            made.step()
            if step in again_after:
                over.fold()
                over = attached()
            if step == reload_after:
                saved = copy.deepcopy((layer.state_dict(), made.state_dict()))
                layer = OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4)
                made = torch.optim.AdamW(layer.parameters(), lr=0.01)
                over = attached(every)
                layer.load_state_dict(saved[0])
                made.load_state_dict(saved[1])
            if step == 8 and every is None:
                over.fold()
        return layer.lora_A.weight.detach(), [event.step for event in over.history]

    refreshed, events = train(3)
    assert events == [0, 4, 4, 7, 7, 9]
    assert torch.equal(train(None, again_after=(3, 6))[0], refreshed)
    assert torch.equal(train(3, reload_after=5)[0], refreshed)
    assert torch.equal(train(3, reload_after=6)[0], refreshed)
    assert not torch.equal(train(None)[0], refreshed)


def test_only_what_has_cores_gets_them_anew():
    layer = nn.ModuleList(OverParamAdapter.from_linear(nn.Linear(8, 8), rank=2) for _ in range(2))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    over = LoraOver(layer, optimizer, MPO(order=4), Static(refresh_every=2))
    for step in range(4):
        optimizer.zero_grad()
        sum(one(torch.ones(1, 8)).square().sum() for one in layer).backward()
        optimizer.step()
        if step == 0:
            over.fold(["0.A", "1.B"])
    assert over.expanded == ("0.B", "1.A") or set(over.expanded) == {"0.B", "1.A"}
    assert {name for event in over.history[2:] for name in event.names} == {"0.B", "1.A"}


class Again(Scheduler):
    """Expands A at step 3, and makes its cores anew at step 6."""

    def __init__(self, after_update=False):
        self.after_update = after_update

    def select(self, step, matrices):
        return ["A"] if step in (3, 6) else ()

    def release(self, step, matrices):
        return ["A"] if step == 6 else ()


@pytest.mark.parametrize("after_update", [False, True])
def test_cores_that_are_made_anew_do_not_start_with_what_was_known_before_the_first_ones(after_update):
    """What Adam knows of A is from steps 1 and 2: a run in which it is taken away before step 6 is the same."""

    def train(take_away):
        torch.manual_seed(0)
        layer = OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4).double()
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        LoraOver(layer, optimizer, MPO(order=4), Again(after_update))
        for step in range(1, 9):
            if step == 6 and take_away:
                assert optimizer.state.pop(layer.lora_A.weight)
            x = torch.randn(3, 12, dtype=torch.float64)
            optimizer.zero_grad()
            (layer(x) - x).square().mean().backward()
            optimizer.step()
        return layer.lora_A.weight.detach()

    assert torch.equal(train(False), train(True))


def test_a_scheduler_of_ones_own_needs_select_only():
    class Mine(Scheduler):
        def select(self, step, matrices):
            return ()

    class Forgets(Mine):
        def __init__(self, steps):
            self.every = steps

    assert Forgets(3).label == "Forgets"
    scheduler = Mine()
    assert scheduler.label == "Mine()"
    assert scheduler.due(3)
    assert list(scheduler.release(3, {})) == []
    assert scheduler.state_dict() == {}
    assert scheduler.first_step() is None
    assert not scheduler.after_update
    assert repr(scheduler) == "Mine()"
    with pytest.raises(TypeError):
        Scheduler()
