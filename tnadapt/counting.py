"""What a factorization multiplies and keeps, counted by running it: its kernel on tensors without data, its decomposition on a
matrix of random numbers.

A module of its own, since torch's dispatch modes take time to import.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from tnadapt.factorizations import Factorization, Structure

__all__ = ["StepWork", "decomposition_work", "step_work"]


@dataclass(frozen=True)
class StepWork:
    """Of one matrix in one step: flops of refolding and pulling back; numbers kept from one to the other or for core gradients,
    whichever is more; further numbers that are needed while pulling back."""

    flops: int
    kept: int
    scratch: int


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all tensors that operations made and that are still there; the most at any time."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._before = {tensor.untyped_storage()._cdata for tensor in known}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def alive(self) -> int:
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}  # type: ignore[no-untyped-call]
        return sum(size for _, size in self._made.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._before:
                    made = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                    self._made.setdefault(storage._cdata, (made, storage.nbytes()))
        self.peak = max(self.peak, self.alive())
        return out


@lru_cache(maxsize=256)
def step_work(factorization: Factorization, structure: Structure) -> StepWork:
    """What a step works on one matrix of this structure."""
    shapes = factorization.fused_shapes(structure.core_shapes)
    cores = [torch.empty(1, *shape, dtype=torch.float32, device="meta") for shape in shapes]
    grad = torch.empty(1, math.prod(structure.shape), dtype=torch.float32, device="meta")
    with FlopCounterMode(display=False) as counter, _Allocations([*cores, grad]) as memory:
        kernel = factorization.kernel(cores)
        kernel.contract()
        prefixes = memory.alive()
        memory.peak = prefixes
        kernel.pull_back(grad)
        peak = memory.peak
    width = torch.float32.itemsize
    kept = max(structure.num_parameters, prefixes // width)
    return StepWork(counter.get_total_flops(), kept, max(0, peak // width - kept))


def _svd_flops(shape: Sequence[int], *_: Any, **__: Any) -> int:
    *batch, rows, cols = shape
    long, short = max(rows, cols), min(rows, cols)
    return math.prod(batch) * (6 * long * short**2 + 20 * short**3)


@lru_cache(maxsize=256)
def decomposition_work(factorization: Factorization, structure: Structure) -> tuple[int, float]:
    """Flops of the singular value decompositions that one matrix needs, and seconds that they take here: the best of three times, as
    others may use the machine too."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(structure.shape, generator=generator)
    gradient = torch.randn(structure.shape, generator=generator) if factorization.needs_gradient else None
    flops, seconds = 0, math.inf
    for _ in range(3):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._linalg_svd: _svd_flops}) as counter:
            started = time.perf_counter()
            factorization.unfold(matrix, gradient)
            seconds = min(seconds, time.perf_counter() - started)
        flops = counter.get_flop_counts().get("Global", {}).get(torch.ops.aten._linalg_svd, 0)
    return flops, seconds
