"""What to expand and when. A scheduler decides; it moves nothing and changes no matrix."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from tnadapt.matrices import TrainedMatrix

__all__ = ["Scheduler", "by_group", "warn_small_groups"]


class Scheduler(ABC):
    """Decides which LoRA matrices are expanded at which optimizer step.

    Steps count optimizer steps from 1; step 0 is the attachment, before any training. At each step `observe` comes
    first, with gradients present, then `release`, then `select`. Matrices selected at a step are trained through their
    cores from that very step on, or from the next one if `after_update` is set.
    """

    #: whether what is selected at a step is expanded after the update of that step
    after_update: bool = False

    def attach(self, matrices: Mapping[str, TrainedMatrix]) -> None:
        """Check the settings against the matrices of a model; raise ValueError before anything changed."""

    def observe(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> None:
        """Look at the gradients of `step`; do not write to them."""

    @abstractmethod
    def select(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> Iterable[str]:
        """Names of matrices, not yet expanded, to expand now."""

    def release(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> Iterable[str]:
        """Names of expanded matrices to fold back now."""
        return ()

    def due(self, step: int) -> bool:
        """Whether `select` or `release` may name anything at `step`; must be the same on every rank."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: numbers, strings, tensors and plain containers only."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave. Must raise before changing anything where the state does not fit."""

    @property
    def label(self) -> str:
        """Short name for tables."""
        return type(self).__name__


def by_group(matrices: Mapping[str, TrainedMatrix]) -> dict[str, list[TrainedMatrix]]:
    """Matrices of each group, in the order of the model."""
    groups: dict[str, list[TrainedMatrix]] = {}
    for matrix in matrices.values():
        groups.setdefault(matrix.group, []).append(matrix)
    return groups


def warn_small_groups(owner: str, top_n: int, matrices: Mapping[str, TrainedMatrix]) -> None:
    """Warn once where groups have fewer than `top_n` matrices; called from `attach`, so that it points at whoever attaches."""
    groups = by_group(matrices)
    small = {group: len(members) for group, members in groups.items() if len(members) < top_n}
    if small:
        shown = ", ".join(f"{group} ({size})" for group, size in list(small.items())[:3])
        warnings.warn(
            f"{owner}: top_n={top_n} exceeds the size of {len(small)} of {len(groups)} groups, such as {shown}; these are "
            "expanded whole",
            stacklevel=4,
        )
