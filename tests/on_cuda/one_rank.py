"""One rank alone: DDP and FSDP2 with shards on the CPU, over NCCL on a GPU and gloo without; prints the largest differences from
training without them as JSON.

    python one_rank.py DEVICE FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from on_cuda.models import WIDTH, adamw, attached, largest_difference, loss_of, net, trainable, values  # noqa: E402

STEPS = range(1, 8)


def batch(step: int, device: str) -> torch.Tensor:
    return torch.randn(6, WIDTH, generator=torch.Generator("cpu").manual_seed(100 + step)).to(device)


def trained(model: Any, device: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What is trained in rounds, whole and by its own name, and what was seen."""
    optimizer = adamw(trainable(model))
    over = attached(model, optimizer)
    for step in STEPS:
        optimizer.zero_grad()
        loss_of(model, batch(step, device)).backward()
        optimizer.step()
    places = {str(p.device.type) for p in trainable(model)}
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            held = p.to_local() if hasattr(p, "to_local") else p
            found[name.removeprefix("module.")] = held.detach().cpu()
    return found, {"expanded": len(over.expanded), "places": sorted(places)}


def main(device: str, folder: str) -> None:
    torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
    alone = net(device)
    expected, _ = trained(alone, device)
    moved = largest_difference(expected, values(net(device)))
    report: dict[str, Any] = {"moved": moved, "backend": dist.get_backend()}
    found, seen = trained(DistributedDataParallel(net(device)), device)
    report["ddp"] = {"difference": largest_difference(found, expected), **seen}
    mesh = init_device_mesh(device, (1,))
    model = net(device)
    policy = CPUOffloadPolicy(pin_memory=device == "cuda")
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, offload_policy=policy)
    fully_shard(model, mesh=mesh, offload_policy=policy)
    found, seen = trained(model, device)
    report["fsdp2"] = {"difference": largest_difference(found, expected), **seen}
    print(json.dumps(report), flush=True)
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo that live when the interpreter goes abort the process now and then


if __name__ == "__main__":
    main(*sys.argv[1:])
