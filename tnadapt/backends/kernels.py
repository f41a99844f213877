"""Kernels: contractions that a training loop repeats at every step, and their gradients, in the precision of the cores.

A kernel multiplies as exactly as its dtype allows, whatever training has switched on. Autocast would contract float32 tensors in
half precision, and the float32 matmul settings of torch (`tf32`, "high", "medium") would round the factors of a product to ten
bits or seven. With either, every fold would change the matrix by a thousandth of its size. Rounding in float32 changes it by a
ten-millionth.

Letters as in `torch_backend`.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from tnadapt.backends.contractions import contract_cp, contract_tucker, sweeps_from_left

__all__ = [
    "AutogradKernel",
    "CPKernel",
    "ChainKernel",
    "Kernel",
    "TuckerKernel",
    "flatten",
    "full_precision",
    "ieee_matmul",
]

# -- precision ---------------------------------------------------------------------------------------------------------

F = TypeVar("F", bound=Callable[..., Any])


def full_precision(method: F) -> F:
    """Run a method outside autocast and with exact float32 products. The device is that of its object, or of the first tensor
    among the arguments."""

    @wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        device = _device_of(self, args, kwargs)
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if not autocast and not _reduced():
            return method(self, *args, **kwargs)
        with ExitStack() as stack:
            if autocast:
                stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(ieee_matmul())
            return method(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def _device_of(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    if hasattr(owner, "device"):
        return str(owner.device.type)
    tensors = next(iter((*args, *kwargs.values())), ())
    first = tensors if isinstance(tensors, Tensor) else next(iter(tensors), None)
    return "cpu" if first is None else first.device.type


class _Switch:
    """The settings are the process's, not the thread's: the first to come in saves them, the last to leave restores them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.saved: Any = None


_SWITCH = _Switch()


@contextmanager
def ieee_matmul() -> Iterator[None]:
    """float32 products without TF32 or bfloat16, on every device; the settings are put back afterwards."""
    with _SWITCH.lock:
        if _SWITCH.inside == 0:
            _SWITCH.saved = _save_and_set()
        _SWITCH.inside += 1
    try:
        yield
    finally:
        with _SWITCH.lock:
            _SWITCH.inside -= 1
            if _SWITCH.inside == 0:
                _restore(_SWITCH.saved)


@cache
def _settings() -> list[Any]:
    """Where torch keeps the precision of float32 products, one entry per kind of device (torch 2.9 and later; reading the
    older global setting there is an error when the newer ones were used)."""
    places = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [place for place in places if hasattr(place, "fp32_precision")]


def _reduced() -> bool:
    places = _settings()
    if not places:
        return torch.get_float32_matmul_precision() != "highest"
    return any(place.fp32_precision in ("tf32", "bf16") for place in places)


def _save_and_set() -> Any:
    places = _settings()
    if not places:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        return before
    inherited = getattr(torch.backends, "fp32_precision", "none")
    saved = []
    for place in places:
        value = place.fp32_precision
        # what is inherited from the setting for everything reads like one's own; "none" inherits it again
        saved.append("none" if value == inherited else value)
        place.fp32_precision = "ieee"
    return saved


def _restore(saved: Any) -> None:
    places = _settings()
    if not places:
        torch.set_float32_matmul_precision(saved)
        return
    for place, value in zip(places, saved, strict=True):
        place.fp32_precision = value


# -- kernels -----------------------------------------------------------------------------------------------------------


class Kernel(ABC):
    """A contraction of tensors that stay where they are while their numbers change, and its gradients.

    Neither method records a graph, and both run in full precision.

    Args:
        device: where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        #: what the last contraction left for pulling back, of whatever kind it is; None where there is nothing
        self._kept: Any = None

    @torch.no_grad()
    @full_precision
    def contract(self) -> Tensor:
        """The contraction of the tensors as they are now, [n, P]. Keeps what pulling back through it reuses."""
        return self._contract()

    @torch.no_grad()
    @full_precision
    def pull_back(self, grad: Tensor) -> Tensor:
        """Gradients of `sum(grad * contract())` with respect to all tensors, flat, one tensor after the other.

        `grad` is [n, P]. The tensors must not have changed since they were contracted; where they were not contracted, or were
        pulled back through since, they are contracted again. The result lasts until the next contraction.
        """
        return self._pull_back(grad)

    def forget(self) -> None:
        """The tensors have changed since they were contracted."""
        self._kept = None

    @abstractmethod
    def _contract(self) -> Tensor:
        """`contract`, as a kernel does it."""

    @abstractmethod
    def _pull_back(self, grad: Tensor) -> Tensor:
        """`pull_back`, as a kernel does it."""


class AutogradKernel(Kernel):
    """Any differentiable contraction, pulled back through by autograd: its graph is kept from contracting to pulling back.

    Args:
        contract: contracts `tensors`, or others of the same shapes, to [n, P].
        tensors: what is contracted; they keep their memory.
    """

    def __init__(self, contract: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors[0].device)
        self._differentiable, self._tensors = contract, tensors

    def _contract(self) -> Tensor:
        """The contraction, [n, P]."""
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in self._tensors]
            result = self._differentiable(leaves)
        self._kept = leaves, result
        return result.detach()

    def _pull_back(self, grad: Tensor) -> Tensor:
        """Gradients of `sum(grad * contract())`, in memory of their own."""
        if self._kept is None:
            self._contract()
        (leaves, result), self._kept = self._kept, None
        return flatten(torch.autograd.grad(result, leaves, grad))


class ChainKernel(Kernel):
    """A chain in place, swept from the end that takes fewer multiplications.

    From the left, with X_k the contraction of cores 0..k and C_k core k: X_k = X_{k-1} C_k, so dC_k = X_{k-1}^T dX_k and
    dX_{k-1} = dX_k C_k^T; the mirror image from the right.

    One allocation holds first the partial contractions X and then the gradients. X_k is in slot k, which is as large as the
    larger of X_k and C_k. Pulling back goes from the last slot to the first and packs the gradients at the far end. So the
    gradient of core k overwrites only those X that have been read already. X_0 is core 0 itself. All views are made once, so a
    contraction is its matmuls and nothing else.
    """

    def __init__(self, cores: Sequence[Tensor]) -> None:
        super().__init__(cores[0].device)
        n, m = cores[0].shape[0], len(cores)
        shapes = [tuple(core.shape[1:]) for core in cores]
        self._from_left = sweeps_from_left(tuple(shapes))
        order = list(range(m)) if self._from_left else list(range(m - 1, -1, -1))
        sizes = [n * math.prod(shape) for shape in shapes]
        swept, partials = 1, [0] * m
        for k in order:
            swept *= shapes[k][1]
            partials[k] = n * swept * shapes[k][2 if self._from_left else 0]
        slots = [sizes[k] if k in (0, m - 1) else max(sizes[k], partials[k]) for k in range(m)]
        memory = cores[0].new_empty(sum(slots))
        start = memory.numel() - sum(sizes) if self._from_left else 0
        #: gradients of all cores, one after the other
        self._flat = memory[start : start + sum(sizes)]
        grads = torch.split(self._flat, sizes)
        held = torch.split(memory, slots)
        matrices = [core.view(n, *self._unfolding(shape)) for core, shape in zip(cores, shapes, strict=True)]

        self._forward: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._backward: list[tuple[tuple[int, ...], Tensor, Tensor, Tensor, Tensor | None]] = []
        first = order[0]
        partial = self._opened(cores[first].view(n, -1), shapes[first])
        for k in order[1:]:
            rows, columns = (partial, matrices[k]) if self._from_left else (matrices[k], partial)
            shape = (n, rows.shape[1], columns.shape[2])
            out = None if k == order[-1] else held[k][: partials[k]].view(shape)
            self._forward.append((rows, columns, out))
            into = grads[first].view(partial.shape) if k == order[1] else None
            grad = grads[k].view(matrices[k].shape)
            self._backward.append((shape, partial.transpose(1, 2), matrices[k].transpose(1, 2), grad, into))
            if out is not None:
                partial = self._opened(out, shapes[k])
        self._backward.reverse()

    def _unfolding(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """A core as the matrix by which the sweep multiplies."""
        left, p, right = shape
        return (left, p * right) if self._from_left else (left * p, right)

    def _opened(self, partial: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What is swept up to a core of `shape`, with that core's far bond as last (from the right: first) dimension."""
        n = partial.shape[0]
        return partial.view(n, -1, shape[2]) if self._from_left else partial.view(n, shape[0], -1)

    def _contract(self) -> Tensor:
        """All cores contracted, [n, P]."""
        self._sweep()
        rows, columns, _ = self._forward[-1]
        return torch.bmm(rows, columns).view(rows.shape[0], -1)

    def _sweep(self) -> None:
        self._kept = None
        for rows, columns, out in self._forward[:-1]:
            torch.bmm(rows, columns, out=out)
        self._kept = True  # the partial contractions are in their slots

    def _pull_back(self, grad: Tensor) -> Tensor:
        """Gradients of `sum(grad * contract())`, in memory that the next contraction overwrites."""
        if self._kept is None:
            self._sweep()
        self._kept = None
        flow = grad
        for shape, partial, core, out, into in self._backward:
            flow = flow.view(shape)
            if self._from_left:
                torch.bmm(partial, flow, out=out)
                flow = torch.bmm(flow, core, out=into)
            else:
                torch.bmm(flow, partial, out=out)
                flow = torch.bmm(core, flow, out=into)
        return self._flat


class TuckerKernel(Kernel):
    """A Tucker in place. Y_k = X_k^T U_k^T, with X_k the partial contraction [n, R_k, the others], gives
    dU_k = dY_k^T X_k^T and dX_k = U_k^T dY_k^T."""

    def __init__(self, factors: Sequence[Tensor], core: Tensor) -> None:
        super().__init__(core.device)
        self._factors, self._core = factors, core

    def _contract(self) -> Tensor:
        """Factors and core tensor contracted, [n, P]."""
        flat, self._kept = contract_tucker(self._factors, self._core)
        return flat

    def _pull_back(self, grad: Tensor) -> Tensor:
        """Gradients of `sum(grad * contract())`, in memory of their own."""
        if self._kept is None:
            self._contract()
        partial, self._kept = self._kept, None
        n, factors = grad.shape[0], self._factors
        grads: list[Tensor] = []
        flow = grad
        for factor, before in zip(reversed(factors), reversed(partial), strict=True):
            outward = flow.reshape(n, -1, factor.shape[1]).transpose(1, 2)
            grads.append(torch.bmm(outward, before.transpose(1, 2)))
            flow = torch.bmm(factor.transpose(1, 2), outward)
        return flatten([*reversed(grads), flow])


class CPKernel(Kernel):
    """A CP in place: the Khatri-Rao products of both halves, and one batched matmul that joins them."""

    def __init__(self, factors: Sequence[Tensor]) -> None:
        super().__init__(factors[0].device)
        self._factors = factors

    def _contract(self) -> Tensor:
        """Factors contracted, [n, P]."""
        flat, self._kept = contract_cp(self._factors)
        return flat

    def _pull_back(self, grad: Tensor) -> Tensor:
        """Gradients of `sum(grad * contract())`, in memory of their own: two batched matmuls, then elementwise products down
        both halves."""
        if self._kept is None:
            self._contract()
        (left, right), self._kept = self._kept, None
        split = len(left)
        joint = grad.reshape(grad.shape[0], left[-1].shape[1], right[-1].shape[1])
        flows = (torch.bmm(joint, right[-1]), torch.bmm(joint.transpose(1, 2), left[-1]))
        return flatten(
            [
                *_khatri_rao_pull_back(self._factors[:split], left, flows[0]),
                *_khatri_rao_pull_back(self._factors[split:], right, flows[1]),
            ]
        )


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All entries, one tensor after the other."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _khatri_rao_pull_back(factors: Sequence[Tensor], products: Sequence[Tensor], flow: Tensor) -> list[Tensor]:
    """Gradients of the factors of one half, from the gradient [n, P, R] of its Khatri-Rao product."""
    grads: list[Tensor] = [flow] * len(factors)
    for k in range(len(factors) - 1, 0, -1):
        n, p, rank = factors[k].shape
        flow = flow.reshape(n, -1, p, rank)
        grads[k] = (flow * products[k - 1].unsqueeze(2)).sum(dim=1)
        flow = (flow * factors[k].unsqueeze(1)).sum(dim=2)
    grads[0] = flow.reshape(factors[0].shape)
    return grads
