"""The file of a run, with the fields that the board's own files have."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from support.config import is_hub_id
from support.provenance import git, git_state, write_json

PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def peft_config_of(model: Any) -> dict[str, Any]:
    """PEFT's configuration as JSON data."""
    settings: dict[str, Any] = model.peft_config["default"].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}


def checkout_of(package: str) -> dict[str, Any] | None:
    """The state of the git checkout that a package was imported from; None for an installed release."""
    found = find_spec(package)
    places = found.submodule_search_locations if found else None
    if not places or {"site-packages", "dist-packages"} & {*Path(places[0]).parts}:
        return None
    state = git_state(Path(places[0]))
    return state and {**state, "branch": git(Path(places[0]), "rev-parse", "--abbrev-ref", "HEAD")}


def package_info() -> dict[str, str | None]:
    """Version and commit of what took part; None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            version: str | None = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        state = checkout_of(name) if version else None
        found |= {f"{name}-version": version, f"{name}-commit-hash": state["commit"] if state else None}
    return found


def hub_info(place: str, kind: str) -> dict[str, str | None]:
    """Commit and age of a ``model`` or ``dataset`` on the hub; None of both for what is elsewhere, or cannot be asked for."""
    if is_hub_id(place) and not Path(place).expanduser().exists():
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # what its client raises

        asked: dict[str, Any] = {"model": HfApi().model_info, "dataset": HfApi().dataset_info}
        try:
            known = asked[kind](place)
            return {"sha": known.sha, "created_at": known.created_at.isoformat()}
        except (OSError, HTTPError):
            pass
    return {"sha": None, "created_at": None}


def meta_info(model: str, metamath: str, gsm8k: str) -> dict[str, Any]:
    """Where model, data and software come from, and what they ran on."""
    gpu = torch.cuda.is_available()
    return {
        "model_info": hub_info(model, "model"),
        "dataset_info": {"metamath": hub_info(metamath, "dataset"), "gsm8k": hub_info(gsm8k, "dataset")},
        "package_info": package_info(),
        "system_info": {
            "system": platform.system(),
            "release": platform.release(),
            "version": platform.version(),
            "machine": platform.machine(),
            "processor": platform.processor(),
            "accelerator": torch.cuda.get_device_name(0) if gpu else "cpu",
        },
        "pytorch_info": torch.__config__.show(),
    }


def write_record(record: Mapping[str, Any], folder: Path) -> Path:
    """Write a run's file where the board has it: ``results`` for a finished run, else ``cancelled_results`` with its time."""
    run, finished = record["run_info"], record["train_info"]["status"] == "success"
    stem = run["experiment_name"].replace("/", "--")
    if not finished:
        stem += f"--{run['created_at'].replace(':', '-')}"
    path = folder / ("results" if finished else "cancelled_results") / f"{stem}.json"
    write_json(path, record)
    return path
