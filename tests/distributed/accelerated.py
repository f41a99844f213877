"""FSDP2 of accelerate, which HF Trainer uses too, on CPU ranks.

accelerate takes an FSDP plugin on accelerators only: CPU ranks are `MULTI_CPU` to it, which its `AcceleratorState` gives no
plugin, so that they train with DDP without a word. What decides that is `PartialState._prepare_backend` alone. `on_cpu_ranks`
has it say "ranks with an accelerator each, over gloo", and names the CPU as their device; all that follows is accelerate's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from .models import OFFLOAD


@contextmanager
def fresh(**environment: str) -> Iterator[None]:
    """accelerate's state and the environment, which it writes to, are as before afterwards."""
    with mock.patch.dict(os.environ, environment):
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def on_cpu_ranks() -> Iterator[None]:
    """Inside, accelerate does on CPU ranks what it does on GPUs."""
    answer = ("gloo", DistributedType.MULTI_GPU)
    ask = mock.patch.object(PartialState, "_prepare_backend", return_value=answer)
    with fresh(ACCELERATE_TORCH_DEVICE="cpu"), ask:
        yield


#: options of the plugin that runs are tried with
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "kept gathered": {"reshard_after_forward": False},
    "CPU offload": {"cpu_offload": OFFLOAD},
    "weights from rank 0": {"cpu_ram_efficient_loading": True},
    "checkpointed activations": {"activation_checkpointing": True},
}


def plugin(**options: Any) -> FullyShardedDataParallelPlugin:
    """FSDP2 with each adapter of the small model as a unit."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["OverParamAdapter"],
        **options,
    )
