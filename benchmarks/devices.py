"""What benchmarks ask of a device: that it is there, that it is done, what it allocates, and what a piece of work makes it do."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

DEVICES = ("cpu", "cuda")


def require(device: str, who: str) -> None:
    """End the script in one line where the device is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"{who} needs CUDA, which this machine has not; --device cpu runs anywhere")


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


# -- memory ------------------------------------------------------------------------------------------------------------


@dataclass
class Memory:
    """Bytes that were asked of torch's allocator: what was still there at the end, and the most at any time, above what was
    there before."""

    kept: int = 0
    peak: int = 0


@contextmanager
def watched_memory(device: str) -> Iterator[Memory]:
    """Fills in what it yields at the end of the block."""
    memory = Memory()
    gc.collect()  # what nobody holds any longer would be taken off in the block
    if device == "cuda":
        torch.ones(1, 1, device=device).mm(torch.ones(1, 1, device=device))  # cuBLAS takes its work space once
        requested = "requested_bytes.all."  # blocks are rounded up; what is asked for is not
        before = torch.cuda.memory_stats()[f"{requested}current"]
        torch.cuda.reset_peak_memory_stats()
        yield memory
        stats = torch.cuda.memory_stats()
        memory.kept, memory.peak = (stats[f"{requested}{when}"] - before for when in ("current", "peak"))
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield memory
    changes = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    for _, change in sorted(changes):
        memory.kept += change
        memory.peak = max(memory.peak, memory.kept)


# -- traffic -----------------------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """What a piece of work makes the device do.

    Attributes:
        operators: torch operators that compute or copy, views left out; on any device.
        launches: kernels that were launched; None on the CPU.
        copies: copies and fills of device memory; None on the CPU.
        waits: where the host waited for the device, as `file:line`, as far as torch can tell; None on the CPU.
    """

    operators: int = 0
    launches: int | None = None
    copies: int | None = None
    waits: list[str] | None = field(default=None)


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = any(
            result.alias_info is not None and not result.alias_info.is_write for result in function._schema.returns
        )
        self.count += not view
        return function(*args, **(kwargs or {}))


def traffic(work: Callable[[], Any], device: str) -> Traffic:
    """Does `work` once for operators; on a GPU once more for launches and once more for waits."""
    with _Operators() as operators:
        work()
    found = Traffic(operators.count)
    if device != "cuda":
        return found
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize()
    names = [e.name() for e in recorded.profiler.kineto_results.events() if e.device_type() == DeviceType.CUDA]
    found.copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    found.launches = len(names) - found.copies
    found.waits = waits(work)
    return found


def waits(work: Callable[[], Any]) -> list[str]:
    """Where `work` makes the host wait for the GPU, as `file:line`, as far as torch's debug mode can tell."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]
