"""Backends, which contract and decompose: one small interface, and one class per library (see `base`).

A backend is chosen by name (`MPO(order=9, backend="opt_einsum")`) and imports its library when it is built, so that
`import tnadapt` needs torch alone. A library that is missing is an error that names the extra to install.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TypeVar

from tnadapt.backends.base import Backend
from tnadapt.backends.kernels import AutogradKernel, Kernel, full_precision
from tnadapt.backends.torch_backend import TorchBackend

__all__ = [
    "BACKENDS",
    "AutogradKernel",
    "Backend",
    "Kernel",
    "TorchBackend",
    "full_precision",
    "get_backend",
    "register_backend",
]

B = TypeVar("B", bound="type[Backend]")

#: name -> (module, class), imported when it is asked for; the name is also that of the library and of the pip extra. Of those
#: that are registered, the class itself.
BACKENDS: dict[str, tuple[str, str] | type[Backend]] = {
    "torch": ("tnadapt.backends.torch_backend", "TorchBackend"),
    "opt_einsum": ("tnadapt.backends.opt_einsum_backend", "OptEinsumBackend"),
    "tensorly": ("tnadapt.backends.tensorly_backend", "TensorlyBackend"),
    "tensornetwork": ("tnadapt.backends.tensornetwork_backend", "TensorNetworkBackend"),
}


@cache
def get_backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        ValueError: no backend has that name.
        ImportError: its library is not installed; the message names the pip extra.
    """
    if name not in BACKENDS:
        raise ValueError(
            f"backend {name!r} is unknown; choose one of {', '.join(sorted(BACKENDS))}, or add one with register_backend"
        )
    known = BACKENDS[name]
    if isinstance(known, type):
        return known()
    module, cls = known
    try:
        return getattr(import_module(module), cls)()  # type: ignore[no-any-return]
    except ImportError as error:
        if (error.name or "").startswith("tnadapt"):
            raise  # a fault of ours, which no extra would mend
        raise ImportError(
            f"backend {name!r} needs the library {name}, which is not installed: pip install 'tnadapt[{name}]'"
        ) from error


def register_backend(cls: B, name: str | None = None) -> B:
    """Make a backend known by the name that its class has as `name`, or another. Usable as a decorator. It is built, without
    arguments, when it is first asked for. A class that is defined anew, as in a notebook, replaces itself.

    Raises:
        TypeError: `cls` is not a subclass of `Backend`, or has no name.
        ValueError: the name belongs to another backend.
    """
    if not isinstance(cls, type) or not issubclass(cls, Backend):
        raise TypeError(f"register_backend takes a subclass of Backend, got {cls!r}")
    name = getattr(cls, "name", None) if name is None else name
    if not isinstance(name, str) or not name:
        raise TypeError(f"register_backend: {cls.__qualname__} has name={name!r}; give the class a name, a string")
    known = BACKENDS.get(name)
    path = known if known is None or isinstance(known, tuple) else (known.__module__, known.__qualname__)
    if path not in (None, (cls.__module__, cls.__qualname__)):
        raise ValueError(f"register_backend: the name {name!r} belongs to another backend; take a new one")
    BACKENDS[name] = cls
    get_backend.cache_clear()
    return cls
