"""Adapters for whole models: added by pattern, saved and loaded, merged, exchanged with PEFT."""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from tnadapt import (
    CP,
    MPO,
    SVD,
    LoraOver,
    OverParamAdapter,
    RowRescale,
    Static,
    TTLoraLinear,
    Tucker,
    add_adapters,
    export_peft,
    find_adapters,
    import_peft,
    load_adapters,
    merge_adapters,
    register_factorization,
    save_adapters,
)
from tnadapt.factorizations.base import _FACTORIZATIONS

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

KINDS = [(OverParamAdapter, {"rank": 3, "alpha": 7}), (TTLoraLinear, {"rank": 3, "alpha": 0.7})]
kinds = pytest.mark.parametrize(("kind", "options"), KINDS, ids=[kind.__name__ for kind, _ in KINDS])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width // 2, bias=False)
        self.out = nn.Linear(width // 2, width)

    def forward(self, x):
        return x + self.out(torch.tanh(self.v_proj(torch.tanh(self.q_proj(x)))))


class Net(nn.Module):
    def __init__(self, width: int = 12, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    return transformers.LlamaForCausalLM(config).eval()


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, vocab_size=40, decoder_start_token_id=0, dropout_rate=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def logits(model, size: int = 40):
    ids = torch.arange(1, 13).reshape(2, 6) % size
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).logits


def moved(model: nn.Module, seed: int = 1) -> nn.Module:
    """Random values in all that an adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in find_adapters(model).values():
            for p in adapter.trained_tensors().values():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


X = torch.linspace(-1, 1, 4 * 12, dtype=torch.float64).reshape(4, 12)


# -- adding -----------------------------------------------------------------------------------------------------------


@kinds
def test_adding_by_pattern_wraps_what_matches_and_trains_nothing_else(kind, options):
    model, plain = net(), net()
    added = add_adapters(model, r"q_proj|v_proj", kind=kind, **options)
    assert list(added) == ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"]
    assert all(model.get_submodule(name) is adapter for name, adapter in added.items())
    assert all(type(adapter) is kind for adapter in added.values())
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for a in added.values() for p in a.trained_tensors().values()}
    assert torch.equal(model(X), plain(X)), "new adapters change nothing"
    assert type(model.layers[0].out) is nn.Linear


def test_adding_by_name():
    model = net()
    assert list(add_adapters(model, ["head", "layers.1.out"], rank=2)) == ["layers.1.out", "head"]
    assert list(find_adapters(model)) == ["layers.1.out", "head"]


def test_adding_more_leaves_the_first_ones_trained():
    model = net()
    first = add_adapters(model, "q_proj", rank=2)
    second = add_adapters(model, "v_proj", rank=4)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for a in (*first.values(), *second.values()) for p in a.trained_tensors().values()}


def test_adding_beside_adapters_of_peft_leaves_these_trained():
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    adapters = add_adapters(model, "v_proj", rank=2)
    of_ours = {id(p) for adapter in adapters.values() for p in adapter.trained_tensors().values()}
    assert {name for name, p in model.named_parameters() if p.requires_grad and id(p) not in of_ours} == trained


def test_adding_keeps_the_mode_of_each_layer():
    model = net().eval()
    model.head.train()
    added = add_adapters(model, r"q_proj|head", rank=2, dropout=0.5)
    assert added["head"].training
    assert not added["layers.0.q_proj"].training


def test_a_layer_that_two_modules_share_gets_one_adapter():
    model = net()
    model.layers[1].q_proj = model.layers[0].q_proj
    added = add_adapters(model, "q_proj", rank=2)
    assert list(added) == ["layers.0.q_proj"]
    assert model.layers[0].q_proj is model.layers[1].q_proj is added["layers.0.q_proj"]


def test_names_are_those_without_wrappers():
    model = net()
    wrapped = torch.compile(model, backend="eager")
    assert "layers.0.q_proj" in add_adapters(wrapped, r"^layers\.0\.q_proj$", rank=2)
    assert isinstance(model.layers[0].q_proj, OverParamAdapter)


class InsideAModule(nn.Module):
    """A layer inside a child called `module`, as wrappers call theirs, and something of the same name outside of it."""

    def __init__(self, outside: nn.Module) -> None:
        super().__init__()
        self.head = outside
        self.module = nn.ModuleDict({"head": nn.Linear(4, 4)})


@kinds
def test_layers_of_one_name_are_refused_and_not_lost(kind, options, tmp_path):
    options = {**options, "rank": 2}
    model = InsideAModule(nn.Linear(4, 4))
    for adapt in (lambda: add_adapters(model, "head", kind=kind, **options), lambda: RowRescale(model, "head")):
        with pytest.raises(
            ValueError, match=r"two layers of the model are called head, .*at module\.head\); rename one"
        ):
            adapt()
    assert not any(isinstance(module, kind) for module in model.modules())
    model.head = kind.from_linear(model.head, **options)
    model.module["head"] = kind.from_linear(model.module["head"], **options)
    for lose in (lambda: save_adapters(model, tmp_path / "lost", kind), lambda: merge_adapters(model)):
        with pytest.raises(ValueError, match="two layers of the model are called head"):
            lose()
    assert not (tmp_path / "lost").exists()
    assert isinstance(model.head, kind)


@kinds
def test_what_is_no_layer_may_have_the_name_of_one(kind, options):
    model = InsideAModule(nn.Embedding(3, 4))
    outside, layer = model.head, model.module["head"]
    adapter = add_adapters(model, "head", kind=kind, **{**options, "rank": 2})["head"]
    assert (model.module["head"], adapter.base, model.head) == (adapter, layer, outside)
    merge_adapters(model)
    assert type(model.module["head"]) is nn.Linear
    assert model.head is outside


def test_lora_over_trains_what_was_added():
    model = net()
    added = add_adapters(model, "q_proj", rank=2, factorization={"A": MPO(order=3), "B": SVD()})
    assert {type(a.factorization["A"]) for a in added.values()} == {MPO}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=3))
    assert list(over.matrices) == [f"layers.{k}.q_proj.{side}" for k in range(2) for side in "AB"]
    model(X).square().sum().backward()
    optimizer.step()
    over.fold()
    assert not torch.equal(model(X), net()(X))


def test_bad_targets_are_refused_and_change_nothing():
    model = net()
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"'k_proj' matches none of the 7 linear layers.*layers\.0\.q_proj"):
        add_adapters(model, "k_proj", rank=2)
    with pytest.raises(ValueError, match="targets is an empty list of names"):
        add_adapters(model, [], rank=2)
    with pytest.raises(ValueError, match=r"no linear layer called layers\.0, tail"):
        add_adapters(model, ["head", "layers.0", "tail"], rank=2)
    with pytest.raises(ValueError, match="names head more than once"):
        add_adapters(model, ["head", "head"], rank=2)
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj: rank=0"):
        add_adapters(model, "q_proj", rank=0)
    with pytest.raises(ValueError, match="linear layer itself"):
        add_adapters(nn.Linear(3, 3), "", rank=2)
    assert not find_adapters(model)
    assert [p.requires_grad for p in model.parameters()] == before
    add_adapters(model, "q_proj", rank=2)
    for again in (r"q_proj", ["layers.0.q_proj"], r"proj|lora"):
        with pytest.raises(ValueError, match=r"layers\.0\.q_proj.* has an adapter already; merge it first"):
            add_adapters(model, again, rank=2)


def test_layers_that_fail_late_leave_no_adapter_behind():
    """The second factorization does not fit: the first layer must be as it was."""
    model = net()
    with pytest.raises(ValueError, match=r"layers\.0\.v_proj: the factorization of B does not fit its 6x2 matrix"):
        add_adapters(model, "proj", rank=2, factorization={"B": MPO(sites=[(3, 1), (4, 2)])})
    assert not find_adapters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_attention_that_reads_the_weight_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(TypeError, match=r"out_proj of nn\.MultiheadAttention is never called"):
        add_adapters(model, "out_proj", rank=2)


# -- merging ----------------------------------------------------------------------------------------------------------


@kinds
def test_merged_model_is_plain_and_computes_the_same(kind, options):
    model = net()
    add_adapters(model, r"proj", kind=kind, **options)
    expected = moved(model)(X)
    assert not torch.allclose(expected, net()(X))
    assert merge_adapters(model) == [f"layers.{k}.{n}" for k in range(2) for n in ("q_proj", "v_proj")]
    assert {type(m) for m in model.modules()} == {type(m) for m in net().modules()}
    assert model.state_dict().keys() == net().state_dict().keys()
    assert torch.allclose(model(X), expected, rtol=0, atol=1e-12)
    assert not model.layers[0].q_proj.weight.requires_grad


@given(depth=st.integers(1, 3), seed=st.integers(0, 100))
def test_adapters_around_adapters_merge_into_one_layer(depth, seed):
    model = net()
    for level in range(depth):
        kind, options = KINDS[level % 2]
        model.head = kind.from_linear(model.head, **options)
    assert [p.requires_grad for p in model.head.trained_tensors().values()].count(True) > 0
    assert not any(p.requires_grad for p in model.head.base.parameters())
    expected = moved(model, seed)(X)
    assert list(find_adapters(model)) == ["head" + ".base" * level for level in range(depth)]
    assert merge_adapters(model) == ["head"]
    assert type(model.head) is nn.Linear
    assert torch.allclose(model(X), expected, rtol=0, atol=1e-11)


def test_a_merge_that_fails_changes_nothing():
    model = net()
    add_adapters(model, r"q_proj", rank=2)
    model.layers[1].q_proj.base.register_forward_hook(lambda m, a, y: 2 * y)
    with pytest.raises(ValueError, match=r"layers\.1\.q_proj: the base has forward hooks.*RowRescale"):
        merge_adapters(model)
    assert len(find_adapters(model)) == 2
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_adapters(net())
    with pytest.raises(ValueError, match="adapter itself"):
        merge_adapters(OverParamAdapter.from_linear(nn.Linear(4, 4), rank=2))


def test_a_merge_that_overflows_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    add_adapters(model, "0|1", rank=2)
    for half in (model[1].lora_A, model[1].lora_B):
        nn.init.constant_(half.weight, 300)
    with pytest.raises(ValueError, match=r"1: the sum of weight and update is not finite in torch.float16"):
        merge_adapters(model)
    assert len(find_adapters(model)) == 2


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_what_was_trained_of_a_base_is_trained_of_the_merged_layer(weight, bias):
    model = nn.Sequential(nn.Linear(4, 4))
    add_adapters(model, "0", rank=2)
    model[0].base.weight.requires_grad_(weight)
    model[0].base.bias.requires_grad_(bias)
    merge_adapters(model)
    assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (weight, bias)


def test_low_precision_weights_are_rounded_once():
    torch.manual_seed(0)
    base = nn.Linear(64, 64, dtype=torch.bfloat16)
    adapter = moved(OverParamAdapter.from_linear(base, rank=4))
    exact = base.weight.double() + adapter.scaling * adapter.lora_B.weight.double() @ adapter.lora_A.weight.double()
    rounding = torch.finfo(torch.bfloat16).eps / 2 * exact.abs()
    assert bool(((adapter.merge().weight.double() - exact).abs() <= rounding * 1.01 + 1e-6).all())


# -- files ------------------------------------------------------------------------------------------------------------


@kinds
def test_saved_adapters_come_back_bit_for_bit(kind, options, tmp_path):
    model, file = net(), tmp_path / "adapters.safetensors"
    add_adapters(model, r"proj", kind=kind, **options)
    save_adapters(moved(model), file, kind)
    again = net()
    loaded = load_adapters(again, file, kind)
    assert list(loaded) == list(find_adapters(model))
    assert torch.equal(again(X), model(X))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    assert {n: a.settings() for n, a in loaded.items()} == {n: a.settings() for n, a in find_adapters(model).items()}
    assert not list(tmp_path.glob(".*")), "no half-written file is left"


@kinds
def test_loading_into_adapters_that_are_there_keeps_their_parameters(kind, options, tmp_path):
    model, file = net(), tmp_path / "adapters.safetensors"
    add_adapters(model, r"proj", kind=kind, **options)
    save_adapters(moved(model), file, kind)
    again = net()
    there = add_adapters(again, r"proj", kind=kind, **options)
    parameters = [p for a in there.values() for p in a.trained_tensors().values()]
    assert load_adapters(again, file, kind) == there
    assert all(p is q for p, q in zip(parameters, (p for p in again.parameters() if p.requires_grad), strict=True))
    assert torch.equal(again(X), model(X))


def test_scalings_that_are_no_ratio_come_back_exactly(tmp_path):
    model = net()
    add_adapters(model, "head", rank=3, alpha=0.7, use_rslora=True, dropout=0.1)
    save_adapters(model, tmp_path / "a.safetensors")
    loaded = load_adapters(net(), tmp_path / "a.safetensors")["head"]
    assert loaded.scaling == 0.7 / math.sqrt(3)
    assert loaded.dropout.p == 0.1


def test_adapters_around_adapters_are_saved(tmp_path):
    model = net()
    model.head = OverParamAdapter.from_linear(OverParamAdapter.from_linear(model.head, rank=2), rank=3)
    add_adapters(model, "q_proj", rank=1)
    save_adapters(moved(model), tmp_path / "a.safetensors")
    again = net()
    assert set(load_adapters(again, tmp_path / "a.safetensors")) == set(find_adapters(model))
    assert torch.equal(again(X), model(X))
    assert (again.head.rank, again.head.base.rank) == (3, 2)


def test_stacks_of_two_classes_are_not_saved(tmp_path):
    for outer, inner in ((OverParamAdapter, TTLoraLinear), (TTLoraLinear, OverParamAdapter)):
        model = net()
        model.head = outer.from_linear(inner.from_linear(model.head, rank=2), rank=2)
        for kind in (outer, inner):
            with pytest.raises(ValueError, match="head has an adapter of one class around one of another"):
                save_adapters(model, tmp_path / "a.safetensors", kind)


def test_narrow_files_are_trained_in_float32(tmp_path):
    model = net(torch.float32)
    add_adapters(model, "head", rank=2)
    moved(model).head.to(torch.bfloat16)
    save_adapters(model, tmp_path / "a.safetensors")
    loaded = load_adapters(net(torch.float32), tmp_path / "a.safetensors")["head"]
    assert loaded.lora_B.weight.dtype == torch.float32
    assert torch.equal(loaded.lora_B.weight, model.head.lora_B.weight.float())


@kinds
def test_values_are_not_loaded_where_they_would_be_lost(kind, options, tmp_path):
    model = Net()
    add_adapters(model, "q_proj", kind=kind, **options)
    save_adapters(model, tmp_path / "file", kind)
    with torch.device("meta"):
        empty, adapted = Net(), Net()
    add_adapters(adapted, "q_proj", kind=kind, **options)
    trained = [p.requires_grad for p in empty.parameters()]
    for without_values in (empty, adapted):
        with pytest.raises(
            ValueError, match=r"layers\.[01]\.q_proj is on the meta device.*load the weights of the model first"
        ):
            load_adapters(without_values, tmp_path / "file", kind)
    assert not find_adapters(empty)
    assert [p.requires_grad for p in empty.parameters()] == trained


def test_the_dtype_of_a_file_is_kept_and_never_narrowed(tmp_path):
    model, file = net(torch.float32), tmp_path / "a.safetensors"
    add_adapters(model, "head", rank=2)
    model.head.lora_A.double()
    save_adapters(model, file)
    assert load_adapters(net(torch.float32), file)["head"].lora_A.weight.dtype == torch.float64
    there = net(torch.float32)
    add_adapters(there, "head", rank=2)
    with pytest.raises(ValueError, match=r"head\.lora_A\.weight is torch\.float64 in .* would round it"):
        load_adapters(there, file)


def test_pairs_that_share_a_matrix_are_saved_apart(tmp_path):
    model = net()
    q, head = (add_adapters(model, [name], rank=2)[name] for name in ("layers.0.q_proj", "head"))
    head.lora_A = q.lora_A
    save_adapters(moved(model), tmp_path / "a.safetensors")
    export_peft(model, tmp_path)
    again, third = net(), net()
    load_adapters(again, tmp_path / "a.safetensors")
    import_peft(third, tmp_path)
    assert torch.equal(again(X), model(X))
    assert torch.equal(third(X), model(X))


def test_factorizations_survive_files_and_train_as_before(tmp_path):
    """One for both sides, one for each side, one side alone, explicit sites of several shapes, and none."""
    ways = {
        "layers.0.q_proj": MPO(order=3, gauge="identity"),
        "layers.0.v_proj": {"A": MPO(sites={(3, 12): [(1, 4), (3, 3)]}), "B": CP(order=3)},
        "layers.1.q_proj": {"B": Tucker()},
        "layers.1.v_proj": None,
    }
    model, file = net(), tmp_path / "a.safetensors"
    for name, factorization in ways.items():
        add_adapters(model, [name], rank=3, factorization=factorization)
    save_adapters(moved(model), file)
    again = net()
    loaded = load_adapters(again, file)
    assert {name: adapter.factorization for name, adapter in loaded.items()} == {
        name: adapter.factorization for name, adapter in find_adapters(model).items()
    }
    assert loaded["layers.0.v_proj"].factorization["B"] == CP(order=3)

    def trained(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        over = LoraOver(model, optimizer, noted_or_svd(model), Static())
        for _ in range(3):
            model(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model(X), over.trained_parameters

    def noted_or_svd(model):
        # the sides without a factorization get the SVD
        own = {
            f"{name}.{side}": one for name, a in find_adapters(model).items() for side, one in a.factorization.items()
        }
        return lambda matrix: own[matrix.name] or SVD()

    (got, numbers), (expected, same_numbers) = trained(again), trained(model)
    assert torch.equal(got, expected)
    assert numbers == same_numbers


def test_files_with_and_without_factorizations_load_into_models_with_others(tmp_path):
    """Only values are read there: a plain run can be gone on with through cores, and the other way round."""
    for written, there in ((None, MPO(order=3)), (SVD(), None), (SVD(), MPO(order=3))):
        model, other = net(), net()
        add_adapters(model, "head", rank=2, factorization=written)
        save_adapters(moved(model), tmp_path / "a.safetensors")
        add_adapters(other, "head", rank=2, factorization=there)
        load_adapters(other, tmp_path / "a.safetensors")
        assert torch.equal(other(X), model(X))
        assert other.head.factorization == {"A": there, "B": there}


def test_a_factorization_that_is_not_registered_is_one_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(_FACTORIZATIONS, "_classes", dict(_FACTORIZATIONS._classes))
    file, model = tmp_path / "a.safetensors", net()

    @dataclass(frozen=True, kw_only=True)
    class OfSomebodyElse(SVD):
        pass

    add_adapters(model, "head", rank=2, factorization={"A": OfSomebodyElse()})
    save_adapters(model, file)
    fresh = net()
    message = "^head: its settings in .*a.safetensors make no OverParamAdapter: factorization 'OfSomebodyElse' is unknown; .*register_factorization"
    with pytest.raises(ValueError, match=message):
        load_adapters(fresh, file)
    assert type(fresh.head) is nn.Linear
    assert all(p.requires_grad for p in fresh.parameters())
    register_factorization(OfSomebodyElse)
    assert load_adapters(fresh, file)["head"].factorization == {"A": OfSomebodyElse(), "B": None}


def test_factorizations_that_a_file_has_garbled_are_refused(tmp_path):
    model, file = net(), tmp_path / "a.safetensors"
    add_adapters(model, "head", rank=2)
    save_adapters(model, file)
    tensors = load_file(file)
    for noted, message in (
        ("MPO", "factorization='MPO' has no entries for the sides"),
        ({"C": SVD().to_dict()}, "an entry for 'C'"),
        ({"A": {"type": "MPO", "odrer": 3}}, "MPO has no setting odrer"),
        ({"A": None}, "a factorization is rebuilt from what its to_dict"),
        ({"A": MPO(sites=[(3, 1), (4, 2)]).to_dict()}, "the factorization of A does not fit its 2x12 matrix"),
    ):
        settings = {"rank": 2, "scaling": 1.0, "dropout": 0.0, "factorization": noted}
        about = json.dumps({"kind": "OverParamAdapter", "layers": {"head": settings}})
        header = {"format": "tnadapt.adapters", "version": "1", "about": about}
        save_file(tensors, tmp_path / "bad", metadata=header)
        with pytest.raises(ValueError, match=f"^head: its settings in .*bad make no OverParamAdapter: .*{message}"):
            load_adapters(net(), tmp_path / "bad")


def test_stock_peft_loads_an_export_of_adapters_with_factorizations(tmp_path):
    model = llama()
    add_adapters(model, "q_proj", rank=2, alpha=4, factorization={"A": MPO(order=3), "B": SVD()})
    add_adapters(model, "v_proj", rank=2, alpha=4)
    export_peft(moved(model), tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


def test_files_that_do_not_fit_are_refused_and_change_nothing(tmp_path):
    model, file = net(), tmp_path / "a.safetensors"
    add_adapters(model, "proj", rank=2)
    save_adapters(model, file)
    header = {"format": "tnadapt.adapters", "version": "1"}
    layers = {"head": {"rank": 2, "scaling": 1.0, "dropout": 0.0}}

    def written(tensors, layers=layers, **changed):
        about = json.dumps({"kind": "OverParamAdapter", "layers": layers})
        save_file(tensors, tmp_path / "bad", metadata={**header, "about": about, **changed})
        return tmp_path / "bad"

    a, b = torch.zeros(2, 12), torch.zeros(5, 2)
    good = {"head.lora_A.weight": a, "head.lora_B.weight": b}
    assert load_adapters(net(), written(good)), "the cases below differ from a good file in one thing"
    cases = [
        (lambda: tmp_path / "none", FileNotFoundError, "none is not there"),
        (lambda: written(good, format="other"), ValueError, "not a tnadapt.adapters file: its header says 'other'"),
        (lambda: written(good, version="2"), ValueError, "version '2'.*reads '1'"),
        (
            lambda: written({"head.lora_A.weight": a}),
            ValueError,
            "head has the tensors .* but .* has lora_A.weight for",
        ),
        (lambda: written({**good, "head.lora_B.weight": b.T.contiguous()}), ValueError, r"\(2, 5\) in .*\(5, 2\) fits"),
        (
            lambda: written({**good, "tail.weight": a.clone()}),
            ValueError,
            r"tail\.weight, which belongs to none of its layers",
        ),
        (lambda: written(good, {"head": {"rank": 2}}), ValueError, "its settings in .* make no OverParamAdapter"),
        (lambda: written({"tail.x": a}, {"tail": layers["head"]}), ValueError, "no linear layer called tail"),
    ]
    for make, error, message in cases:
        fresh = net()
        with pytest.raises(error, match=message):
            load_adapters(fresh, make())
        assert not find_adapters(fresh)
        assert all(p.requires_grad for p in fresh.parameters())
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut is not a whole safetensors file"):
        load_adapters(net(), tmp_path / "cut")
    with pytest.raises(ValueError, match="holds adapters of the class OverParamAdapter; load it with kind=OverParam"):
        load_adapters(net(), file, TTLoraLinear)
    with pytest.raises(ValueError, match="has no TTLoraLinear to save"):
        save_adapters(model, file, TTLoraLinear)
    other = net()
    add_adapters(other, "q_proj", rank=2)
    with pytest.raises(ValueError, match=r"only the file has layers\.0\.v_proj"):
        load_adapters(other, file)
    third = net()
    add_adapters(third, "proj", rank=2, alpha=4)
    with pytest.raises(ValueError, match=r"'scaling': 2\.0.*'scaling': 1\.0"):
        load_adapters(third, file)


# -- PEFT's format ----------------------------------------------------------------------------------------------------

PATTERNS = [
    (r"q_proj|v_proj", {}),
    (r"layers\.1.*(q_proj|down_proj)", {"alpha": 5, "dropout": 0.1}),
    (r".*proj", {"alpha": 16, "use_rslora": True}),
]


@pytest.mark.parametrize(("pattern", "options"), PATTERNS)
def test_stock_peft_loads_what_was_exported(pattern, options, tmp_path):
    model = llama()
    add_adapters(model, pattern, rank=3, **options)
    moved(model).eval()
    export_peft(model, tmp_path, base_model="somewhere/llama", task_type="CAUSAL_LM")
    loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert torch.allclose(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model), logits(llama()), atol=1e-2)
    pairs = {n for n, m in loaded.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {n.removeprefix("base_model.model.") for n in pairs} == set(find_adapters(model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere/llama"
    assert config["lora_dropout"] == options.get("dropout", 0.0)


@pytest.mark.parametrize(("pattern", "options"), PATTERNS)
def test_what_was_exported_comes_back_bit_for_bit(pattern, options, tmp_path):
    model = llama()
    add_adapters(model, pattern, rank=3, **options)
    moved(model).eval()
    export_peft(model, tmp_path)
    again = llama()
    imported = import_peft(again, tmp_path)
    assert {n: a.settings() for n, a in imported.items()} == {n: a.settings() for n, a in find_adapters(model).items()}
    assert torch.equal(logits(again), logits(model))


def test_models_that_read_the_weight_of_a_layer(tmp_path):
    """T5 asks its feed-forward layers for the dtype of their weight; its `o` is the end of other names."""
    model = t5()
    add_adapters(model, r"\.(wi|wo|q)$", rank=2)
    moved(model).eval()
    export_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(t5(), str(tmp_path)).eval()
    assert torch.allclose(logits(loaded), logits(model), rtol=0, atol=1e-5)


def test_an_interrupted_export_leaves_no_mixture_of_two(tmp_path, monkeypatch):
    """An interruption before every write: what can be loaded is one of the two adapters."""

    def adapted(seed: int) -> Net:
        torch.manual_seed(0)
        model = Net()
        torch.manual_seed(seed)
        for adapter in add_adapters(model, "q_proj", rank=2, alpha=seed).values():
            nn.init.normal_(adapter.lora_B.weight)
        return model

    class Killed(BaseException):
        pass

    old, new, x = adapted(1), adapted(2), torch.randn(3, 12)

    def dying(write):
        def writes(*arguments, **options):
            if next(count) == at:
                raise Killed
            return write(*arguments, **options)

        return writes

    seen = []
    for at in range(5):
        folder, count = tmp_path / str(at), itertools.count()
        export_peft(old, folder)
        with monkeypatch.context() as patched:
            patched.setattr("safetensors.torch.save_file", dying(save_file))
            patched.setattr(peft.LoraConfig, "save_pretrained", dying(peft.LoraConfig.save_pretrained))
            patched.setattr(Path, "unlink", dying(Path.unlink))
            patched.setattr(Path, "replace", dying(Path.replace))
            with pytest.raises(Killed):
                export_peft(new, folder)
        torch.manual_seed(0)
        again = Net()
        try:
            import_peft(again, folder)
        except FileNotFoundError:
            seen.append("none")
        else:
            seen.append("old" if torch.equal(again(x), old(x)) else "mixture")
        assert not list(folder.glob(".*"))
    assert seen == ["old", "old", "old", "none", "none"]
    export_peft(new, folder)
    torch.manual_seed(0)
    again = Net()
    import_peft(again, folder)
    assert torch.equal(again(x), new(x))


def test_different_ranks_and_scalings_become_patterns(tmp_path):
    model = llama()
    add_adapters(model, r"q_proj|k_proj", rank=4, alpha=8)
    model.model.layers[0].self_attn.v_proj = OverParamAdapter.from_linear(
        model.model.layers[0].self_attn.v_proj, rank=2, alpha=3
    )
    export_peft(moved(model), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {r"^model\.layers\.0\.self_attn\.v_proj": 2}
    assert config["alpha_pattern"] == {r"^model\.layers\.0\.self_attn\.v_proj": 3}
    loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert torch.allclose(logits(loaded), logits(model), rtol=0, atol=1e-5)
    again = llama()
    import_peft(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_a_name_that_is_the_end_of_another_means_itself_alone(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.ModuleDict({"proj": nn.Linear(4, 4)})
            self.inner = nn.ModuleDict({"block": nn.ModuleDict({"proj": nn.Linear(4, 4)})})

        def forward(self, x):
            return self.block["proj"](self.inner["block"]["proj"](x))

    torch.manual_seed(0)
    model = Twice()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    add_adapters(model, ["block.proj"], rank=2)
    export_peft(moved(model), tmp_path)
    fresh = Twice()
    fresh.load_state_dict(state)
    loaded = peft.PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    x = torch.randn(3, 4)
    assert torch.allclose(loaded(x), model(x), atol=1e-6)
    assert not hasattr(fresh.inner["block"]["proj"], "lora_A")


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "lora_dropout": 0.2},
        {"r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 5}},
        {"r": 4, "init_lora_weights": "gaussian"},
    ],
)
def test_adapters_of_peft_are_read(options, tmp_path):
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], **options)).eval()
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(str(tmp_path))
    ours = llama()
    added = import_peft(ours, tmp_path)
    ours.eval()
    assert len(added) == 4
    assert all(p.requires_grad == ("lora_" in name) for name, p in ours.named_parameters())
    assert torch.allclose(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    merge_adapters(ours)
    assert torch.allclose(logits(ours), logits(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True, which OverParamAdapter cannot follow"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which may rewrite the base"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"embed_tokens\..*, which is not a LoRA weight of a linear"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_what_is_not_plain_lora_is_refused(options, message, tmp_path):
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**{"target_modules": ["q_proj"], **options}))
    theirs.save_pretrained(str(tmp_path))
    ours = llama()
    with pytest.raises(ValueError, match=message):
        import_peft(ours, tmp_path)
    assert not find_adapters(ours)
    assert all(p.requires_grad for p in ours.parameters())


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is not there"):
        import_peft(llama(), tmp_path)
    theirs = peft.get_peft_model(llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="type 'IA3'; only LORA"):
        import_peft(llama(), tmp_path)
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    theirs.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 2}))
    with pytest.raises(ValueError, match=r"q_proj has rank 4 in .*the config says 2"):
        import_peft(llama(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "from_the_future": 7}))
    with pytest.raises(ValueError, match="from_the_future=7"):
        import_peft(llama(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no linear layer called model\.layers\.0\.self_attn\.q_proj"):
        import_peft(net(), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("lora_B.weight"))
    del tensors[key]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"q_proj has the tensors lora_A\.weight, lora_B\.weight, but"):
        import_peft(llama(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safe_serialization=False"):
        import_peft(llama(), tmp_path)


def test_what_peft_cannot_say_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match="no layer with an OverParamAdapter"):
        export_peft(net(), tmp_path)
    model = net()
    model.head = OverParamAdapter.from_linear(OverParamAdapter.from_linear(model.head, rank=2), rank=2)
    with pytest.raises(ValueError, match="head has an adapter around an adapter"):
        export_peft(model, tmp_path)
    model = net()
    add_adapters(model, "q_proj", rank=2)
    add_adapters(model, "head", kind=TTLoraLinear, rank=2)
    with pytest.raises(ValueError, match="head has an adapter that is no LoRA pair"):
        export_peft(model, tmp_path)
    model = net()
    add_adapters(model, "q_proj", rank=2)
    add_adapters(model, "v_proj", rank=2, dropout=0.1)
    with pytest.raises(ValueError, match=r"dropouts \[0\.0, 0\.1\]"):
        export_peft(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", [export_peft, import_peft])
def test_without_peft_its_format_names_what_to_install(what, tmp_path, monkeypatch):
    model = net()
    add_adapters(model, "q_proj", rank=2)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"needs PEFT: pip install 'tnadapt\[peft\]'"):
        what(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("given", "written"), [(None, "somewhere/base"), ("elsewhere", "elsewhere")])
def test_an_export_names_the_base_that_was_given_or_that_the_model_was_loaded_from(given, written, tmp_path):
    model = net()
    add_adapters(model, "q_proj", rank=2)
    model.config = transformers.LlamaConfig(name_or_path="somewhere/base")
    export_peft(model, tmp_path, base_model=given)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == written


def test_a_full_disk_leaves_the_older_file_and_nothing_beside_it(tmp_path, monkeypatch):
    model = nn.ModuleDict({"q": OverParamAdapter.from_linear(nn.Linear(8, 8), rank=2)})
    save_adapters(model, tmp_path / "adapters.safetensors")
    before = (tmp_path / "adapters.safetensors").read_bytes()

    def full(tensors, file, metadata):
        file.write_bytes(b"the beginning")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_adapters(model, tmp_path / "adapters.safetensors")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"adapters.safetensors": before}


@pytest.mark.parametrize("about", [{}, {"about": "{"}])
def test_a_damaged_header_is_an_error_that_says_so(about, tmp_path):
    save_file(
        {"q_proj.lora_A.weight": torch.ones(2)},
        tmp_path / "file",
        {"format": "tnadapt.adapters", "version": "1", **about},
    )
    with pytest.raises(ValueError, match=r"the header of .*file is damaged"):
        load_adapters(Net(), tmp_path / "file")


def test_folders_that_a_file_needs_are_made(tmp_path):
    model = net()
    add_adapters(model, "q_proj", rank=2)
    save_adapters(model, file := tmp_path / "a" / "folder" / "of.safetensors")
    again = net()
    load_adapters(again, file)
    assert find_adapters(again).keys() == find_adapters(model).keys()


@pytest.mark.parametrize(("count", "said"), [(2, "q0, q1"), (3, "q0, q1, q2"), (5, "q0, q1, q2 and 2 more")])
def test_of_many_names_an_error_says_some(count, said):
    layers = nn.ModuleDict({f"q{k}": nn.Linear(4, 4) for k in range(count)})
    with pytest.raises(ValueError, match=f"no linear layer called nobody; .* look like {said}$"):
        add_adapters(layers, ["nobody"], rank=2)
