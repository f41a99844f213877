"""Checkpoints of `torch.distributed.checkpoint` (DCP), for FSDP2 and whatever else shards parameters.

DCP reads a checkpoint into the containers that are there, entry by entry; a `LoraOver` that was just attached has no cores
to read into. `Checkpointed(over)` is one entry instead, written by one rank and read by all:

    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save({**state, "over": Checkpointed(over)}, checkpoint_id=folder)

and, in another run, on as many ranks as there are then:

    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load({**state, "over": Checkpointed(over)}, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])

DCP's functions for optimizers drop what they do not know, so the cores do not ride in the optimizer's state here.
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

    The number of ranks may change between saving and loading: cores that are dealt out over ranks are brought together when a
    checkpoint is saved (every rank takes part in that anyway) and dealt out anew when it is read. Tensors are copied to the CPU:
    loading needs no device of the saving run.
    """

    def __init__(self, over: LoraOver) -> None:
        self.over = over

    def state_dict(self) -> dict[str, Any]:
        """One entry. A tuple is what DCP does not look into."""
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
