"""Ranks that live as long as a test file: processes that run one function after the other, together."""

from __future__ import annotations

import gc
import os
import queue
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 100.0
IMPORTED = ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"]


class Failed(RuntimeError):
    """A rank raised; the message holds its traceback."""


class Ranks:
    """`world` processes on this machine.

    A function of a test is called on each as `function(start, *arguments)`: `start()` makes the process group (gloo), which
    some tests want to happen late. Its process group is destroyed afterwards. What it returns comes back, by rank.
    They are forks of a process that has imported torch and nothing else: one for all ranks of a test run. With
    TNADAPT_RANKS=fork in the environment they are forks of this process.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        how = os.environ.get("TNADAPT_RANKS", "forkserver")
        context: Any = mp.get_context(how)
        if how == "forkserver":
            context.set_forkserver_preload(IMPORTED)
        self._folder = tempfile.TemporaryDirectory()
        self._calls = 0
        self._inboxes = [context.Queue() for _ in range(world)]
        self._outbox = context.Queue()
        self._processes = [
            context.Process(target=_serve, args=(rank, world, inbox, self._outbox), daemon=True)
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        self._calls += 1
        store = str(Path(self._folder.name) / f"store{self._calls}")
        for inbox in self._inboxes:
            inbox.put((store, function, arguments))
        results: dict[int, Any] = {}
        for _ in range(self.world):
            try:
                rank, ok, value = self._outbox.get(timeout=TIMEOUT)
            except queue.Empty:
                self.close()
                raise Failed(f"ranks {sorted(set(range(self.world)) - set(results))} did not come back") from None
            if not ok:
                self.close()
                raise Failed(f"rank {rank}:\n{value}")
            results[rank] = value
        return [results[rank] for rank in range(self.world)]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


def leave() -> None:
    """End the process of a rank, without what the interpreter does at its end: caches of DTensor and the like keep the
    process group after it was destroyed, and threads of gloo that live then abort the process now and then."""
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _serve(rank: int, world: int, inbox: Any, outbox: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # libraries that take a GPU where there is one take the CPU too
    while True:
        store, function, arguments = inbox.get()

        def start(store: str = store) -> None:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)

        try:
            value, ok = function(start, *arguments), True
        except BaseException:
            value, ok = traceback.format_exc(), False
        if dist.is_initialized():
            # models and trainers in cycles hold the group: its threads of gloo would live on beside those of the next call, see `leave`
            gc.collect()
            dist.destroy_process_group()
        outbox.put((rank, ok, value))
