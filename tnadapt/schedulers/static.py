"""Expand a fixed choice from step 0 ("LoRA-Over-SVD" and "LoRA-Over-MPO" in the paper when it is every matrix)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from tnadapt.matrices import TrainedMatrix, compiled
from tnadapt.schedulers.base import Scheduler

__all__ = ["Static"]


class Static(Scheduler):
    """Expands every matrix, or those that are named, from step 0. With `fold_after` it folds them back after that step. With
    `refresh_every` it unfolds them anew at that interval.

    Args:
        which: None for every matrix; a regular expression that is searched for in names (`r"q_proj\\.A$"`); or names.
        fold_after: the last step that trains through cores, at least 1; from the next one on the matrices are trained on as
            plain LoRA. None for cores to the end. Not in the paper.
        refresh_every: steps, at least 1, between two times at which every matrix is unfolded anew. The gauge is then that of the
            trained matrix (and, with `gauge="gradient"`, of the gradient of that step). The new cores start without moments,
            except with `matched=True`, where they get those of the matrices. None for cores that stay. Not in the paper.

    Raises:
        TypeError: `which` is neither a string nor names.
        ValueError: `which` is not a regular expression, or has a name twice; a number of steps below 1.
    """

    def __init__(
        self,
        which: str | Iterable[str] | None = None,
        fold_after: int | None = None,
        refresh_every: int | None = None,
    ) -> None:
        for name, what, value in (("fold_after", "a step", fold_after), ("refresh_every", "steps", refresh_every)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"Static: {name}={value!r} must be {what}, an integer of at least 1, or None")
        self.fold_after, self.refresh_every = fold_after, refresh_every
        self.which = which if which is None or isinstance(which, str) else _names_in(which)
        told = f"Static: which={which!r} is not a regular expression"
        self._pattern = compiled(which, told) if isinstance(which, str) else None
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
        if step == 0:
            return self._choose(matrices)
        return _expanded(matrices) if self._refreshes(step) else ()

    def release(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> Iterable[str]:
        return _expanded(matrices) if self._refreshes(step) or step - 1 == self.fold_after else ()

    def due(self, step: int) -> bool:
        return step == 0 or step - 1 == self.fold_after or self._refreshes(step)

    def first_step(self) -> int:
        return 0

    def _refreshes(self, step: int) -> bool:
        """Whether the cores that have been trained up to the step before are made anew."""
        trained = step - 1
        if self.refresh_every is None or trained < 1 or (self.fold_after is not None and trained >= self.fold_after):
            return False
        return trained % self.refresh_every == 0

    def _choose(self, matrices: Mapping[str, TrainedMatrix]) -> list[str]:
        if self._names is not None:
            missing = [name for name in self._names if name not in matrices]
            if missing:
                raise ValueError(
                    f"Static: {', '.join(missing[:5])} is not among the {len(matrices)} matrices that can be "
                    f"expanded, whose names look like {', '.join(list(matrices)[:3])}"
                )
            # in the order of the model: that of a set differs between processes, and ranks must agree
            named = set(self._names)
            return [name for name in matrices if name in named]
        return [name for name in matrices if self._pattern is None or self._pattern.search(name)]

    @property
    def label(self) -> str:
        # what a resumed run is compared by, so it has every setting
        later = {"fold_after": self.fold_after, "refresh_every": self.refresh_every}
        shown = [f"{name}={value}" for name, value in later.items() if value is not None]
        if self._pattern is not None:
            shown.insert(0, repr(self._pattern.pattern))
        elif self._names is not None:
            shown.insert(0, f"{len(self._names)} names")
        return f"Static({', '.join(shown)})"


def _names_in(which: object) -> tuple[str, ...]:
    names = tuple(which) if isinstance(which, Iterable) else (which,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"Static: which={which!r}: give a regular expression, names of matrices, or None for every one")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"Static: which has {', '.join(twice[:5])} more than once")
    return names


def _expanded(matrices: Mapping[str, TrainedMatrix]) -> list[str]:
    return [name for name, matrix in matrices.items() if matrix.expanded]
