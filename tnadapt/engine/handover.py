"""What the optimizer knows of a matrix, handed over to its cores at expansion.

Fresh Adam moments make every core move by a full learning rate at once, in the middle of a run; the matrix then jumps,
further the deeper the factorization. Warm moments are those that the cores would have, as far as the matrix's tell:

- a first moment is an average of gradients, and core gradients are linear in the matrix's: it is pulled back, exactly;
- a second moment is an average of squares. With gradient entries taken as independent, that of a core entry is
  `sum_j J_j^2 v_j` over the entries j of the matrix, J the Jacobian of fold. It is estimated without J, by pulling back
  `sqrt(v) * z` for random signs z and averaging the squares, whose mean it is.

State that is neither (unknown names) is not handed over: the cores then start fresh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tnadapt.factorizations import Factorization

__all__ = ["HANDOVERS", "warm_state"]

HANDOVERS = ("warm", "restart")

#: state entries that are averages of gradients, and of their squares, in torch's elementwise optimizers
_LINEAR = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})
_QUADRATIC = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
_SAMPLES = 32


@torch.no_grad()
def warm_state(
    factorization: Factorization, cores: Sequence[Tensor], states: Sequence[Mapping[str, Any]]
) -> list[list[dict[str, Any]]] | None:
    """State of every core of every matrix, `result[matrix][core]`; None where the cores must start fresh.

    Args:
        cores: stacked cores of n matrices, each [n, *core_k].
        states: what the optimizer holds of each matrix.
    """
    if not states or any(not state for state in states) or any(set(state) != set(states[0]) for state in states):
        return None
    shape = factorization.fold(cores).shape[1:]
    result: list[list[dict[str, Any]]] = [[{} for _ in cores] for _ in states]
    for key, first in states[0].items():
        values = [state[key] for state in states]
        if isinstance(first, Tensor) and first.dim() > 0:
            if first.shape != shape or key not in _LINEAR | _QUADRATIC:
                return None
            stacked = torch.stack(values).to(cores[0].dtype)
            per_core = (
                factorization.pull_back(cores, stacked)
                if key in _LINEAR
                else _pull_squares(factorization, cores, stacked)
            )
            for m, member in enumerate(result):
                for k, state in enumerate(member):
                    state[key] = per_core[k][m]
        else:
            for value, member in zip(values, result, strict=True):
                for state in member:
                    state[key] = value.clone() if isinstance(value, Tensor) else value
    return result


def _pull_squares(factorization: Factorization, cores: Sequence[Tensor], moment: Tensor) -> Sequence[Tensor]:
    # a generator of its own: the global random state, and with it the data order and dropout, is left alone
    generator = torch.Generator("cpu").manual_seed(0)
    root = moment.sqrt()
    totals = [torch.zeros_like(core) for core in cores]
    for _ in range(_SAMPLES):
        # the same for every matrix, so that none depends on which others are expanded with it
        signs = torch.randint(0, 2, root.shape[1:], generator=generator, device="cpu").to(root) * 2 - 1
        for total, pulled in zip(totals, factorization.pull_back(cores, root * signs), strict=True):
            total.addcmul_(pulled, pulled, value=1 / _SAMPLES)
    return totals
