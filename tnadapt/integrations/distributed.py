"""Checkpoints of `torch.distributed.checkpoint` (DCP), for FSDP2 and whatever else shards parameters.

DCP reads a checkpoint into the containers that are there, entry by entry, and a `LoraOver` that was just attached has no cores
to read into. Its functions for optimizers drop what they do not know, so the cores cannot be part of the optimizer's state.
`Checkpointed(over)` is one entry of its own instead, written by one rank and read by all. `docs/distributed.md` has a script that
saves and loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tnadapt.engine import on_cpu
from tnadapt.lora_over import LoraOver

__all__ = ["Checkpointed"]

_KEY = "tnadapt"


class Checkpointed:
    """The state of a `LoraOver` as one entry of a distributed checkpoint (a `Stateful`).

    The number of ranks may change between saving and loading. Cores that are dealt out over ranks are brought together when a
    checkpoint is saved, in which every rank takes part, and dealt out anew when it is read. Tensors are copied to the CPU, so
    loading does not need the devices of the run that saved.
    """

    def __init__(self, over: LoraOver) -> None:
        self.over = over

    def state_dict(self) -> dict[str, Any]:
        """The state as one entry: a tuple, which DCP does not take apart."""
        self.over.consolidate()
        return {_KEY: (on_cpu(self.over.state_dict()),)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it, see `LoraOver.load_state_dict`.

        Raises:
            ValueError: no state of a `LoraOver`, or one that does not fit; nothing has changed then.
        """
        entry = state.get(_KEY)
        if not isinstance(entry, tuple) or len(entry) != 1:
            raise ValueError("the checkpoint has no state of Checkpointed(over); save it with Checkpointed(over), too")
        self.over.load_state_dict(entry[0])
