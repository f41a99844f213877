"""Models of other kinds: quantized, compiled, made where another device is the default; and expansion in the middle of a run."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from engine.models import base_llama, loss_of, tokens
from torch import nn

from tnadapt import MPO, LoraOver, OverParamAdapter, TaylorRuntime

from .conftest import needs_cuda
from .models import adamw, attached, inputs, largest_difference, net, train, trainable, values
from .pretended import Pretended, a_gpu, moved

# -- after the last step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded", [False, True])
def test_a_model_that_is_moved_after_its_last_step_is_folded_where_it_is(device: str, loaded: bool) -> None:
    """As `model.cpu()` before the adapter is saved."""
    model = net(device)
    optimizer = adamw(trainable(model))
    over = attached(model, optimizer)
    train(model, optimizer, range(1, 6))
    assert over.expanded
    if loaded:
        over.load_state_dict(copy.deepcopy(over.state_dict()))
    model.cpu()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        over.fold()


@pytest.mark.parametrize("loaded", [False, True])
def test_a_matrix_that_is_moved_from_a_pretended_gpu_is_compared_with_what_its_cores_fold_to(loaded: bool) -> None:
    layer = OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4)
    with a_gpu():
        moved(layer)
        optimizer = torch.optim.SGD([layer.lora_A.weight, layer.lora_B.weight], lr=1e-3)
        over = LoraOver(layer, optimizer, MPO(order=3))
        for matrix in over.matrices.values():
            matrix.parameter.grad = Pretended(torch.ones(matrix.shape))
        optimizer.step()
        if loaded:
            over.load_state_dict(over.state_dict())
        for matrix in over.matrices.values():
            # torch keeps the object and exchanges its data, which one that is pretended cannot do
            matrix.parameter = nn.Parameter(matrix.parameter.detach().cpu())
        assert over.changed_outside() == ()
        over.matrices["A"].parameter[1, 2] += 1
        assert over.changed_outside() == ("A",)


# -- expansion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expansion_in_mid_run_does_not_move_the_matrices(device: str, dtype: torch.dtype) -> None:
    model = net(device, dtype)
    optimizer = adamw(trainable(model))
    over = attached(model, optimizer)
    train(model, optimizer, [1])
    before = values(model)
    # two rounds in steps that move nothing
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, [2, 3, 4])
    assert len(over.expanded) == 4
    size = max(float(value.abs().max()) for value in before.values())
    assert largest_difference(values(model), before) <= 8 * torch.finfo(dtype).eps * size
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    losses = train(model, optimizer, [5] * 8)
    assert losses[-1] < losses[0]
    plain = copy.deepcopy(values(model))
    over.fold()
    assert largest_difference(values(model), plain) == 0


# -- quantized bases --------------------------------------------------------------------------------------------------


def quantized(bits: int, device: str) -> Any:
    """A small Llama whose linear layers are bitsandbytes', in so many bits, with PEFT's LoRA on them."""
    layers: Any = pytest.importorskip("bitsandbytes").nn
    from peft import LoraConfig, get_peft_model

    model: Any = base_llama(layers=1)
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                if bits == 4:
                    small = layers.Linear4bit(
                        child.in_features, child.out_features, False, torch.float32, quant_type="nf4"
                    )
                else:
                    small = layers.Linear8bitLt(child.in_features, child.out_features, False, has_fp16_weights=False)
                small.load_state_dict({"weight": child.weight.data})
                setattr(module, name, small)
    setattr(model, f"is_loaded_in_{bits}bit", True)
    torch.manual_seed(1)
    options: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    return get_peft_model(model.to(device), LoraConfig(lora_alpha=8, **options))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_stays_and_its_adapter_is_trained(device: str, bits: int) -> None:
    model = quantized(bits, device)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    kinds = {"4": torch.uint8, "8": torch.int8}
    assert any(value.dtype == kinds[str(bits)] for value in frozen.values())
    optimizer = adamw(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=4), TaylorRuntime(top_n=1, split=1, every=2))
    ids = tokens(0).to(device)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_of(model(input_ids=ids).logits.float(), ids)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert len(over.expanded) == 4
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


# -- torch.compile ----------------------------------------------------------------------------------------------------


def test_a_compiled_model_is_compiled_once(device: str) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model, plain = net(device), net(device)
    # on a CPU inductor would take a compiler of C++, and long; what recompiles is decided before it
    compiled = torch.compile(model, backend="inductor" if device == "cuda" else "aot_eager")
    optimizer = adamw(trainable(model))
    over = attached(compiled, optimizer)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(compiled, optimizer, range(1, 8))
    assert len(over.expanded) == 4
    assert counters["stats"]["unique_graphs"] == 1
    other = adamw(trainable(plain))
    attached(plain, other)
    train(plain, other, range(1, 8))
    assert largest_difference(values(model), values(plain)) < 1e-4


# -- default devices --------------------------------------------------------------------------------------------------


@contextmanager
def default(device: str) -> Iterator[None]:
    """What names no device is made there."""
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def whole_run(device: str) -> tuple[dict[str, torch.Tensor], int]:
    """Train in rounds, save, resume in a new model, fold."""
    model = net(device)
    optimizer = adamw(trainable(model))
    attached(model, optimizer, max_update=10.0)
    train(model, optimizer, [1, 2, 3])
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    model = net(device)
    optimizer = adamw(trainable(model))
    over = attached(model, optimizer, max_update=10.0)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(model, optimizer, [4, 5, 6, 7])
    with torch.no_grad():  # somebody else's write is found, too
        trainable(model)[0].add_(0.1)
    with pytest.warns(UserWarning, match="changed outside"):
        train(model, optimizer, [8])
    count = over.trained_parameters
    over.fold()
    return values(model), count


@pytest.mark.parametrize(
    ("device", "elsewhere"),
    [
        ("cpu", "meta"),
        *(pytest.param(*places, marks=needs_cuda) for places in (("cuda", "cuda"), ("cuda", "meta"), ("cpu", "cuda"))),
    ],
)
def test_the_default_device_decides_nothing(device: str, elsewhere: str) -> None:
    expected, count = whole_run(device)
    with default(elsewhere):
        assert torch.empty(1).device.type == elsewhere
        found, same = whole_run(device)
    assert count == same
    assert largest_difference(found, expected) == 0


def test_inputs_are_where_the_model_is(device: str) -> None:
    model = net(device)
    assert inputs(1, trainable(model)[0]).device.type == device
