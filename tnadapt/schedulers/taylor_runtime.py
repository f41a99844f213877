"""Expand in rounds while training, by a first-order Taylor estimate of importance (LoRA-Over, Eq. 8; MPO_R)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from tnadapt.matrices import TrainedMatrix
from tnadapt.schedulers.base import Scheduler, by_group, check_switches, warn_small_groups
from tnadapt.schedulers.scores import check_any, check_finite, check_reduction, taylor_scores, to_floats

__all__ = ["TaylorRuntime", "round_sizes"]


def round_sizes(top_n: int, split: int, group_size: int) -> list[int]:
    """How many matrices of a group each of the `split` rounds expands.

    After round k, `ceil(k * N / split)` are expanded, with N = min(top_n, group_size). Rounds differ by at most one, and the last
    round reaches N exactly, whether or not `split` divides it.

    >>> round_sizes(9, 4, 32)
    [3, 2, 2, 2]
    """
    n = min(top_n, group_size)
    reached = [-(-k * n // split) for k in range(split + 1)]
    return [b - a for a, b in pairwise(reached)]


class TaylorRuntime(Scheduler):
    """Expands in `split` rounds, `every` steps apart. Each round expands, in each group, the matrices with the highest scores
    that are not expanded yet. After the last round `top_n` matrices of each group are expanded.

    The score of a matrix is the sum over steps of the first-order change of the loss when the matrix is set to zero,
    `|<dL/dW, W>|` (Eq. 8). The paper leaves open whether products are summed before or after taking absolute values:
    `"inner"` (the default) is the Taylor term of Eq. 7; `"elementwise"`, `sum |g * w|`, is an upper bound of it that
    depends on the basis.

    Args:
        top_n: N, matrices to expand in each group in the end. A smaller group is expanded whole, with a warning.
        split: number of rounds.
        every: optimizer steps between rounds.
        reduction: `"inner"` or `"elementwise"`.
        average: whether a score is divided by the number of steps in which the matrix had a gradient. It matters only if
            matrices are idle in some steps (experts).
        reset: whether scores start from zero after each round. Off by default: the estimate from all steps so far has
            less noise than that from the last few.
        expand_after_update: the order of Algorithm 2 as it is printed. The matrices that a round selects at step t are then
            expanded after the update of that step, and update t + 1 is the first through their cores. By default they are
            expanded before the update of step t, which is then the first.
    """

    def __init__(
        self,
        top_n: int,
        split: int,
        every: int,
        reduction: str = "inner",
        average: bool = False,
        reset: bool = False,
        expand_after_update: bool = False,
    ) -> None:
        for name, value in (("top_n", top_n), ("split", split), ("every", every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"TaylorRuntime: {name}={value!r} must be an integer of at least 1")
        check_reduction("TaylorRuntime", reduction)
        check_switches("TaylorRuntime", average=average, reset=reset, expand_after_update=expand_after_update)
        self.top_n, self.split, self.every = top_n, split, every
        self.reduction, self.average, self.reset = reduction, average, reset
        self.expand_after_update = self.after_update = expand_after_update
        self.rounds_done = 0
        self._scores: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        #: for the report: what each round knew, as {"step": int, "scores": {name: float}, "selected": [names]}
        self.rounds: list[dict[str, Any]] = []

    def attach(self, matrices: Mapping[str, TrainedMatrix]) -> None:
        if self.rounds_done or self._scores:
            raise ValueError(
                f"TaylorRuntime: this scheduler has {self.rounds_done} of {self.split} rounds behind it; make a new one for "
                "another run (to resume, load the saved state after attaching)"
            )
        warn_small_groups("TaylorRuntime", self.top_n, matrices)

    def due(self, step: int) -> bool:
        return step > 0 and step % self.every == 0 and self.rounds_done < self.split

    def first_step(self) -> int:
        return self.every

    def observe(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> None:
        if self.rounds_done == self.split:
            return
        waiting = [matrix for matrix in matrices.values() if not matrix.expanded]
        for name, score in taylor_scores(waiting, self.reduction).items():
            known = self._scores.get(name)
            self._scores[name] = score if known is None else known.to(score.device) + score
            self._counts[name] = self._counts.get(name, 0) + 1

    def select(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> Iterable[str]:
        if not self.due(step):
            return ()
        scores = self.scores()
        check_finite("TaylorRuntime", scores, step)
        check_any("TaylorRuntime", scores, (m for m in matrices.values() if not m.expanded), step)
        chosen: list[str] = []
        unscored: list[str] = []
        for group, members in by_group(matrices).items():
            count = round_sizes(self.top_n, self.split, len(members))[self.rounds_done]
            waiting = [m.name for m in members if not m.expanded]
            # sorted() is stable: equal scores (all zero, say) go by the order of the model on every rank
            taken = sorted(waiting, key=lambda name: -scores.get(name, 0.0))[:count]
            # where all that wait are taken, nothing was ranked
            if len(taken) < len(waiting) and taken and not any(name in scores for name in waiting):
                unscored.append(f"{group} ({', '.join(taken[:3])})")
            chosen += taken
        if unscored:
            warnings.warn(
                f"TaylorRuntime: no matrix that waits in {len(unscored)} groups had a gradient before the round of step "
                f"{step}; they are expanded by the order of the model: {'; '.join(unscored[:3])}",
                stacklevel=2,
            )
        self.rounds_done += 1
        self.rounds.append({"step": step, "scores": scores, "selected": list(chosen)})
        if self.reset:
            self._scores.clear()
            self._counts.clear()
        return chosen

    def scores(self) -> dict[str, float]:
        """Score of every matrix observed so far (one host synchronisation)."""
        scores = to_floats(self._scores)
        return {name: score / self._counts[name] for name, score in scores.items()} if self.average else scores

    def state_dict(self) -> dict[str, Any]:
        return {
            "rounds_done": self.rounds_done,
            "scores": dict(self._scores),
            "counts": dict(self._counts),
            "rounds": [dict(r) for r in self.rounds],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        missing = {"rounds_done", "scores", "counts", "rounds"} - set(state)
        if missing:
            raise ValueError(
                f"TaylorRuntime: the state lacks {', '.join(sorted(missing))}; it is not one of TaylorRuntime"
            )
        if state["rounds_done"] > self.split:
            raise ValueError(
                f"TaylorRuntime: the state has {state['rounds_done']} rounds behind it, but split={self.split}; "
                "resume with the split of the run that was saved"
            )
        self.rounds_done = int(state["rounds_done"])
        self._scores = {name: score.detach().clone() for name, score in state["scores"].items()}
        self._counts = dict(state["counts"])
        self.rounds = [dict(r) for r in state["rounds"]]

    @property
    def label(self) -> str:
        """As `repr`: a state is not resumed under other settings."""
        return repr(self)
