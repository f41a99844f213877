"""Which factorization each matrix gets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from tnadapt.factorizations import Factorization
from tnadapt.matrices import TrainedMatrix, compiled

__all__ = ["FactorizationArgument", "assign_factorizations", "describe_factorizations"]

#: one for all matrices; or by group, or by a regular expression that is searched for in names, the first that fits; or a
#: function of the matrix; or None for that of the adapter
FactorizationArgument = Factorization | Mapping[str, Factorization] | Callable[[TrainedMatrix], Factorization] | None


def assign_factorizations(matrices: Mapping[str, TrainedMatrix], given: FactorizationArgument) -> None:
    """Set the factorization of every matrix.

    Raises:
        TypeError: a function gave something else than a factorization.
        ValueError: a matrix that has none, an entry that fits no matrix or is not a regular expression, or a factorization that does not
            fit a shape.
    """
    used: set[str] = set()
    chosen: dict[str, Factorization] = {}
    for name, matrix in matrices.items():
        one: Any = matrix.factorization
        if isinstance(given, Factorization):
            one = given
        elif isinstance(given, Mapping):
            key = next((k for k in given if k == matrix.group or _pattern(k).search(name)), None)
            if key is not None:
                used.add(key)
                one = given[key]
        elif given is not None:
            one = given(matrix)
        if one is None:
            raise ValueError(
                f"{name} has no factorization: pass one for all, an entry for it, or give its adapter one with "
                "OverParamAdapter.from_linear(..., factorization=...)"
            )
        if not isinstance(one, Factorization):
            raise TypeError(f"the factorization of {name} is a {type(one).__name__}; give one such as MPO(order=9)")
        try:
            one.structure(matrix.shape)
        except ValueError as error:
            error.add_note(f"tnadapt: {one.label} for {name}")
            raise
        chosen[name] = one
    idle = [] if not isinstance(given, Mapping) else [key for key in given if key not in used]
    if idle:
        raise ValueError(
            f"factorization: {idle[0]!r} fits none of the {len(matrices)} matrices that no entry before it fits; names look like "
            f"{', '.join(list(matrices)[:3])}"
        )
    for name, one in chosen.items():
        matrices[name].factorization = one


def _pattern(key: str) -> re.Pattern[str]:
    return compiled(key, f"factorization: {key!r} is neither a group nor a regular expression")


def describe_factorizations(matrices: Mapping[str, TrainedMatrix]) -> str:
    """The labels of all factorizations that are in use, each once, in the order of the model."""
    labels = dict.fromkeys(m.factorization.label for m in matrices.values() if m.factorization is not None)
    return " and ".join(labels)
