"""Which matrices are found, what they are called and grouped by, and what is skipped and why."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tnadapt import MPO, SVD, LoraOver, OverParamAdapter, TrainedMatrix, find_lora_matrices
from tnadapt.finders import lora_pairs
from tnadapt.matrices import canonical_name

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

LLAMA = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=False,
)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def llama(**options):
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    return get_peft_model(LlamaForCausalLM(copy.deepcopy(LLAMA)), LoraConfig(**config))


def reasons(skipped) -> dict[str, str]:
    return {one.name: one.reason for one in skipped}


def test_every_pair_of_a_llama():
    model = llama()
    found, skipped = find_lora_matrices(model)
    expected = [
        f"model.layers.{k}.{'self_attn' if module in ATTENTION else 'mlp'}.{module}.{side}"
        for k in range(2)
        for module in [*ATTENTION, *MLP]
        for side in "AB"
    ]
    assert list(found) == expected
    assert skipped == []
    parameters = dict(model.named_parameters())
    for name, matrix in found.items():
        assert matrix.parameter is parameters[f"base_model.model.{name[:-2]}.lora_{name[-1]}.default.weight"]
        assert matrix.name == name
        assert matrix.kind == name[-1]
        assert matrix.module == name[:-2]
        assert matrix.layer == int(name.split(".")[2])
        assert matrix.shape == tuple(matrix.parameter.shape)
        assert matrix.shape["AB".index(matrix.kind)] == 4
        assert not matrix.expanded
        assert matrix.gradient is None


def test_groups_are_module_types_and_sides():
    found, _ = find_lora_matrices(llama())
    groups: dict[str, list[str]] = {}
    for matrix in found.values():
        groups.setdefault(matrix.group, []).append(matrix.name)
    assert len(groups) == 14
    assert groups["model.layers.*.self_attn.q_proj.A"] == [f"model.layers.{k}.self_attn.q_proj.A" for k in range(2)]
    assert {len(names) for names in groups.values()} == {2}


def test_groups_can_be_given():
    found, _ = find_lora_matrices(llama(), groups=lambda matrix: f"layer {matrix.layer} {matrix.kind}")
    assert {matrix.group for matrix in found.values()} == {"layer 0 A", "layer 0 B", "layer 1 A", "layer 1 B"}


def test_stacks_of_a_t5_are_different_groups():
    config = T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=2,
        decoder_start_token_id=0,
    )
    model = get_peft_model(T5ForConditionalGeneration(config), LoraConfig(r=4, target_modules=["q", "v"]))
    found, _ = find_lora_matrices(model)
    sizes: dict[str, int] = {}
    for matrix in found.values():
        sizes[matrix.group] = sizes.get(matrix.group, 0) + 1
    assert sizes == {
        f"{stack}.{module}.{side}": count
        for stack, count in {
            "encoder.block.*.layer.*.SelfAttention": 2,
            "decoder.block.*.layer.*.SelfAttention": 3,
            "decoder.block.*.layer.*.EncDecAttention": 3,
        }.items()
        for module in "qv"
        for side in "AB"
    }


def test_adapters_that_are_not_active_are_skipped():
    model = llama()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    found, skipped = find_lora_matrices(model)
    assert len(found) == 28
    assert reasons(skipped) == {
        f"model.layers.{k}.self_attn.q_proj.second.{side}": "adapter 'second' is not active"
        for k in range(2)
        for side in "AB"
    }
    model.set_adapter("second")
    found, skipped = find_lora_matrices(model)
    assert list(found) == [f"model.layers.{k}.self_attn.q_proj.second.{side}" for k in range(2) for side in "AB"]
    assert {reason for name, reason in reasons(skipped).items() if "layers.0" in name} == {
        "adapter 'default' is not active"
    }
    assert found["model.layers.1.self_attn.q_proj.second.A"].shape == (2, 16)


def test_several_active_adapters():
    model = llama(target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    found, skipped = find_lora_matrices(model)
    assert skipped == []
    assert len(found) == 8
    assert len({matrix.group for matrix in found.values()}) == 4


def test_embeddings_are_skipped():
    model = llama(target_modules=["embed_tokens", "q_proj"])
    found, skipped = find_lora_matrices(model)
    assert len(found) == 4
    assert set(reasons(skipped)) == {"model.embed_tokens.A", "model.embed_tokens.B"}
    assert "embedding" in reasons(skipped)["model.embed_tokens.A"]


def test_convolutions_are_skipped():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3)))

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["conv", "head"]))
    found, skipped = find_lora_matrices(model)
    assert list(found) == ["head.A", "head.B"]
    assert set(reasons(skipped)) == {"conv.A", "conv.B"}
    assert "Conv2d, not a linear layer" in reasons(skipped)["conv.A"]


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}, {"lora_dropout": 0.1}]
)
def test_kinds_of_lora(options):
    found, skipped = find_lora_matrices(llama(**options))
    assert len(found) == 28
    assert skipped == []


def test_rank_pattern():
    found, _ = find_lora_matrices(llama(rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 8}))
    assert found["model.layers.0.self_attn.q_proj.A"].shape == (2, 16)
    assert found["model.layers.0.mlp.up_proj.B"].shape == (24, 4)
    assert found["model.layers.1.mlp.up_proj.B"].shape == (24, 8)


def test_frozen_matrices_are_skipped():
    model = llama()
    for name, parameter in model.named_parameters():
        if "layers.0" in name and "lora_A" in name:
            parameter.requires_grad_(False)
    found, skipped = find_lora_matrices(model)
    assert len(found) == 21
    assert len(skipped) == 7
    assert set(reasons(skipped).values()) == {"it is frozen (requires_grad is False)"}


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = OverParamAdapter.from_linear(nn.Linear(6, 6), rank=2)
        self.two = OverParamAdapter.from_linear(nn.Linear(6, 6), rank=2)


def test_one_parameter_in_two_places():
    model = Pairs()
    model.two.lora_A.weight = model.one.lora_A.weight
    found, skipped = find_lora_matrices(model)
    assert list(found) == ["one.A", "one.B", "two.B"]
    assert reasons(skipped) == {"two.A": "it is the same parameter as one.A"}


def test_one_module_in_two_places():
    model = Pairs()
    model.two = model.one
    found, skipped = find_lora_matrices(model)
    assert list(found) == ["one.A", "one.B"]
    assert set(reasons(skipped)) == {"two.A", "two.B"}


def test_two_parameters_of_one_memory():
    model = Pairs()
    model.two.lora_A.weight = nn.Parameter(model.one.lora_A.weight.detach())
    found, skipped = find_lora_matrices(model)
    assert list(found) == ["one.B", "two.B"]
    assert "shares storage with two.lora_A.weight" in reasons(skipped)["one.A"]
    assert "shares storage with one.lora_A.weight" in reasons(skipped)["two.A"]


def test_parameters_side_by_side_in_one_buffer_are_no_obstacle():
    model = Pairs()
    buffer = torch.randn(24)
    model.one.lora_A.weight = nn.Parameter(buffer[:12].view(2, 6))
    model.two.lora_A.weight = nn.Parameter(buffer[12:].view(2, 6))
    found, skipped = find_lora_matrices(model)
    assert len(found) == 4
    assert skipped == []


def test_meta_device():
    with torch.device("meta"):
        model = Pairs()
    found, skipped = find_lora_matrices(model)
    assert [m.shape for m in found.values()] == [(2, 6), (6, 2)] * 2
    assert skipped == []


def test_a_pair_of_ones_own():
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A = nn.Linear(6, 2, bias=False)
            self.lora_B = nn.Linear(2, 6, bias=False)

    found, _ = find_lora_matrices(nn.Sequential(Mine(), Mine()))
    assert list(found) == ["0.A", "0.B", "1.A", "1.B"]
    assert found["1.A"].group == "*.A"
    lone, _ = find_lora_matrices(Mine())
    assert list(lone) == ["A", "B"]
    assert lone["A"].layer is None


def test_no_lora():
    assert find_lora_matrices(nn.Linear(3, 3)) == ({}, [])


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        ("base_model.model.model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("module.base_model.model.layers.0.q_proj", "layers.0.q_proj"),
        ("_orig_mod.module.layers.0._checkpoint_wrapped_module.q_proj", "layers.0.q_proj"),
        ("module._orig_mod.base_model.model.x", "x"),
        ("_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.q", "layers.0.q"),
        ("encoder.module.q", "encoder.module.q"),
        ("", ""),
    ],
)
def test_canonical_names(raw, canonical):
    assert canonical_name(raw) == canonical


def test_wrappers_change_no_name():
    model = llama()
    names = list(find_lora_matrices(model)[0])
    assert list(find_lora_matrices(torch.compile(model, backend="eager"))[0]) == names
    assert list(find_lora_matrices(torch.nn.DataParallel(model))[0]) == names
    assert list(find_lora_matrices(model.base_model.model)[0]) == names


def test_gradient_without_the_scale():
    parameter = nn.Parameter(torch.zeros(2, 3))
    parameter.grad = torch.full((2, 3), 8.0)
    matrix = TrainedMatrix("x.A", "A", "", "x", None, nn.Linear(3, 2), "weight", parameter)
    assert matrix.gradient is parameter.grad
    matrix.grad_scale = torch.tensor(4.0)
    assert torch.equal(matrix.gradient, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("how", ["parametrization", "weight_norm", "pruned"])
def test_a_weight_that_is_computed_from_others_is_not_left_out_in_silence(how):
    layer = OverParamAdapter.from_linear(nn.Linear(12, 8), rank=4)
    if how == "parametrization":
        torch.nn.utils.parametrizations.weight_norm(layer.lora_A)
    elif how == "weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            torch.nn.utils.weight_norm(layer.lora_A)
    else:
        prune.random_unstructured(layer.lora_A, "weight", 0.5)
    found, skipped = find_lora_matrices(nn.ModuleDict({"q": layer}))
    assert list(found) == ["q.B"]
    assert [(s.name, s.is_left_out) for s in skipped] == [("q.A", True)]
    assert "computed from other parameters" in skipped[0].reason
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="^A: left as plain LoRA, since it is computed from other parameters"):
        over = LoraOver(layer, optimizer, MPO(order=3))
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.ones(2, 12)).square().sum().backward()
        optimizer.step()
    assert over.expanded == ("B",)


@pytest.mark.parametrize(
    ("groups", "said"), [("q_proj", "groups='q_proj': give a function"), (lambda matrix: 3, "groups gave 3 for 0.A")]
)
@pytest.mark.parametrize("finder", [None, lora_pairs])
def test_groups_that_are_no_function_to_strings(groups: Any, said: str, finder: Any) -> None:
    model = nn.Sequential(OverParamAdapter.from_linear(nn.Linear(6, 6), rank=2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(TypeError, match=said):
        LoraOver(model, optimizer, SVD(), groups=groups, matrices=finder)
    assert LoraOver.of(model) is None
