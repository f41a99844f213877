"""α-LoRA: rows of frozen weights, scaled and trained beside any adapter."""

from __future__ import annotations

import copy
import functools
import io
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from tnadapt import MPO, LoraOver, OverParamAdapter, RowRescale, TTLoraLinear, add_adapters, merge_adapters

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Net(nn.Module):
    def __init__(self, width: int = 8, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=bias)
        self.second = nn.Linear(width, width // 2, bias=bias)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def net(dtype=torch.float64, bias: bool = True, frozen: bool = True) -> Net:
    torch.manual_seed(0)
    return Net(bias=bias).to(dtype).requires_grad_(not frozen)


def sgd(lr: float = 0.1):
    return lambda alphas: torch.optim.SGD(alphas, lr=lr)


def adamw(lr: float = 0.05):
    return lambda alphas: torch.optim.AdamW(alphas, lr=lr, weight_decay=0.0)


def scattered(rescale: RowRescale, seed: int = 1) -> RowRescale:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for alpha in rescale.alphas.values():
            alpha.copy_(0.5 + torch.rand(alpha.shape, generator=generator))
    return rescale


def by_hand(model: Net, alphas, x):
    """The model with `diag(α) W` in place of each weight."""
    hidden = nn.functional.linear(x, alphas["first"][:, None] * model.first.weight, model.first.bias)
    return nn.functional.linear(torch.tanh(hidden), alphas["second"][:, None] * model.second.weight, model.second.bias)


X = torch.linspace(-1, 1, 6 * 8, dtype=torch.float64).reshape(6, 8)
EVERY_LAYER = ".*"


# -- what it computes -------------------------------------------------------------------------------------------------


@given(
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 9),
    batch=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from(list(DTYPES)),
    bias=st.booleans(),
)
def test_output_is_that_of_the_scaled_weight_and_the_same_bias(d_in, d_out, batch, dtype, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d_in, d_out, bias=bias, dtype=dtype)).requires_grad_(False)
    x = torch.randn(*batch, d_in, dtype=dtype)
    before = model(x)
    rescale = RowRescale(model, EVERY_LAYER)
    assert torch.equal(model(x), before), "α starts at 1, where nothing changes, not even a bit"
    alpha = scattered(rescale).alphas["0"]
    assert alpha.dtype == torch.promote_types(dtype, torch.float32)
    weight = alpha.double()[:, None] * model[0].weight.double()
    expected = nn.functional.linear(x.double(), weight, model[0].bias.double() if bias else None)
    assert model(x).dtype == dtype
    assert torch.allclose(model(x).double(), expected, rtol=0, atol=DTYPES[dtype] * 4)


@given(
    batch=st.lists(st.integers(1, 3), max_size=3),
    dtype=st.sampled_from(list(DTYPES)),
    bias=st.booleans(),
)
def test_gradient_of_the_input_is_that_of_the_scaled_weight(batch, dtype, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=bias, dtype=dtype)).requires_grad_(False)
    alpha = scattered(RowRescale(model, EVERY_LAYER)).alphas["0"]
    x = torch.randn(*batch, 5, dtype=dtype, requires_grad=True)
    direction = torch.randn(*batch, 4, dtype=dtype)
    (got,) = torch.autograd.grad((direction * model(x).tanh()).sum(), x)
    y = nn.functional.linear(
        x.double(), alpha.double()[:, None] * model[0].weight.double(), model[0].bias.double() if bias else None
    )
    (expected,) = torch.autograd.grad((direction.double() * y.tanh()).sum(), x)
    assert torch.allclose(got.double(), expected.double(), rtol=0, atol=DTYPES[dtype] * 4)


@pytest.mark.parametrize("bias", [False, True])
def test_scaling_takes_no_memory_between_the_steps_of_alpha(bias):
    """The output of the layer is scaled where it lies. A step of α keeps it, since the gradient of α needs it."""
    model = net(bias=bias)
    outputs = []
    model.second.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    rescale = scattered(RowRescale(model, "second", optimizer=sgd()))
    x = X.clone().requires_grad_()
    assert model(x).data_ptr() == outputs[-1].data_ptr()
    rescale.step(lambda: outputs.append(model(x)) or outputs[-1].sum())
    assert outputs[-1].data_ptr() != outputs[-2].data_ptr()


@given(seed=st.integers(0, 100), bias=st.booleans())
def test_gradient_of_alpha_equals_autograd_through_the_scaled_weight(seed, bias):
    model = net(bias=bias)
    rescale = scattered(RowRescale(model, EVERY_LAYER, optimizer=sgd(1.0)), seed)
    before = {name: alpha.clone().requires_grad_() for name, alpha in rescale.alphas.items()}
    loss = by_hand(model, before, X).square().mean()
    expected = torch.autograd.grad(loss, list(before.values()))
    got = rescale.step(lambda: model(X).square().mean())
    assert torch.allclose(got, loss.detach(), rtol=1e-12)
    for (name, alpha), gradient in zip(rescale.alphas.items(), expected, strict=True):
        assert torch.allclose(before[name] - alpha, gradient, rtol=1e-9, atol=1e-13)


def test_alpha_of_bfloat16_layers_gathers_steps_that_bfloat16_would_lose():
    """Steps of 1e-4 from 1 round back to 1 in bfloat16, for ever."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 1, bias=False, dtype=torch.bfloat16)).requires_grad_(False)
    x = torch.rand(4, 16, dtype=torch.bfloat16)
    scale = float(model(x).float().sum())
    rescale = RowRescale(model, EVERY_LAYER, optimizer=sgd(1e-4))
    for _ in range(100):
        rescale.step(lambda: -model(x).float().sum() / scale)
    assert rescale.alphas["0"].item() == pytest.approx(1.01, abs=1e-4)


def test_the_best_scale_of_a_shrunk_target_is_found():
    """Linear regression on `y = diag(s) W x`: the loss separates over rows and is least at α = s; with noise in y, at the
    least-squares quotient `sum y z / sum z²` of each row, z = W x."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False, dtype=torch.float64)).requires_grad_(False)
    x = torch.randn(200, 6, dtype=torch.float64)
    z = model(x)
    shrunk = torch.tensor([0.2, 0.5, 0.8, 1.0, -0.3], dtype=torch.float64)
    for noise in (0.0, 0.3):
        y = z * shrunk + noise * torch.randn_like(z)
        rescale = RowRescale(model, EVERY_LAYER, optimizer=lambda alphas: torch.optim.SGD(alphas, lr=1.0))
        for _ in range(1500):
            rescale.step(lambda y=y: (model(x) - y).square().mean())
        optimum = (y * z).sum(0) / z.square().sum(0)
        assert torch.allclose(rescale.alphas["0"], optimum, rtol=0, atol=1e-8)
        if not noise:
            assert torch.allclose(optimum, shrunk, rtol=0, atol=1e-12)
        rescale.remove()


# -- the period, and what is left alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 20])
def test_alpha_steps_every_t_steps_on_a_batch_of_its_own(every):
    model = net()
    rescale = RowRescale(model, EVERY_LAYER, optimizer=sgd(), every=every)
    drawn = []

    def loss():
        drawn.append(rescale.steps + 1)
        return model(X).square().mean()

    for step in range(1, 61):
        before = {name: alpha.clone() for name, alpha in rescale.alphas.items()}
        returned = rescale.step(loss)
        moved = [not torch.equal(alpha, before[name]) for name, alpha in rescale.alphas.items()]
        assert all(moved) if step % every == 0 else not any(moved)
        assert (returned is None) == (step % every != 0)
    assert drawn == list(range(every, 61, every))
    assert rescale.steps == 60


@pytest.mark.parametrize("every", [1, 20])
def test_a_run_equals_the_one_written_out(every):
    """LoRA's and α's steps in turn, against autograd through weights that are computed by hand."""
    torch.manual_seed(3)
    data = torch.randn(45, 6, 8, dtype=torch.float64)
    fresh = torch.randn(45, 6, 8, dtype=torch.float64)
    model, plain = net(), net()
    add_adapters(model, "first", rank=2)
    nn.init.normal_(model.first.lora_B.weight, std=0.1)
    a, b = (half.weight.detach().clone().requires_grad_() for half in (model.first.lora_A, model.first.lora_B))
    alphas = {
        name: torch.ones(rows, dtype=torch.float64, requires_grad=True) for name, rows in (("first", 8), ("second", 4))
    }

    def reference(x):
        hidden = nn.functional.linear(x, alphas["first"][:, None] * plain.first.weight + b @ a, plain.first.bias)
        return nn.functional.linear(
            torch.tanh(hidden), alphas["second"][:, None] * plain.second.weight, plain.second.bias
        )

    rescale = RowRescale(model, EVERY_LAYER, optimizer=adamw(), every=every)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    theirs, theirs_alpha = torch.optim.AdamW([a, b], lr=0.02), adamw()(list(alphas.values()))
    for k in range(45):
        model(data[k]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        rescale.step(lambda k=k: model(fresh[k]).square().mean())
        reference(data[k]).square().mean().backward()
        theirs.step()
        for p in (a, b, *alphas.values()):
            p.grad = None
        if (k + 1) % every == 0:
            reference(fresh[k]).square().mean().backward()
            theirs_alpha.step()
            for p in (a, b, *alphas.values()):
                p.grad = None
    assert torch.allclose(model(X), reference(X), rtol=1e-9, atol=1e-11)
    assert all(torch.allclose(rescale.alphas[n], alpha, rtol=1e-9) for n, alpha in alphas.items())
    assert not torch.allclose(model(X), plain(X), atol=1e-2)


def test_gradients_of_the_adapter_and_what_is_trained_stay_as_they_are():
    model = net()
    add_adapters(model, "first", rank=2)
    model.second.bias.requires_grad_(True)
    rescale = RowRescale(model, EVERY_LAYER, optimizer=sgd())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model(X).sum().backward()
    accumulated = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert accumulated.keys() == trained
    rescale.step(lambda: model(X).square().sum())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert all(torch.equal(p.grad, accumulated[n]) for n, p in model.named_parameters() if p.grad is not None)
    assert not any(alpha.requires_grad or alpha.grad is not None for alpha in rescale.alphas.values())


def test_parameters_and_state_dict_of_the_model_do_not_change():
    model = net()
    names, keys = [n for n, _ in model.named_parameters()], list(model.state_dict())
    rescale = RowRescale(model, EVERY_LAYER, optimizer=sgd())
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == keys
    before = model(X)
    scattered(rescale)
    assert not torch.allclose(model(X), before, atol=1e-2)
    rescale.remove()
    assert torch.equal(model(X), before)
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="cannot remove: this RowRescale is removed already"):
        rescale.remove()


def test_no_activation_is_kept_for_alpha_between_its_steps():
    """In the adapter's steps, the output of a scaled layer is saved by nobody, so the graph of a frozen layer is empty."""
    model = net()
    RowRescale(model, EVERY_LAYER, optimizer=sgd())
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        model(X)
        assert saved == []
        model(X.clone().requires_grad_())
    assert saved.count((6, 4)) == 0, "the last layer's output is not needed"


# -- kinds of layers --------------------------------------------------------------------------------------------------


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


IDS = torch.arange(12).reshape(2, 6)


def lora(model, **options):
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)).eval()
    torch.manual_seed(5)
    for name, p in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    return made


def test_peft_layers_have_their_base_scaled_and_nothing_else(tmp_path):
    model = lora(llama(attention_bias=True))
    rescale = scattered(RowRescale(model, optimizer=sgd()))
    assert list(rescale.alphas) == [f"model.layers.{k}.self_attn.{p}_proj" for k in range(2) for p in "qv"]
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    x = torch.randn(3, 32)
    alpha = rescale.alphas["model.layers.1.self_attn.q_proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = alpha[:, None] * layer.base_layer.weight + layer.scaling["default"] * b @ a
    assert torch.allclose(layer(x), nn.functional.linear(x, weight, layer.base_layer.bias), atol=1e-5)
    model.save_pretrained(str(tmp_path))
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "lora_" not in key]


def test_alpha_then_peft_merge_into_one_plain_model():
    model = lora(llama(attention_bias=True))
    rescale = scattered(RowRescale(model))
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    assert len(rescale.merge()) == 4
    with torch.no_grad():
        assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-5)
        merged = model.merge_and_unload()
        assert torch.allclose(merged(input_ids=IDS).logits, expected, atol=1e-5)


def test_a_merge_of_peft_in_the_wrong_order_is_noticed():
    model = lora(llama())
    rescale = scattered(RowRescale(model))
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="PEFT has merged an adapter into a weight"):
        model(input_ids=IDS)
    with pytest.raises(ValueError, match=r"q_proj: PEFT has merged.*unmerge_adapter\(\) first"):
        rescale.merge()
    model.unmerge_adapter()
    assert rescale.merge()


@pytest.mark.parametrize("kind", [OverParamAdapter, TTLoraLinear])
def test_our_adapters_have_their_base_scaled_and_merge_after_alpha(kind):
    model = net()
    for _ in range(2):  # an adapter around an adapter, too
        model.first = kind.from_linear(model.first, rank=2)
        nn.init.normal_(next(iter(model.first.trained_tensors().values())), std=0.3)
    rescale = scattered(RowRescale(model))
    assert list(rescale.alphas) == ["first"]
    base = model.first.base.base
    update = model.first.delta_weight() + model.first.base.delta_weight()
    weight = rescale.alphas["first"][:, None] * base.weight + update
    assert torch.allclose(model.first(X), nn.functional.linear(X, weight, base.bias), rtol=1e-11, atol=1e-12)
    expected = model(X)
    with pytest.raises(ValueError, match=r"first: the base has forward hooks.*RowRescale"):
        merge_adapters(model)
    rescale.merge()
    merge_adapters(model)
    assert type(model.first) is nn.Linear
    assert torch.allclose(model(X), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_layers_are_scaled_and_never_merged(bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    if bits == 4:
        layer = bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float32)
    else:
        layer = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    model = nn.Sequential(layer).to("cpu").requires_grad_(False)
    x = torch.randn(16, 64)
    with torch.no_grad():
        before, bias = model(x).float(), layer.bias.float()
    rescale = RowRescale(model, EVERY_LAYER, optimizer=adamw(0.02))
    target = 0.5 * (before - bias) + bias
    losses = [float(rescale.step(lambda: (model(x).float() - target).square().mean())) for _ in range(60)]
    alpha = rescale.alphas["0"]
    assert alpha.dtype == torch.float32
    assert torch.allclose(model(x).float(), alpha * (before - bias) + bias, atol=2e-2)
    assert losses[-1] < 0.01 * losses[0]
    assert float((alpha - 0.5).abs().max()) < 0.1
    with pytest.raises(TypeError, match=r"cannot merge α into 0: its weight is a Linear.*Keep α in a file"):
        rescale.merge()
    rescale.remove()


def test_together_with_lora_over():
    """LoraOver trains the pair as it does without α: with α's rate at zero, the run is the same bit for bit."""

    def run(rescaled: bool, lr: float):
        torch.manual_seed(0)
        model = net()
        add_adapters(model, "first", rank=2)
        rescale = RowRescale(model, optimizer=sgd(lr), every=2) if rescaled else None
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        over = LoraOver(model, optimizer, MPO(order=3))
        for _ in range(6):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
            if rescale is not None:
                rescale.step(lambda: model(X).square().mean())
        over.fold()
        return model, rescale

    plain, _ = run(False, 0.0)
    still, _ = run(True, 0.0)
    trained, rescale = run(True, 0.3)
    assert torch.equal(plain(X), still(X))
    assert not torch.allclose(plain(X), trained(X), atol=1e-3)
    assert not torch.allclose(rescale.alphas["first"], torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_step(reentrant):
    def run(checkpointed: bool):
        model = net()
        rescale = RowRescale(model, EVERY_LAYER, optimizer=sgd())
        x = X.clone().requires_grad_()  # as trainers do for reentrant checkpoints

        def loss():
            if not checkpointed:
                return model(x).square().mean()
            return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).square().mean()

        rescale.step(loss)
        return rescale.alphas

    assert all(torch.equal(a, b) for a, b in zip(run(True).values(), run(False).values(), strict=True))


def test_compiled_models_train_the_same():
    def run(compiled: bool):
        torch._dynamo.reset()
        model = net()
        add_adapters(model, "first", rank=2)
        rescale = RowRescale(model, EVERY_LAYER, optimizer=sgd(), every=2)
        call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            call(X).square().mean().backward()
            optimizer.step()
            rescale.step(lambda: call(X).square().mean())
        return model(X).detach()

    assert torch.allclose(run(True), run(False), rtol=1e-12, atol=1e-13)
    assert not torch.allclose(run(False), net()(X), atol=1e-4)


def test_alpha_on_a_compiled_model_that_ran_before_is_noticed():
    torch._dynamo.reset()
    model = net()
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    rescale = RowRescale(compiled, EVERY_LAYER, optimizer=sgd())
    with pytest.raises(RuntimeError, match="attach before a compiled model is first called"):
        rescale.step(lambda: compiled(X).square().mean())


def test_wrapped_models_have_plain_names():
    compiled = torch.compile(net(), backend="eager")
    assert list(RowRescale(compiled, EVERY_LAYER).alphas) == ["first", "second"]


def test_copies_and_pickles_of_a_model_compute_the_same():
    model = net()
    scattered(RowRescale(model, EVERY_LAYER))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(X), model(X))


def test_autocast():
    model = net(torch.float32)
    rescale = RowRescale(model, EVERY_LAYER, optimizer=sgd())

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            y = model(X.float())
        assert y.dtype == torch.bfloat16
        return y.float().square().mean()

    rescale.step(loss)
    assert all(alpha.dtype == torch.float32 and bool((alpha != 1).all()) for alpha in rescale.alphas.values())


# -- merging ----------------------------------------------------------------------------------------------------------


@given(dtype=st.sampled_from(list(DTYPES)), seed=st.integers(0, 100))
def test_merged_weights_are_the_product_rounded_once(dtype, seed):
    model = net(dtype)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    rescale = scattered(RowRescale(model, EVERY_LAYER), seed)
    assert rescale.merge() == ["first", "second"]
    for name, alpha in rescale.alphas.items():
        wide = torch.promote_types(dtype, torch.float32)
        exact = (alpha.to(wide)[:, None] * weights[f"{name}.weight"].to(wide)).to(dtype)
        merged = model.get_submodule(name)
        assert torch.equal(merged.weight, exact)
        assert torch.equal(merged.bias, weights[f"{name}.bias"])
        assert merged.weight.dtype == dtype
    assert not any(m._forward_hooks for m in model.modules())


def test_nothing_is_merged_twice_or_used_after():
    model = net()
    rescale = scattered(RowRescale(model, EVERY_LAYER, optimizer=sgd()))
    expected, state = model(X), rescale.state_dict()
    rescale.merge()
    merged = model.first.weight.clone()
    assert torch.allclose(model(X), expected, rtol=1e-12, atol=1e-13)
    for what, call in (
        ("merge", rescale.merge),
        ("step", lambda: rescale.step(lambda: model(X).sum())),
        ("save", lambda: rescale.save("nowhere")),
        ("load a state", lambda: rescale.load_state_dict(state)),
        ("remove", rescale.remove),
    ):
        with pytest.raises(RuntimeError, match=f"cannot {what}: this RowRescale is merged already"):
            call()
    assert torch.equal(model.first.weight, merged)
    assert "merged" in repr(rescale)


def test_a_weight_that_another_module_uses_is_not_merged():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    model.requires_grad_(False)
    before = model["embed"].weight.clone()
    rescale = scattered(RowRescale(model, "head"))
    with pytest.raises(ValueError, match="cannot merge α into head: a Embedding has the same weight"):
        rescale.merge()
    assert torch.equal(model["embed"].weight, before)
    rescale.remove()


# -- files and states -------------------------------------------------------------------------------------------------


def test_a_file_scales_the_base_and_the_adapted_model_alike(tmp_path):
    file = tmp_path / "alpha.safetensors"
    model = lora(llama())
    rescale = scattered(RowRescale(model))
    rescale.save(file)
    assert {n: tuple(t.shape) for n, t in load_file(file).items()} == {
        n: tuple(a.shape) for n, a in rescale.alphas.items()
    }
    again = lora(llama())
    restored = RowRescale.from_file(again, file)
    assert all(torch.equal(a, rescale.alphas[n]) for n, a in restored.alphas.items())
    plain = llama().requires_grad_(False)
    RowRescale.from_file(plain, file)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
        with model.disable_adapter():
            expected = model(input_ids=IDS).logits
        assert torch.allclose(plain(input_ids=IDS).logits, expected, atol=1e-6)


def test_files_that_do_not_fit_are_refused(tmp_path):
    file, bad = tmp_path / "alpha.safetensors", tmp_path / "bad"
    model = net()
    rescale = RowRescale(model, "first")
    rescale.save(file)
    rescale.remove()
    header = {"format": "tnadapt.row_rescale", "version": "1", "about": json.dumps({})}
    cases = [
        ({"third": torch.ones(8)}, header, "no linear layer called third; .* look like first, second"),
        ({"first": torch.ones(7)}, header, r"α of first has shape \(7,\) in .*has 8 rows"),
        ({"first": torch.ones(8)}, {**header, "format": "x"}, "not a tnadapt.row_rescale file"),
        ({"first": torch.ones(8)}, {**header, "version": "9"}, "version '9'"),
    ]
    for tensors, metadata, message in cases:
        save_file(tensors, bad, metadata=metadata)
        with pytest.raises(ValueError, match=message):
            RowRescale.from_file(model, bad)
    with pytest.raises(FileNotFoundError, match="none is not there"):
        RowRescale.from_file(model, tmp_path / "none")
    assert not any(m._forward_hooks for m in model.modules())
    assert RowRescale.from_file(model, file).alphas


@pytest.mark.parametrize("every", [1, 20])
def test_a_resumed_run_ends_with_the_same_bits(every, tmp_path):
    torch.manual_seed(3)
    data = torch.randn(50, 6, 8, dtype=torch.float64)

    def start():
        model = net()
        add_adapters(model, "first", rank=2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        return model, optimizer, RowRescale(model, EVERY_LAYER, optimizer=adamw(), every=every)

    def train(model, optimizer, rescale, steps):
        for k in steps:
            optimizer.zero_grad()
            model(data[k]).square().mean().backward()
            optimizer.step()
            rescale.step(lambda k=k: model(-data[k]).square().mean())

    torch.manual_seed(7)
    whole = start()
    train(*whole, range(50))
    torch.manual_seed(7)
    half = start()
    train(*half, range(31))
    torch.save([part.state_dict() for part in half], tmp_path / "checkpoint")
    torch.manual_seed(8)
    again = start()
    for part, state in zip(again, torch.load(tmp_path / "checkpoint", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*again, range(31, 50))
    assert torch.equal(again[0](X), whole[0](X))
    assert all(torch.equal(a, whole[2].alphas[n]) for n, a in again[2].alphas.items())
    assert again[2].steps == 50


def test_a_state_that_is_kept_in_memory_stays_that_of_its_step():
    torch.manual_seed(0)
    rescale = RowRescale(net(), EVERY_LAYER, optimizer=adamw(), every=1)

    def step():
        rescale.step(lambda: rescale.model(X).square().mean())

    step()
    kept = rescale.state_dict()
    step()
    after = {name: alpha.clone() for name, alpha in rescale.alphas.items()}
    step()
    rescale.load_state_dict(kept)
    step()
    assert all(torch.equal(alpha, after[name]) for name, alpha in rescale.alphas.items())


@pytest.mark.parametrize("part", ["every", "steps", "alphas", "optimizer"])
def test_damaged_states_are_refused_and_change_nothing(part):
    rescale = scattered(RowRescale(net(), EVERY_LAYER, optimizer=sgd(), every=2))
    state = rescale.state_dict()
    fresh = RowRescale(net(), EVERY_LAYER, optimizer=sgd(), every=2)
    with pytest.raises(ValueError, match=f"the state lacks {part}; it is damaged"):
        fresh.load_state_dict({name: value for name, value in state.items() if name != part})
    broken = {**state, "alphas": {name: alpha / 0 for name, alpha in state["alphas"].items()}}
    with pytest.raises(ValueError, match="α of first holds NaN or infinity in the state"):
        fresh.load_state_dict(broken)
    assert all(torch.equal(alpha, torch.ones_like(alpha)) for alpha in fresh.alphas.values())


def test_states_of_other_runs_are_refused_and_change_nothing():
    rescale = scattered(RowRescale(net(), EVERY_LAYER, optimizer=sgd(), every=2))
    state = copy.deepcopy(rescale.state_dict())
    other = RowRescale(net(), "second", optimizer=sgd(), every=2)
    with pytest.raises(ValueError, match="with first that are not"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="without first of the 2 here"):
        RowRescale(net(), EVERY_LAYER, optimizer=sgd()).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="with an optimizer and there is none here"):
        RowRescale(net(), EVERY_LAYER).load_state_dict(state)
    fresh = RowRescale(net(), EVERY_LAYER, optimizer=sgd(), every=2)
    with pytest.raises(ValueError, match="without an optimizer"):
        fresh.load_state_dict({**state, "optimizer": None})
    with pytest.raises(ValueError, match="version 7"):
        fresh.load_state_dict({**state, "version": 7})
    with pytest.raises(ValueError, match=r"α of first has shape \(3,\)"):
        fresh.load_state_dict({**state, "alphas": {**state["alphas"], "first": torch.ones(3)}})
    assert all(bool((alpha == 1).all()) for alpha in fresh.alphas.values())
    with pytest.warns(UserWarning, match="saved with every=2, this run has every=5"):
        RowRescale(net(), EVERY_LAYER, optimizer=sgd(), every=5).load_state_dict(state)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (net(frozen=False), {"targets": "first"}, "first has no frozen weight: its weight is trained itself"),
        (net(), {}, "no LoRA layers whose base could be scaled; say which layers"),
        (net(), {"targets": "third"}, "'third' matches none of the 2 linear layers, whose names look like first, second"),
        (net(), {"targets": ["first", "third"]}, "no linear layer called third"),
        (net(), {"targets": []}, "an empty list"),
        (net(), {"targets": "("}, r"targets='\(' is not a regular expression"),
        (nn.Sequential(nn.Conv1d(2, 2, 1)).requires_grad_(False), {"targets": "0"}, "the model has no linear layers"),
        (net(), {"targets": "first", "optimizer": "adamw"}, "optimizer is a str; give a function that makes"),
        (net(), {"targets": ["first", "first"]}, "names first more than once"),
        (net(), {"targets": "first", "every": 0}, "every=0: the period"),
        (net(), {"targets": "first", "every": True}, "every=True"),
        (net(), {"targets": "first", "optimizer": lambda a: None}, "optimizer made a NoneType"),
        (net(), {"targets": "first", "optimizer": lambda a: torch.optim.LBFGS(a)}, "LBFGS evaluates"),
        (net(), {"targets": ".*", "optimizer": lambda a: torch.optim.SGD(a[:1])}, "holds 1 parameters that are not exactly the 2"),
        (nn.MultiheadAttention(8, 2).requires_grad_(False), {"targets": "out_proj"}, "out_proj is the out_proj of nn.Multi"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_and_change_nothing(model, options, message):
    with pytest.raises(ValueError, match=message):
        RowRescale(model, **options)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("targets", [3, [3], [nn.Linear(2, 2)]])
def test_targets_that_are_no_names_are_refused(targets):
    with pytest.raises(TypeError, match="give a regular expression or names of linear layers, which look like first"):
        RowRescale(net(), targets)


def test_a_weight_without_values_is_not_merged():
    rescale = RowRescale(net().to("meta"), "first")
    with pytest.raises(TypeError, match="first: its weight is on the meta device and has no values; load the weights"):
        rescale.merge()


def test_a_layer_has_one_alpha():
    model = net()
    rescale = RowRescale(model, "first")
    with pytest.raises(ValueError, match="first is scaled by a RowRescale already; remove or merge that one first"):
        RowRescale(model, EVERY_LAYER)
    assert not model.second._forward_hooks
    rescale.remove()
    RowRescale(model, EVERY_LAYER)


def test_dora_is_refused():
    with pytest.raises(ValueError, match="q_proj has a DoRA adapter"):
        RowRescale(lora(llama(), use_dora=True))


def test_matrices_of_adapters_are_no_layers():
    """The pair of an inactive adapter is frozen and linear, and still not a base."""
    model = lora(llama())
    model.requires_grad_(False)
    assert not [name for name in RowRescale(model, EVERY_LAYER).alphas if "lora" in name or "default" in name]


def test_steps_that_cannot_work_are_errors_and_change_nothing():
    model = net()
    add_adapters(model, "first", rank=2)
    rescale = RowRescale(model, optimizer=adamw())
    trained = [p for p in model.parameters() if p.requires_grad]

    def broken():
        raise KeyError("no batch")

    for loss, error, message in (
        (lambda: net()(X).sum(), RuntimeError, "does not depend on any α"),
        (lambda: model(X * float("nan")).sum(), RuntimeError, "gradient of α of first is not finite"),
        (broken, KeyError, "no batch"),
        (model(X).sum(), TypeError, "a function that draws a mini-batch and returns its loss, got a Tensor"),
        (lambda: 1.0, TypeError, "returned a float; it has to return the loss"),
        (lambda: model(X), TypeError, r"returned a tensor of shape \(6, 4\)"),
    ):
        with pytest.raises(error, match=message):
            rescale.step(loss)
        assert rescale.steps == 0
        assert bool((rescale.alphas["first"] == 1).all())
        assert not rescale.alphas["first"].requires_grad
        assert [p for p in model.parameters() if p.requires_grad] == trained
        assert not rescale.optimizer.state
    with pytest.raises(RuntimeError, match="has no optimizer, so α cannot step"):
        RowRescale(net(), EVERY_LAYER).step(lambda: X.sum())


# -- HF Trainer -------------------------------------------------------------------------------------------------------


class Fresh:
    """Mini-batches of α, each a function of the step it is for."""

    def __init__(self, rescale: RowRescale) -> None:
        self.rescale = rescale

    def __next__(self):
        ids = (torch.arange(20).reshape(2, 10) * (self.rescale.steps + 3)) % 50
        return {"input_ids": ids, "labels": ids.clone()}


def _trainer(folder, steps: int, callback: type, every: int):
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    rescale = RowRescale(model, optimizer=adamw(0.02), every=every)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=5,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    data = [{"input_ids": (ids := (torch.arange(10) * (k + 2)) % 50), "labels": ids.clone()} for k in range(24)]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback(rescale, Fresh(rescale))])
    return trainer, model, rescale


@pytest.mark.parametrize("every", [1, 4])
def test_the_callback_of_the_page_trains_and_resumes_bit_for_bit(every, tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "row_rescale.md").read_text(encoding="utf-8")
    namespace = {"torch": torch}
    exec(next(b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "AlphaCallback" in b), namespace)
    whole, model, rescale = _trainer(tmp_path / "whole", 9, namespace["AlphaCallback"], every)
    whole.train()
    assert rescale.steps == 9
    assert all(bool((alpha != 1).any()) for alpha in rescale.alphas.values())
    _trainer(tmp_path / "cut", 5, namespace["AlphaCallback"], every)[0].train()
    again, resumed, other = _trainer(tmp_path / "cut", 9, namespace["AlphaCallback"], every)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-5"))
    assert other.steps == 9
    assert all(torch.equal(alpha, rescale.alphas[name]) for name, alpha in other.alphas.items())
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), model.parameters(), strict=True))


# -- ranks ------------------------------------------------------------------------------------------------------------


def _run(wrap, batches, mean):
    """Four steps of the pair, each followed by one of α; `batches(k)` are this process's, `mean` joins their losses."""
    model = net()
    torch.manual_seed(1)
    add_adapters(model, "first", rank=2)
    nn.init.normal_(model.first.lora_B.weight, std=0.1)
    model = wrap(model)
    rescale = RowRescale(model, EVERY_LAYER, optimizer=sgd(0.3))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for k in range(4):
        optimizer.zero_grad()
        mean([model(x).square().mean() for x in batches(k)]).backward()
        optimizer.step()
        rescale.step(lambda k=k: mean([model(-x).square().mean() for x in batches(k)]))
    return {**rescale.alphas, **{name: p for name, p in model.named_parameters() if p.requires_grad}}


def _batch(k: int, rank: int):
    return torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * k + rank))


def _one_rank(start, static_graph):
    start()
    rank = torch.distributed.get_rank()
    wrap = functools.partial(nn.parallel.DistributedDataParallel, static_graph=static_graph)
    values = _run(wrap, lambda k: [_batch(k, rank)], lambda losses: losses[0])
    return [value.detach().tolist() for value in values.values()]


def test_ranks_take_the_steps_of_one_process_on_all_batches():
    from tests.distributed.ranks import Ranks

    alone = _run(lambda model: model, lambda k: [_batch(k, 0), _batch(k, 1)], lambda losses: sum(losses) / 2)
    ranks = Ranks(2)
    try:
        for static_graph in (False, True):
            results = ranks.run(_one_rank, static_graph)
            assert results[0] == results[1], "the ranks do not drift"
            for got, expected in zip(results[0], alone.values(), strict=True):
                assert torch.allclose(torch.tensor(got, dtype=torch.float64), expected.detach(), rtol=1e-9, atol=1e-11)
    finally:
        ranks.close()
