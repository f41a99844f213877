"""Expand a fixed choice from step 0 ("LoRA-Over-SVD" and "LoRA-Over-MPO" in the paper when it is every matrix)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tnadapt.matrices import TrainedMatrix
from tnadapt.schedulers.base import Scheduler

__all__ = ["Static"]


class Static(Scheduler):
    """Expands every matrix, or those that are named, from step 0; folds them back after a step where one is given.

    Args:
        which: None for every matrix; a regular expression that is searched for in names (`r"q_proj\\.A$"`); or names.
        fold_after: the last step that trains through cores, at least 1; from the next one on the matrices are trained on as
            plain LoRA. None for cores to the end. Not in the paper.
    """

    def __init__(self, which: str | Iterable[str] | None = None, fold_after: int | None = None) -> None:
        if fold_after is not None and (
            isinstance(fold_after, bool) or not isinstance(fold_after, int) or fold_after < 1
        ):
            raise ValueError(f"Static: fold_after={fold_after!r} must be a step, an integer of at least 1, or None")
        self.fold_after = fold_after
        self.which = which if which is None or isinstance(which, str) else tuple(which)
        self._pattern = re.compile(which) if isinstance(which, str) else None
        self._names = None if isinstance(self.which, str) else self.which

    def attach(self, matrices: Mapping[str, TrainedMatrix]) -> None:
        chosen = self._choose(matrices)
        if not chosen:
            wanted = "an empty list of names" if self._pattern is None else f"the pattern {self._pattern.pattern!r}"
            raise ValueError(
                f"Static: {wanted} matches none of the {len(matrices)} matrices, whose names look like "
                f"{', '.join(list(matrices)[:3])}"
            )

    def select(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> Iterable[str]:
        return self._choose(matrices) if step == 0 else ()

    def release(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> Iterable[str]:
        return [name for name, matrix in matrices.items() if matrix.expanded] if step - 1 == self.fold_after else ()

    def due(self, step: int) -> bool:
        return step == 0 or step - 1 == self.fold_after

    def first_step(self) -> int:
        return 0

    def _choose(self, matrices: Mapping[str, TrainedMatrix]) -> list[str]:
        if self._names is not None:
            missing = [name for name in self._names if name not in matrices]
            if missing:
                raise ValueError(
                    f"Static: {', '.join(missing[:5])} is not among the {len(matrices)} matrices that can be "
                    f"expanded, whose names look like {', '.join(list(matrices)[:3])}"
                )
            return list(self._names)
        return [name for name in matrices if self._pattern is None or self._pattern.search(name)]

    @property
    def label(self) -> str:
        # what a resumed run is compared by, so it has every setting
        shown = [] if self.fold_after is None else [f"fold_after={self.fold_after}"]
        if self._pattern is not None:
            shown.insert(0, repr(self._pattern.pattern))
        elif self._names is not None:
            shown.insert(0, f"{len(self._names)} names")
        return f"Static({', '.join(shown)})"
