"""Who contracts and decomposes: one small interface, one class per library.

A backend is chosen by name (`MPO(order=9, backend="opt_einsum")`) and imports its library when it is built, so that
`import tnadapt` needs torch alone. A library that is missing is an error that names the extra to install.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from tnadapt.backends.kernels import Kernel, full_precision
from tnadapt.backends.torch_backend import TorchBackend

__all__ = ["BACKENDS", "Kernel", "TorchBackend", "full_precision", "get_backend"]

#: name -> (module, class). The name is also that of the library and of the pip extra.
BACKENDS: dict[str, tuple[str, str]] = {
    "torch": ("tnadapt.backends.torch_backend", "TorchBackend"),
    "opt_einsum": ("tnadapt.backends.opt_einsum_backend", "OptEinsumBackend"),
    "tensorly": ("tnadapt.backends.tensorly_backend", "TensorlyBackend"),
    "tensornetwork": ("tnadapt.backends.tensornetwork_backend", "TensorNetworkBackend"),
}


@cache
def get_backend(name: str) -> TorchBackend:
    """The backend called `name`.

    Raises:
        ValueError: no backend has that name.
        ImportError: its library is not installed; the message names the pip extra.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; choose one of {', '.join(sorted(BACKENDS))}")
    module, cls = BACKENDS[name]
    try:
        return getattr(import_module(module), cls)()  # type: ignore[no-any-return]
    except ImportError as error:
        if (error.name or "").startswith("tnadapt"):
            raise  # a fault of ours, which no extra would mend
        raise ImportError(
            f"backend {name!r} needs the library {name}, which is not installed: pip install 'tnadapt[{name}]'"
        ) from error
