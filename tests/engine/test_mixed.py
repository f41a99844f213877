"""Different factorizations for different matrices, and matrices that are not LoRA's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import contract
from torch import Tensor, nn

from tnadapt import (
    CP,
    MPO,
    SVD,
    Factorization,
    LoraOver,
    OverParamAdapter,
    Static,
    TaylorRuntime,
    Tucker,
    find_lora_matrices,
    finders,
    plan,
)
from tnadapt.assignment import describe_factorizations
from tnadapt.finders import Found

from .models import backward, llama, same, trainable, values, when_lent


class Layers(nn.Module):
    """Four adapters one after the other; the first has a factorization for each side."""

    OWN = ({"A": MPO(order=5), "B": CP()}, SVD(), Tucker(), MPO(order=3, gauge="identity"))

    def __init__(self, own: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            OverParamAdapter.from_linear(
                nn.Linear(12, 12, dtype=torch.float64), rank=4, alpha=8, factorization=factorization if own else None
            )
            for factorization in self.OWN
        )
        for layer in self.layers:
            nn.init.normal_(layer.lora_B.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (model(x) - x).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def stepped_by_autograd(model: nn.Module, over: LoraOver, steps: int, make: Any, loss: Any) -> dict[str, Tensor]:
    """Train a copy of the model through the same cores, whose gradients autograd takes through the independent contraction."""
    oracle = copy.deepcopy(model)
    matrices = {name: (m.factorization, m.shape) for name, m in over.matrices.items()}
    modules = dict(oracle.named_parameters())
    raw = {id(p): n for n, p in model.named_parameters()}
    cores: dict[str, list[nn.Parameter]] = {}
    for name, (factorization, _) in matrices.items():
        assert factorization is not None
        parameter = modules[raw[id(over.matrices[name].parameter)]]
        value = parameter.detach().reshape(over.matrices[name].shape)
        cores[name] = [nn.Parameter(core.clone()) for core in factorization.unfold(value)]
    optimizer = make([core for chain in cores.values() for core in chain])
    for step in range(steps):
        optimizer.zero_grad()
        replaced = {}
        for name, (factorization, _) in matrices.items():
            where = raw[id(over.matrices[name].parameter)]
            replaced[where] = contract(factorization, cores[name]).reshape(modules[where].shape)
        loss(lambda *args, used=replaced, **kw: torch.func.functional_call(oracle, used, args, kw), step).backward()
        optimizer.step()
    return {
        raw[id(over.matrices[name].parameter)]: contract(f, cores[name])
        .detach()
        .reshape(over.matrices[name].parameter.shape)
        for name, (f, _) in matrices.items()
        if f is not None
    }


MAKERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
}


@pytest.mark.parametrize("make", MAKERS)
def test_four_factorizations_on_four_layers_equal_autograd(make: str) -> None:
    model = Layers()
    optimizer = MAKERS[make](trainable(model))
    over = LoraOver(model, optimizer)
    labels = [m.factorization.label for m in over.matrices.values() if m.factorization is not None]
    assert labels == [
        *("MPO(order=5)", CP().label),
        *("SVD()",) * 2,
        *(Tucker().label,) * 2,
        *("MPO(order=3, gauge=identity)",) * 2,
    ]
    wanted = stepped_by_autograd(model, over, 6, MAKERS[make], loss_of)
    train(model, optimizer, range(6))
    for name, value in wanted.items():
        assert torch.allclose(dict(model.named_parameters())[name], value, rtol=1e-9, atol=1e-11), name


def test_a_mixed_run_is_resumed_bit_for_bit() -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, LoraOver]:
        model = Layers()
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        return model, optimizer, LoraOver(model, optimizer, None, TaylorRuntime(top_n=4, split=2, every=2))

    model, optimizer, over = start()
    train(model, optimizer, range(3))
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(3, 7))
    other, its_optimizer, its_over = start()
    other.load_state_dict(kept[0])
    its_optimizer.load_state_dict(kept[1])
    train(other, its_optimizer, range(3, 7))
    assert same(values(model), values(other))
    assert its_over.history == over.history


def test_patterns_groups_and_functions_choose() -> None:
    def labels(given: Any) -> list[str]:
        model = Layers(own=False)
        over = LoraOver(model, torch.optim.SGD(trainable(model), lr=1e-2), given)
        found = [m.factorization.label for m in over.matrices.values() if m.factorization is not None]
        over.detach()
        return found

    assert labels({r"layers\.0\.": MPO(order=4), "layers.*.B": SVD(), "": Tucker()}) == [
        *("MPO(order=4)",) * 2,
        *(Tucker().label, "SVD()") * 3,
    ]
    assert labels(lambda matrix: SVD() if matrix.kind == "A" else MPO(order=4)) == ["SVD()", "MPO(order=4)"] * 4


def test_a_given_factorization_goes_before_that_of_an_adapter() -> None:
    model = Layers()
    over = LoraOver(model, torch.optim.SGD(trainable(model), lr=1e-2), {r"layers\.0": SVD()})
    labels = [m.factorization.label for m in over.matrices.values() if m.factorization is not None]
    assert labels[:4] == ["SVD()"] * 4
    assert labels[4] == Tucker().label


def test_what_is_said_of_a_run_names_each_factorization_once() -> None:
    over = LoraOver(model := Layers(), torch.optim.SGD(trainable(model), lr=1e-2))
    named = f"MPO(order=5) and {CP().label} and SVD() and {Tucker().label} and MPO(order=3, gauge=identity)"
    assert repr(over).startswith(f"LoraOver({named}, ")


def test_matrices_without_a_factorization_are_described_by_those_of_the_others() -> None:
    model = Layers()
    for layer in (model.layers[0], model.layers[3]):
        layer.factorization = None
    assert describe_factorizations(find_lora_matrices(model)[0]) == f"SVD() and {Tucker().label}"
    assert describe_factorizations(find_lora_matrices(Layers(own=False))[0]) == ""


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        (None, ValueError, r"layers.0.A has no factorization"),
        ({"nobody": SVD()}, ValueError, "has no factorization"),
        ({"": SVD(), "nobody": SVD()}, ValueError, "'nobody' fits none of the 8 matrices"),
        ({"(": SVD()}, ValueError, r"'\(' is neither a group nor a regular expression"),
        ({"": "svd"}, TypeError, r"factorization\[''\] is 'svd'"),
        ({3: SVD()}, TypeError, "the key 3"),
        (lambda matrix: "svd", TypeError, "the factorization of layers.0.A is a str"),
        ({"": MPO(sites=[(2, 3), (2, 4)])}, ValueError, "multiply to"),
    ],
)
def test_choices_that_mean_nothing(given: Any, kind: type[Exception], said: str) -> None:
    model = Layers(own=False)
    with pytest.raises(kind, match=said):
        LoraOver(model, torch.optim.SGD(trainable(model), lr=1e-2), given)
    assert LoraOver.of(model) is None


def test_a_plan_of_a_mixed_model() -> None:
    table = plan(Layers(), None)
    over = LoraOver(model := Layers(), torch.optim.SGD(trainable(model), lr=1e-2))
    assert table.trained_parameters == over.trained_parameters
    assert "SVD()" in str(table)
    assert "MPO(order=5)" in str(table)


# -- other matrices ---------------------------------------------------------------------------------------------------


def small_model(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return transformers.BertForMaskedLM(config).double()
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).double()


def language_loss(call: Any, step: int) -> Tensor:
    ids = torch.randint(1, 32, (2, 6), generator=torch.Generator().manual_seed(step))
    return call(input_ids=ids, labels=ids.flip(0)).loss


@pytest.mark.parametrize("factorization", [MPO(order=3), SVD(), Tucker()], ids=lambda f: f.label)
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_full_weights_equal_autograd_and_save_as_ever(kind: str, factorization: Factorization, tmp_path: Any) -> None:
    """OPF: whole weight matrices are trained through cores."""
    model = small_model(kind)
    which = r"query|value|dense" if kind == "bert" else r"\.(q|v|wi|wo)$"
    chosen = {id(f.owner.weight) for f in finders.full_weights(which)(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    make = MAKERS["AdamW"]
    optimizer = make(trainable(model))
    over = LoraOver(model, optimizer, factorization, matrices=finders.full_weights(which))
    assert len(over.matrices) >= 4
    wanted = stepped_by_autograd(model, over, 4, make, language_loss)
    for step in range(4):
        optimizer.zero_grad()
        language_loss(model, step).backward()
        optimizer.step()
    for name, value in wanted.items():
        assert torch.allclose(dict(model.named_parameters())[name], value, rtol=1e-9, atol=1e-11), name
    over.fold()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert same(model.state_dict(), again.state_dict())


def test_lora_of_convolutions_and_embeddings() -> None:
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 12)
            self.conv = nn.Conv1d(12, 6, 3, padding=1)

        def forward(self, ids: Tensor) -> Tensor:
            return self.conv(self.words(ids).transpose(1, 2))

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["words", "conv"], init_lora_weights=False)
    model = peft.get_peft_model(Net(), config).double()
    make = MAKERS["SGD"]
    optimizer = make(trainable(model))
    finder = finders.together(finders.embedding_lora, finders.convolution_lora)
    over = LoraOver(model, optimizer, MPO(order=3), matrices=finder)
    assert {name: m.shape for name, m in over.matrices.items()} == {
        "words.A": (4, 20), "words.B": (12, 4), "conv.A": (4, 36), "conv.B": (6, 4),
    }  # fmt: skip

    def loss(call: Any, step: int) -> Tensor:
        return call(torch.arange(8).view(2, 4) + step).square().mean() / 50

    wanted = stepped_by_autograd(model, over, 4, make, loss)
    for step in range(4):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    for name, value in wanted.items():
        assert torch.allclose(dict(model.named_parameters())[name], value, rtol=1e-9, atol=1e-11), name


def test_bare_parameters_by_a_finder_of_ones_own() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.left = nn.Parameter(torch.randn(6, 8, dtype=torch.float64))
            self.right = nn.Parameter(torch.randn(8, 6, dtype=torch.float64))

    def finder(model: nn.Module) -> Iterator[Found]:
        for attribute in ("left", "right"):
            yield Found(attribute, model, attribute)

    model = Bare()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=3), matrices=finder)
    (model.left @ model.right).square().sum().backward()
    optimizer.step()
    assert over.step == 1
    assert over.changed_outside() == ()
    same_by_name = finders.named_parameters("left|right")
    assert [found.name for found in same_by_name(model)] == ["left", "right"]


WRONG: dict[str, tuple[Any, str]] = {
    "a name twice": ([("w", "a"), ("w", "b")], "the name w twice"),
    "a parameter twice": ([("v", "a"), ("w", "a")], "v twice, the second time as w"),
    "a vector": ([("w", "vector")], r"w has the shape \(3,\); only matrices"),
    "no parameter": ([("w", "name")], "Odd.name is not a parameter"),
    "a frozen one": ([("w", "frozen")], "w is frozen"),
    "one that is not there": ([("w", "nothing")], "Odd.nothing is not a parameter"),
    "one that the optimizer does not hold": ([("w", "b")], "the optimizer does not hold"),
}


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
        self.vector, self.name = nn.Parameter(torch.ones(3)), "odd"
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)


@pytest.mark.parametrize("case", WRONG)
def test_finders_that_find_what_cannot_be_trained(case: str) -> None:
    found, said = WRONG[case]
    model = Odd()
    optimizer = torch.optim.SGD([model.a, model.vector], lr=1e-2)
    with pytest.raises(ValueError, match=said):
        LoraOver(model, optimizer, SVD(), matrices=lambda m: [Found(name, m, attribute) for name, attribute in found])
    assert LoraOver.of(model) is None


def test_a_gauge_that_is_aligned_with_the_gradient_gets_it() -> None:
    model = llama(torch.float64, layers=1, zero_start=True)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    over = LoraOver(model, optimizer, MPO(order=4, gauge="gradient"), Static(r"\.B$"))
    backward(model, 0)
    gradients = {name: m.parameter.grad.clone() for name, m in over.matrices.items() if name.endswith(".B")}
    seen: dict[str, list[Tensor]] = {}

    def look() -> None:
        seen.update({n: [c.clone() for c in e["cores"]] for n, e in over.state_dict()["cores"].items()})

    when_lent(over, look)
    optimizer.step()
    for name, gradient in gradients.items():
        wanted = MPO(order=4, gauge="gradient").unfold(torch.zeros_like(gradient), gradient)
        assert all(torch.allclose(a, b) for a, b in zip(seen[name], wanted, strict=True)), name
