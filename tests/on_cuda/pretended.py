"""A GPU that is not there: tensors that say they are on `cuda:0`, hold their numbers on the CPU, and keep a record of their use.

Code that asks a tensor where it is takes its paths for a GPU. The record says how many kernels would be launched, and where the host
would wait for the device: where a number is read from it, where the size of a result depends on its values, or where memory is copied
between host and device, unless the copy is asked not to block. Tensors of both places in one operation are an error, as with CUDA.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cuda", 0)
PACKAGE = str(Path(__file__).resolve().parents[2] / "tnadapt")

aten = torch.ops.aten
#: what gives a number, or a result of a size that only the values tell, to the host
_READ = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2}


class Pretended(Tensor):
    """A tensor on the GPU that is not there; its numbers are in `held`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.held = held
        return made

    def __getitem__(self, key: Any) -> Any:
        """By numbers, slices, None and lists; torch's own asks the device for more than is pretended here."""
        result: Tensor = self
        dim = 0
        for each in key if isinstance(key, tuple) else (key,):
            if isinstance(each, slice):
                result = aten.slice(result, dim, each.start, each.stop, each.step or 1)
            elif each is None:
                result = result.unsqueeze(dim)
            elif isinstance(each, int):
                result = result.select(dim, each)
                continue
            else:
                result = result.index_select(dim, torch.tensor(each, dtype=torch.int64, device="cpu").to(DEVICE))
            dim += 1
        return result

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Any:
        torch._foreach_copy_([self], [source], non_blocking)
        return self

    def item(self) -> Any:
        return self.cpu().item()

    def __float__(self) -> float:
        return float(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("a tensor of a GPU that is not there is used outside of `a_gpu()`")


class Gpu(TorchDispatchMode):
    """The device, and the record of what it was given since `forget`."""

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        self.launches: list[str] = []
        #: lines of the package, as `module.py:line`
        self.waits: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in given if isinstance(tensor, Pretended)]
        packet = function.overloadpacket
        into = packet in (aten.copy_, aten._foreach_copy_)
        copies = into or packet is aten._to_copy
        device = kwargs.get("device")
        there = bool(here) if device is None else torch.device(device).type == "cuda"
        strangers = [tensor for tensor in given if not isinstance(tensor, Pretended) and tensor.dim() > 0]
        if here and strangers and not copies:
            raise RuntimeError(f"{function}: all tensors must be on one device")
        if device is not None:
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        if into:
            there = isinstance(tree_leaves(args[0])[0], Pretended)
        crossing = copies and (any(isinstance(t, Pretended) is not there for t in given) or (bool(here) != there))
        masked = packet in (aten.index, aten.index_put_) and any(
            isinstance(t, Pretended) and t.dtype in (torch.bool, torch.uint8) for t in given[1:]
        )
        blocking = crossing and not (kwargs.get("non_blocking") or (into and args[2:] and args[2]))
        if (here and (packet in _READ or masked)) or blocking:
            self.waits.append(_line())
        returns = function._schema.returns
        written = [
            k for k, a in enumerate(function._schema.arguments) if a.alias_info is not None and a.alias_info.is_write
        ]
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if (
            (here or there)
            and not view
            and packet not in (*_READ, aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided)
        ):
            self.launches.append(str(function))
        held = tree_map_only(Pretended, lambda tensor: tensor.held, (args, kwargs))
        result = function(*held[0], **held[1])
        if written and any(r.alias_info is not None and r.alias_info.is_write for r in returns):
            name = function._schema.arguments[written[0]].name
            return args[written[0]] if written[0] < len(args) else (kwargs | {}).get(name)
        if packet in (aten._local_scalar_dense, aten.equal) or not there:
            return result
        return tree_map_only(Tensor, Pretended, result)


def _line() -> str:
    """The innermost line of the package that is running."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"


class _Event:
    """Everything is done at once here. A stream is known by its device."""

    def record(self, stream: torch.device) -> None:
        assert stream == DEVICE, "the event is on another device than what it tells of"

    def synchronize(self) -> None: ...


@contextmanager
def a_gpu() -> Iterator[Gpu]:
    """Inside, `cuda:0` is there, and nothing records a graph."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())  # a graph asks for a stream of the device
        stack.enter_context(mock.patch.object(torch.cuda, "_lazy_init"))
        stack.enter_context(mock.patch.object(torch.cuda, "Event", _Event))
        # the current device is another one
        stack.enter_context(mock.patch.object(torch.cuda, "current_stream", lambda device=None: device))
        yield stack.enter_context(Gpu())


def moved(module: nn.Module) -> nn.Module:
    """The module with its parameters, and their gradients, on the GPU that is not there."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            there = nn.Parameter(Pretended(parameter.detach()), requires_grad=parameter.requires_grad)
            if parameter.grad is not None:
                there.grad = Pretended(parameter.grad)
            setattr(owner, name, there)
    return module
