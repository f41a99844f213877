"""What others do to the LoRA matrices during a run: who writes them, freezes them, or trains ones that are not ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from tnadapt.engine.attachment import shown
from tnadapt.engine.cohort import Cohort
from tnadapt.engine.engine import Engine
from tnadapt.engine.tensors import agree_any, is_distributed
from tnadapt.lora_matrices import LoraMatrix, Skipped

__all__ = ["Outside"]

#: optimizer steps between two looks at matrices off the CPU, each of which waits for the device once
_LOOK_EVERY = 50


class Outside:
    """Notices what happens to LoRA matrices outside the optimizer.

    Args:
        engine: the expanded matrices.
        skipped: LoRA weights that were not candidates at the attachment.
    """

    def __init__(self, engine: Engine, skipped: Sequence[Skipped]) -> None:
        self._engine = engine
        self._asleep = [s for s in skipped if s.parameter is not None and not s.parameter.requires_grad]
        self._resting: set[str] = set()

    def changed(self, step: int) -> list[str]:
        """Names of expanded matrices that somebody else wrote (a loaded adapter, a hand edit), the same on all ranks. Looks at
        every step on the CPU; off it, where an answer is waited for, where torch has counted a write and every few steps."""
        names: list[str] = []
        for cohort in self._engine.cohorts.values():
            if self._looks(cohort, step) and bool(self._agreed(self._engine.may_be_changed(cohort)).any()):
                names += _flagged(cohort, self._agreed(self._engine.changed_outside(cohort)))
        return names

    def _looks(self, cohort: Cohort, step: int) -> bool:
        if cohort.device.type == "cpu" or step % _LOOK_EVERY == 1:
            return True
        # what only one rank has seen must not make it look alone
        return not is_distributed(self._engine.process_group) and self._engine.touched(cohort)

    def _agreed(self, flags: Tensor) -> Tensor:
        return agree_any(flags, self._engine.process_group)

    def changed_now(self) -> tuple[str, ...]:
        """Names of expanded matrices that hold something else than what their cores fold to, on this rank. Waits for the
        device."""
        return tuple(
            name
            for cohort in self._engine.cohorts.values()
            for name in _flagged(cohort, self._engine.changed_outside(cohort))
        )

    def warn_of_switches(self, matrices: Iterable[LoraMatrix], held: Callable[[Tensor], bool]) -> None:
        """Say once of each matrix that it was frozen or woken since the attachment, as `set_adapter` does.

        Args:
            matrices: those that can be expanded.
            held: whether the optimizer holds a parameter.
        """
        frozen = [
            m.name for m in matrices if m.expanded and not m.parameter.requires_grad and m.name not in self._resting
        ]
        if frozen:
            self._resting.update(frozen)
            warnings.warn(
                f"{shown(frozen)} no longer required to have gradients (set_adapter, or requires_grad_(False)): their cores rest "
                "until they are trained again. fold() before switching adapters for good",
                stacklevel=2,
            )
        woken = [s for s in self._asleep if s.parameter is not None and s.parameter.grad is not None]
        if woken:
            self._asleep = [s for s in self._asleep if s not in woken]
            names = [s.name for s in woken if s.parameter is not None and held(s.parameter)]
            if names:
                warnings.warn(
                    f"{shown(names)}, left out at the attachment ({woken[0].reason}), now trained as plain LoRA; fold() and "
                    "attach a new LoraOver to expand them",
                    stacklevel=2,
                )


def _flagged(cohort: Cohort, flags: Tensor) -> list[str]:
    return [m.matrix.name for m, flag in zip(cohort.members, flags.tolist(), strict=True) if flag]
