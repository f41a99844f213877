"""Ablation scores, the two stages built on them, and the budget scheduler."""

from __future__ import annotations

import copy
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tnadapt import (
    MPO,
    Budget,
    LoraOver,
    LossAblation,
    OverParamAdapter,
    ablation_scores,
    find_lora_matrices,
    predefined,
)


class Stack(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(OverParamAdapter.from_linear(nn.Linear(16, 16), rank=4) for _ in range(depth))
        for layer in self.layers:
            nn.init.normal_(layer.lora_B.weight, std=0.2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(self.dropout(x)))
        return x


X, Y = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(5)).unbind(0)


def loss(model: nn.Module) -> float:
    return float(((model(X) - Y) ** 2).mean().detach())


def test_scores_are_the_change_of_the_loss() -> None:
    model = Stack()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    calls = []

    def evaluate() -> float:
        calls.append(model.training)
        return loss(model)

    scores = ablation_scores(model, evaluate)
    assert calls == [False] * 4, "one evaluation of the model and one per pair, without dropout"
    assert model.training
    assert list(scores) == [f"layers.{k}.{s}" for k in range(3) for s in "AB"]
    model.eval()
    whole = loss(model)
    for k, layer in enumerate(model.layers):
        with torch.no_grad():
            kept = layer.lora_A.weight.clone()
            layer.lora_A.weight.zero_()
            expected = abs(whole - loss(model))
            layer.lora_A.weight.copy_(kept)
        assert scores[f"layers.{k}.A"] == scores[f"layers.{k}.B"] == pytest.approx(expected, rel=1e-6)
        assert expected > 0
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_half_a_pair_is_scored() -> None:
    """Zeroing either matrix of a pair takes the pair out; where one is frozen it is the other."""
    model = Stack()
    whole = ablation_scores(model, lambda: loss(model))
    model.layers[1].lora_A.weight.requires_grad_(False)
    scores = ablation_scores(model, lambda: loss(model))
    assert scores == {name: score for name, score in whole.items() if name != "layers.1.A"}


@pytest.mark.parametrize(("progress", "terminal"), [(True, False), (False, True), (None, False), (None, True)])
def test_progress_is_shown_on_request_and_on_terminals(progress, terminal, monkeypatch, capsys) -> None:
    pytest.importorskip("tqdm")
    model = Stack()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    ablation_scores(model, lambda: loss(model), progress=progress)
    shown = terminal if progress is None else progress
    assert ("ablation" in capsys.readouterr().err) == shown


def test_progress_needs_no_library(monkeypatch, capsys) -> None:
    model = Stack()
    expected = ablation_scores(model, lambda: loss(model))
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert ablation_scores(model, lambda: loss(model), progress=True) == expected
    assert capsys.readouterr().err == ""


def test_the_model_is_restored_when_scoring_is_interrupted() -> None:
    model = Stack()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    calls = iter([1.0, 2.0])

    def evaluate() -> float:
        try:
            return next(calls)
        except StopIteration:
            raise KeyboardInterrupt from None

    with pytest.raises(KeyboardInterrupt):
        ablation_scores(model, evaluate)
    assert model.training
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_bad_scores_and_models_are_errors() -> None:
    with pytest.raises(ValueError, match="no LoRA matrices"):
        ablation_scores(nn.Linear(2, 2), lambda: 0.0)
    values = iter([1.0, 1.0, float("nan")])
    with pytest.raises(ValueError, match=r"without layers\.1.*nan"):
        ablation_scores(Stack(), lambda: next(values))
    with pytest.raises(ValueError, match="not finite"):
        LossAblation({"a": float("inf")}, top_n=1)
    for top_n in (0, True, 1.5, "2"):
        with pytest.raises(ValueError, match=f"top_n={top_n!r} must be"):
            LossAblation({"a": 1.0}, top_n=top_n)
    model = Stack()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match=r"5 of 6 matrices have no score"):
        LoraOver(model, optimizer, MPO(order=2), LossAblation({"layers.0.A": 1.0}, top_n=1))


def test_merged_adapters_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"]))
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        ablation_scores(model, lambda: 0.0)


def test_the_highest_of_each_group_are_expanded_from_the_start() -> None:
    model = Stack()
    scores = {
        "layers.0.A": 1.0,
        "layers.1.A": 3.0,
        "layers.2.A": 2.0,
        "layers.0.B": 9.0,
        "layers.1.B": 0.0,
        "layers.2.B": 8.0,
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    over = LoraOver(model, optimizer, MPO(order=2), LossAblation(scores, top_n=2))
    assert set(over.expanded) == {"layers.1.A", "layers.2.A", "layers.0.B", "layers.2.B"}
    scheduler = LossAblation(scores, top_n=2)
    assert [step for step in range(-1, 5) if scheduler.due(step)] == [0]
    assert scheduler.label == "LossAblation(top_n=2)"


def test_small_groups_are_warned_of_where_they_are_attached() -> None:
    model = Stack()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scores = {f"layers.{k}.{side}": 1.0 for k in range(3) for side in "AB"}
    with pytest.warns(UserWarning, match="LossAblation: top_n=4 exceeds the size of 2 of 2 groups") as caught:
        LoraOver(model, optimizer, MPO(order=2), LossAblation(scores, top_n=4))
    assert [warning.filename for warning in caught] == [__file__]


def test_two_stages_start_from_where_the_model_was() -> None:
    model = Stack()
    model.register_buffer("seen", torch.zeros(()))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    trained: dict[str, float] = {}

    def train() -> None:
        model.seen += 32
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            ((model(X) - Y) ** 2).mean().backward()
            optimizer.step()
        assert not torch.equal(state["layers.0.lora_A.weight"], model.layers[0].lora_A.weight)
        trained.update(ablation_scores(model, lambda: loss(model)))

    scheduler = predefined(model, train, lambda: loss(model), top_n=1)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    matrices, _ = find_lora_matrices(model)
    assert len(list(scheduler.select(0, matrices))) == 2
    assert scheduler.scores == trained
    assert trained != ablation_scores(model, lambda: loss(model))


def test_nothing_is_trained_for_scores_that_cannot_be_used() -> None:
    def train() -> None:
        raise AssertionError("trained")

    with pytest.raises(ValueError, match="top_n=0 must be"):
        predefined(Stack(), train, lambda: 1.0, top_n=0)
    with pytest.raises(ValueError, match="nothing to score"):
        predefined(torch.nn.Linear(2, 2), train, lambda: 1.0, top_n=1)


def budgeted(costs: list[int], scores: list[float], expanded: tuple[int, ...] = ()) -> dict[str, Any]:
    """Matrices of the Stack that would add `costs` parameters, with gradients such that `|<g, W>|` is their score (None:
    no gradient)."""
    matrices, _ = find_lora_matrices(Stack(len(costs) // 2))
    names = {name for k, name in enumerate(matrices) if k in expanded}
    for matrix, cost, score in zip(matrices.values(), costs, scores, strict=True):
        value = matrix.parameter.detach()
        matrix.factorization = SimpleNamespace(added_parameters=lambda shape, cost=cost: cost)
        matrix.roster = lambda: names
        matrix.parameter.grad = None if score is None else score * value / value.square().sum()
    return matrices


def decide(scheduler: Budget, matrices: dict[str, Any], step: int = 1) -> tuple[set[int], set[int]]:
    """Positions of the matrices that are released and selected."""
    names = list(matrices)
    scheduler.observe(step, matrices)
    released = {names.index(name) for name in scheduler.release(step, matrices)}
    return released, {names.index(name) for name in scheduler.select(step, matrices)}


@given(
    steps=st.lists(st.lists(st.none() | st.floats(0, 1e3), min_size=2, max_size=2), min_size=1, max_size=5),
    decay=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_scores_of_a_budget_are_an_exponential_average(steps, decay) -> None:
    scheduler = Budget(10, 1, decay=decay)
    for step, scores in enumerate(steps, start=1):
        scheduler.observe(step, budgeted([4, 4], scores))
    for k, name in enumerate(["layers.0.A", "layers.0.B"]):
        # steps without a gradient do not count, and the average starts from zero
        seen = [scores[k] for scores in steps if scores[k] is not None]
        expected = sum((1 - decay) * decay ** (len(seen) - 1 - i) * score for i, score in enumerate(seen))
        assert scheduler.scores().get(name, 0.0) == pytest.approx(expected, rel=1e-5)
        assert (name in scheduler.scores()) == bool(seen)


def test_sums_of_absolute_products_in_a_budget() -> None:
    matrices = budgeted([4, 4], [1.0, 1.0])
    for matrix in matrices.values():
        matrix.parameter.grad = torch.ones_like(matrix.parameter)
    scheduler = Budget(10, 1, decay=0.0, reduction="elementwise")
    scheduler.observe(1, matrices)
    for name, matrix in matrices.items():
        assert scheduler.scores()[name] == pytest.approx(sum(map(abs, matrix.value.flatten().tolist())), rel=1e-5)


def test_a_parameter_is_spent_where_it_is_worth_most() -> None:
    """By score per added parameter: two cheap matrices of score 3 go before the dear one of score 5."""
    assert decide(Budget(20, 1), budgeted([20, 10, 10, 10], [5.0, 3.0, 1.0, 3.0])) == (set(), {1, 3})
    # and 10 + 10 exactly fill the budget, 10 + 11 do not fit
    assert decide(Budget(20, 1), budgeted([20, 10, 10, 11], [5.0, 3.0, 1.0, 3.2])) == (set(), {1, 2})


def test_a_waiting_matrix_has_to_win_by_the_margin() -> None:
    for options, margin in (({}, 1.5), ({"margin": 1.0}, 1.0), ({"margin": 3.0}, 3.0)):
        for factor, wins in ((0.95, False), (1.05, True)):
            scores = [margin * factor, 1.0]
            assert decide(Budget(10, 1, **options), budgeted([10, 10], scores, expanded=(1,))) == (
                ({1}, {0}) if wins else (set(), set())
            )


def test_matrices_that_add_nothing_are_left() -> None:
    assert decide(Budget(100, 1), budgeted([0, 1, -2, 10], [9.0, 1.0, 9.0, 1.0])) == (set(), {1, 3})
    # nor are they taken for the cheapest
    with pytest.raises(ValueError, match=r"added_parameters=9 is less than the cheapest matrix adds \(10\)"):
        Budget(9, 1).attach(budgeted([0, 10, -2, 12], [1.0] * 4))
    Budget(10, 1).attach(budgeted([0, 10, -2, 12], [1.0] * 4))
    Budget(1, 1).attach(budgeted([1, 12], [1.0] * 2))
    with pytest.raises(ValueError, match="adds no parameters"):
        Budget(9, 1).attach(budgeted([0, 0], [1.0] * 2))


def test_a_budget_is_not_spent_without_any_score() -> None:
    with pytest.raises(ValueError, match=r"Budget: matrices are to be ranked at step 1, but none of the 2 .*backward"):
        decide(Budget(20, 1), budgeted([10, 10], [None, None]))


def test_matrices_without_a_score_come_last_in_a_budget() -> None:
    """As if their score were zero: after one that matters, and by the order of the model beside another of zero."""
    assert decide(Budget(10, 1), budgeted([10, 10], [None, 1e-3])) == (set(), {1})
    assert decide(Budget(10, 1), budgeted([10, 10], [None, 0.0])) == (set(), {0})


def test_shares_of_groups() -> None:
    """A costs 10 in each layer and B 30: of 80, a quarter is for A and three quarters for B, whatever their scores."""
    costs, scores = [10, 30] * 4, [9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0]
    assert decide(Budget(80, 1, per_group=True), budgeted(costs, scores)) == (set(), {0, 2, 5, 7})
    # across groups, which is the default, all of A is worth more
    assert decide(Budget(80, 1), budgeted(costs, scores)) == (set(), {0, 2, 4, 6, 7})


def test_shares_that_pay_for_nothing_are_refused() -> None:
    """Two groups of two: a share is a quarter or three quarters, and a matrix takes half of its group's."""
    matrices = budgeted([10, 30] * 2, [1.0] * 4)
    with pytest.raises(
        ValueError, match=r"39 is shared out by per_group=True over 2 groups.*nothing.*at least 40, or drop"
    ):
        Budget(39, 1, per_group=True).attach(matrices)
    Budget(40, 1, per_group=True).attach(matrices)
    Budget(39, 1).attach(matrices)
    assert decide(Budget(39, 1, per_group=True), matrices) == (set(), set())
    assert len(decide(Budget(40, 1, per_group=True), matrices)[1]) == 2


def test_a_budget_is_due_until_the_end() -> None:
    assert [step for step in range(-4, 14) if Budget(1, 4, until=8).due(step)] == [4, 8]
    assert [step for step in range(-4, 14) if Budget(1, 4, until=7).due(step)] == [4]
    assert [step for step in range(-4, 14) if Budget(1, 4).due(step)] == [4, 8, 12]
    assert [step for step in range(4) if Budget(1, 1).due(step)] == [1, 2, 3]


def test_a_broken_gradient_is_an_error_of_the_budget() -> None:
    with pytest.raises(ValueError, match=r"Budget: the score of layers\.0\.B is not finite at step 1"):
        decide(Budget(10, 1), budgeted([10, 10], [1.0, float("nan")]))


def test_state_of_a_budget() -> None:
    matrices = budgeted([10, 10], [1.0, 2.0])
    scheduler = Budget(10, 1)
    scheduler.attach(matrices)
    assert decide(scheduler, matrices) == (set(), {1})
    assert list(scheduler.select(2, matrices)) == [], "what was decided holds for its step"
    with pytest.raises(ValueError, match="has scores of another run"):
        scheduler.attach(matrices)
    state = scheduler.state_dict()
    kept = {name: score.clone() for name, score in state["scores"].items()}
    scheduler.observe(2, matrices)
    assert all(torch.equal(state["scores"][name], score) for name, score in kept.items())
    scheduler.load_state_dict(state)
    assert scheduler.scores() == {name: float(score) for name, score in kept.items()}
    assert list(scheduler.select(1, matrices)) == [], "a loaded state has not decided anything"
    with pytest.raises(ValueError, match="the state lacks scores"):
        scheduler.load_state_dict({})
    assert scheduler.label == "Budget(added_parameters=10, every=1)"


@given(
    scores=st.lists(st.lists(st.floats(0, 1e3), min_size=6, max_size=6), min_size=1, max_size=5),
    budget=st.integers(100, 1500),
    margin=st.floats(1, 3),
    per_group=st.booleans(),
)
def test_a_budget_is_never_exceeded_and_always_spent(scores, budget, margin, per_group) -> None:
    model = Stack()
    matrices, _ = find_lora_matrices(model)
    expanded: set[str] = set()
    for matrix in matrices.values():
        matrix.factorization = MPO(order=6)
        matrix.roster = lambda: expanded
    scheduler = Budget(added_parameters=budget, every=1, decay=0.0, margin=margin, per_group=per_group)
    for step, values in enumerate(scores, start=1):
        for matrix, value in zip(matrices.values(), values, strict=True):
            # <g, W> = value
            matrix.parameter.grad = value * matrix.parameter.detach() / matrix.parameter.detach().square().sum()
        scheduler.observe(step, matrices)
        for name in scheduler.release(step, matrices):
            assert matrices[name].expanded
            expanded.remove(name)
        for name in scheduler.select(step, matrices):
            assert not matrices[name].expanded
            expanded.add(name)
        spent = sum(m.added_parameters for m in matrices.values() if m.expanded)
        assert spent <= budget
        if not per_group:
            waiting = [m.added_parameters for m in matrices.values() if not m.expanded]
            assert not waiting or min(waiting) > budget - spent


def test_budget_follows_the_scores_and_goes_on_after_a_resume() -> None:
    def build():
        model = Stack()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        cost = MPO(order=4).added_parameters((4, 16))
        scheduler = Budget(added_parameters=2 * cost, every=2, decay=0.3, margin=1.0)
        return model, optimizer, LoraOver(model, optimizer, MPO(order=4), scheduler)

    def go(model, optimizer, steps):
        model.eval()
        for _ in range(steps):
            optimizer.zero_grad()
            ((model(X) - Y) ** 2).mean().backward()
            optimizer.step()

    model, optimizer, over = build()
    go(model, optimizer, 7)
    saved = {"model": {k: v.clone() for k, v in model.state_dict().items()}}
    saved["optimizer"] = copy.deepcopy(optimizer.state_dict())
    go(model, optimizer, 9)
    actions = {event.action for event in over.history}
    assert actions == {"expand", "fold"}, "something was taken back and spent elsewhere"
    assert len(over.expanded) == 2

    again, optimizer2, over2 = build()
    again.load_state_dict(saved["model"])
    optimizer2.load_state_dict(saved["optimizer"])
    go(again, optimizer2, 9)
    assert over2.expanded == over.expanded
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_bad_budgets_are_errors() -> None:
    counts = [{name: value} for name in ("added_parameters", "every") for value in (0, True, 1.5, "2", None)]
    for options in (
        *counts,
        {"decay": 1.0},
        {"decay": -0.5},
        {"margin": 0.5},
        {"margin": math.inf},
        {"reduction": "max"},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            Budget(**{"added_parameters": 10, "every": 1, **options})
    for until in (True, 2.5, "9"):
        with pytest.raises(ValueError, match=f"until={until!r} must be a step"):
            Budget(10, 1, until=until)
    with pytest.raises(TypeError, match="per_group='no' must be True or False"):
        Budget(10, 1, per_group="no")
    model = Stack()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="less than the cheapest matrix adds"):
        LoraOver(model, optimizer, MPO(order=6), Budget(added_parameters=3, every=1))
    with pytest.raises(ValueError, match="adds no parameters"):
        LoraOver(model, optimizer, MPO(order=2, max_bond=1), Budget(3, 1))
