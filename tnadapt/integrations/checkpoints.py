"""Which checkpoints of HF Trainer are whole, and what tnadapt has in them."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from tnadapt.state import STATE_KEY

__all__ = [
    "OPTIMIZER_FILE",
    "OWN_FILE",
    "TRAINER_STATE_FILE",
    "checkpoint_fault",
    "last_complete_checkpoint",
    "read_state",
    "require_whole",
]

OPTIMIZER_FILE = "optimizer.pt"
#: written where the optimizer's own file keeps nothing but its own state (FSDP)
OWN_FILE = "tnadapt.pt"
_SCHEDULER_FILE = "scheduler.pt"
TRAINER_STATE_FILE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
#: what Trainer writes the model or the adapter to, whole or as the index of its shards
_WEIGHT_FILES = tuple(
    name + ending
    for name in ("adapter_model", "model", "pytorch_model", "pytorch_model_fsdp")
    for ending in (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")
)


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest `checkpoint-STEP` in `folder` that is whole, to be given to `trainer.train(resume_from_checkpoint=...)`;
    None where there is none. One that was being written (or deleted) when the process died is passed over."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    # if any checkpoint has a file of ours, one without an optimizer.pt is not whole without that file
    apart = any((path / OWN_FILE).is_file() for _, path in found)
    for _, path in sorted(found, reverse=True):
        if apart and not any((path / name).is_file() for name in (OWN_FILE, OPTIMIZER_FILE)):
            continue
        if path.is_dir() and checkpoint_fault(path) is None:
            return str(path)
    return None


def checkpoint_fault(folder: str | Path) -> str | None:
    """Why training cannot be resumed from a checkpoint of HF Trainer; None if it can.

    Model or adapter, optimizer, learning-rate scheduler, random states and the trainer's own state must be there and whole. All
    files are read, but nothing is loaded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return f"{folder} is not a folder"
    fault = _state_fault(folder / TRAINER_STATE_FILE) or _weights_fault(folder)
    if fault is not None:
        return fault
    sharded = sorted(path for path in folder.glob("optimizer_*") if path.is_dir())
    if sharded:
        fault = _shards_fault(sharded)
        if fault is not None:
            return fault
    elif not (folder / OPTIMIZER_FILE).is_file() and not (folder / "optimizer.bin").is_file():
        return f"{folder / OPTIMIZER_FILE} is not there (a checkpoint of save_only_model cannot be resumed from)"
    if not list(folder.glob("rng_state*.pth")):
        return f"{folder / 'rng_state.pth'} is not there"
    if not (folder / _SCHEDULER_FILE).is_file():
        return f"{folder / _SCHEDULER_FILE} is not there"
    for path in sorted(
        [
            *(folder / name for name in (OPTIMIZER_FILE, "optimizer.bin", "scaler.pt", OWN_FILE)),
            folder / _SCHEDULER_FILE,
            *folder.glob("rng_state*.pth"),
        ]
    ):
        fault = _zip_fault(path) if path.is_file() else None
        if fault is not None:
            return fault
    return None


def require_whole(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"the checkpoint {folder} is not there")
    fault = checkpoint_fault(folder)
    if fault is not None:
        raise ValueError(
            f"the checkpoint {folder} is not whole: {fault}. Resume from an earlier one, which "
            "tnadapt.integrations.transformers.last_complete_checkpoint(output_dir) finds"
        )


def read_state(folder: Path) -> Any:
    """The tnadapt part of a whole checkpoint."""
    own, file = folder / OWN_FILE, folder / OPTIMIZER_FILE
    if own.is_file():
        return torch.load(own, map_location="cpu", weights_only=True)
    saved = None
    if file.is_file():
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True).get(STATE_KEY)
    if saved is None:
        raise ValueError(
            f"{folder} was saved without LoraOver, or was not finished ({OWN_FILE} comes last under FSDP), so there are no "
            "cores to resume from; resume from an earlier checkpoint, or start a new run from that adapter"
        )
    return saved


def _state_fault(file: Path) -> str | None:
    if not file.is_file():
        return f"{file} is not there, which is written last"
    try:
        step = json.loads(file.read_text())["global_step"]
    except (ValueError, KeyError, TypeError) as error:
        return f"{file} cannot be read ({type(error).__name__})"
    named = _CHECKPOINT.fullmatch(file.parent.name)
    if named and int(named[1]) != step:
        return f"{file} is of step {step}"
    return None


def _weights_fault(folder: Path) -> str | None:
    """What is wrong with the model's or the adapters' files; adapters beside `default` have folders of their own."""
    sharded = [path for path in folder.glob("pytorch_model_fsdp_*") if path.is_dir()]
    if sharded:
        return _shards_fault(sharded)
    places = [folder, *sorted(config.parent for config in folder.glob("*/adapter_config.json"))]
    files = [place / name for place in places for name in _WEIGHT_FILES if (place / name).is_file()]
    if not files:
        return f"{folder} holds no model or adapter weights, such as adapter_model.safetensors"
    half = [place for place in places[1:] if not any(file.parent == place for file in files)]
    if half:
        return f"{half[0]} holds no adapter weights"
    for file in files:
        fault = _index_fault(file) if file.suffix == ".json" else _weight_file_fault(file)
        if fault is not None:
            return fault
    return None


def _shards_fault(folders: list[Path]) -> str | None:
    """What is wrong with folders of `torch.distributed.checkpoint`: `.metadata`, written last, says how long the files are."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    for folder in folders:
        if not (folder / ".metadata").is_file():
            return f"{folder} has no .metadata: it was being written"
        ends: dict[Path, int] = {}
        try:
            for part in FileSystemReader(folder).read_metadata().storage_data.values():
                file = folder / part.relative_path
                ends[file] = max(ends.get(file, 0), part.offset + part.length)
        except Exception as error:  # unpickling raises anything
            return f"{folder / '.metadata'} cannot be read ({type(error).__name__})"
        for file, end in sorted(ends.items()):
            if not file.is_file() or file.stat().st_size < end:
                return f"{file} is cut off or not there"
    return None


def _index_fault(index: Path) -> str | None:
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{index} cannot be read ({type(error).__name__})"
    for shard in shards:
        if not (index.parent / shard).is_file():
            return f"{index.parent / shard} is not there"
        fault = _weight_file_fault(index.parent / shard)
        if fault is not None:
            return fault
    return None


def _weight_file_fault(file: Path) -> str | None:
    return _safetensors_fault(file) if file.suffix == ".safetensors" else _zip_fault(file)


def _safetensors_fault(file: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        # opening compares the length of the file with what its header says
        with safe_open(file, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        return f"{file} is cut off or damaged ({error})"


def _zip_fault(file: Path) -> str | None:
    """What is wrong with a file of `torch.save`, a zip archive with checksums."""
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    # RuntimeError: one flipped bit says that the file is encrypted
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError) as error:
        return f"{file} is cut off or damaged ({error})"
    return None if broken is None else f"{file} is damaged in {broken}"
