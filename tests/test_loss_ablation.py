"""Ablation scores, the two stages built on them, and the budget scheduler."""

from __future__ import annotations

import copy

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
    with pytest.raises(ValueError, match="top_n=0"):
        LossAblation({"a": 1.0}, top_n=0)
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


def test_two_stages_start_from_where_the_model_was() -> None:
    model = Stack()
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def train() -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            ((model(X) - Y) ** 2).mean().backward()
            optimizer.step()
        assert not torch.equal(state["layers.0.lora_A.weight"], model.layers[0].lora_A.weight)

    scheduler = predefined(model, train, lambda: loss(model), top_n=1)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    matrices, _ = find_lora_matrices(model)
    assert len(list(scheduler.select(0, matrices))) == 2


@given(
    scores=st.lists(st.lists(st.floats(0, 1e3), min_size=6, max_size=6), min_size=1, max_size=5),
    budget=st.integers(100, 1500),
    margin=st.floats(1, 3),
    per_group=st.booleans(),
)
def test_a_budget_is_never_exceeded_and_always_spent(scores, budget, margin, per_group) -> None:
    model = Stack()
    matrices, _ = find_lora_matrices(model)
    for matrix in matrices.values():
        matrix.added_parameters = MPO(order=6).added_parameters(matrix.shape)
    scheduler = Budget(added_parameters=budget, every=1, decay=0.0, margin=margin, per_group=per_group)
    for step, values in enumerate(scores, start=1):
        for matrix, value in zip(matrices.values(), values, strict=True):
            # <g, W> = value
            matrix.parameter.grad = value * matrix.parameter.detach() / matrix.parameter.detach().square().sum()
        scheduler.observe(step, matrices)
        for name in scheduler.release(step, matrices):
            assert matrices[name].expanded
            matrices[name].expanded = False
        for name in scheduler.select(step, matrices):
            assert not matrices[name].expanded
            matrices[name].expanded = True
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
    for options in ({"added_parameters": 0}, {"every": 0}, {"decay": 1.0}, {"margin": 0.5}, {"reduction": "max"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Budget(**{"added_parameters": 10, "every": 1, **options})
    model = Stack()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="less than the cheapest matrix adds"):
        LoraOver(model, optimizer, MPO(order=6), Budget(added_parameters=3, every=1))
    with pytest.raises(ValueError, match="adds no parameters"):
        LoraOver(model, optimizer, MPO(order=2, max_bond=1), Budget(3, 1))
