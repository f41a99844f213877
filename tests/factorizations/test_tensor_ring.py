"""What is the ring's alone: which structure is exact, what truncation misses, and where it is an MPO."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import contract

from tnadapt import LoraOver, OverParamAdapter, Static
from tnadapt.factorizations import MPO, SVD, TensorRing

from .variants import make_matrix, relative_error, shapes


@given(shape=shapes(), order=st.integers(2, 12))
def test_the_first_bond_of_an_mpo_is_split(shape: tuple[int, int], order: int) -> None:
    ring, mpo = TensorRing(order=order).core_shapes(shape), MPO(order=order).core_shapes(shape)
    assert ring[0][0] == ring[-1][-1]
    assert ring[0][0] * ring[0][-1] == mpo[0][-1]
    assert ring[0][0] <= ring[0][-1]
    assert [core[1:3] for core in ring] == [core[1:3] for core in mpo]
    if ring[0][0] == 1:
        assert ring == mpo
    assert TensorRing(order=2).num_parameters(shape) == SVD().num_parameters(shape)


def test_at_order_2_it_is_the_svd_of_the_sites() -> None:
    matrix = make_matrix((24, 8))
    first, last = TensorRing(order=2).unfold(matrix)
    u, rest = SVD().unfold(matrix)
    assert torch.equal(first.permute(1, 2, 0, 3).flatten(2).flatten(), u.flatten())
    assert torch.equal(last.permute(3, 0, 1, 2).flatten(), rest.flatten())


@pytest.mark.parametrize("cap", [1, 2, 3, 5])
def test_truncation_misses_at_most_what_is_cut(cap: int) -> None:
    """Each decomposition cuts a projection of the matrix, so the squared errors add up to no more than the bound."""
    sites, shape = [(4, 3), (2, 5), (6, 1)], (48, 15)
    matrix = make_matrix(shape)
    ring = TensorRing(sites=sites, max_bond=cap)
    assert not ring.structure(shape).exact
    split = matrix.reshape(4, 2, 6, 3, 5, 1).permute(0, 3, 1, 4, 2, 5).reshape(12, 10, 6)
    r, _, _, d_1 = ring.core_shapes(shape)[0]
    first = torch.linalg.svd(split.reshape(12, 60), full_matrices=False)
    kept = r * d_1
    cut = float(first.S[kept:].square().sum())
    rest = (first.S[:kept, None] * first.Vh[:kept]).reshape(r, d_1, 10, 6).permute(1, 2, 3, 0).reshape(d_1 * 10, 6 * r)
    cut += float(torch.linalg.svdvals(rest)[ring.core_shapes(shape)[2][0] :].square().sum())
    missing = float((ring.fold(ring.unfold(matrix)) - matrix).norm())
    assert missing == pytest.approx(math.sqrt(cut), rel=1e-10)


def test_a_matrix_of_the_ring_is_kept() -> None:
    """One that a truncated ring of bonds (2, 2) can hold from its first site on comes back whole."""
    ring = TensorRing(order=2, max_bond=2)
    matrix = ring.fold(ring.unfold(make_matrix((24, 8))))
    assert relative_error(ring.fold(ring.unfold(matrix)), matrix) <= 1e-13


def test_bad_rings() -> None:
    with pytest.raises(ValueError, match=r"TensorRing\(\) has no order"):
        TensorRing()
    with pytest.raises(ValueError, match="max_bond=0"):
        TensorRing(order=3, max_bond=0)
    with pytest.raises(ValueError, match="drop one"):
        TensorRing(expansion=1.5, max_bond=3)
    with pytest.raises(ValueError, match="cores 1 and 0 do not belong together: bond dimensions 4 and 3"):
        TensorRing(order=2).fold([torch.ones(3, 2, 2, 5), torch.ones(5, 2, 2, 4)])
    with pytest.raises(ValueError, match="at least two"):
        TensorRing(order=2).fold([torch.ones(3, 2, 2, 3)])
    assert TensorRing(order=3, max_bond=2).label == "TensorRing(order=3, max_bond=2)"


def test_a_model_trains_through_rings_as_autograd_does() -> None:
    torch.manual_seed(0)
    model = OverParamAdapter.from_linear(torch.nn.Linear(12, 18, dtype=torch.float64), rank=6)
    pair = [model.lora_A.weight, model.lora_B.weight]
    torch.nn.init.normal_(pair[1])
    ring = TensorRing(order=4)
    cores = [[core.requires_grad_() for core in ring.unfold(weight.detach())] for weight in pair]
    optimizer = torch.optim.AdamW(pair, lr=1e-2, weight_decay=0.01)
    reference = torch.optim.AdamW([*cores[0], *cores[1]], lr=1e-2, weight_decay=0.01)
    LoraOver(model, optimizer, ring, Static())
    x = torch.randn(7, 12, dtype=torch.float64)
    for _ in range(6):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        lora_a, lora_b = (contract(ring, own) for own in cores)
        (model.base(x) + model.scaling * x @ lora_a.mT @ lora_b.mT).square().sum().backward()
        reference.step()
        reference.zero_grad()
    for weight, own in zip(pair, cores, strict=True):
        assert relative_error(weight.detach(), contract(ring, own).detach()) <= 1e-10
