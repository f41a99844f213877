"""opt_einsum: the library finds the order in which to contract, once per structure, and runs it on torch tensors.

Letters as in `torch_backend`. Decompositions are torch's: the library has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import opt_einsum
from torch import Tensor

from tnadapt.backends.torch_backend import TorchPrimitives

__all__ = ["OptEinsumBackend"]


class OptEinsumBackend(TorchPrimitives):
    """Contractions along the path that opt_einsum finds; the batch is one more index, on every tensor."""

    name = "opt_einsum"

    def contract(self, equation: str, *tensors: Tensor) -> Tensor:
        expression = _expression(equation, tuple(tuple(tensor.shape) for tensor in tensors))
        return expression(*tensors, backend="torch")  # type: ignore[no-any-return]

    def chain_contract(self, cores: Sequence[Tensor]) -> Tensor:
        m = len(cores)
        batch, bonds, modes = _symbols(1, m + 1, m)
        terms = [f"{batch}{bonds[k]}{modes[k]}{bonds[k + 1]}" for k in range(m)]
        # the outer bonds have size 1: summing over them is taking their only entry
        return self._flat(terms, f"{batch}{modes}", cores)

    def tucker_contract(self, factors: Sequence[Tensor], core: Tensor) -> Tensor:
        m = len(factors)
        batch, ranks, modes = _symbols(1, m, m)
        terms = [*(f"{batch}{modes[k]}{ranks[k]}" for k in range(m)), f"{batch}{ranks}"]
        return self._flat(terms, f"{batch}{modes}", [*factors, core])

    def cp_contract(self, factors: Sequence[Tensor]) -> Tensor:
        m = len(factors)
        batch, rank, modes = _symbols(1, 1, m)
        return self._flat([f"{batch}{mode}{rank}" for mode in modes], f"{batch}{modes}", factors)

    def _flat(self, terms: Sequence[str], result: str, tensors: Sequence[Tensor]) -> Tensor:
        """The whole network as one equation, so that the library finds the order; flat."""
        return self.contract(f"{','.join(terms)}->{result}", *tensors).reshape(tensors[0].shape[0], -1)


def _symbols(*counts: int) -> list[str]:
    """Disjoint groups of index names, each of `counts[k]` symbols."""
    groups, start = [], 0
    for count in counts:
        groups.append("".join(opt_einsum.get_symbol(start + k) for k in range(count)))
        start += count
    return groups


@lru_cache(maxsize=1024)
def _expression(equation: str, shapes: tuple[tuple[int, ...], ...]) -> Any:
    """The path for these shapes; finding it costs more than walking it."""
    return opt_einsum.contract_expression(equation, *shapes)
