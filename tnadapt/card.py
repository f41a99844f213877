"""How an adapter was trained, kept beside it: `tnadapt.json` for programs, a section of `README.md` for people."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from tnadapt.lora_over import LoraOver

__all__ = ["CONFIG_FILE", "describe", "save_card"]

CONFIG_FILE = "tnadapt.json"
_BEGIN, _END = "<!-- tnadapt -->", "<!-- /tnadapt -->"
_PACKAGES = ("tnadapt", "torch", "peft", "transformers", "accelerate")


def describe(over: LoraOver) -> dict[str, Any]:
    """The settings of a run, what was expanded when, and the versions of packages, as JSON data for `LoraOver.from_config`."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "config": over.config(),
        "optimizer": type(over.optimizer).__name__,
        "steps": over.step,
        "lora_parameters": over.lora_parameters,
        "events": [{"step": e.step, "action": e.action, "names": list(e.names)} for e in over.history],
        "versions": versions,
    }


def save_card(over: LoraOver, folder: str | Path) -> None:
    """Write `tnadapt.json`, and a section of `README.md`, into the folder of a saved adapter. The rest of the README is kept,
    what follows a section whose end somebody has taken out included.

    Raises:
        FileNotFoundError: the folder is not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not there; save the adapter first, for example with model.save_pretrained"
        )
    described = describe(over)
    _write(folder / CONFIG_FILE, json.dumps(described, indent=1) + "\n")
    readme = folder / "README.md"
    # bytes that are no UTF-8 are somebody's own, and come back as they were
    text = readme.read_text(encoding="utf-8", errors="surrogateescape") if readme.is_file() else ""
    before, _, rest = text.partition(_BEGIN)
    _, closed, after = rest.partition(_END)
    if not closed:
        after = rest
    section = f"{_BEGIN}\n{_section(over, described)}\n{_END}"
    head = before.rstrip()
    _write(readme, f"{head}\n\n{section}\n{after.lstrip()}" if head else f"{section}\n{after.lstrip()}")


def _section(over: LoraOver, described: dict[str, Any]) -> str:
    config = described["config"]
    settings = [
        f"{key} = {config[key]}" for key in ("core_lr", "core_weight_decay", "max_update") if config[key] is not None
    ]
    settings += [f"handover = {config['handover']}", *(["matched steps"] if config["matched"] else [])]
    events = [f"- step {e['step']}: {e['action']} {len(e['names'])} matrices" for e in described["events"]]
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items())
    return "\n".join(
        [
            "## Trained through tensor networks",
            "",
            f"While these weights were trained, their matrices were over-parameterized ({over}) and folded back",
            "(LoRA-Over, arXiv:2605.16470).",
            "",
            f"Optimizer {described['optimizer']}; {'; '.join(settings)}. {described['steps']} steps. {versions}.",
            "",
            *events,
        ]
    )


def _write(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    half = file.with_name(file.name + ".writing")
    half.write_text(text, encoding="utf-8", errors="surrogateescape")
    half.replace(file)
