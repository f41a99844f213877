"""Run by torchrun: a plain loop. Writes what test_torchrun.py compares to the folder of the first argument."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.models import STEPS, net, optimizer_of, outcome, scheduler, train, trainable, whole_values
from tests.distributed.ranks import leave
from tnadapt import MPO, LoraOver

torch.set_num_threads(1)
dist.init_process_group("gloo")
folder, rank, world = Path(sys.argv[1]), dist.get_rank(), dist.get_world_size()
for how in ("ddp", "fsdp"):
    model = net(rank)
    wrapped = (
        DistributedDataParallel(model) if how == "ddp" else fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    )
    optimizer = optimizer_of(trainable(wrapped))
    initial = whole_values(wrapped)
    over = LoraOver(wrapped, optimizer, MPO(order=4), scheduler())
    train(wrapped, optimizer, range(1, STEPS + 1), rank, world)
    torch.save({**outcome(wrapped, over), "initial": initial}, folder / f"{how}{rank}.pt")
leave()
