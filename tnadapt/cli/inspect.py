"""`tnadapt inspect`: what a checkpoint of a run with `LoraOver` holds, without the model."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnadapt.cli.tables import aligned
from tnadapt.factorizations import Factorization
from tnadapt.matrices import canonical_name
from tnadapt.state import STATE_KEY, VERSION

__all__ = ["run"]

_FILES = ("tnadapt.pt", "optimizer.pt", "optimizer.bin")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "pytorch_model.bin")
_WEIGHT = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")


def run(checkpoint: Path, as_json: bool = False) -> str:
    """What the checkpoint holds, as text or JSON."""
    file = _state_file(checkpoint)
    state, adapter = _state(file), _adapter(file.parent)
    try:
        found = described(state, adapter)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the state in {file} is damaged ({type(error).__name__}: {error}); take an earlier one"
        ) from error
    return json.dumps({"file": str(file), **found}, indent=2) if as_json else f"{file}\n{_text(found)}"


def _state_file(checkpoint: Path) -> Path:
    if checkpoint.is_file():
        return checkpoint
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint} is not there")
    for name in _FILES:
        if (checkpoint / name).is_file():
            return checkpoint / name
    inside = sorted(path.name for path in checkpoint.glob("checkpoint-*"))
    hint = f"; it holds {', '.join(inside[:5])}, name one of them" if inside else ""
    raise FileNotFoundError(f"{checkpoint} has none of {', '.join(_FILES)}{hint}")


def _state(file: Path) -> Mapping[str, Any]:
    """The part of a `LoraOver` in a file: the state itself, or that in the state of an optimizer, in a dict of such states, or in a
    checkpoint of Lightning."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file} is not a file of torch.save with tensors and plain containers: {first}") from error
    outer = loaded if isinstance(loaded, Mapping) else {}
    # Lightning has a list of the states of its optimizers
    parts = [part for value in outer.values() for part in (value if isinstance(value, list) else [value])]
    for place in (outer, *(part for part in parts if isinstance(part, Mapping))):
        for state in (place, place.get(STATE_KEY)):
            if isinstance(state, Mapping) and {"version", "factorization", "cores"} <= state.keys():
                if state["version"] != VERSION:
                    raise ValueError(f"{file} has format version {state['version']}; this tnadapt reads {VERSION}")
                return state
    raise ValueError(f"{file} has no state of a LoraOver: it was saved without one, or holds something else")


def _adapter(folder: Path) -> dict[str, Tensor]:
    """The LoRA matrices in the weight files of a folder, and of the adapters in folders of their own, by our names."""
    found: dict[str, Tensor] = {}
    places = {"": folder} | {path.parent.name: path.parent for path in folder.glob("*/adapter_config.json")}
    for adapter, place in places.items():
        file = next((place / name for name in _ADAPTERS if (place / name).is_file()), None)
        for key, value in ({} if file is None else _weights(file)).items():
            match = _WEIGHT.fullmatch(key)
            if match is None:
                continue
            named = match["adapter"] if match["adapter"] not in (None, "default") else adapter
            parts = (canonical_name(match["path"]), named, match["side"])
            found[".".join(part for part in parts if part)] = value
    return found


def _weights(file: Path) -> Mapping[str, Tensor]:
    if file.suffix != ".safetensors":
        weights: Mapping[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        return weights
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"reading {file} needs safetensors: pip install 'tnadapt[safetensors]'") from error
    return load_file(file)


def described(state: Mapping[str, Any], adapter: Mapping[str, Tensor]) -> dict[str, Any]:
    """A state in numbers, as JSON data.

    Args:
        state: what `LoraOver.state_dict()` gave.
        adapter: the LoRA matrices that were saved with it, by name; those that are missing are not compared.
    """
    matrices = [
        _matrix(name, state["cores"][name], label, adapter)
        for name, label in state["factorization"].items()
        if name in state["cores"]
    ]
    compared = [one for one in matrices if one["difference"] is not None]
    scheduler = dict(state["scheduler"])
    rounds = scheduler["state"].get("rounds", []) if isinstance(scheduler["state"], Mapping) else []
    return {
        "step": state["step"],
        "scheduler": scheduler["settings"],
        "rounds": [{"step": one["step"], "selected": list(one["selected"])} for one in rounds],
        "core_lr": state["rates"]["core_lr"],
        "base_lr": state["rates"]["base"],
        "matrices": len(state["factorization"]),
        "waiting": list(state["waiting"]),
        "expanded": matrices,
        "history": [{"step": e["step"], "action": e["action"], "names": list(e["names"])} for e in state["history"]],
        "compared": len(compared),
        "disagreeing": [one["name"] for one in compared if not one["agrees"]],
    }


def _matrix(name: str, entry: Mapping[str, Any], label: str | None, adapter: Mapping[str, Tensor]) -> dict[str, Any]:
    cores: Sequence[Tensor] = entry["cores"]
    shapes = [list(core.shape) for core in cores]
    matrix = _folded(label, cores)
    if matrix is not None and entry["residual"] is not None:
        matrix = matrix + entry["residual"].to(matrix.dtype)
    saved = adapter.get(name)
    difference, agrees = None, None
    if matrix is not None and saved is not None and saved.shape == matrix.shape:
        difference = float((saved.to(matrix.dtype) - matrix).abs().max())
        # cores are contracted in float32 and the matrix is rounded to its own dtype
        eps = max(torch.finfo(saved.dtype).eps, 64 * torch.finfo(cores[0].dtype).eps)
        agrees = difference <= eps * float(matrix.abs().max())
    states = entry["state"] or []
    count = next((int(one["step"]) for one in states if "step" in one), None)
    return {
        "name": name,
        "factorization": label,
        "core_shapes": shapes,
        "bonds": [shape[-1] for shape in shapes[:-1]] if all(len(shape) == 4 for shape in shapes) else None,
        "parameters": sum(core.numel() for core in cores),
        "norm": None if matrix is None else float(matrix.norm()),
        "core_norms": [float(core.norm()) for core in cores],
        "residual_norm": None if entry["residual"] is None else float(entry["residual"].norm()),
        "optimizer_steps": count,
        "optimizer_entries": sorted(states[0]) if states else [],
        "difference": difference,
        "agrees": agrees,
    }


def _folded(label: str | None, cores: Sequence[Tensor]) -> Tensor | None:
    """The matrix of the cores in float64; None where the factorization is not one that is known here."""
    kind = (label or "").partition("(")[0]
    for settings in ({}, {"order": len(cores)}):
        try:
            return Factorization.from_dict({"type": kind, **settings}).fold([core.double() for core in cores])
        except ValueError:
            continue
    return None


def _text(found: Mapping[str, Any]) -> str:
    matrices = found["expanded"]
    lines = [
        f"step {found['step']}: {len(matrices)} of {found['matrices']} matrices are expanded",
        f"scheduler      {found['scheduler']}",
        f"core_lr        {_core_rate(found)}",
    ]
    if found["waiting"]:
        lines.append(f"waiting        {len(found['waiting'])} matrices are expanded at the next step")
    for event in found["history"]:
        shown = ", ".join(event["names"][:3]) + (
            f" and {len(event['names']) - 3} more" if len(event["names"]) > 3 else ""
        )
        lines.append(f"step {event['step']:>6}    {event['action']} {len(event['names'])}: {shown}")
    if matrices:
        header = ("matrix", "factorization", "bonds", "numbers", "norm", "core norms", "optimizer steps")
        rows = [
            (
                one["name"],
                one["factorization"] or "–",
                _bonds(one),
                f"{one['parameters']:,}",
                "–" if one["norm"] is None else f"{one['norm']:.4g}",
                "{:.2g} to {:.2g}".format(min(one["core_norms"]), max(one["core_norms"])),
                _or_dash(one["optimizer_steps"]),
            )
            for one in matrices
        ]
        lines += ["", aligned(header, rows)]
    return "\n".join([*lines, "", _agreement(found)])


def _core_rate(found: Mapping[str, Any]) -> str:
    if found["core_lr"] is None:
        return "the rate of the matrices"
    return f"{found['core_lr']:g} at a base rate of {_or_dash(found['base_lr'])}"


def _agreement(found: Mapping[str, Any]) -> str:
    if not found["expanded"]:
        return "No matrix is expanded, so there are no cores to compare with the adapter."
    if not found["compared"]:
        return "No adapter lies beside the state, so matrices and cores were not compared."
    wrong = found["disagreeing"]
    if not wrong:
        worst = max(one["difference"] for one in found["expanded"] if one["difference"] is not None)
        return f"All {found['compared']} matrices in the adapter are what their cores fold to (largest difference {worst:.1e})."
    return (
        f"{len(wrong)} of {found['compared']} matrices in the adapter are NOT what their cores fold to: {', '.join(wrong[:5])}. The "
        "adapter and the state are of different steps, or the adapter was edited."
    )


def _bonds(one: Mapping[str, Any]) -> str:
    """Bonds along the chain, equal ones in a row as `64 ×7`; the shapes of the cores where there is no chain."""
    if one["bonds"] is None:
        return " ".join("x".join(map(str, shape)) for shape in one["core_shapes"])
    parts: list[tuple[int, int]] = []
    for bond in one["bonds"]:
        if parts and parts[-1][0] == bond:
            parts[-1] = (bond, parts[-1][1] + 1)
        else:
            parts.append((bond, 1))
    return " ".join(f"{bond} ×{count}" if count > 1 else f"{bond}" for bond, count in parts)


def _or_dash(value: object) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else f"{value}"
