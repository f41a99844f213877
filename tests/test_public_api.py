"""The names and calls that people write code against keep working as they are written in the documentation."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import tnadapt


def test_public_names() -> None:
    from tnadapt import (  # noqa: F401
        CP,
        MPO,
        SVD,
        LoraOver,
        LossAblation,
        OverParamAdapter,
        Static,
        TaylorRuntime,
        Tucker,
        ablation_scores,
        plan,
    )
    from tnadapt.integrations.transformers import LoraOverCallback  # noqa: F401

    assert all(hasattr(tnadapt, name) for name in tnadapt.__all__)


def test_factorizations_as_documented() -> None:
    mpo = tnadapt.MPO(order=9)
    assert mpo.core_shapes((4096, 8))[0] == (1, 64, 2, 128)
    assert mpo.core_shapes((4096, 8))[-1] == (128, 64, 4, 1)
    weight = torch.randn(3, 64, 8)
    for factorization in (mpo, tnadapt.SVD(), tnadapt.Tucker(), tnadapt.CP()):
        cores = factorization.unfold(weight)
        assert torch.allclose(factorization.fold(cores), weight, atol=1e-5)
        assert factorization.num_parameters((64, 8)) == sum(core[0].numel() for core in cores)
        grads = factorization.pull_back(cores, torch.ones_like(weight))
        assert [g.shape for g in grads] == [core.shape for core in cores]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = tnadapt.OverParamAdapter.from_linear(nn.Linear(24, 24), rank=8, alpha=16)
        linear, lora_A, lora_B = nn.Linear(24, 24), nn.Linear(24, 4, bias=False), nn.Linear(4, 24, bias=False)
        self.out = tnadapt.OverParamAdapter(lora_A, lora_B, base=linear, scaling=2.0)

    def forward(self, x):
        return self.out(self.proj(x))


def attach(**options):
    torch.manual_seed(0)
    model = Block()
    trained = [p for name, p in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    return model, optimizer, tnadapt.LoraOver(model, optimizer, tnadapt.MPO(order=3), **options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 24)).square().sum().backward()
    optimizer.step()


def test_adapters_in_ones_own_model() -> None:
    model, optimizer, over = attach()
    assert over.matrices["proj.A"].expanded
    step(model, optimizer)
    assert over.trained_parameters > over.lora_parameters
    assert [event.action for event in over.history] == ["expand"]
    state = over.state_dict()
    over.load_state_dict(state)
    over.fold(["proj.A"])
    assert not over.matrices["proj.A"].expanded
    over.detach()
    assert not over.attached


def test_copies_are_refused_with_the_way_out() -> None:
    _, optimizer, over = attach()
    for copying in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            copying(over)
    with pytest.raises(TypeError, match="attach a LoraOver to both"):
        copy.deepcopy(optimizer)


def test_one_optimizer_has_one_over() -> None:
    _, optimizer, over = attach()
    other = Block()
    optimizer.add_param_group({"params": [p for name, p in other.named_parameters() if "lora_" in name]})
    with pytest.raises(ValueError, match="to this optimizer, already"):
        tnadapt.LoraOver(other, optimizer, tnadapt.MPO(order=3))
    over.detach()
    tnadapt.LoraOver(other, optimizer, tnadapt.MPO(order=3)).detach()


def test_detached_matrices_start_fresh() -> None:
    model, optimizer, over = attach(scheduler=tnadapt.TaylorRuntime(top_n=9, split=1, every=3))
    for _ in range(6):
        step(model, optimizer)
    weight = over.matrices["proj.A"].parameter
    assert float(optimizer.state[weight]["step"]) == 2
    over.detach()
    assert weight not in optimizer.state
    assert over.state_dict()["cores"]


def test_cores_follow_their_matrix_to_another_group() -> None:
    model = Block()
    a, b = ([p for n, p in model.named_parameters() if f"lora_{side}" in n] for side in "AB")
    optimizer = torch.optim.SGD([{"params": a, "lr": 0.0}, {"params": b, "lr": 0.1}])
    over = tnadapt.LoraOver(model, optimizer, tnadapt.MPO(order=3))
    step(model, optimizer)
    frozen = over.matrices["proj.A"].parameter.detach().clone()
    optimizer.param_groups.reverse()
    moved = over.matrices["out.B"].parameter.detach().clone()
    step(model, optimizer)
    assert torch.allclose(over.matrices["proj.A"].parameter, frozen, rtol=0, atol=1e-6)
    assert not torch.allclose(over.matrices["out.B"].parameter, moved, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 0.95), (torch.float16, 0.99), (torch.float32, 0.9999)])
def test_edits_of_narrow_matrices_are_noticed(dtype: torch.dtype, factor: float) -> None:
    model, optimizer, over = attach()
    over.detach()
    for module in model.modules():
        if isinstance(module, tnadapt.OverParamAdapter):
            module.lora_A.to(dtype)
            module.lora_B.to(dtype)
    over = tnadapt.LoraOver(model, optimizer, tnadapt.MPO(order=16))
    step(model, optimizer)
    assert not over.changed_outside(), "rounding to the matrix's dtype is no edit"
    with torch.no_grad():
        over.matrices["proj.A"].parameter.mul_(factor)
    assert over.changed_outside() == ("proj.A",)


def test_what_is_idle_does_not_take_the_moments_of_the_others() -> None:
    model, optimizer, over = attach(scheduler=tnadapt.TaylorRuntime(top_n=9, split=1, every=4))
    idle = model.out.lora_B.weight
    for k in range(4):
        optimizer.zero_grad()
        model(torch.ones(2, 24)).square().sum().backward()
        if k < 3:
            idle.grad = None
        optimizer.step()
    members = over.state_dict()["cores"]
    assert float(members["proj.B"]["state"][0]["step"]) == 4
    assert float(members["out.B"]["state"][0]["step"]) == 1


def test_halves_that_are_bare_parameters_are_listed() -> None:
    model = Block()
    model.old = nn.Module()
    model.old.lora_A, model.old.lora_B = nn.Parameter(torch.zeros(2, 8)), nn.Parameter(torch.zeros(8, 2))
    _, skipped = tnadapt.find_lora_matrices(model)
    assert [s.name for s in skipped] == ["old.A", "old.B"]
    assert "bare parameter" in skipped[0].reason


def test_other_settings_of_the_scheduler_are_said_on_resume() -> None:
    model, optimizer, over = attach(scheduler=tnadapt.Static(r"\.A$"))
    step(model, optimizer)
    state = copy.deepcopy(over.state_dict())
    over.detach()
    again = tnadapt.LoraOver(model, optimizer, tnadapt.MPO(order=3), tnadapt.Static())
    with pytest.warns(UserWarning, match=r"was saved with scheduler Static\('.*, this run has scheduler Static\(\):"):
        again.load_state_dict(state)


@pytest.mark.parametrize(
    ("saved", "resumed", "said"),
    [
        ({"matched": True}, {}, "saved with matched True, this run has matched False:"),
        ({}, {"max_update": 2.0}, "saved with max_update None, this run has max_update 2.0:"),
        (
            {"core_lr": 0.1, "core_weight_decay": 0.1},
            {"core_lr": 0.2},
            "saved with core_lr 0.1, core_weight_decay 0.1, this run has core_lr 0.2, core_weight_decay None:",
        ),
        ({}, {"handover": "restart"}, "saved with handover warm, this run has handover restart:"),
    ],
)
def test_other_settings_of_the_cores_are_said_on_resume(
    saved: dict[str, Any], resumed: dict[str, Any], said: str
) -> None:
    model, _, over = attach()
    optimizer = over.optimizer
    over.detach()
    over = tnadapt.LoraOver(model, optimizer, tnadapt.MPO(order=3), tnadapt.Static(), **saved)
    step(model, optimizer)
    state = copy.deepcopy(over.state_dict())
    over.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = tnadapt.LoraOver(model, optimizer, tnadapt.MPO(order=3), tnadapt.Static(), **saved)
        same.load_state_dict(state)
        same.detach()
    again = tnadapt.LoraOver(model, optimizer, tnadapt.MPO(order=3), tnadapt.Static(), **resumed)
    with pytest.warns(UserWarning, match=re.escape(said)):
        again.load_state_dict(state)


_LATER = tnadapt.TaylorRuntime(top_n=1, split=1, every=5)


@pytest.mark.parametrize(
    ("saved", "resumed", "said"),
    [
        (
            (tnadapt.MPO(order=3), tnadapt.Static(["proj.A"])),
            (tnadapt.MPO(order=3), tnadapt.Static(["out.B"])),
            "the settings of the scheduler Static(1 names) are not those",
        ),
        (
            (tnadapt.MPO(order=3), tnadapt.LossAblation({"proj.A": 1.0, "proj.B": 0.0, "out.A": 1.0, "out.B": 0.0}, 1)),
            (tnadapt.MPO(order=3), tnadapt.LossAblation({"proj.A": 0.0, "proj.B": 1.0, "out.A": 0.0, "out.B": 1.0}, 1)),
            "the settings of the scheduler LossAblation",
        ),
        (
            (tnadapt.Tucker(ranks=(2, 2)), _LATER),
            (tnadapt.Tucker(ranks=(3, 2)), _LATER),
            "the settings of the factorization of proj.A",
        ),
        (
            (tnadapt.MPO(order=3), tnadapt.Static()),
            (tnadapt.MPO(order=3, backend="opt_einsum"), tnadapt.Static()),
            None,
        ),
    ],
)
def test_settings_that_a_label_shortens_are_compared_on_resume(saved: Any, resumed: Any, said: str | None) -> None:
    model, _, over = attach()
    optimizer = over.optimizer
    over.detach()
    over = tnadapt.LoraOver(model, optimizer, *copy.deepcopy(saved))
    step(model, optimizer)
    state = copy.deepcopy(over.state_dict())
    over.detach()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tnadapt.LoraOver(model, optimizer, *copy.deepcopy(resumed)).load_state_dict(state)
    told = [str(each.message) for each in caught]
    assert len(told) == (0 if said is None else 1), told
    assert said is None or said in told[0]


def test_a_cap_without_a_rate_is_refused() -> None:
    class OwnRate(torch.optim.SGD):
        pass

    model = Block()
    optimizer = OwnRate([p for n, p in model.named_parameters() if "lora_" in n], lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="sets itself"):
        tnadapt.LoraOver(model, optimizer, tnadapt.MPO(order=3), max_update=1.0)
