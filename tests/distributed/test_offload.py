"""Shards that FSDP2 keeps on the CPU (`CPUOffloadPolicy`) while their mesh is of GPUs, which send no CPU tensors. It is simulated
by tensors without data; runs on a mesh of CPUs are in test_fsdp.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tnadapt.engine.ranks import agree_any, broadcast_from_first, local_parts, stack_rows, write_rows
from tnadapt.schedulers.scores import taylor_scores

from .ranks import Ranks

ROWS, COLUMNS = 5, 4  # the first of two ranks has three rows


@contextmanager
def _on_gpus(sent: list[str]) -> Iterator[DeviceMesh]:
    """The first of two ranks of a mesh of GPUs, whose backend is like NCCL: for GPU tensors. What is sent is noted by device.

    Inside, tensors have shapes and devices and no data. Where torch was built without CUDA, it cannot say which is the current
    GPU: `to("cuda")` is the first one here, and nothing is made contiguous.
    """
    dist.init_process_group("cuda:fake", store=FakeStore(), rank=0, world_size=2)
    with mock.patch.dict(os.environ):
        os.environ.pop("LOCAL_RANK")  # by which a mesh would set the current GPU
        mesh = DeviceMesh("cuda", torch.arange(2))
    to = Tensor.to

    def to_first(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(tensor, *(torch.device("cuda", 0) if str(a) == "cuda" else a for a in args), **kwargs)

    def noted(tensor: Tensor, *_: Any, **__: Any) -> None:
        sent.append(str(tensor.device))

    def gathered(tensor: DTensor) -> Tensor:
        sent.append(str(tensor.to_local().device))
        return full(tensor)

    full = DTensor.full_tensor
    with (
        mock.patch.object(Tensor, "to", to_first),
        mock.patch.object(Tensor, "contiguous", lambda tensor, **_: tensor),
        mock.patch.object(DTensor, "full_tensor", gathered),
        mock.patch.object(dist, "all_reduce", noted),
        mock.patch.object(dist, "broadcast", noted),
        FakeTensorMode(),
    ):
        yield mesh


def _shard_on_the_cpu(mesh: DeviceMesh) -> DTensor:
    like = DTensor.from_local(
        torch.ones(3, COLUMNS, device="cuda"), mesh, [Shard(0)], run_check=False,
        shape=torch.Size((ROWS, COLUMNS)), stride=(COLUMNS, 1),
    )  # fmt: skip
    return DTensor(torch.ones(3, COLUMNS), like._spec, requires_grad=False)


def _devices(start: Callable[[], None], what: str) -> tuple[list[tuple[str, tuple[int, ...]]], list[str]]:
    """Device and shape of what comes of it, and the devices that were sent from."""
    sent: list[str] = []
    with _on_gpus(sent) as mesh:
        shards = [_shard_on_the_cpu(mesh) for _ in range(2)]
        values, flags = torch.ones(2, ROWS * COLUMNS), torch.ones(2, dtype=torch.bool)
        made: Any
        if what == "gathered":
            made = [stack_rows(shards)]
        elif what == "cut out":
            made = local_parts(shards, values)
        elif what == "written":
            write_rows(shards, values)
            made = [shard.to_local() for shard in shards]
        elif what == "agreed on":
            made = [agree_any(flags)]
        elif what == "broadcast":
            broadcast_from_first([values, values.clone()])
            made = [values]
        else:
            parameter = nn.Parameter(shards[0])
            parameter.grad = shards[1]
            matrix: Any = SimpleNamespace(name="A", parameter=parameter, value=shards[0], gradient=shards[1])
            made = list(taylor_scores([matrix], "inner").values())
        return [(str(tensor.device), tuple(tensor.shape)) for tensor in made], sent


@pytest.mark.parametrize(
    ("what", "shapes", "sent"),
    [
        ("gathered", [(2, ROWS * COLUMNS)], True),
        ("cut out", [(3, COLUMNS)] * 2, False),
        ("written", [(3, COLUMNS)] * 2, False),
        ("agreed on", [(2,)], True),
        ("broadcast", [(2, ROWS * COLUMNS)], True),
        ("scored", [()], True),
    ],
)
def test_shards_on_the_cpu_of_a_mesh_of_gpus(two: Ranks, what: str, shapes: list[tuple[int, ...]], sent: bool) -> None:
    for made, devices in two.run(_devices, what):
        assert made == [("cpu", shape) for shape in shapes]
        assert devices == (["cuda:0"] if sent else [])
