"""The saved state of a `LoraOver`: what it holds, and whether a state fits that is to be loaded.

Tensors and plain containers only, so that `torch.load(weights_only=True)` reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tnadapt.engine import CoreRates, Event, Expanded, in_dtype, shown, state_signature
from tnadapt.factorizations import Factorization, core_dtype
from tnadapt.matrices import TrainedMatrix
from tnadapt.schedulers import Scheduler

__all__ = ["STATE_KEY", "VERSION", "load", "other_settings", "saved", "validate"]

#: key of our part in the state dict of an optimizer
STATE_KEY = "tnadapt"
VERSION = 2
_PARTS = ("version", "factorization", "step", "waiting", "expanded", "ranks", "cores", "scheduler", "rates", "history")


def saved(expanded: Expanded, scheduler: Scheduler, rates: CoreRates, cores: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a resumed run needs. Tensors are references.

    Args:
        cores: `expanded.state_dict()`, or, where they are dealt out over ranks, what `expanded.collected()` gave.
    """
    now = expanded.now
    return {
        "version": VERSION,
        "factorization": _labels(expanded),
        "step": now.step,
        "waiting": list(now.waiting),
        "expanded": sorted(now.names),
        "ranks": 1 + max(now.owners.values(), default=0),
        "cores": cores,
        "scheduler": {
            "label": type(scheduler).__name__,
            "settings": scheduler.label,
            "state": scheduler.state_dict(),
        },
        "fingerprints": _fingerprints(expanded, scheduler),
        "rates": {
            "core_lr": rates.lr,
            "core_weight_decay": rates.weight_decay,
            "max_update": rates.max_update,
            "matched": rates.matched,
            "base": rates.base,
        },
        "handover": "warm" if expanded.warm else "restart",
        "history": [{"step": e.step, "action": e.action, "names": list(e.names)} for e in now.history],
    }


def _labels(expanded: Expanded) -> dict[str, str | None]:
    """Label of the factorization of each matrix."""
    known = {name: matrix.factorization for name, matrix in expanded.matrices.items()}
    return {name: None if used is None else used.label for name, used in known.items()}


def _fingerprints(expanded: Expanded, scheduler: Scheduler) -> dict[str, Any]:
    """Of the settings of the scheduler and of each factorization: labels shorten long ones (names, ranks, scores)."""
    known = {name: matrix.factorization for name, matrix in expanded.matrices.items()}
    each = {id(used): _fingerprint(used) for used in known.values() if used is not None}
    return {
        "scheduler": _fingerprint(scheduler),
        "factorization": {name: each.get(id(used)) for name, used in known.items()},
    }


def _fingerprint(described: Factorization | Scheduler) -> str | None:
    """A hash of all settings but the backend, which changes no numbers; None where they are no JSON data."""
    try:
        settings = described.to_dict()
    except (TypeError, ValueError):
        return None
    settings.pop("backend", None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def other_settings(state: Mapping[str, Any], expanded: Expanded, scheduler: Scheduler) -> list[str]:
    """What has other settings than in the run that was saved, under the same label. States of earlier versions do not tell."""
    then, now = state.get("fingerprints", {}), _fingerprints(expanded, scheduler)

    def differ(one: str | None, other: str | None) -> bool:
        return one is not None and other is not None and one != other

    found = []
    if scheduler.label == state["scheduler"]["settings"] and differ(then.get("scheduler"), now["scheduler"]):
        found.append(f"the scheduler {scheduler.label}")
    saved_ones = then.get("factorization", {})
    names = [name for name, one in now["factorization"].items() if differ(saved_ones.get(name), one)]
    if names:
        found.append(f"the factorization of {shown(names)}")
    return found


def load(state: Mapping[str, Any], expanded: Expanded, scheduler: Scheduler, rates: CoreRates) -> None:
    """Replace everything by a state that `validate` has passed; tensors are copied, in the dtype that cores have here."""
    before = scheduler.state_dict()
    scheduler.load_state_dict(state["scheduler"]["state"])
    history = [Event(e["step"], e["action"], tuple(e["names"])) for e in state["history"]]
    cores = {name: _as_here(entry, expanded.matrices[name]) for name, entry in state["cores"].items()}
    try:
        expanded.load_state(cores, state["ranks"], state["step"], state["waiting"], history)
    except BaseException:
        scheduler.load_state_dict(before)
        raise
    rates.base = state["rates"]["base"]


def _as_here(entry: Mapping[str, Any], matrix: TrainedMatrix) -> Mapping[str, Any]:
    """The saved cores of a matrix, which may have been saved from a model of another dtype: what has that of the cores follows."""
    old, new = entry["cores"][0].dtype, core_dtype(matrix.parameter.dtype)
    if old == new:
        return entry

    convert, states = partial(in_dtype, old=old, new=new), entry["state"]
    return {
        **entry,
        "cores": [convert(core) for core in entry["cores"]],
        "state": states and [{key: convert(value) for key, value in one.items()} for one in states],
        "residual": convert(entry["residual"]),
    }


def validate(state: Any, expanded: Expanded, scheduler: Scheduler) -> None:
    """Raise ValueError where a state is damaged, or of another model, factorization or scheduler; change nothing."""
    missing = [part for part in _PARTS if part not in state] if isinstance(state, Mapping) else ["everything"]
    if missing and not (isinstance(state, Mapping) and "version" in state and state["version"] != VERSION):
        raise ValueError(
            f"the state lacks {', '.join(sorted(missing))}; it is damaged, or was not made by LoraOver.state_dict()"
        )
    if state["version"] != VERSION:
        raise ValueError(
            f"the state has format version {state['version']}, this tnadapt reads {VERSION}; "
            "resume with the version that saved it"
        )
    try:
        _validate_parts(state, expanded, scheduler)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"the state is damaged ({type(error).__name__}: {error}); resume from an earlier checkpoint"
        ) from error


def _validate_parts(state: Mapping[str, Any], expanded: Expanded, scheduler: Scheduler) -> None:
    kind, matrices = type(scheduler).__name__, expanded.matrices
    if state["scheduler"]["label"] != kind:
        raise ValueError(
            f"the state was saved with the scheduler {state['scheduler']['label']}, this run has {kind}; use the same"
        )
    if isinstance(state["step"], bool) or not isinstance(state["step"], int):
        raise TypeError(f"step is {state['step']!r}")
    for event in state["history"]:
        Event(event["step"], event["action"], tuple(event["names"]))
    base = state["rates"]["base"]
    if base is not None and not (isinstance(base, float) and base > 0):
        raise TypeError(f"the base rate is {base!r}")
    strangers = [name for name in (*state["waiting"], *state["cores"]) if name not in matrices]
    if strangers:
        raise ValueError(
            f"the state has cores of {shown(strangers)}, which is not among the {len(matrices)} matrices of this model; load it "
            "into the model that it was saved from"
        )
    for name, label in _labels(expanded).items():
        saved_label = state["factorization"].get(name, label)
        if saved_label != label:
            raise ValueError(
                f"the state was saved with {saved_label} for {name}, this run has {label}; resume with the factorization of the "
                "run that was saved"
            )
    if set(state["expanded"]) != {*state["cores"], *state["waiting"]}:
        raise ValueError(
            "the state has lost cores: it was read into a LoraOver that had not expanded the same matrices, as "
            "torch.distributed.checkpoint does (save and load tnadapt.integrations.distributed.Checkpointed(over) instead), or it was "
            "saved by a rank for which consolidate() had not brought the cores together"
        )
    signatures: dict[int, Any] = {}
    for name, entry in state["cores"].items():
        _validate_cores(matrices[name], entry, expanded.elementwise)
        if not isinstance(entry["cohort"], int):
            raise TypeError(f"the cohort of {name} is {entry['cohort']!r}")
        if not 0 <= entry["owner"] < state["ranks"]:
            raise ValueError(
                f"the state has cores of {name} from rank {entry['owner']} of {state['ranks']}; it is damaged"
            )
        signature = state_signature(entry["state"][0]) if entry["state"] else None
        if expanded.elementwise and signatures.setdefault(entry["cohort"], signature) != signature:
            raise ValueError(
                f"the optimizer state of {name} is damaged: that of cores which are stepped together differs in step counts or "
                "entries; resume from an earlier checkpoint"
            )
    # only the scheduler knows what it takes: let it load, and put back what it had
    before = scheduler.state_dict()
    try:
        scheduler.load_state_dict(state["scheduler"]["state"])
    finally:
        scheduler.load_state_dict(before)


def _validate_cores(matrix: TrainedMatrix, entry: Mapping[str, Any], elementwise: bool) -> None:
    """Check the saved cores of one matrix, what they miss, and their optimizer state."""
    assert matrix.factorization is not None
    name, (rows, cols) = matrix.name, matrix.shape
    structure = matrix.factorization.structure(matrix.shape)
    got = tuple(tuple(core.shape) for core in entry["cores"])
    if got != structure.core_shapes:
        raise ValueError(
            f"the state has cores {got} of {name} ({rows}x{cols}), but {matrix.factorization.label} makes "
            f"{structure.core_shapes}; resume with the factorization of the run that was saved"
        )
    if not all(bool(torch.isfinite(core).all()) for core in entry["cores"]):
        raise ValueError(f"the saved cores of {name} hold NaN or infinity; resume from an earlier checkpoint")
    residual = entry["residual"]
    if (residual is None) != structure.exact or (
        residual is not None and (tuple(residual.shape) != matrix.shape or not bool(torch.isfinite(residual).all()))
    ):
        raise ValueError(f"the saved residual of {name} is damaged; resume from an earlier checkpoint")
    scale = entry["scale"]
    if scale is not None and not (scale.numel() == 1 and bool(scale > 0) and bool(torch.isfinite(scale))):
        raise ValueError(f"the saved scale of the steps of {name} is damaged; resume from an earlier checkpoint")
    if entry["state"] is not None:
        _validate_moments(name, entry["cores"], entry["state"], elementwise)


def _validate_moments(
    name: str, cores: Sequence[Tensor], states: Sequence[Mapping[str, Any]], elementwise: bool
) -> None:
    """Check the saved optimizer state of the cores of one matrix."""
    if len(states) != len(cores):
        raise ValueError(f"the optimizer state of {name} is damaged: {len(states)} states of {len(cores)} cores")
    if elementwise and any(state_signature(state) != state_signature(states[0]) for state in states):
        raise ValueError(
            f"the optimizer state of {name} is damaged: that of its cores, which are stepped together, differs in step "
            "counts or entries; resume from an earlier checkpoint"
        )
    for core, state in zip(cores, states, strict=True):
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if elementwise and value.numel() != core.numel():
                raise ValueError(
                    f"the optimizer state of {name} is damaged: {key} has {value.numel()} numbers for a core of "
                    f"{core.numel()}; resume from an earlier checkpoint"
                )
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"the saved optimizer state of {name} holds NaN or infinity in {key}; resume from an earlier checkpoint"
                )
