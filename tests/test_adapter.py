"""`OverParamAdapter`: plain LoRA around a linear layer."""

from __future__ import annotations

import copy
import json
import math

import numpy
import pytest
import torch
from torch import nn

from tnadapt import MPO, SVD, OverParamAdapter


def linear(d_in: int = 6, d_out: int = 10, **options) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(d_in, d_out, **options)


def trained(adapter: OverParamAdapter) -> OverParamAdapter:
    nn.init.normal_(adapter.lora_B.weight)
    return adapter


@pytest.mark.parametrize(
    ("alpha", "rslora", "scaling"), [(None, False, 1.0), (16, False, 4.0), (16, True, 8.0), (3.0, False, 0.75)]
)
def test_scaling(alpha, rslora, scaling):
    base = linear()
    adapter = trained(OverParamAdapter.from_linear(base, rank=4, alpha=alpha, use_rslora=rslora))
    x = torch.randn(3, 6)
    update = x @ adapter.lora_A.weight.T @ adapter.lora_B.weight.T
    assert adapter.scaling == pytest.approx(scaling)
    assert torch.allclose(adapter(x), base(x) + scaling * update, atol=1e-6)


def test_starts_as_the_base_and_trains_the_pair_alone():
    base = linear()
    adapter = OverParamAdapter.from_linear(base, rank=4)
    x = torch.randn(2, 5, 6)
    assert torch.equal(adapter(x), base(x))
    assert adapter.base is base
    assert [name for name, p in adapter.named_parameters() if p.requires_grad] == ["lora_A.weight", "lora_B.weight"]
    assert adapter.lora_A.weight.shape == (4, 6)
    assert adapter.lora_B.weight.shape == (10, 4)
    bound = math.sqrt(3) * math.sqrt(2 / (1 + 5)) / math.sqrt(6)
    assert 0 < float(adapter.lora_A.weight.detach().abs().max()) <= bound


@pytest.mark.parametrize(
    ("dtype", "pair"), [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
)
def test_dtypes(dtype, pair):
    adapter = trained(OverParamAdapter.from_linear(linear(dtype=dtype), rank=4))
    assert adapter.lora_A.weight.dtype == adapter.lora_B.weight.dtype == pair
    assert adapter(torch.randn(3, 6, dtype=dtype)).dtype == dtype


def test_meta_device():
    adapter = OverParamAdapter.from_linear(nn.Linear(6, 10, device="meta"), rank=4)
    assert adapter.lora_A.weight.is_meta
    assert adapter.lora_B.weight.is_meta


def test_an_existing_pair_is_used_as_it_is():
    base, lora_a, lora_b = linear(), nn.Linear(6, 4, bias=False), nn.Linear(4, 10, bias=False)
    adapter = OverParamAdapter(lora_a, lora_b, base=base, scaling=2.0)
    assert adapter.lora_A is lora_a
    assert adapter.lora_B is lora_b
    assert base.weight.requires_grad, "left alone"
    x = torch.randn(3, 6)
    assert torch.allclose(adapter(x), base(x) + 2 * lora_b(lora_a(x)))
    alone = OverParamAdapter(lora_a, lora_b, scaling=0.5)
    assert torch.equal(alone(x), 0.5 * lora_b(lora_a(x)))
    assert "rank=4, scaling=0.5" in repr(alone)


@pytest.mark.parametrize("bias", [True, False])
def test_merged_layer_equals_the_adapter(bias):
    base = linear(bias=bias, dtype=torch.float64)
    adapter = trained(OverParamAdapter.from_linear(base, rank=4, alpha=8))
    before = base.weight.detach().clone()
    merged, x = adapter.merge(), torch.randn(3, 6, dtype=torch.float64)
    assert type(merged) is nn.Linear
    assert torch.allclose(merged(x), adapter(x), rtol=0, atol=1e-12)
    assert torch.allclose(merged.weight, base.weight + adapter.delta_weight())
    assert torch.equal(base.weight, before)
    assert merged.weight is not base.weight


def test_dropout_in_training_only():
    adapter = trained(OverParamAdapter.from_linear(linear(), rank=4, dropout=0.5))
    x = torch.randn(64, 6)
    assert not torch.equal(adapter(x), adapter(x))
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))
    assert torch.allclose(adapter(x), adapter.merge()(x), atol=1e-5)


def test_the_smallest_rank():
    """B A is an outer product then."""
    adapter = trained(OverParamAdapter.from_linear(linear(), rank=1, alpha=3))
    wanted = 3 * torch.outer(adapter.lora_B.weight[:, 0], adapter.lora_A.weight[0])
    assert torch.allclose(adapter.delta_weight(), wanted)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "4"])
def test_bad_rank(rank):
    with pytest.raises(ValueError, match=r"rank=.*at least 1"):
        OverParamAdapter.from_linear(linear(), rank=rank)


@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), -float("inf")])
def test_bad_scaling(scaling):
    pair = nn.Linear(6, 4, bias=False), nn.Linear(4, 10, bias=False)
    with pytest.raises(ValueError, match=r"scaling=.*a finite number"):
        OverParamAdapter(*pair, scaling=scaling)


def test_numbers_of_other_libraries_can_be_saved():
    adapter = OverParamAdapter.from_linear(linear(), rank=4, alpha=numpy.float32(6))
    assert json.loads(json.dumps(adapter.settings()))["scaling"] == 1.5


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_bad_dropout(dropout):
    with pytest.raises(ValueError, match=r"dropout=.*probability"):
        OverParamAdapter.from_linear(linear(), rank=4, dropout=dropout)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_alpha_is_a_finite_number(alpha):
    base = linear()
    with pytest.raises(ValueError, match=f"alpha={alpha}: LoRA's alpha is a finite number"):
        OverParamAdapter.from_linear(base, rank=4, alpha=alpha)
    assert base.weight.requires_grad


def test_bad_layers():
    good_a, good_b = nn.Linear(6, 4, bias=False), nn.Linear(4, 10, bias=False)
    with pytest.raises(TypeError, match="lora_B is a Conv1d"):
        OverParamAdapter(good_a, nn.Conv1d(4, 10, 1))
    with pytest.raises(ValueError, match="lora_A has a bias"):
        OverParamAdapter(nn.Linear(6, 4), good_b)
    with pytest.raises(ValueError, match="rank 4, but lora_B takes rank 3"):
        OverParamAdapter(good_a, nn.Linear(3, 10, bias=False))
    with pytest.raises(ValueError, match="6 -> 10, but base maps 10 -> 6"):
        OverParamAdapter(good_a, good_b, base=nn.Linear(10, 6))
    with pytest.raises(TypeError, match=r"needs an nn\.Linear, got Conv1d"):
        OverParamAdapter.from_linear(nn.Conv1d(4, 10, 1), rank=4)


def test_merging_into_what_has_no_dense_weight():
    pair = nn.Linear(6, 4, bias=False), nn.Linear(4, 10, bias=False)
    with pytest.raises(TypeError, match="NoneType"):
        OverParamAdapter(*pair).merge()
    with pytest.raises(TypeError, match="Sequential"):
        OverParamAdapter(*pair, base=nn.Sequential(linear())).merge()


def test_a_bad_pair_leaves_the_base_as_it_was():
    base = linear()
    with pytest.raises(ValueError, match="dropout"):
        OverParamAdapter.from_linear(base, rank=4, dropout=2.0)
    assert base.weight.requires_grad, "freezing is part of what was refused"


# -- factorizations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (None, {"A": None, "B": None}),
        (MPO(order=9), {"A": MPO(order=9), "B": MPO(order=9)}),
        ({"A": MPO(order=9), "B": SVD()}, {"A": MPO(order=9), "B": SVD()}),
        ({"B": SVD()}, {"A": None, "B": SVD()}),
        ({"A": None, "B": SVD()}, {"A": None, "B": SVD()}),
        ({}, {"A": None, "B": None}),
    ],
)
def test_factorization_is_stored_by_side_and_changes_nothing(given, stored):
    adapter = OverParamAdapter.from_linear(linear(), rank=4, factorization=given)
    assert adapter.factorization == stored
    torch.manual_seed(1)
    plain = OverParamAdapter.from_linear(linear(), rank=4)
    adapter.load_state_dict(plain.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(adapter(x), plain(x))
    assert adapter.state_dict().keys() == plain.state_dict().keys()
    pair = OverParamAdapter(plain.lora_A, plain.lora_B, factorization=given)
    assert pair.factorization == stored
    assert copy.deepcopy(adapter).factorization == stored


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("mpo", TypeError, r"factorization='mpo' is a str; give a factorization such as MPO"),
        ((MPO(order=3), SVD()), TypeError, "is a tuple; give"),
        ({"A": "mpo"}, TypeError, "the factorization of A is a str"),
        ({"a": MPO(order=3)}, ValueError, r'an entry for \'a\'; the sides of a LoRA pair are "A" and "B"'),
        (MPO(sites=[(2, 2), (2, 3)]), ValueError, "the factorization of B does not fit its 10x4 matrix: sites"),
    ],
)
def test_bad_factorizations_are_refused(given, error, message):
    base = linear()
    with pytest.raises(error, match=message):
        OverParamAdapter.from_linear(base, rank=4, factorization=given)
    assert base.weight.requires_grad


def test_an_adapter_looks_like_its_base_to_models_that_ask():
    base = linear(dtype=torch.bfloat16)
    adapter = OverParamAdapter.from_linear(OverParamAdapter.from_linear(base, rank=4), rank=2)
    assert adapter.weight is base.weight
    assert adapter.bias is base.bias
    assert (adapter.in_features, adapter.out_features) == (6, 10)
    assert adapter.trained_tensors().keys() == {"lora_A.weight", "lora_B.weight"}
    assert adapter.lora_A.weight.dtype == torch.float32
