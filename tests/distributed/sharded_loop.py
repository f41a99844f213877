"""Run by torchrun, or alone: a loop under DDP with cores dealt out over the ranks, that saves every second step and goes on from the
last checkpoint. Arguments: the folder, and seconds to wait in each step."""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.models import STEPS, load_values, net, optimizer_of, scheduler, train, trainable, whole_values
from tests.distributed.ranks import leave
from tnadapt import MPO, LoraOver


def main() -> None:
    folder, pause = Path(sys.argv[1]), float(sys.argv[2])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    rank = int(os.environ.get("RANK", 0))
    model = net(0)
    optimizer = optimizer_of(trainable(model))
    trained = DistributedDataParallel(model) if world > 1 else model
    over = LoraOver(trained, optimizer, MPO(order=4), scheduler(), shard=True)
    file = folder / "checkpoint.pt"
    if file.exists():
        saved = torch.load(file, weights_only=True)
        load_values(model, saved["values"])
        optimizer.load_state_dict(saved["optimizer"])
    for step in range(over.step + 1, STEPS + 1):
        train(trained, optimizer, range(step, step + 1), rank, world)
        time.sleep(pause)
        if step % 2 == 0:
            over.consolidate(to=0)
            if rank == 0:
                half = file.with_suffix(".writing")
                torch.save({"values": whole_values(model), "optimizer": optimizer.state_dict()}, half)
                half.replace(file)
                (folder / f"reached{step}").touch()
    if rank == 0:
        torch.save(whole_values(model), folder / "end.pt")


main()
leave()
