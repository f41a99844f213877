"""safetensors files that say what they hold: a format, a version, and JSON beside the tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["named", "read_tensors", "write_tensors"]

_VERSION = "1"


def write_tensors(file: str | Path, tensors: Mapping[str, Tensor], kind: str, about: Mapping[str, Any]) -> None:
    """Write `tensors` to `file`, with `kind` and the JSON-able `about` in its header. The file replaces an older one in one
    move, so that an interruption leaves one of the two."""
    _require_safetensors()
    from safetensors.torch import save_file

    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_name(f".{file.name}.{os.getpid()}.writing")
    header = {"format": kind, "version": _VERSION, "about": json.dumps(dict(about))}
    # clones, because safetensors refuses tensors that share memory
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(plain, half, metadata=header)
        half.replace(file)
    except BaseException:
        # on a full disk, what was written of it would stay in the way of another attempt
        half.unlink(missing_ok=True)
        raise


def read_tensors(file: str | Path, kind: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of `file`, on the CPU, and its `about`. With `kind` None any safetensors file will do.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind, or of a later version.
    """
    _require_safetensors()
    from safetensors import SafetensorError, safe_open

    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there")
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error})") from error
    if kind is None:
        return tensors, {}
    if header.get("format") != kind:
        raise ValueError(f"{file} is not a {kind} file: its header says {header.get('format')!r}")
    if header.get("version") != _VERSION:
        raise ValueError(
            f"{file} has version {header.get('version')!r} of the format {kind}, this tnadapt reads {_VERSION!r}; "
            "read it with the tnadapt that wrote it"
        )
    try:
        return tensors, json.loads(header["about"])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"the header of {file} is damaged ({type(error).__name__}); get the file anew") from error


def named(names: Iterable[str], most: int = 3) -> str:
    """Some of `names` for an error message, and how many more there are."""
    listed = list(names)
    more = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {more} more" if more > 0 else "")


def _require_safetensors() -> None:
    """Raise ImportError with the way out if safetensors is missing, or numpy, by which it writes: tnadapt needs torch alone."""
    try:
        import numpy  # noqa: F401
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "adapter files are safetensors files, which need safetensors and numpy: pip install 'tnadapt[safetensors]'"
        ) from error
