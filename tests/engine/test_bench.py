"""Cohorts that are stepped apart and contracted as one."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tnadapt import CP, MPO, SVD, LoraOver, Static, Tucker

from .models import Experts, expert_loss, trainable, values

#: the experts that are active in each step: pasts drift apart, cohorts come to the bench in changing company and are alone at times
PLAN = [(0, 1, 2), (0, 2), (1, 2), (0, 1, 2), (1,), (0, 1, 2), (2,), (0, 2), (0, 1, 2)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, plan: list[tuple[int, ...]]) -> None:
    for step, experts in enumerate(plan):
        optimizer.zero_grad()
        expert_loss(model, step, experts).backward()
        optimizer.step()


def run(
    monkeypatch: pytest.MonkeyPatch, limit: int, kind: Any, factorization: Any, **options: Any
) -> tuple[dict[str, Tensor], LoraOver]:
    """Matrices after the plan, where cohorts up to `limit` bytes are contracted together."""
    monkeypatch.setattr("tnadapt.engine.cores.JOIN_BYTES", limit)
    model = Experts()
    optimizer = kind(trainable(model), lr=1e-2)
    over = LoraOver(model, optimizer, factorization, **options)
    train(model, optimizer, PLAN)
    return values(model), over


@pytest.mark.parametrize(
    "options",
    [{}, {"matched": True}, {"max_update": 0.05}, {"core_lr": 3e-3}],
    ids=["plain", "matched", "capped", "core_lr"],
)
@pytest.mark.parametrize("factorization", [MPO(order=4), SVD(max_bond=2), CP(order=3), Tucker(order=3)], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor])
def test_cohorts_train_together_as_they_do_alone(
    kind: Any, factorization: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, apart = run(monkeypatch, 0, kind, factorization, **options)
    together, over = run(monkeypatch, 2**19, kind, factorization, **options)
    assert apart._step is not None
    assert over._step is not None
    assert not apart._step._benches
    assert over._step._benches
    for name, value in alone.items():
        assert torch.allclose(together[name], value, rtol=1e-7, atol=1e-9), name
    assert apart.update_norms().keys() == over.update_norms().keys()
    for name, norm in apart.update_norms().items():
        assert over.update_norms()[name] == pytest.approx(norm, rel=1e-6, abs=1e-10)
    assert over.changed_outside() == ()


def test_large_matrices_are_permuted_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up, _ = run(monkeypatch, 2**19, torch.optim.AdamW, MPO(order=4))
    monkeypatch.setattr("tnadapt.engine.cores._LOOKED_UP", 0)
    permuted, over = run(monkeypatch, 2**19, torch.optim.AdamW, MPO(order=4))
    assert over._step is not None
    assert {bench._sources is None for bench in over._step._benches.values()} == {True}
    assert all(torch.equal(permuted[name], value) for name, value in looked_up.items())


def test_gradients_that_a_scheduler_clears_are_not_stepped() -> None:
    class Clears(Static):
        def observe(self, step: int, matrices: Any) -> None:
            if step == 3:
                for matrix in matrices.values():
                    matrix.parameter.grad = None

    model = Experts()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=4), Clears())
    train(model, optimizer, PLAN[:2])
    before = values(model)
    train(model, optimizer, PLAN[2:3])
    assert all(torch.equal(before[name], value) for name, value in values(model).items())
    train(model, optimizer, PLAN[3:4])
    assert over.step == 4


def test_a_bench_holds_no_more_than_a_cohort_may(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, _ = run(monkeypatch, 0, torch.optim.AdamW, MPO(order=4))
    whole, over = run(monkeypatch, 2**19, torch.optim.AdamW, MPO(order=4))
    assert over._step is not None
    key = over._expanded.now.cohorts[0].key
    assert key.capacity > 3
    monkeypatch.setattr("tnadapt.engine.cores.STACK_BYTES", 2 * key.size * key.dtype.itemsize)
    few, over = run(monkeypatch, 2**19, torch.optim.AdamW, MPO(order=4))
    assert over._step is not None
    benches = over._step._benches.values()
    assert {bench.key.capacity for bench in benches} & {2}
    assert all(sum(bench.lengths) <= bench.key.capacity for bench in benches)
    for name, value in alone.items():
        assert torch.allclose(few[name], value, rtol=1e-7, atol=1e-9)
        assert torch.allclose(whole[name], value, rtol=1e-7, atol=1e-9)


class Dies(torch.optim.AdamW):
    """Steps everything, and dies in its last step."""

    dying = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        if self.dying:
            raise MemoryError


def test_a_matrix_that_was_restored_after_a_step_that_died_is_left_alone() -> None:
    """One of several on the bench: the others are refolded from their cores, and this one is unfolded anew."""
    model = Experts()
    optimizer = Dies(trainable(model), lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=4))
    train(model, optimizer, PLAN[:4])
    before = copy.deepcopy(values(model))
    optimizer.dying = True
    optimizer.zero_grad()
    expert_loss(model, 4, (0, 1, 2)).backward()
    with pytest.raises(MemoryError):
        optimizer.step()
    optimizer.dying = False
    first = next(iter(before))
    restored = dict(model.named_parameters())[first]
    with torch.no_grad():
        restored.copy_(before[first])
    optimizer.zero_grad()
    after = values(model)
    assert torch.equal(after[first], before[first])
    assert all(not torch.equal(after[name], before[name]) for name in before if name != first)
    with pytest.warns(UserWarning, match="changed outside") as record:
        train(model, optimizer, PLAN[:1])
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, PLAN)
    assert over.changed_outside() == ()
