"""Cores dealt out over ranks: each expanded matrix has an owner, the only rank that holds, steps and refolds its cores.

Memory for cores falls as one over the ranks. In every step each owner sends the matrices that it has refolded, all in one
collective, so that all ranks go on with the same bits; gradients are on all ranks already (DistributedDataParallel), or are
gathered anyway (FSDP2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tnadapt.engine import ranks
from tnadapt.engine.cores import Cohort, differs
from tnadapt.matrices import TrainedMatrix

__all__ = ["Exchange", "deal"]


def deal(names: Sequence[str], taken: Mapping[str, int], sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """An owner for each matrix: the largest first, each to the rank with the fewest numbers in its cores so far.

    All ranks come to the same answer. What two ranks hold differs by the largest matrix at most.

    Args:
        names: of the matrices.
        taken: owners of other matrices.
        sizes: numbers in the cores of all of them.
        count: of ranks.
    """
    load = [0] * count
    for name, rank in taken.items():
        load[rank] += sizes[name]
    dealt: dict[str, int] = {}
    for name in sorted(names, key=lambda name: (-sizes[name], name)):
        dealt[name] = load.index(min(load))
        load[dealt[name]] += sizes[name]
    return dealt


class Exchange:
    """What owners send and others write after a step.

    Args:
        process_group: ranks that train the same matrices; None for all.
    """

    def __init__(self, process_group: Any = None) -> None:
        self._group = process_group
        #: this rank's shards of the matrices of others, as they were written last
        self._seen: dict[str, Tensor] = {}

    def run(self, matrices: Sequence[TrainedMatrix], owners: Mapping[str, int], cohorts: Sequence[Cohort]) -> None:
        """Send the matrices that this rank owns, and write those of the other owners.

        Args:
            matrices: those that were refolded, the same on all ranks and in one order.
            owners: by name.
            cohorts: of this rank.
        """
        here, count = ranks.position(self._group)
        rows = {
            matrix.name: row
            for cohort in cohorts
            if cohort.written is not None
            for matrix, row in zip(cohort.matrices, cohort.written, strict=True)
        }
        owned = [[m for m in matrices if owners[m.name] == rank] for rank in range(count)]
        lengths = [[m.parameter.numel() * m.parameter.dtype.itemsize for m in of_rank] for of_rank in owned]
        parts = [rows[m.name].to(m.parameter.dtype).contiguous().view(torch.uint8) for m in owned[here]]
        device = ranks.local(matrices[0].parameter).device
        message = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)
        received = ranks.exchange_bytes(message, [sum(each) for each in lengths], self._group)
        others = [rank for rank in range(count) if rank != here]
        targets = [m for rank in others for m in owned[rank]]
        blocks = [block for rank in others for block in torch.split(received[rank], lengths[rank])]
        values = [_numbers(block, m.parameter.dtype) for m, block in zip(targets, blocks, strict=True)]
        ranks.write_all([m.parameter for m in targets], values)
        self._seen.update(
            {m.name: ranks.local(m.parameter).detach().clone() for m in targets if ranks.is_sharded(m.parameter)}
        )

    def edited(self, matrices: Sequence[TrainedMatrix]) -> list[str]:
        """Names of matrices of others whose shard on this rank was written by somebody else. Of whole matrices the owner sees
        it."""
        return [
            m.name
            for m in matrices
            if m.name in self._seen
            and ranks.is_sharded(m.parameter)
            and differs(ranks.local(m.parameter), self._seen[m.name])
        ]

    def forget(self, names: Sequence[str] | None = None) -> None:
        """These matrices were unfolded anew, or have no cores any more; None for all."""
        for name in list(self._seen) if names is None else names:
            self._seen.pop(name, None)


def _numbers(block: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers of a dtype; a copy where they begin where such numbers cannot."""
    return (block.clone() if block.storage_offset() % dtype.itemsize else block).view(dtype)
