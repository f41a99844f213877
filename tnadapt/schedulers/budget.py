"""Spend a budget of parameters where it matters now, and take it back where it no longer does. Not in the paper."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from tnadapt.matrices import TrainedMatrix
from tnadapt.schedulers.base import Scheduler, by_group, check_switches
from tnadapt.schedulers.scores import check_any, check_finite, check_reduction, taylor_scores, to_floats

__all__ = ["Budget"]


class Budget(Scheduler):
    """Keep expanded, across the whole run, the matrices with the highest score per added parameter.

    The score is that of `TaylorRuntime`, as an exponential average over steps. Every `every` steps matrices are ranked by
    score over the parameters that expanding them adds (Eq. 6); the best that fit into the budget should be expanded. An
    expanded matrix that is no longer among them is folded back if a waiting one beats it by the factor `margin`. So nothing
    flips back and forth on noise. A folded matrix keeps its values and is trained on as plain LoRA.

    Unlike the paper's schedulers this ranks across groups: a parameter costs the same everywhere. Pass `per_group=True`
    for a share of the budget per group, in proportion to what its matrices would add.

    Args:
        added_parameters: the budget: how many more numbers cores may have than the matrices that they replace.
        every: optimizer steps between decisions.
        until: no changes after this step, so that what is expanded late has time to train; None for the whole run.
        decay: of the average per step, in [0, 1).
        margin: factor of at least 1.
        reduction: `"inner"` or `"elementwise"`, as for `TaylorRuntime`.
        per_group: see above.
    """

    def __init__(
        self,
        added_parameters: int,
        every: int,
        until: int | None = None,
        decay: float = 0.95,
        margin: float = 1.5,
        reduction: str = "inner",
        per_group: bool = False,
    ) -> None:
        for name, value in (("added_parameters", added_parameters), ("every", every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Budget: {name}={value!r} must be an integer of at least 1")
        if until is not None and (isinstance(until, bool) or not isinstance(until, int)):
            raise ValueError(f"Budget: until={until!r} must be a step, an integer, or None")
        if until is not None and until < every:
            raise ValueError(
                f"Budget: until={until!r} is before the first decision at step every={every}, so that nothing would ever be "
                "expanded; raise until or lower every"
            )
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"Budget: decay={decay!r} must be at least 0 and below 1")
        if not 1.0 <= margin < math.inf:
            raise ValueError(f"Budget: margin={margin!r} must be a finite number of at least 1")
        check_reduction("Budget", reduction)
        check_switches("Budget", per_group=per_group)
        self.added_parameters, self.every, self.until = added_parameters, every, until
        self.decay, self.margin, self.reduction, self.per_group = decay, margin, reduction, per_group
        self._scores: dict[str, Tensor] = {}
        self._decided: tuple[int, tuple[str, ...], tuple[str, ...]] = (0, (), ())

    def attach(self, matrices: Mapping[str, TrainedMatrix]) -> None:
        if self._scores:
            raise ValueError(
                "Budget: this scheduler has scores of another run; make a new one (to resume, load its state later)"
            )
        costs = [m.added_parameters for m in matrices.values() if m.added_parameters > 0]
        if not costs:
            raise ValueError("Budget: expanding adds no parameters to any matrix; choose an order or sites that do")
        if min(costs) > self.added_parameters:
            raise ValueError(
                f"Budget: added_parameters={self.added_parameters} is less than the cheapest matrix adds "
                f"({min(costs)}); raise it to at least that"
            )
        shares = [
            (share, [m.added_parameters for m in some if m.added_parameters > 0])
            for share, some in self._shares(matrices)
        ]
        if not any(min(its) <= share for share, its in shares if its):
            # the share of a group is rounded down
            enough = min(-(-min(its) * sum(costs) // sum(its)) for _, its in shares if its)
            raise ValueError(
                f"Budget: added_parameters={self.added_parameters} is shared out by per_group=True over {len(shares)} groups, and no "
                f"share pays for the cheapest matrix of its group, so that nothing would ever be expanded; raise it to at least {enough}, or drop "
                "per_group"
            )

    def due(self, step: int) -> bool:
        return step > 0 and step % self.every == 0 and (self.until is None or step <= self.until)

    def first_step(self) -> int:
        return self.every

    def observe(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> None:
        for name, score in taylor_scores(matrices.values(), self.reduction).items():
            known = self._scores.get(name)
            fresh = score * (1 - self.decay)
            self._scores[name] = fresh if known is None else known.to(score.device) * self.decay + fresh

    def release(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> Iterable[str]:
        self._decide(step, matrices)
        return self._decided[1]

    def select(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> Iterable[str]:
        return self._decided[2] if self._decided[0] == step else ()

    def _decide(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> None:
        scores = to_floats(self._scores)
        check_finite("Budget", scores, step)
        check_any("Budget", scores, matrices.values(), step)
        released: list[str] = []
        chosen: list[str] = []
        for budget, members in self._shares(matrices):
            worth = {m.name: scores.get(m.name, 0.0) / m.added_parameters for m in members if m.added_parameters > 0}
            ranked = sorted(worth, key=lambda name: -worth[name] * (self.margin if matrices[name].expanded else 1.0))
            keep: list[str] = []
            for name in ranked:
                if matrices[name].added_parameters <= budget:
                    budget -= matrices[name].added_parameters
                    keep.append(name)
            released += [name for name in worth if matrices[name].expanded and name not in set(keep)]
            chosen += [name for name in keep if not matrices[name].expanded]
        self._decided = (step, tuple(released), tuple(chosen))

    def _shares(self, matrices: Mapping[str, TrainedMatrix]) -> list[tuple[int, list[TrainedMatrix]]]:
        if not self.per_group:
            return [(self.added_parameters, list(matrices.values()))]
        # a truncated structure may have fewer numbers than its matrix, which adds nothing to anyone's share
        adding = [
            (sum(max(m.added_parameters, 0) for m in members), members) for members in by_group(matrices).values()
        ]
        total = sum(added for added, _ in adding)
        return [(self.added_parameters * added // total, members) for added, members in adding]

    def scores(self) -> dict[str, float]:
        """Averaged score of every matrix (one host synchronisation)."""
        return to_floats(self._scores)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": dict(self._scores)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "scores" not in state:
            raise ValueError("Budget: the state lacks scores; it is not one of Budget")
        self._scores = {name: score.detach().clone() for name, score in state["scores"].items()}
        self._decided = (0, (), ())

    @property
    def label(self) -> str:
        """The same as `repr`, since a state is not resumed under other settings."""
        return repr(self)
