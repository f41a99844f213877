"""The ranks of a command: torchrun, accelerate launch and Ray Train start several processes that train one model together.

The first rank alone evaluates, writes and prints. The others wait for it to say what comes next, and train along.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

__all__ = ["FirstFailed", "hear", "is_first", "sharded", "start", "stop", "tell", "training_together", "whole", "world"]

#: How long the other ranks wait while the first one evaluates.
_PATIENCE = timedelta(days=7)

_messages: Any = None  # a group of its own, over gloo, whatever the ranks train over
_own_group = False
_others_listen = True


class FirstFailed(RuntimeError):
    """The first rank failed, which tells of it."""


def world() -> int:
    """How many ranks there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the rank that evaluates, writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def sharded() -> bool:
    """Whether accelerate was told to shard the model over the ranks (FSDP)."""
    return world() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")


def start() -> None:
    """Bring the ranks together; nothing where this is the only one, or where they are."""
    global _messages, _own_group
    if world() == 1 or _messages is not None:
        return
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        _own_group = True
    _messages = dist.new_group(backend="gloo", timeout=_PATIENCE)


def stop() -> None:
    """Take the ranks apart, if `start` brought them together."""
    global _messages, _own_group
    if _own_group:
        import torch.distributed as dist

        gc.collect()
        dist.destroy_process_group()
    _messages, _own_group = None, False


def tell(message: Any) -> None:
    """Have all ranks `hear` it; called by the first one. Nothing while they are training, and do not listen."""
    if _messages is not None and _others_listen:
        import torch.distributed as dist

        dist.broadcast_object_list([message], src=0, group=_messages)


def hear() -> Any:
    """What the first rank tells.

    Raises:
        FirstFailed: it failed.
    """
    import torch.distributed as dist

    heard: list[Any] = [None]
    dist.broadcast_object_list(heard, src=0, group=_messages)
    if isinstance(heard[0], FirstFailed):
        raise heard[0]
    return heard[0]


@contextmanager
def training_together(work: Path) -> Iterator[None]:
    """On the first rank, around what all ranks do: the others hear the folder of the run."""
    global _others_listen
    tell(work)
    _others_listen = False
    yield
    _others_listen = True


def whole(model: Any) -> dict[str, Any]:
    """What was trained of a model that is sharded over the ranks, on the CPU of the first one; all ranks call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    )
