"""The search for the scale of a step: lengths end where they should, after few folds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tnadapt import MPO, LoraOver, OverParamAdapter
from tnadapt.engine.cores import Batch
from tnadapt.engine.scaling import search_scale


class Lengths:
    """`|a_1 s + ... + a_m s^m|` for orthogonal a_k, as of updates through m cores; counts how often it is asked for."""

    def __init__(self, sizes: Tensor, round_to: float = 0.0) -> None:
        self.sizes, self.round_to = sizes, round_to  # [n, m]
        self.asked: list[Tensor] = []

    def __call__(self, scale: Tensor) -> Tensor:
        assert bool((scale >= 0).all()), "a step keeps its direction"
        self.asked.append(scale.clone())
        powers = scale[:, None] ** torch.arange(1, self.sizes.shape[1] + 1)
        found = (self.sizes * powers).square().sum(1).sqrt()
        return (found / self.round_to).round() * self.round_to if self.round_to else found


ORDERS = st.sampled_from([1, 2, 4, 9, 16])


@given(ORDERS, st.integers(0, 2**16), st.floats(1e-6, 1e6), st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None)
def test_the_wanted_length_is_found(order: int, seed: int, spread: float, first: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    powers = torch.arange(order)
    sizes = torch.rand(5, order, generator=generator, dtype=torch.float64).add(1e-3) * spread ** (powers / order)
    lengths, wanted = Lengths(sizes), torch.logspace(-4, 4, 5, dtype=torch.float64)
    scale = search_scale(lengths, wanted, torch.full_like(wanted, first), wanted * 1e-7, only_shorten=False)
    assert torch.allclose(lengths(scale), wanted, rtol=1e-6)
    assert torch.equal(lengths.asked[-2], scale), "what was folded last is what is written"
    assert len(lengths.asked) <= 40


def test_only_too_long_steps_are_shortened() -> None:
    lengths = Lengths(torch.tensor([[1.0, 1.0], [1e-3, 1e-3], [0.0, 0.0]], dtype=torch.float64))
    wanted = torch.full((3,), 0.5, dtype=torch.float64)
    scale = search_scale(lengths, wanted, torch.ones_like(wanted), wanted * 1e-3, only_shorten=True)
    assert scale[1:].tolist() == [1.0, 1.0]
    assert float(lengths(scale)[0]) == pytest.approx(0.5, rel=1e-3)


def test_a_length_that_rounding_hides_is_not_looked_for_for_ever() -> None:
    """Lengths are multiples of 1e-5 here, and none is within the tolerance."""
    lengths = Lengths(torch.tensor([[1.0]], dtype=torch.float64), round_to=1e-5)
    wanted = torch.tensor([3.4e-5], dtype=torch.float64)
    scale = search_scale(lengths, wanted, torch.ones_like(wanted), torch.full_like(wanted, 2e-6), only_shorten=False)
    assert abs(float(lengths(scale)[0] - wanted[0])) < 1e-5
    assert len(lengths.asked) <= 8


def test_a_flat_stretch_far_from_the_wanted_length_is_no_end() -> None:
    """Two scales with one length stop the search only near the wanted one, where rounding may be the reason."""

    def length_at(scale: Tensor) -> Tensor:
        return scale.clamp(max=1.0)

    wanted = torch.tensor([1e-3], dtype=torch.float64)
    scale = search_scale(length_at, wanted, torch.full_like(wanted, 1e6), wanted * 1e-3, only_shorten=True)
    assert float(length_at(scale)) == pytest.approx(1e-3, rel=1e-3)


def test_a_length_of_zero_and_a_step_without_direction() -> None:
    lengths = Lengths(torch.tensor([[1.0], [0.0]], dtype=torch.float64))
    wanted = torch.tensor([0.0, 1.0], dtype=torch.float64)
    scale = search_scale(lengths, wanted, torch.ones_like(wanted), wanted * 1e-3, only_shorten=False)
    assert scale.tolist() == [0.0, 1.0]
    assert len(lengths.asked) == 2


def test_what_overflowed_on_the_way_is_too_long() -> None:
    def length_at(scale: Tensor) -> Tensor:
        assert bool((scale > 0).all()), "a step keeps its direction"
        return torch.where(scale > 1e-4, math.inf, scale)

    wanted = torch.tensor([1e-6], dtype=torch.float64)
    scale = search_scale(length_at, wanted, torch.ones_like(wanted), wanted * 1e-3, only_shorten=True)
    assert float(scale) == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("order", [4, 16])
def test_a_matched_step_folds_three_times(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the first, in which A has no gradient and moves by its weight decay, which is less than its rounding."""
    folds = 0
    original = Batch.fold

    def counted(batch: Batch) -> Tensor:
        nonlocal folds
        folds += 1
        return original(batch)

    monkeypatch.setattr(Batch, "fold", counted)
    torch.manual_seed(0)
    layer = OverParamAdapter.from_linear(nn.Linear(96, 96), rank=8, alpha=16)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-4)
    LoraOver(layer, optimizer, MPO(order=order), matched=True)
    target, counts = torch.randn(96, 96) * 0.03, []
    for step in range(12):
        x = torch.randn(64, 96, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (layer(x) - x @ target.T).square().mean().backward()
        folds = 0
        optimizer.step()
        counts.append(folds)
    assert max(counts) <= 6, counts
    assert sorted(counts)[len(counts) // 2] <= 3, counts
