"""Cores dealt out over four ranks, all of which are killed at a random moment; the run goes on on two, and then on one."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from .models import MPO, STEPS, LoraOver, net, optimizer_of, scheduler, train, trainable, whole_values

HERE = Path(__file__).parent


def _start(folder: Path, world: int, pause: float) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    root = HERE.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *launcher, str(HERE / "sharded_loop.py"), str(folder), str(pause)]
    return subprocess.Popen(command, env=environment, cwd=root, start_new_session=True)


def _kill_after(process: subprocess.Popen[bytes], mark: Path, delay: float) -> None:
    """Kill the launcher and its ranks `delay` seconds after they have come to a step."""
    deadline = time.monotonic() + 200
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert mark.exists(), "the run did not come to the step at which it is killed"
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_on_four_ranks_resumed_on_two_and_on_one(tmp_path: Path, seed: int) -> None:
    """The end is that of one process that was never killed, up to the order in which ranks add gradients."""
    draw = random.Random(seed)
    for world, step in ((4, 2), (2, 6)):
        # three steps and their pauses are left after step 6: more than any delay
        _kill_after(_start(tmp_path, world, 0.6), tmp_path / f"reached{step}", draw.uniform(0, 1.5))
        assert not (tmp_path / "end.pt").exists()
    assert _start(tmp_path, 1, 0.0).wait(timeout=200) == 0
    model = net(0)
    optimizer = optimizer_of(trainable(model))
    LoraOver(model, optimizer, MPO(order=4), scheduler())
    train(model, optimizer, range(1, STEPS + 1))
    wanted = whole_values(model)
    found = torch.load(tmp_path / "end.pt")
    assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) < 1e-9


@pytest.mark.slow
def test_an_owner_that_dies_stops_the_others_and_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(2):
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE.parent.parent),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": "2"}
        command = [sys.executable, str(HERE / "sharded_loop.py"), str(tmp_path), "0.4"]
        ranks.append(subprocess.Popen(command, env=environment, cwd=HERE.parent.parent, stderr=subprocess.PIPE))
    deadline = time.monotonic() + 200
    while not (tmp_path / "reached4").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks[1].kill()
    _, said = ranks[0].communicate(timeout=200)
    ranks[1].communicate()
    assert ranks[0].returncode not in (0, None)
    assert b"Error" in said
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["optimizer"]["tnadapt"]["step"] >= 4
    assert len(saved["optimizer"]["tnadapt"]["cores"]) == len(saved["optimizer"]["tnadapt"]["expanded"])
