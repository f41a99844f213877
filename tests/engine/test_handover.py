"""What the optimizer knows of a matrix passes to its cores at an expansion in mid-run."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from statistics import mean

import pytest
import torch
from oracle import contract_mpo
from torch import Tensor, nn

from tnadapt import MPO, LoraOver, OverParamAdapter, Scheduler
from tnadapt.engine.handover import warm_state

from .models import adapters, backward_through, trainable


class AllAt(Scheduler):
    def __init__(self, step: int) -> None:
        self.step = step

    def select(self, step, matrices):
        return list(matrices) if step == self.step else []


def moments(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    average = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    return average, torch.rand(rows, cols, generator=generator, dtype=torch.float64) + 0.1


@pytest.mark.parametrize("order", [2, 4, 9])
def test_moments_are_pulled_back(order: int) -> None:
    matrix = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    average, square = moments(12, 8)
    mpo = MPO(order=order)
    cores = mpo.unfold(matrix)
    state = {"step": torch.tensor(7.0), "exp_avg": average, "exp_avg_sq": square}
    before = torch.get_rng_state()
    result = warm_state(mpo, [core[None] for core in cores], [state])
    assert torch.equal(torch.get_rng_state(), before)
    assert result is not None
    jacobians = torch.func.jacrev(lambda *c: contract_mpo(list(c)), argnums=tuple(range(order)))(*cores)
    ratios = []
    for core, jacobian, warm in zip(cores, jacobians, result[0], strict=True):
        assert warm["step"] == 7.0
        exact_mean = torch.einsum("rc,rcdije->dije", average, jacobian)
        exact_square = torch.einsum("rc,rcdije->dije", square, jacobian**2)
        assert torch.allclose(warm["exp_avg"], exact_mean, rtol=1e-10, atol=1e-12)
        assert warm["exp_avg_sq"].shape == core.shape
        assert bool((warm["exp_avg_sq"] >= 0).all())
        ratios.append(float(warm["exp_avg_sq"].sum() / exact_square.sum()))
    # an estimate without bias: each entry is a mean of 32 squares, and a core has many entries
    assert math.prod(ratios) ** (1 / order) == pytest.approx(1, abs=0.1)


def test_unknown_state_starts_fresh() -> None:
    mpo = MPO(order=3)
    cores = [core[None] for core in mpo.unfold(torch.randn(6, 4))]
    assert warm_state(mpo, cores, [{}]) is None
    assert warm_state(mpo, cores, [{"row_var": torch.ones(6, 1)}]) is None
    assert warm_state(mpo, cores, [{"ax": torch.ones(6, 4)}]) is None
    assert warm_state(mpo, cores, [{"exp_avg": torch.ones(6)}]) is None


def test_counts_are_each_core_its_own() -> None:
    """A step count that cores shared would go up once for each of them."""
    mpo = MPO(order=3)
    cores = [torch.stack([core, core]) for core in mpo.unfold(torch.randn(6, 4))]
    states = [{"step": torch.tensor(float(k)), "exp_avg": torch.ones(6, 4), "amsgrad": False} for k in (3, 5)]
    result = warm_state(mpo, cores, states)
    assert result is not None
    for member, state, count in zip(result, states, (3, 5), strict=True):
        state["step"] += 100
        for core in member:
            assert core["amsgrad"] is False
            assert core["step"] == count
            core["step"] += 10


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [OverParamAdapter.from_linear(nn.Linear(24, 24), rank=4, alpha=8) for _ in range(2)]
    for layer in layers:
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1]).double()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, noisy: bool = False
) -> list[dict[str, Tensor]]:
    """Values of all trained matrices before the first step and after every one; `noisy` draws a batch for each step."""
    generator = torch.Generator().manual_seed(1)
    batches = torch.randn(steps if noisy else 1, 2, 16, 24, generator=generator, dtype=torch.float64)
    matrices = {n: p for n, p in model.named_parameters() if p.requires_grad}
    seen = [{n: p.detach().clone() for n, p in matrices.items()}]
    for step in range(steps):
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()
        seen.append({n: p.detach().clone() for n, p in matrices.items()})
    return seen


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def first_jump(handover: str) -> float:
    """Mean over matrices of the first update after an expansion, relative to the mean update of the five steps before."""
    model = net()
    optimizer = torch.optim.AdamW(trained(model), lr=5e-3)
    LoraOver(model, optimizer, MPO(order=9), AllAt(60), handover=handover)
    seen = train(model, optimizer, 60, noisy=True)
    moves = [{n: float((b[n] - a[n]).norm()) for n in a} for a, b in pairwise(seen)]
    return mean(moves[59][n] / mean(move[n] for move in moves[54:59]) for n in seen[0])


def test_warm_jumps_less_than_restart() -> None:
    # where gradients are noisy, that is: moments then say that a steady direction is weak, and fresh ones do not
    assert first_jump("warm") < 0.7 * first_jump("restart")


def test_matrices_with_different_step_counts_are_stepped_apart() -> None:
    model = net()
    optimizer = torch.optim.AdamW(trained(model), lr=5e-3)
    over = LoraOver(model, optimizer, MPO(order=3), AllAt(3))
    idle = model[0].lora_A.weight
    for step in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 24, dtype=torch.float64)).square().sum().backward()
        if step == 0:
            idle.grad = None
        optimizer.step()
    members = over.state_dict()["cores"]
    # the step that expands is counted too: the idle matrix has one step less behind it
    assert float(members["0.A"]["state"][0]["step"]) == 2
    assert float(members["2.A"]["state"][0]["step"]) == 3


@pytest.mark.parametrize("cap", [0.2, 1.0, 2.5])
@pytest.mark.parametrize("order", [2, 9])
def test_a_cap_on_the_update_holds_at_every_step(cap: float, order: int) -> None:
    model = net()
    optimizer = torch.optim.AdamW(trained(model), lr=5e-3)
    LoraOver(model, optimizer, MPO(order=order), max_update=cap)
    seen = train(model, optimizer, 20)
    moves = [float((b[n] - a[n]).square().mean().sqrt()) for a, b in pairwise(seen) for n in a]
    assert max(moves) <= cap * 5e-3 * 1.01
    if cap < 2:
        assert max(moves) > cap * 5e-3 * 0.95, "the cap shortens steps, it does not stop them"


def test_a_cap_that_is_never_reached_changes_nothing() -> None:
    results = []
    for cap in (None, 1e6):
        model = net()
        optimizer = torch.optim.AdamW(trained(model), lr=5e-3)
        LoraOver(model, optimizer, MPO(order=4), max_update=cap)
        results.append(train(model, optimizer, 10)[-1])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_cap_shortens_only_the_matrices_that_go_beyond_it() -> None:
    """Of two matrices of one cohort one is shortened, and the other goes where it goes without a limit."""

    def run(limit: float | None) -> tuple[nn.ModuleList, LoraOver]:
        model = adapters(12, 12)
        optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
        over = LoraOver(model, optimizer, MPO(order=3), max_update=limit)
        generator = torch.Generator().manual_seed(0)
        for k, layer in enumerate(model):
            for parameter in (layer.lora_A.weight, layer.lora_B.weight):
                parameter.grad = (1e-2, 1.0)[k] * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        return model, over

    free, unlimited = run(None)
    norms = unlimited.update_norms()
    slow, fast = max(norms["0.A"], norms["0.B"]), min(norms["1.A"], norms["1.B"])
    assert 2 * slow < fast / 2, "the matrices differ"
    limit = 1.5 * slow / (1e-2 * math.sqrt(48))
    model, over = run(limit)
    assert len(over._expanded.now.cohorts) == 1
    for name in ("1.A", "1.B"):
        assert over.update_norms()[name] == pytest.approx(1.5 * slow, rel=2e-3)
    for name in ("lora_A", "lora_B"):
        assert torch.allclose(getattr(model[0], name).weight, getattr(free[0], name).weight, rtol=1e-12, atol=1e-14)


def test_update_norms_are_given_of_matrices_that_are_expanded() -> None:
    model = adapters(12)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=3))
    backward_through(model, 0)
    optimizer.step()
    assert set(over.update_norms()) == {"0.A", "0.B"}
    over.fold(["0.A"])
    assert set(over.update_norms()) == {"0.B"}
    over.load_state_dict(copy.deepcopy(over.state_dict()))
    assert over.update_norms() == {}


def test_bad_settings_are_errors() -> None:
    model = net()
    optimizer = torch.optim.AdamW(trained(model))
    with pytest.raises(ValueError, match=r"handover='cold'.*warm, restart"):
        LoraOver(model, optimizer, MPO(order=4), handover="cold")
    with pytest.raises(ValueError, match="max_update=0"):
        LoraOver(model, optimizer, MPO(order=4), max_update=0)
