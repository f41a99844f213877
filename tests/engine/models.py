"""Small models of the engine's tests, their batches, and what is compared."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tnadapt import OverParamAdapter

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 32


@functools.cache
def _base(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def base_llama(layers: int = 2) -> LlamaForCausalLM:
    return copy.deepcopy(_base(layers))


def llama(dtype: torch.dtype = torch.float32, *, layers: int = 2, zero_start: bool = False, **lora: Any) -> Any:
    """A Llama with PEFT LoRA on all its linear layers, the same at every call. `B` is not zero unless `zero_start`."""
    model = base_llama(layers)
    if dtype == torch.float64:
        # those of Llama compute in float32 whatever the dtype
        for parent in [*model.model.layers, model.model]:
            for name, child in list(parent.named_children()):
                if type(child).__name__ == "LlamaRMSNorm":
                    norm = nn.RMSNorm(16, eps=1e-5)
                    norm.load_state_dict(child.state_dict())
                    setattr(parent, name, norm)
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": zero_start, **lora}
    return get_peft_model(model, LoraConfig(**options)).to(dtype)


def tokens(step: int, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, VOCABULARY, (rows, 8), generator=generator)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Next-token loss in the dtype of the logits."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def backward(model: nn.Module, step: int) -> Tensor:
    ids = tokens(step)
    loss = loss_of(model(input_ids=ids).logits, ids)
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


class Experts(nn.Module):
    """Adapters of one shape side by side; a forward pass uses those it is told to."""

    def __init__(self, count: int = 3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.experts = nn.ModuleList(
            OverParamAdapter.from_linear(nn.Linear(12, 6, dtype=dtype), rank=4, alpha=8) for _ in range(count)
        )
        for expert in self.experts:
            nn.init.normal_(expert.lora_B.weight, std=0.3)

    def forward(self, x: Tensor, used: tuple[int, ...]) -> Tensor:
        return torch.stack([self.experts[k](x) for k in used]).sum(0)


def expert_loss(model: Experts, step: int, used: tuple[int, ...] = (0, 1, 2)) -> Tensor:
    generator = torch.Generator().manual_seed(200 + step)
    x = torch.randn(5, 12, generator=generator, dtype=torch.float64).to(model.experts[0].lora_A.weight)
    return (model(x, used) - x[:, :6]).square().mean()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, over: Any = None) -> dict[str, Any]:
    """A copy of all that an error must leave alone, with hooks counted."""
    state = copy.deepcopy({k: v for k, v in optimizer.state_dict().items() if k != "tnadapt"})
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "optimizer": state,
        "groups": [
            {k: ([id(p) for p in v] if k == "params" else v) for k, v in g.items()} for g in optimizer.param_groups
        ],
        "tracked": len(optimizer.state),
        "hooks": [
            len(getattr(optimizer, name))
            for name in sorted(vars(optimizer))
            if name.startswith("_optimizer_") and name.endswith("_hooks")
        ],
        "over": None if over is None else copy.deepcopy(over.state_dict()),
        "expanded": None if over is None else over.expanded,
    }


def same(one: Any, other: Any) -> bool:
    """Bit for bit equality of nested containers."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
        )
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def adapters(*widths: int) -> nn.ModuleList:
    """Adapters from 12 features to so many each, in float64, the same at every call. `B` is not zero."""
    torch.manual_seed(0)
    model = nn.ModuleList(
        OverParamAdapter.from_linear(nn.Linear(12, width, dtype=torch.float64), rank=4, alpha=8) for width in widths
    )
    for layer in model:
        nn.init.normal_(layer.lora_B.weight)
    return model


def backward_through(model: nn.ModuleList, *chosen: int, **options: Any) -> None:
    """Gradients of some of the `adapters`."""
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 12)
    torch.stack([model[k](x).square().mean() for k in chosen]).sum().backward(**options)


def when_lent(over: Any, look: Callable[..., None]) -> None:
    """Call `look` in every step once the cores are lent: they are what the optimizer is about to step."""
    lend = over._step._lend

    def lend_and_look(loan: Any) -> None:
        lend(loan)
        look()

    over._step._lend = lend_and_look
