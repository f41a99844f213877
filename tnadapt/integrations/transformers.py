"""HF Trainer and everything built on it (TRL): a callback for where the trainer makes the model or the optimizer itself, and
which of its checkpoints are whole."""

from __future__ import annotations

import json
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "tnadapt.integrations.transformers needs transformers: pip install 'tnadapt[transformers]'"
    ) from error

from tnadapt.factorizations import Factorization
from tnadapt.lora_over import STATE_KEY, FoldReport, LoraOver
from tnadapt.schedulers import Scheduler

__all__ = ["LoraOverCallback", "checkpoint_fault", "last_complete_checkpoint"]

_OPTIMIZER_FILE = "optimizer.pt"
#: written where the optimizer's own file keeps nothing but its own state (FSDP)
_OWN_FILE = "tnadapt.pt"
_SCHEDULER_FILE = "scheduler.pt"
_TRAINER_STATE_FILE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
#: what Trainer writes the model or the adapter to, whole or as the index of its shards
_WEIGHT_FILES = tuple(
    name + ending
    for name in ("adapter_model", "model", "pytorch_model", "pytorch_model_fsdp")
    for ending in (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")
)


class LoraOverCallback(TrainerCallback):  # type: ignore[misc]
    """Attaches `LoraOver` when training begins and folds when it ends.

    Its state is saved with the optimizer's in each checkpoint (in `tnadapt.pt` beside it under FSDP) and is restored on
    resume: the folder is `output_dir/checkpoint-STEP`, or `resume_from`. Where training is not resumed, every call of `train()` starts the
    rounds of the scheduler anew.

    Logs get `core_learning_rate`, `expanded_matrices` and `largest_update_norm` (of an expanded matrix, in the last step).
    Trainer calls the callbacks that report to TensorBoard and the like before those of the user, so these find the three
    in `state.log_history` only.

    Args:
        factorization, scheduler: as for `LoraOver`.
        resume_from: the checkpoint folder that the first call of `train()` resumes from, where it is not
            `output_dir/checkpoint-STEP`; the same that `train(resume_from_checkpoint=...)` is given.
        options: further arguments of `LoraOver`, such as `core_lr`.

    Attributes:
        over: the `LoraOver` while training, and after it.
        report: what `fold` gave at the end of training; None before.

    Raises:
        ValueError, FileNotFoundError: the checkpoint is damaged or incomplete, belongs to another adapter, or was saved
            without `LoraOver`. Raised before the first step, with `resume_from` when the trainer is made already.
    """

    def __init__(
        self,
        factorization: Factorization,
        scheduler: Scheduler | None = None,
        *,
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        self._factorization = factorization
        self._scheduler = scheduler
        self._resume_from = None if resume_from is None else Path(resume_from)
        self._options = options
        self._fresh = None if scheduler is None else scheduler.state_dict()
        self.over: LoraOver | None = None
        self.report: FoldReport | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._resume_from is not None:
            _require_whole(self._resume_from)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = self._checkpoint(args, state)
        saved = None if folder is None else _read_state(folder)
        self._resume_from = None
        if self.over is not None:
            # a second call of train(), or another attempt of auto_find_batch_size: rounds start again
            self.over.detach()
            if self._scheduler is not None and self._fresh is not None:
                self._scheduler.load_state_dict(self._fresh)
        self.over = LoraOver(
            kwargs["model"], kwargs["optimizer"], self._factorization, self._scheduler, **self._options
        )
        self.report = None
        if saved is None:
            return
        try:
            self.over.load_state_dict(saved)
            changed = self.over.changed_outside()
            if changed:
                raise ValueError(
                    f"the cores in {folder} are not those of the adapter that training resumes with: {changed[0]} and "
                    f"{len(changed) - 1} other matrices differ from what their cores fold to; give LoraOverCallback the "
                    "folder that train(resume_from_checkpoint=...) was given as resume_from="
                )
        except BaseException:
            self.over.detach()
            raise

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        over = self.over
        if over is None or not over.attached or not state.log_history or "loss" not in state.log_history[-1]:
            return
        extra: dict[str, float | int | None] = {
            "core_learning_rate": over.core_rate(),
            "expanded_matrices": len(over.expanded),
        }
        norms = over.update_norms()
        if norms:
            extra["largest_update_norm"] = max(norms.values())
        state.log_history[-1].update(extra)
        logs = kwargs.get("logs")
        if isinstance(logs, dict):
            logs.update(extra)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.over is None or not self.over.attached or args.save_only_model:
            return
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        own = self.over.state_dict()
        if not args.should_save or not folder.is_dir() or (folder / _OPTIMIZER_FILE).is_file():
            return
        half = folder / (_OWN_FILE + ".writing")
        torch.save(own, half)
        half.replace(folder / _OWN_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.over is None or not self.over.attached:
            return
        with warnings.catch_warnings():
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                # the best adapter was asked for and is in the model now
                warnings.filterwarnings("ignore", message=".*changed outside the optimizer")
            self.report = self.over.fold()

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path | None:
        """The checkpoint that training resumes from, whole and of its step; None for a run from the start."""
        step, given = state.global_step, self._resume_from
        if step == 0:
            if given is not None:
                raise ValueError(
                    f"LoraOverCallback has resume_from={str(given)!r}, but training starts at step 0; resume it with "
                    f"trainer.train(resume_from_checkpoint={str(given)!r})"
                )
            return None
        folder = given or Path(args.output_dir or ".") / f"checkpoint-{step}"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"training resumes at step {step}, but {folder} is not there, so the cores cannot be restored; give "
                "LoraOverCallback the folder that train(resume_from_checkpoint=...) was given as resume_from="
            )
        _require_whole(folder)
        found = json.loads((folder / _TRAINER_STATE_FILE).read_text())["global_step"]
        if found != step:
            raise ValueError(
                f"training resumes at step {step}, but {folder} was saved at step {found}; give LoraOverCallback and "
                "train(resume_from_checkpoint=...) the same folder"
            )
        return folder


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest `checkpoint-STEP` in `folder` that is whole, to be given to `trainer.train(resume_from_checkpoint=...)`;
    None where there is none. One that was being written (or deleted) when the process died is passed over."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    # where one has a file of ours, none that has its optimizer elsewhere is whole without it
    apart = any((path / _OWN_FILE).is_file() for _, path in found)
    for _, path in sorted(found, reverse=True):
        if apart and not any((path / name).is_file() for name in (_OWN_FILE, _OPTIMIZER_FILE)):
            continue
        if path.is_dir() and checkpoint_fault(path) is None:
            return str(path)
    return None


def checkpoint_fault(folder: str | Path) -> str | None:
    """Why training cannot be resumed from a checkpoint of HF Trainer, None where it can.

    Everything is read, but nothing is loaded: model or adapter, optimizer, learning-rate scheduler, random states and the
    trainer's own state must be there and whole.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return f"{folder} is not a folder"
    fault = _state_fault(folder / _TRAINER_STATE_FILE) or _weights_fault(folder)
    if fault is not None:
        return fault
    sharded = sorted(path for path in folder.glob("optimizer_*") if path.is_dir())
    if sharded:
        fault = _shards_fault(sharded)
        if fault is not None:
            return fault
    elif not (folder / _OPTIMIZER_FILE).is_file() and not (folder / "optimizer.bin").is_file():
        return f"{folder / _OPTIMIZER_FILE} is not there (a checkpoint of save_only_model cannot be resumed from)"
    if not list(folder.glob("rng_state*.pth")):
        return f"{folder / 'rng_state.pth'} is not there"
    if not (folder / _SCHEDULER_FILE).is_file():
        return f"{folder / _SCHEDULER_FILE} is not there"
    for path in sorted(
        [
            *(folder / name for name in (_OPTIMIZER_FILE, "optimizer.bin", "scaler.pt", _OWN_FILE)),
            folder / _SCHEDULER_FILE,
            *folder.glob("rng_state*.pth"),
        ]
    ):
        fault = _zip_fault(path) if path.is_file() else None
        if fault is not None:
            return fault
    return None


def _require_whole(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"the checkpoint {folder} is not there")
    fault = checkpoint_fault(folder)
    if fault is not None:
        raise ValueError(
            f"the checkpoint {folder} is not whole: {fault}. Resume from an earlier one, which "
            "tnadapt.integrations.transformers.last_complete_checkpoint(output_dir) finds"
        )


def _read_state(folder: Path) -> Any:
    """The tnadapt part of a whole checkpoint."""
    own, file = folder / _OWN_FILE, folder / _OPTIMIZER_FILE
    if own.is_file():
        return torch.load(own, map_location="cpu", weights_only=True)
    saved = None
    if file.is_file():
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True).get(STATE_KEY)
    if saved is None:
        raise ValueError(
            f"{folder} was saved without LoraOver, or was not finished ({_OWN_FILE} comes last under FSDP), so there are no "
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
    """A safetensors file is the length of its header, the header and the tensors, which end where the file ends."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                return f"{file} is cut off"
            header = json.loads(stream.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        return f"{file} has no readable header"
    return None if size == 8 + length + end else f"{file} has {size} bytes instead of {8 + length + end}"


def _zip_fault(file: Path) -> str | None:
    """What is wrong with a file of `torch.save`, a zip archive with checksums."""
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        return f"{file} is cut off or damaged ({error})"
    return None if broken is None else f"{file} is damaged in {broken}"
