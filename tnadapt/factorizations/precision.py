"""Contracting in the precision of the cores, whatever the training around it has switched on.

Autocast contracts float32 tensors in half precision, and the float32 matmul settings of torch (`tf32`, "high", "medium") round
the factors of a product to ten bits or seven. Both would move the matrix by a thousandth of its size at every fold, where
rounding moves it by a ten-millionth.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["full_precision", "ieee_matmul"]

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
