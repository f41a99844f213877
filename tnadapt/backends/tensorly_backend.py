"""tensorly: its own tensor-train, Tucker and CP decompositions and contractions, matrix by matrix.

Letters as in `torch_backend`. tensorly's functions have no batch dimensions, so a batch is a loop. tensorly works on
whatever backend is set; ours is set for this thread only, and what was set before is put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import tensorly
import tensorly.decomposition
import torch
from tensorly.backend import BackendManager
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from tnadapt.backends.torch_backend import TorchPrimitives

__all__ = ["TensorlyBackend"]


class TensorlyBackend(TorchPrimitives):
    """Decompositions and contractions by tensorly; plain matrix SVDs stay torch's, which batches them."""

    name = "tensorly"

    def contract(self, equation: str, *tensors: Tensor) -> Tensor:
        with _on_torch():
            return tensorly.einsum(equation, *tensors)  # type: ignore[no-any-return]

    def chain_decompose(self, tensor: Tensor, bonds: Sequence[int]) -> list[Tensor]:
        with _on_torch():
            each = [tensorly.decomposition.tensor_train(one, rank=[1, *bonds, 1]).factors for one in tensor]
        return _stack(each)

    def chain_contract(self, cores: Sequence[Tensor]) -> Tensor:
        with _on_torch():
            return torch.stack([tensorly.tt_to_tensor(list(one)).reshape(-1) for one in _members(cores)])

    def tucker_decompose(self, tensor: Tensor, ranks: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """tensorly's HOOI, for matrices that are not zero: it divides by the norm."""
        each = []
        for one in tensor:
            if not bool(one.any()):
                factors, core = super().tucker_decompose(one.unsqueeze(0), ranks)
                each.append([*(factor[0] for factor in factors), core[0]])
                continue
            with _on_torch():
                core, factors = tensorly.decomposition.tucker(one, rank=list(ranks), init="svd", tol=1e-10)
            each.append([*factors, core])
        *stacked, cores = _stack(each)
        return stacked, cores

    def tucker_contract(self, factors: Sequence[Tensor], core: Tensor) -> Tensor:
        with _on_torch():
            each = [
                tensorly.tucker_to_tensor((one[-1], list(one[:-1]))).reshape(-1) for one in _members([*factors, core])
            ]
        return torch.stack(each)

    def cp_decompose(self, tensor: Tensor, rank: int) -> list[Tensor]:
        """tensorly's ALS; matrices whose normal equations it cannot solve (zero and low-rank ones) are torch's, whose
        ridge can."""
        modes = tensor.shape[1:]
        largest = max(range(len(modes)), key=lambda k: modes[k])
        each = []
        for one in tensor:
            factors = _parafac(one, rank)
            if factors is None:
                factors = [factor[0] for factor in super().cp_decompose(one.unsqueeze(0), rank)]
            each.append(_weights_into(factors, largest))
        return _stack(each)

    def cp_contract(self, factors: Sequence[Tensor]) -> Tensor:
        with _on_torch():
            return torch.stack([tensorly.cp_to_tensor((None, list(one))).reshape(-1) for one in _members(factors)])


def _parafac(tensor: Tensor, rank: int) -> list[Tensor] | None:
    """Factors by tensorly, or None where it has none: more components than it can start from, or singular equations."""
    if not bool(tensor.any()):
        return None
    try:
        with _on_torch():
            # components beyond what a singular value decomposition starts are drawn at random: from a fixed seed
            weights, factors = tensorly.decomposition.parafac(tensor, rank=rank, init="svd", tol=1e-9, random_state=0)
    except LinAlgError:
        return None
    factors = [factors[0] * weights, *factors[1:]]
    return factors if all(bool(torch.isfinite(factor).all()) for factor in factors) else None


def _weights_into(factors: Sequence[Tensor], largest: int) -> list[Tensor]:
    """Unit columns everywhere but in one factor, which takes the norms."""
    norms = [factor.norm(dim=0) for factor in factors]
    weights = torch.stack([norm for k, norm in enumerate(norms) if k != largest]).prod(dim=0)
    return [
        factor * weights if k == largest else factor / torch.where(norm == 0, torch.ones_like(norm), norm)
        for k, (factor, norm) in enumerate(zip(factors, norms, strict=True))
    ]


def _members(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.unbind(0) for tensor in tensors), strict=True)


def _stack(each: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(list(tensors)) for tensors in zip(*each, strict=True)]


@contextmanager
def _on_torch() -> Iterator[None]:
    """tensorly on torch, in this thread only. tensorly's own context manager writes the old backend back for *all*
    threads, so the thread's entry is saved and restored here."""
    local = BackendManager._THREAD_LOCAL_DATA.__dict__
    before = local.get("backend")
    tensorly.set_backend("pytorch", local_threadsafe=True)
    try:
        yield
    finally:
        if before is None:
            local.pop("backend", None)
        else:
            local["backend"] = before
