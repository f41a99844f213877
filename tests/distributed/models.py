"""A small model whose matrices do not split evenly over ranks, its batches, and the same run on one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy

from tnadapt import MPO, LoraOver, OverParamAdapter, TaylorRuntime

ROWS = 8  # of a global batch
STEPS = 9
#: shards on the CPU; memory cannot be pinned where there is no accelerator
OFFLOAD = CPUOffloadPolicy(pin_memory=False)


class Net(nn.Module):
    """Three layers of one shape and a head; rows of A (3) and B (10 and 7) are not multiples of 2 or 4."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(self._adapter(10, 10, generator) for _ in range(3))
        self.head = self._adapter(10, 7, generator)

    @staticmethod
    def _adapter(d_in: int, d_out: int, generator: torch.Generator) -> OverParamAdapter:
        base = nn.Linear(d_in, d_out, dtype=torch.float64)
        nn.init.normal_(base.weight, std=0.3, generator=generator)
        nn.init.zeros_(base.bias)
        adapter = OverParamAdapter.from_linear(base, rank=3, alpha=6)
        nn.init.normal_(adapter.lora_B.weight, std=0.3)
        return adapter

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def net(seed: int) -> Net:
    """The base is always the same, the adapters are of `seed`."""
    torch.manual_seed(seed)
    return Net()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def whole_values(model: nn.Module) -> dict[str, Tensor]:
    """Everything that is trained, gathered where it is sharded."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value: Any = parameter.detach()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")] = value.clone()
    return found


def load_values(model: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.copy_(values[name])


def batch(step: int, rank: int = 0, world: int = 1) -> Tensor:
    """The part of a rank of the global batch of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(ROWS, 10, generator=generator, dtype=torch.float64)[rank::world]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :7].sin()).square().mean()


def optimizer_of(parameters: Any, kind: str = "adamw") -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.01)
    options = {"foreach": {"foreach": True}, "fused": {"fused": True}, "adamw": {"foreach": False}}[kind]
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01, **options)


def scheduler() -> TaylorRuntime:
    """Expands at steps 2, 4 and 6: one of the three layers, and the head, in each group each time."""
    return TaylorRuntime(top_n=3, split=3, every=2)


def train(model: nn.Module, optimizer: Any, steps: range, rank: int = 0, world: int = 1) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batch(step, rank, world)).backward()
        optimizer.step()


def outcome(model: nn.Module, over: LoraOver) -> dict[str, Any]:
    """What ranks are compared by."""
    over.consolidate()
    state = over.state_dict()["cores"]
    return {
        "values": whole_values(model),
        "cores": {name: [core.clone() for core in entry["cores"]] for name, entry in state.items()},
        "history": [(e.step, e.action, e.names) for e in over.history],
        "scores": [r["scores"] for r in getattr(over.scheduler, "rounds", [])],
    }


def on_one_process(
    initial: dict[str, Tensor], over_of: Any = None, kind: str = "adamw", steps: range = range(1, STEPS + 1)
) -> dict[str, Any]:
    """The run that ranks must reproduce, from the same initial values."""
    model = net(0)
    load_values(model, initial)
    optimizer = optimizer_of(trainable(model), kind)
    over = LoraOver(model, optimizer, MPO(order=4), scheduler() if over_of is None else over_of())
    train(model, optimizer, steps)
    return outcome(model, over)


def drift(results: list[dict[str, Any]]) -> float:
    """Largest difference of anything between ranks; histories and scores must be equal."""
    first = results[0]
    for other in results[1:]:
        assert other["history"] == first["history"]
        assert other["scores"] == first["scores"]
    return max(_apart(first, other) for other in results)


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference of a matrix; histories must be equal, scores nearly so."""
    assert one["history"] == other["history"]
    for mine, theirs in zip(one["scores"], other["scores"], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(abs(mine[name] - theirs[name]) < 1e-9 for name in mine)
    return max(float((one["values"][name] - other["values"][name]).abs().max()) for name in one["values"])


def _apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one["values"].keys() == other["values"].keys()
    assert one["cores"].keys() == other["cores"].keys()
    apart = [float((one["values"][n] - other["values"][n]).abs().max()) for n in one["values"]]
    for name, cores in one["cores"].items():
        apart += [float((a - b).abs().max()) for a, b in zip(cores, other["cores"][name], strict=True)]
    return max(apart)


def place() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()
