"""The coupling to the optimizer: before it steps, gradients are pulled back and cores are lent to it; after, the cores and
their state are taken back and the matrices are refolded.

Cores are in `optimizer.param_groups` only while the optimizer steps, so learning-rate schedulers, named parameters,
checkpoints and whoever else counts groups see the user's own. Being stepped by the user's optimizer itself, in the same
step, cores get its algorithm exactly: shared counters, norms over all groups, a GradScaler's scale.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tnadapt.engine.cohort import Piece
from tnadapt.engine.engine import Engine
from tnadapt.engine.tensors import agree_any, is_sharded, local, obstacle_to_gathering
from tnadapt.lora_matrices import LoraMatrix

__all__ = ["Coupling"]

#: group entries that an optimizer may rewrite without keeping state in them
_MAY_CHANGE = frozenset({"params", "lr", "capturable", "foreach", "fused"})


class Coupling:
    """Hooks on one optimizer.

    Args:
        optimizer: a torch optimizer that holds the LoRA parameters.
        engine: the cores.
        before_step: called with gradients present and before any pull-back; decides and expands. Not called for a step
            that will not move anything (a gradient overflow, or the empty step by which distributed checkpoints
            initialise an optimizer). What it changed is undone by `undo` where a later part of the preparation fails.
        core_lr: rate of the cores at the optimizer's default rate; None for the rate of the matrices.
        core_weight_decay: weight decay of the cores; None for that of the matrices.
        max_update: largest root mean square of a matrix's update, in units of its cores' rate; None for no limit.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        engine: Engine,
        before_step: Callable[[], Callable[[], None]],
        core_lr: float | None,
        core_weight_decay: float | None,
        max_update: float | None,
    ) -> None:
        self.optimizer = optimizer
        self.engine = engine
        self._before_step = before_step
        self._ratio = 1.0 if core_lr is None else core_lr / float(optimizer.defaults["lr"])
        self._core_weight_decay = core_weight_decay
        self._max_update = max_update
        #: rate of the first cores in the last step; None before it, or where the optimizer sets its own
        self.core_rate: float | Tensor | None = None
        self._frame: FrameType | None = None
        self._loans: list[tuple[dict[str, Any], dict[str, Any], list[Piece]]] = []
        self._hidden: list[tuple[nn.Parameter, Tensor]] = []
        self._nonfinite: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._verified: set[int] = set()
        self._verify: list[tuple[Piece, Tensor]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._pre_hook),
            optimizer.register_step_post_hook(self._post_hook),
            optimizer.register_state_dict_pre_hook(lambda _: self.recover()),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        self.recover()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def group_of(self, matrix: LoraMatrix) -> int:
        """Index of the optimizer group that holds the matrix now, looked up anew where a wrapper replaced the parameter.

        Raises:
            RuntimeError: the optimizer does not hold it any more.
        """
        index = self._owners().get(id(matrix.parameter))
        if index is None:
            raise RuntimeError(_lost(matrix))
        return index

    def holds(self, parameter: Tensor) -> bool:
        """Whether a parameter is in one of the optimizer's groups."""
        return id(parameter) in self._owners()

    def known(self, matrices: Iterable[LoraMatrix]) -> dict[Tensor, Any]:
        """The optimizer's own state entries of the matrices that have one."""
        state = self.optimizer.state
        return {m.parameter: state[m.parameter] for m in matrices if m.expanded and m.parameter in state}

    def restore_known(self, known: dict[Tensor, Any]) -> None:
        """Put back entries that `forget` dropped."""
        self.optimizer.state.update(known)

    def forget(self, matrices: Iterable[LoraMatrix]) -> None:
        """Drop the optimizer's own state entries of these matrices."""
        for matrix in matrices:
            self.optimizer.state.pop(matrix.parameter, None)

    def fill_missing(self, optimizer_state: dict[str, Any]) -> None:
        """Give expanded matrices that were never stepped themselves an entry of zeros in a state dict of the optimizer.

        torch.distributed.checkpoint wants an entry for every parameter, both when it reads and when it sets. The entries are
        dropped with the cores, see `forget`. Without a process group nothing is done.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        state = optimizer_state["state"]
        expanded = {id(m.parameter) for m in self.engine.matrices.values() if m.expanded}
        for group, packed in zip(self.optimizer.param_groups, optimizer_state["param_groups"], strict=True):
            missing = [
                (p, index)
                for p, index in zip(group["params"], packed["params"], strict=True)
                if id(p) in expanded and index not in state
            ]
            like = self._entry_like(group["params"]) if missing else None
            if like is not None:
                state.update({index: _zero_entry(*like, parameter) for parameter, index in missing})

    def _entry_like(self, parameters: list[Tensor]) -> tuple[Tensor, dict[str, Any]] | None:
        """A parameter (or a core) and its state, all of whose entries are of its shape or scalars; None where there is none."""
        cores = [piece for cohort in self.engine.cohorts.values() for piece in cohort.pieces]
        entries = [(p, self.optimizer.state[p]) for p in parameters if p in self.optimizer.state]
        for parameter, entry in [*entries, *((piece.parameter, piece.state) for piece in cores)]:
            tensors = [value for value in entry.values() if isinstance(value, Tensor)]
            if tensors and all(value.dim() == 0 or value.shape == parameter.shape for value in tensors):
                return parameter, entry
        return None

    def reset_checks(self) -> None:
        """Forget what earlier steps left to be checked: another state has been loaded."""
        self._nonfinite = []

    def recover(self) -> None:
        """Clean up after a step that died inside the optimizer: take loans back and refold from the cores as they are."""
        if self._frame is None or _on_stack(self._frame):
            return
        # a step that died has not shown whether the optimizer steps cores: look again at the next one
        self._verified -= {id(piece.parameter) for piece, _ in self._verify}
        self._verify = []
        cores = [piece.parameter for _, _, pieces in self._loans for piece in pieces]
        if cores and all(core.grad is None for core in cores):
            # zero_grad() came in between: the hidden gradients are of the past
            self._hidden = []
        self._finish()

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _pre_hook(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame = sys._getframe(1)
        if self._frame is not None and self._frame is not frame and _on_stack(self._frame):
            return None  # step() of a base class, called by the step that is already prepared
        self.recover()
        args, kwargs = _evaluate_closure(args, kwargs)
        self._prepare()
        self._frame = frame
        return args, kwargs

    def _post_hook(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._frame is None or sys._getframe(1) is not self._frame:
            return
        self._finish()

    # -- before -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _prepare(self) -> None:
        """Everything that can fail, then the assignments that cannot."""
        self._resolve()
        if self._moves_nothing():
            return
        self._raise_earlier_nonfinite()
        scale = getattr(self.optimizer, "grad_scale", None)
        for matrix in self.engine.matrices.values():
            matrix.grad_scale = scale
        undo: Callable[[], None] | None = None
        try:
            undo = self._before_step()
            flags = self.engine.pull_back()
            loans = [
                (self.optimizer.param_groups[index], self._core_group(index, pieces), pieces)
                for index, pieces in self.engine.lend(self._limit)
            ]
            hidden = [
                (parameter, grad if scale is None else grad / scale.to(grad.device))
                for parameter in (m.parameter for m in self.engine.matrices.values() if m.expanded)
                if (grad := parameter.grad) is not None
            ]
            watched, fresh = self._first_steps(loans)
            self._remember_flags(flags)
        except BaseException as error:
            _advise(error)
            if undo is not None:
                undo()
            raise
        finally:
            for matrix in self.engine.matrices.values():
                matrix.grad_scale = None
        self._loans, self._hidden, self._verify = loans, hidden, watched
        self._verified |= fresh
        if loans:
            self.core_rate = loans[0][1].get("lr")
        for parameter, _ in hidden:
            parameter.grad = None
        for _, group, pieces in loans:
            for piece in pieces:
                if piece.state:
                    self.optimizer.state[piece.parameter] = piece.state
            self.optimizer.param_groups.append(group)

    def _limit(self, index: int, numel: int) -> float | None:
        """Largest norm of the update of a matrix of `numel` entries in group `index`."""
        rate = self.optimizer.param_groups[index].get("lr")
        if self._max_update is None or rate is None:
            return None
        return self._max_update * float(rate) * self._ratio * math.sqrt(numel)

    def _core_group(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        """A group for cores: the matrices' group as it is now, with the cores' rate and decay."""
        owner = self.optimizer.param_groups[index]
        group = {key: value for key, value in owner.items() if key not in ("params", "param_names")}
        group["params"] = [piece.parameter for piece in pieces]
        if group.get("lr") is not None:
            group["lr"] = group["lr"] * self._ratio
        if self._core_weight_decay is not None:
            group["weight_decay"] = self._core_weight_decay
        return group

    def _owners(self) -> dict[int, int]:
        return {id(p): k for k, group in enumerate(self.optimizer.param_groups) for p in group["params"]}

    def _resolve(self) -> None:
        """Follow parameters that wrappers replaced (FSDP2, `assign=True` loading) and moves between devices."""
        owners = self._owners()
        moved = False
        for matrix in self.engine.matrices.values():
            current: Any = matrix.linear.weight
            if current is not matrix.parameter and is_sharded(matrix.parameter) and not is_sharded(current):
                # FSDP2 holds the gathered parameter in its place (after an evaluation, say); the shard is what is trained
                current = matrix.parameter
            if id(current) not in owners:
                raise RuntimeError(_lost(matrix))
            if current is not matrix.parameter or current.dim() != 2:
                _check_replacement(matrix, current)
                matrix.parameter = current
                moved = True
            moved = moved or matrix.expanded
        if moved:
            self.engine.follow(lambda matrix: owners[id(matrix.parameter)])

    def _moves_nothing(self) -> bool:
        """Whether this step is a GradScaler's overflow, or an initialising step: all rates zero and all gradients too."""
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf.item()):
            return True
        for group in self.optimizer.param_groups:
            rate = group.get("lr")
            # a rate on a device is not read: that would wait for it in every step
            if rate is None or (isinstance(rate, Tensor) and rate.device.type != "cpu") or float(rate) != 0.0:
                return False
        grads = [m.parameter.grad for m in self.engine.matrices.values() if m.parameter.grad is not None]
        moving = torch.tensor(any(bool(local(g).any()) for g in grads))
        if any(is_sharded(g) for g in grads):
            moving = agree_any(moving.to(local(grads[0]).device), self.engine.process_group)
        return not bool(moving)

    # -- after --------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Take the loans back, refold, give the matrices' gradients back; then say what the optimizer did wrong."""
        changed: list[str] = []
        for owner, group, pieces in self._loans:
            groups = self.optimizer.param_groups
            for k in range(len(groups) - 1, -1, -1):
                if groups[k] is group:
                    del groups[k]
            for piece in pieces:
                piece.state = self.optimizer.state.pop(piece.parameter, piece.state)
            changed += self._changed_entries(owner, group)
        self._loans = []
        for parameter, grad in self._hidden:
            if parameter.grad is None:
                parameter.grad = grad
        self._hidden = []
        try:
            self.engine.refold()
        except BaseException as error:
            # the frame is kept, so that `recover` tries again
            error.add_note(
                "tnadapt: the optimizer has stepped the cores, but not all matrices were refolded from them. That is tried "
                "again by the next step, state_dict() or fold(): make room (torch.cuda.empty_cache()), and do not repeat the batch"
            )
            raise
        self._frame = None
        watched, self._verify = self._verify, []
        if changed:
            raise RuntimeError(
                f"{type(self.optimizer).__name__} keeps state in its parameter groups ({changed[0]!r}), which cores enter for "
                "the step only; such an optimizer cannot train tensor-network cores: use a torch.optim optimizer"
            )
        self._check_moved(watched)

    # -- what cannot be known beforehand ------------------------------------------------------------------------------

    def _remember_flags(self, flags: list[Tensor]) -> None:
        """Off the CPU, gradients are checked without waiting for the device: the flag is read before the next step."""
        if not flags:
            return
        finite = torch.stack([flag.to(flags[0].device) for flag in flags]).all()
        if finite.device.type == "cuda":
            host = torch.empty((), dtype=torch.bool, pin_memory=True)
            host.copy_(finite, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._nonfinite.append((host, event))
        else:
            self._nonfinite.append((finite, None))

    def _raise_earlier_nonfinite(self) -> None:
        pending, self._nonfinite = self._nonfinite, []
        for flag, event in pending:
            if event is not None:
                event.synchronize()
            if not bool(flag):
                raise FloatingPointError(
                    "a gradient of the step before held NaN or infinity; the cores were given zeros instead. Lower the "
                    "learning rate, clip gradients, or use a GradScaler for float16; go on from the last checkpoint"
                )

    def _first_steps(
        self, loans: list[tuple[dict[str, Any], dict[str, Any], list[Piece]]]
    ) -> tuple[list[tuple[Piece, Tensor]], set[int]]:
        """Cores that must move in this step, the first that their buffer takes, as they are; and which cores are in their
        first step. torch's own optimizers need no watching, and may take steps too small for a float32 core to show."""
        watched: list[tuple[Piece, Tensor]] = []
        if type(self.optimizer).__module__.startswith("torch.optim"):
            return watched, set()
        fresh = {id(piece.parameter) for _, _, pieces in loans for piece in pieces} - self._verified
        for _, group, pieces in loans:
            rate = group.get("lr")
            if rate is not None and float(rate) == 0.0:
                continue
            for piece in pieces:
                grad = piece.parameter.grad
                if id(piece.parameter) in fresh and grad is not None and bool(grad.any()):
                    watched.append((piece, piece.parameter.detach().clone()))
                    break
        return watched, fresh

    def _check_moved(self, watched: list[tuple[Piece, Tensor]]) -> None:
        if watched and all(not piece.state and torch.equal(piece.parameter, before) for piece, before in watched):
            raise RuntimeError(
                f"{type(self.optimizer).__name__} did not step the cores that were lent to it (it keeps its own list of "
                "parameters); such an optimizer cannot train tensor-network cores: use a torch.optim optimizer"
            )

    def _changed_entries(self, owner: dict[str, Any], group: dict[str, Any]) -> list[str]:
        """Entries of the cores' group that the optimizer made differ from those of the matrices' group."""
        changed: list[str] = []
        for key, value in group.items() if self._verify else ():
            if key in _MAY_CHANGE or (key == "weight_decay" and self._core_weight_decay is not None):
                continue
            if key not in owner or isinstance(value, Tensor) or isinstance(owner[key], Tensor):
                continue
            if value != owner[key]:
                changed.append(key)
        return changed


def _advise(error: BaseException) -> None:
    """Say what can be done about an error that is not ours and stopped a step before anything was changed."""
    if isinstance(error, torch.OutOfMemoryError):
        error.add_note(
            "tnadapt: out of memory before the optimizer stepped; model, optimizer and cores are what they were before the "
            "step. Expand fewer matrices (top_n, added_parameters), lower the order or max_bond, or use smaller batches"
        )
    elif dist.is_available() and isinstance(error, dist.DistError):
        error.add_note(
            "tnadapt: the ranks could not agree before the optimizer stepped; on this rank nothing was changed. Restart all "
            "ranks from the last whole checkpoint"
        )


def _zero_entry(parameter: Tensor, entry: dict[str, Any], target: Tensor) -> dict[str, Any]:
    """Zeros for `target`, shaped as the state `entry` of `parameter`."""

    def zeros(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.zeros_like(target if value.shape == parameter.shape else value)

    return {key: zeros(value) for key, value in entry.items()}


def _evaluate_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Evaluate a closure once, so that gradients are there, and let the optimizer see its result."""
    closure = kwargs.get("closure") if "closure" in kwargs else (args[1] if len(args) > 1 else None)
    if closure is None:
        return args, kwargs
    with torch.enable_grad():
        loss = closure()

    def evaluated() -> Any:
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": evaluated}
    return (args[0], evaluated, *args[2:]), kwargs


def _on_stack(frame: FrameType) -> bool:
    """Whether `frame` is still being executed by this thread."""
    current: FrameType | None = sys._getframe(1)
    while current is not None:
        if current is frame:
            return True
        current = current.f_back
    return False


def _check_replacement(matrix: LoraMatrix, parameter: nn.Parameter) -> None:
    obstacle = obstacle_to_gathering(parameter)
    if parameter.dim() != 2:
        obstacle = f"its shape is {tuple(parameter.shape)} (FSDP1 flattens parameters; use fully_shard, which is FSDP2)"
    elif parameter.shape != matrix.parameter.shape:
        obstacle = f"its shape is {tuple(parameter.shape)}, and was {tuple(matrix.parameter.shape)}"
    if obstacle is not None:
        raise RuntimeError(
            f"the parameter of {matrix.name} was replaced since LoraOver was attached: {obstacle}. Attach LoraOver to the "
            "model as it is trained"
        )


def _lost(matrix: LoraMatrix) -> str:
    return (
        f"the optimizer does not hold the parameter of {matrix.name} any more: it was replaced after LoraOver was attached "
        "(load_adapter with low_cpu_mem_usage=True does that). Make a new optimizer of the model's present parameters and "
        "attach LoraOver to it"
    )
