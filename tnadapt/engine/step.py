"""One optimizer step of a model with expanded matrices, from top to bottom.

    before the optimizer steps (`_prepare`)
        1. follow the matrices to their parameters and devices
        2. stop here if the step moves nothing
        3. unfold anew the matrices that other code has written
        4. make cores for the matrices that were chosen at the attachment
        5. let the scheduler look, release and choose
        6. pull the gradients back to the cores
        7. lend the cores to the optimizer, in place of the matrices
    the optimizer steps
    after it (`_finish`)
        8. take the cores and their state back
        9. refold: write what the cores fold to into the matrices
       10. where ranks share the cores, send the refolded matrices to the others

A failure in 1 to 6 leaves everything as it was. Cores are in `optimizer.param_groups` only while the optimizer steps. So
learning-rate schedulers, named parameters, checkpoints and other code that counts groups see the user's own groups. The user's
optimizer itself steps the cores, in the same step, so they get its algorithm exactly: shared counters, norms over all groups,
a GradScaler's scale.
"""

from __future__ import annotations

import math
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import wraps
from itertools import chain
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tnadapt.engine import ranks
from tnadapt.engine.checks import checked_choice, checked_names, checked_release, require_same_place, shown
from tnadapt.engine.cores import Batch, Bench, Cohort, Piece, batches, raise_nonfinite
from tnadapt.engine.expanded import Expanded, Roster
from tnadapt.engine.owners import Exchange
from tnadapt.matrices import Skipped, TrainedMatrix
from tnadapt.schedulers import Scheduler

__all__ = ["CoreRates", "OwnMethods", "Step"]

#: optimizer steps between two looks at matrices off the CPU, each of which waits for the device once
_LOOK_EVERY = 50
#: group entries that an optimizer may rewrite without keeping state in them
_MAY_CHANGE = frozenset({"params", "lr", "capturable", "foreach", "fused"})
#: where torch runs the hooks of a step
_HOOKS_FILE = torch.optim.Optimizer.profile_hook_step.__code__.co_filename


@dataclass
class CoreRates:
    """How the hyper-parameters of cores follow those of their matrices.

    Attributes:
        lr: rate of the cores while the rate of the matrices is `base`; None for the rate of the matrices.
        weight_decay: of the cores; None for that of the matrices.
        max_update: largest root mean square of a matrix's update, in units of its cores' rate; None for no cap.
        matched: whether a matrix moves as far as the optimizer would have moved it without cores.
        base: base rate of the first optimizer group that holds matrices: its `max_lr` where a schedule such as OneCycle has set
            one, or its `initial_lr` where another schedule has, or its `lr` at the attachment. Fixed at the first step.
    """

    lr: float | None = None
    weight_decay: float | None = None
    max_update: float | None = None
    matched: bool = False
    base: float | None = None

    def fix_base(self, group: Mapping[str, Any], at_attachment: Any) -> None:
        """Find the base rate."""
        base = group.get("max_lr", group.get("initial_lr", at_attachment))
        if not isinstance(base, (int, float, Tensor)) or not float(base) > 0:
            raise ValueError(
                f"core_lr={self.lr!r} is the rate of the cores at the base rate of the first optimizer group that "
                f"holds matrices, and that is {base!r}: make the optimizer with the rate that its schedule starts from or peaks at"
            )
        self.base = float(base)

    @property
    def ratio(self) -> float:
        """Rate of cores over that of their matrices."""
        return 1.0 if self.lr is None or self.base is None else self.lr / self.base


@dataclass
class _Loan:
    """What the optimizer has of ours while it steps."""

    #: groups of cores, each beside the user's group that it was made from
    groups: list[tuple[dict[str, Any], dict[str, Any]]]
    #: the user's lists of parameters, in which stand-ins take the places of the matrices
    lists: list[tuple[dict[str, Any], list[nn.Parameter]]]
    #: matrices whose cores are lent, on whichever rank, with their gradients and torch's count of writes to these
    gradients: list[tuple[nn.Parameter, Tensor, int]]
    #: scale of a GradScaler that the optimizer takes out of the gradients itself
    scale: Tensor | None
    #: cores that must move, as they were, where it is not known yet whether the optimizer steps what is lent to it
    watched: list[tuple[Piece, Tensor]]


class OwnMethods:
    """The methods that somebody has put on this very object, before others are put in their place.

    Args:
        holder: the object.
        names: of the methods that are going to be replaced.
    """

    def __init__(self, holder: object, *names: str) -> None:
        self._holder, self._names = holder, names
        self._own = {name: vars(holder)[name] for name in names if name in vars(holder)}

    def restore(self) -> None:
        """Put them back; where there were none, the methods of the class count again."""
        for name in self._names:
            vars(self._holder).pop(name, None)
        vars(self._holder).update(self._own)


class Step:
    """Hooks on one optimizer that carry its steps through the cores.

    Args:
        optimizer: a torch optimizer that holds the matrices.
        expanded: which of them are expanded.
        scheduler: what to expand and fold back, and when.
        rates: hyper-parameters of the cores.
        skipped: matrices that were not candidates at the attachment.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        expanded: Expanded,
        scheduler: Scheduler,
        rates: CoreRates,
        skipped: Sequence[Skipped] = (),
    ) -> None:
        self.optimizer = optimizer
        self.expanded = expanded
        self.scheduler = scheduler
        self.rates = rates
        #: rate of the first cores in the last step; None before it, or where the optimizer sets its own
        self.core_rate: float | Tensor | None = None
        #: calls of `optimizer.step()` that had gradients of matrices
        self.stepped = 0
        #: whether the optimizer read a checkpoint with cores before they could be read
        self.missed = False
        self._rates_at_attachment = [group.get("lr") for group in optimizer.param_groups]
        self._asleep = [s for s in skipped if s.parameter is not None and not s.parameter.requires_grad]
        self._resting: set[str] = set()
        self._distributed = False
        self._exchange = Exchange(expanded.process_group)
        self._places: list[tuple[torch.device, torch.dtype]] = []
        #: refolded matrices that owners have not sent yet
        self._unsent: list[TrainedMatrix] = []
        self._begun = False
        # torch's own optimizers step what is lent to them, and may take steps too small for a core to show
        self._proven = type(optimizer).__module__.startswith("torch.optim")
        self._nonfinite: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._loan: _Loan | None = None
        #: what is stepped now, and the benches of the last step
        self._batches: list[Batch] = []
        self._benches: dict[Any, Bench] = {}
        # the step that is under way: the frame that runs its hooks, its thread, and how many steps are nested in it
        self._frame: FrameType | None = None
        self._thread = 0
        self._nested = 0
        self._stand_ins: dict[tuple[torch.dtype, torch.device], nn.Parameter] = {}
        self._handles: list[Any] = []
        self._attach()

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        """Hook into the optimizer: last before it steps, so that other hooks have had the gradients, and first after it, so
        that others see the refolded matrices. Its `zero_grad` reaches the matrices inside a step and after one that died."""
        optimizer = self.optimizer
        before, after = optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)
        hooks: Any = optimizer._optimizer_step_pre_hooks
        finishers: Any = optimizer._optimizer_step_post_hooks
        finishers.move_to_end(after.id, last=False)

        def register(hook: Any) -> Any:
            handle = type(optimizer).register_step_pre_hook(optimizer, hook)
            hooks.move_to_end(before.id)
            return handle

        original = optimizer.zero_grad
        self._methods = OwnMethods(optimizer, "register_step_pre_hook", "zero_grad")

        @wraps(original)
        def zero_grad(set_to_none: bool = True) -> None:
            self.recover()
            if self._unsent:
                self._send(after_fault=True)
            original(set_to_none)
            # inside a step, cores stand in for the matrices
            for parameter, _, _ in self._loan.gradients if self._loan is not None else ():
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.zero_()

        optimizer.register_step_pre_hook = register  # type: ignore[method-assign]
        optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
        self._handles = [before, after, optimizer.register_state_dict_pre_hook(lambda _: self._require_between_steps())]

    def remove(self) -> None:
        """Take the hooks off."""
        self.recover()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._benches = {}
        self._methods.restore()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._frame is not None and self._thread == threading.get_ident() and _runs(self._frame, self._thread):
            # step() of a base class, called by the step that is prepared already
            self._nested += 1
            return None
        self.recover()
        args, kwargs = _evaluate_closure(args, kwargs)
        with self._without_autocast():
            self._prepare()
        self._frame, self._thread, self._nested = _step_frame(), threading.get_ident(), 0
        return args, kwargs

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _after(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._frame is None:
            return
        if self._nested:
            self._nested -= 1
            return
        with self._without_autocast():
            self._finish()

    def _without_autocast(self) -> ExitStack:
        stack = ExitStack()
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        return stack

    # -- before the optimizer steps -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _prepare(self) -> None:
        """Everything that can fail, and then the loan, which cannot."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "optimizer.step() is being captured into a CUDA graph, which would leave out all that is not a kernel; capture "
                "the forward and backward passes, and step outside of the graph"
            )
        self._resolve()
        self._warn_of_switches()
        if self._unsent:
            self._send(after_fault=True)
        if self._moves_nothing():
            return
        self._raise_earlier_nonfinite()
        matrices, before, scheduler_before = self.expanded.matrices, self.expanded.now, self.scheduler.state_dict()
        step, base = before.step + 1, self.rates.base
        scale = getattr(self.optimizer, "grad_scale", None)
        if scale is not None:
            for matrix in matrices.values():
                matrix.grad_scale = scale
        try:
            if not self._begun:
                self._begin()
            if self.rates.lr is not None and self.rates.base is None:
                self._fix_base()
            forgotten = self._follow_edits(step)
            if self.expanded.now.waiting:
                self.expanded.expand(self.expanded.now.waiting)
            self.scheduler.observe(step, matrices)
            if self.scheduler.due(step):
                forgotten += self._decide(step)
            flags = self._pull_back()
            loan = self._loan_of(scale)
        except BaseException as error:
            _advise(error)
            self._undo(before, scheduler_before)
            self.rates.base = base
            raise
        finally:
            if scale is not None:
                for matrix in matrices.values():
                    matrix.grad_scale = None
        self._nonfinite += flags
        self.stepped += 1
        self.expanded.now = replace(self.expanded.now, step=step)
        if forgotten:
            self.forget(forgotten)
        self._lend(loan)

    def _undo(self, before: Roster, scheduler: Mapping[str, Any]) -> None:
        """Put back what a failed preparation has changed."""
        for cohort in (*self.expanded.now.cohorts, *before.cohorts):
            cohort.settle()
        self._batches = []
        self.expanded.now = before
        self.scheduler.load_state_dict(scheduler)

    def _resolve(self) -> None:
        """Follow parameters that wrappers replaced (FSDP2, `assign=True` loading) and moves between devices and dtypes."""
        owners = {id(p): k for k, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        # `_parameters` is where a module keeps them; what a parametrization makes is not in it, and is found by the attribute
        lost = [
            m
            for m in self.expanded.matrices.values()
            if m.owner._parameters.get(m.attribute) is not (p := m.parameter) or id(p) not in owners or p.dim() < 2
        ]
        for matrix in lost:
            known: Any = matrix.parameter
            current = getattr(matrix.owner, matrix.attribute)
            if current is not known and hasattr(known, "full_tensor") and not hasattr(current, "full_tensor"):
                # FSDP2 holds the gathered parameter in its place (after an evaluation, say); the shard is what is trained
                current = known
            if current is not known or id(current) not in owners or current.dim() < 2:
                require_same_place(matrix, current, id(current) in owners)
                matrix.parameter = current
        places = [(m.parameter.device, m.parameter.dtype) for m in self.expanded.now.elsewhere]
        if places != self._places:
            self._places, self.expanded.unseen = places, True
        for cohort in self._active():
            key = cohort.key
            for matrix in cohort.matrices:
                p = matrix.parameter
                if p.device != key.device or p.dtype != key.matrix_dtype or owners[id(p)] != key.group:
                    self.expanded.follow()
                    return

    def _active(self) -> list[Cohort]:
        """The cohorts that have gradients."""
        # one pass over all matrices, since most cohorts may rest
        moving = {m for m in self.expanded.matrices.values() if m.parameter.grad is not None}
        return [cohort for cohort in self.expanded.now.cohorts if not moving.isdisjoint(cohort.matrices)]

    def _moves_nothing(self) -> bool:
        """Whether this step is a GradScaler's overflow, one without any gradient, or the one by which distributed checkpoints
        initialise an optimizer: all rates zero and all gradients too."""
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf.item()):
            return True
        grads = [g for m in self.expanded.matrices.values() if (g := m.parameter.grad) is not None]
        if not grads:
            return True
        for group in self.optimizer.param_groups:
            rate = group.get("lr")
            # a rate on a device is not read: that would wait for it in every step
            if rate is None or (isinstance(rate, Tensor) and rate.device.type != "cpu") or float(rate) != 0.0:
                return False
        moving = torch.tensor(any(bool(ranks.local(g).any()) for g in grads), device=grads[0].device)
        if any(ranks.is_sharded(g) for g in grads):
            moving = ranks.agree_any(moving, self.expanded.process_group)
        return not bool(moving)

    def _begin(self) -> None:
        """What is done once, at the first step, and again after a state was loaded."""
        if self.missed:
            raise RuntimeError(
                "the optimizer was loaded from a checkpoint of a LoraOver before this one was attached, so the cores in it were lost: "
                "attach first, then load the checkpoint; or make a new optimizer to train the adapter from fresh cores"
            )
        self._distributed = ranks.is_distributed(self.expanded.process_group)
        if self._distributed:
            now = self.expanded.now
            ranks.require_agreement(
                {
                    "matrices": [
                        (n, tuple(m.shape), str(m.parameter.dtype)) for n, m in self.expanded.matrices.items()
                    ],
                    "the factorization": [str(m.factorization) for m in self.expanded.matrices.values()],
                    "the scheduler": self.scheduler.label,
                    "steps taken": now.step,
                    "expanded matrices": sorted(now.names),
                    "shard": self.expanded.shard,
                    "the owners of the cores": sorted(now.owners.items()),
                    "the values of the cores": []
                    if now.owners
                    else [float(cohort.buffer.double().sum()) for cohort in now.cohorts],
                },
                self.expanded.process_group,
            )
        self._begun = True

    def _fix_base(self) -> None:
        """Find the base rate of `core_lr`, from the first group that holds matrices."""
        index = min(self.expanded.group_of(m) for m in self.expanded.matrices.values())
        at_attachment = self._rates_at_attachment[index] if index < len(self._rates_at_attachment) else None
        self.rates.fix_base(self.optimizer.param_groups[index], at_attachment)

    # what others do to the matrices

    def _follow_edits(self, step: int) -> list[str]:
        """Unfold anew what somebody else has written (a loaded adapter, a hand edit); returns the names."""
        if self._distributed:
            names = self._edited_on_any_rank(step)
        else:
            # after loading everything is looked at, since what is trained may join what rests; later, what rests in this step is
            # looked at when it is trained again
            looked = [cohort for cohort in self.expanded.now.cohorts if cohort.written is None]
            looked += [c for c in self._active() if c.written is not None and self._looks(c, step)]
            names = [name for cohort in looked for name in cohort.named(cohort.edited())]
        if names:
            warnings.warn(
                f"{shown(names)} changed outside the optimizer (a loaded adapter, a hand edit); unfolding anew, with "
                "fresh optimizer state for the cores",
                stacklevel=2,
            )
            self.expanded.drop(names)
            self.expanded.expand(names, fresh=True)
        return names

    @staticmethod
    def _looks(cohort: Cohort, step: int) -> bool:
        """Whether to look at the matrices of a cohort, for which the host must wait off the CPU."""
        return cohort.key.device.type == "cpu" or step % _LOOK_EVERY == 1 or cohort.was_written_to()

    def _edited_on_any_rank(self, step: int) -> list[str]:
        """Names of matrices that any rank has seen written by somebody else: one collective, in steps that all ranks agree on
        without asking each other."""
        now = self.expanded.now
        on_cpu = any(ranks.local(matrix.parameter).device.type == "cpu" for matrix in now.trained)
        if not now.trained or not (on_cpu or self.expanded.unseen or step % _LOOK_EVERY == 1):
            return []
        mine = {*self.expanded.edited(), *self._exchange.edited(now.elsewhere)}
        self.expanded.unseen = False
        flags = torch.tensor([matrix.name in mine for matrix in now.trained])
        agreed = ranks.agree_any(flags.to(ranks.local(now.trained[0].parameter).device), self.expanded.process_group)
        return [matrix.name for matrix, flag in zip(now.trained, agreed.tolist(), strict=True) if flag]

    def _warn_of_switches(self) -> None:
        """Say once of each matrix that it was frozen or woken since the attachment, as `set_adapter` does."""
        now = self.expanded.now
        frozen = [
            matrix.name
            for matrix in chain(now.elsewhere, *(cohort.matrices for cohort in now.cohorts))
            if not matrix.parameter.requires_grad and matrix.name not in self._resting
        ]
        if frozen:
            self._resting.update(frozen)
            warnings.warn(
                f"{shown(frozen)} no longer required to have gradients (set_adapter, or requires_grad_(False)): their cores "
                "rest until they are trained again. fold() before switching adapters for good",
                stacklevel=2,
            )
        woken = [s for s in self._asleep if s.parameter is not None and s.parameter.grad is not None]
        if woken:
            self._asleep = [s for s in self._asleep if s not in woken]
            held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            names = [s.name for s in woken if id(s.parameter) in held]
            if names:
                warnings.warn(
                    f"{shown(names)}, left out at the attachment ({woken[0].reason}), now trained as plain LoRA; fold() and "
                    "attach a new LoraOver to expand them",
                    stacklevel=2,
                )

    # what the scheduler wants

    def _decide(self, step: int) -> list[str]:
        """Release and expand what the scheduler chooses; returns the names of what was released."""
        matrices, scheduler = self.expanded.matrices, self.scheduler

        def choose() -> tuple[list[str], list[str]]:
            released = checked_names(scheduler.release(step, matrices), f"what {scheduler.label} released")
            return released, checked_names(scheduler.select(step, matrices), f"what {scheduler.label} selected")

        if self._distributed:
            released, chosen = ranks.choice_of_first(choose, scheduler.label, step, self.expanded.process_group)
        else:
            released, chosen = choose()
        released = checked_release(released, matrices, scheduler)
        if released:
            self.expanded.drop(released)
            self.expanded.record(step, "fold", released)
        chosen = checked_choice(chosen, matrices, scheduler)
        if chosen and scheduler.after_update:
            self.expanded.wait(chosen, step)
        elif chosen:
            # what the optimizer knows of a matrix that has just been released is from before its expansion
            stale = set[str]() if self.rates.matched else set(released)
            self.expanded.expand([name for name in chosen if name not in stale])
            self.expanded.expand([name for name in chosen if name in stale], fresh=True)
            self.expanded.record(step, "expand", chosen)
        return released

    # gradients

    def _pull_back(self) -> list[tuple[Tensor, torch.cuda.Event | None]]:
        """Pull the gradients back to the cores of all matrices that have one; the others rest. Returns flags that tell off the
        CPU whether gradients were finite."""
        self._require_finite_plain()
        now, flags = self.expanded.now, list[Tensor]()
        active = [m for m in now.trained if m.parameter.grad is not None] if now.owners else []
        gradients = self.expanded.gathered(lambda matrix: matrix.parameter.grad, active) if active else None
        parts: list[Cohort] = []
        for cohort in self._active():
            idle = [matrix.parameter.grad is None for matrix in cohort.matrices]
            parts.append(self.expanded.divide(cohort, idle) if any(idle) else cohort)
        self._batches, self._benches = batches(parts, self._benches)
        for batch in self._batches:
            finite = batch.pull_back(None if gradients is None else gradients(batch))
            if finite is not None:
                flags.append(finite)
        if active and ranks.local(active[0].parameter).device.type != "cpu":
            # a gradient that is not finite stops all ranks, not only its owner
            finite = (
                torch.stack(flags).all()
                if flags
                else torch.tensor(True, device=ranks.local(active[0].parameter).device)
            )
            flags = [~ranks.agree_any(~finite, self.expanded.process_group)]
        return [_read_later(flags)] if flags else []

    def _require_finite_plain(self) -> None:
        """Raise where the gradient of a matrix without cores on this rank is not finite; on the CPU, where it makes nobody wait.
        Where cores are dealt out, all ranks look at all matrices, so that all of them stop."""
        if sum(len(cohort.matrices) for cohort in self.expanded.now.cohorts) == len(self.expanded.matrices):
            return
        names = frozenset[str]() if self.expanded.now.owners else self.expanded.now.names
        plain = [
            matrix
            for matrix in self.expanded.matrices.values()
            if matrix.name not in names and matrix.parameter.grad is not None and matrix.parameter.device.type == "cpu"
        ]
        if not plain:
            return
        grads: list[Any] = [matrix.parameter.grad for matrix in plain]
        sharded = any(hasattr(grad, "full_tensor") for grad in grads)
        held: list[Tensor] = [ranks.local(grad) for grad in grads] if sharded else grads
        # a finite norm has finite entries, and all norms are one call; where the squares overflow, each entry is looked at
        finite = torch.isfinite(torch.stack(torch._foreach_norm(held)))
        if not bool(finite.all()):
            finite = torch.stack([torch.isfinite(g).all() for g in held])
        if sharded:
            finite = ~ranks.agree_any(~finite, self.expanded.process_group)
        raise_nonfinite(plain, finite)

    def _raise_earlier_nonfinite(self) -> None:
        """Off the CPU, the flag that gradients were finite is read one step later, when it is there without waiting."""
        pending, self._nonfinite = self._nonfinite, []
        for flag, event in pending:
            if event is not None:
                event.synchronize()
            if not bool(flag):
                raise FloatingPointError(
                    "a gradient of the step before held NaN or infinity; the cores were given zeros instead. Lower the "
                    "learning rate, clip gradients, or use a GradScaler for float16; go on from the last checkpoint"
                )

    # the loan

    def _loan_of(self, scale: Tensor | None) -> _Loan:
        """Everything that the optimizer is to get, made ready; nothing is handed over yet."""
        by_group: dict[int, list[Piece]] = {}
        for batch in self._batches:
            pieces = batch.lend(self._cap(batch), self.rates.matched)
            by_group.setdefault(batch.key.group, []).extend(pieces)
        groups = [(self.optimizer.param_groups[k], self._core_group(k, pieces)) for k, pieces in by_group.items()]
        parameters = [matrix.parameter for batch in self._batches for matrix in batch.matrices]
        parameters += [matrix.parameter for matrix in self.expanded.now.elsewhere]
        gradients = [(p, p.grad, p.grad._version) for p in parameters if p.grad is not None]
        watched = [] if self._proven else self._watched(by_group)
        return _Loan(groups, [], gradients, scale, watched)

    def _cap(self, batch: Batch) -> float | None:
        """Largest norm of the update of a matrix of a batch."""
        rate = self.optimizer.param_groups[batch.key.group].get("lr")
        if self.rates.max_update is None or rate is None:
            return None
        numel = batch.matrices[0].parameter.numel()
        return self.rates.max_update * float(rate) * self.rates.ratio * math.sqrt(numel)

    def _core_group(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A group for cores: the matrices' group as it is now, with the cores' rate and decay."""
        owner = self.optimizer.param_groups[index]
        group = {key: value for key, value in owner.items() if key not in ("params", "param_names")}
        group["params"] = [piece.parameter for piece in pieces]
        if group.get("lr") is not None:
            group["lr"] = group["lr"] * self.rates.ratio
        if self.rates.weight_decay is not None:
            group["weight_decay"] = self.rates.weight_decay
        return group

    def _watched(self, by_group: Mapping[int, Sequence[Piece]]) -> list[tuple[Piece, Tensor]]:
        """One piece of each group that must move in this step, and a copy of it. A piece whose step is lost to rounding need not
        move: half of rate times gradient must change it already, upwards or downwards."""
        watched: list[tuple[Piece, Tensor]] = []
        for index, pieces in by_group.items():
            rate = self.optimizer.param_groups[index].get("lr")
            half = 0.5 if rate is None else 0.5 * float(rate) * self.rates.ratio
            for piece in pieces:
                before, grad = piece.parameter.detach(), piece.parameter.grad
                if grad is not None and not torch.equal(before.add(grad, alpha=half), before):
                    watched.append((piece, before.clone()))
                    break
        return watched

    def _lend(self, loan: _Loan) -> None:
        """Hand the cores over. Stand-ins without gradient take the places of the matrices, so that the optimizer passes them by
        and positions in groups stay what they were; the matrices keep their gradients for everybody else. Where steps are
        matched, the optimizer steps the matrices as well, and its step is measured and overwritten."""
        stand_ins = {} if self.rates.matched else {id(p): self._stand_in(p) for p, _, _ in loan.gradients}
        for group in self.optimizer.param_groups:
            own = group["params"]
            if not stand_ins.keys().isdisjoint(map(id, own)):
                loan.lists.append((group, own))
                group["params"] = [stand_ins.get(id(p), p) for p in own]
        for cohort in chain(*(batch.cohorts for batch in self._batches)):
            for piece in cohort.pieces:
                if piece.state:
                    self.optimizer.state[piece.parameter] = piece.state
        self.optimizer.param_groups.extend(group for _, group in loan.groups)
        if loan.groups:
            self.core_rate = loan.groups[0][1].get("lr")
        self._loan = loan

    def _stand_in(self, parameter: nn.Parameter) -> nn.Parameter:
        place = parameter.dtype, parameter.device
        if place not in self._stand_ins:
            self._stand_ins[place] = nn.Parameter(torch.empty(0, dtype=place[0], device=place[1]))
        return self._stand_ins[place]

    # -- after the optimizer has stepped ------------------------------------------------------------------------------

    @torch.no_grad()
    def _finish(self, died: bool = False) -> None:
        """Take the loan back and refold; then say what the optimizer did wrong."""
        loan, faults = self._loan, list[str]()
        if loan is not None:
            self._take_back(loan)
            if not died:
                faults = self._faults(loan)
            self._loan = None
        now, shadows = self.expanded.now, None
        lent = set() if loan is None else {id(parameter) for parameter, _, _ in loan.gradients}
        stepped = [matrix for matrix in now.trained if id(matrix.parameter) in lent] if now.owners else []
        matched = self.rates.matched and not died
        try:
            if matched and stepped:
                shadows = self.expanded.gathered(lambda matrix: matrix.parameter, stepped)
            for batch in self._batches:
                if batch.lent:
                    # what was restored after a step that died is not overwritten; the next step unfolds it anew
                    batch.refold(matched, None if shadows is None else shadows(batch), died)
        except BaseException as error:
            # the frame is kept, so that `recover` tries again
            error.add_note(
                "tnadapt: the optimizer has stepped the cores, but not all matrices were refolded from them. That is tried "
                "again by the next step, state_dict() or fold(): make room (torch.cuda.empty_cache()), and do not repeat the batch"
            )
            raise
        self._frame, self._batches = None, []
        self._unsent = self._unsent or stepped
        if self._unsent and not died:
            self._send()
        if faults:
            raise RuntimeError(faults[0])

    @torch.no_grad()
    def _send(self, after_fault: bool = False) -> None:
        """Owners send what they have refolded. All ranks are here at once: at the end of a step, or, where it died, at the
        beginning of the next. What was written by somebody else after a fault is not sent: it is unfolded anew."""
        now = self.expanded.now
        unsent = [matrix for matrix in self._unsent if matrix.name in now.owners]
        if after_fault:
            mine = [name for cohort in now.cohorts for name in cohort.named(cohort.overtaken)]
            overtaken = set(chain(*ranks.gather_objects(mine, self.expanded.process_group)))
            unsent = [matrix for matrix in unsent if matrix.name not in overtaken]
        try:
            if unsent:
                self._exchange.run(unsent, now.owners, now.cohorts)
        except RuntimeError as error:
            error.add_note(
                "tnadapt: the cores were stepped, but the ranks could not exchange the refolded matrices, so they hold different "
                "ones now. A rank has died, or takes other steps: restart all ranks from the last whole checkpoint"
            )
            raise
        self._unsent = []

    def _take_back(self, loan: _Loan) -> None:
        """Give the optimizer its own groups again, and keep its state of the cores."""
        groups, state = self.optimizer.param_groups, self.optimizer.state
        lent = {id(group) for _, group in loan.groups}
        groups[:] = [group for group in groups if id(group) not in lent]
        for owner, own in loan.lists:
            owner["params"] = own
        for cohort in chain(*(batch.cohorts for batch in self._batches)):
            cohort.take_back(state)
        if loan.scale is not None and not self.rates.matched:
            # as the optimizer's kernel leaves gradients that it has unscaled
            for parameter, _, _ in loan.gradients:
                if parameter.grad is not None:
                    parameter.grad.div_(loan.scale.to(parameter.grad.device))

    def _faults(self, loan: _Loan) -> list[str]:
        """What the optimizer did that cores cannot follow."""
        kind = type(self.optimizer).__name__
        faults: list[str] = []
        if not self._proven:
            for owner, group in loan.groups:
                faults += [
                    f"{kind} keeps state in its parameter groups ({key!r}), which cores enter for the step only; such an "
                    "optimizer cannot train tensor-network cores: use a torch.optim optimizer"
                    for key in self._changed_entries(owner, group)
                ]
            moved = [bool(piece.state) or not torch.equal(piece.parameter, old) for piece, old in loan.watched]
            if moved and not any(moved):
                faults.append(
                    f"{kind} did not step the cores that were lent to it (it keeps its own list of parameters); such an "
                    "optimizer cannot train tensor-network cores: use a torch.optim optimizer"
                )
            self._proven = any(moved) and not faults
        if not (
            type(self.optimizer).__module__.startswith("torch.optim") or loan.scale is not None or self.rates.matched
        ):
            changed = [
                p for p, grad, count in loan.gradients if p.grad is grad and grad._version != count and grad.any()
            ]
            if changed:
                faults.append(
                    f"{kind} changed gradients of expanded matrices inside its step (it clips them, perhaps) after they were pulled "
                    "back to the cores, so the cores took the step without that; clip before optimizer.step(), or in a step "
                    "pre-hook, and go on from the last checkpoint"
                )
        return faults

    def _changed_entries(self, owner: Mapping[str, Any], group: Mapping[str, Any]) -> Iterable[str]:
        """Entries of the cores' group that the optimizer made differ from those of the matrices' group."""
        for key, value in group.items():
            if key in _MAY_CHANGE or (key == "weight_decay" and self.rates.weight_decay is not None):
                continue
            if key not in owner or isinstance(value, Tensor) or isinstance(owner[key], Tensor):
                continue
            if value != owner[key]:
                yield key

    # -- after a step that died ---------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Wait for a step that another thread is taking. Clean up after one that died inside the optimizer: take the loan back
        and refold from the cores as they are, but for matrices that were written since."""
        here = threading.get_ident()
        while self._frame is not None and self._thread != here and _runs(self._frame, self._thread):
            time.sleep(1e-3)
        if self._frame is None or _runs(self._frame, self._thread):
            return
        with self._without_autocast():
            self._finish(died=True)

    def _require_between_steps(self) -> None:
        self.recover()
        if self._loan is not None:
            raise RuntimeError(
                "state_dict() was called inside a step, while the optimizer has the cores on loan: by its own code, or by a hook "
                "that torch runs for the step of its base class too. Call it between steps"
            )

    def reset(self) -> None:
        """Another state has been loaded: forget what earlier steps left to be checked, and check anew what ranks hold."""
        self._nonfinite, self._unsent = [], []
        self._exchange.forget()
        self._begun = self.missed = False

    # -- the optimizer's own state of the matrices --------------------------------------------------------------------

    def forget(self, names: Iterable[str]) -> None:
        """Drop what is known of these matrices, which have or had cores: what their owners sent of them last, and the optimizer's own
        state, which is from before the expansion except where the optimizer has stepped the matrices all along."""
        names = list(names)
        self._exchange.forget(names)
        if not self.rates.matched:
            for name in names:
                self.optimizer.state.pop(self.expanded.matrices[name].parameter, None)

    def fill_missing(self, optimizer_state: dict[str, Any]) -> None:
        """Give expanded matrices that were never stepped themselves an entry of zeros in a state dict of the optimizer.

        torch.distributed.checkpoint wants an entry for every parameter, both when it reads and when it sets. The entries are
        dropped with the cores. Without a process group nothing is done.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        state = optimizer_state["state"]
        names = self.expanded.now.names
        ours = {id(m.parameter) for m in self.expanded.matrices.values() if m.name in names}
        for group, packed in zip(self.optimizer.param_groups, optimizer_state["param_groups"], strict=True):
            missing = [
                (p, index)
                for p, index in zip(group["params"], packed["params"], strict=True)
                if id(p) in ours and index not in state
            ]
            like = self._entry_like(group["params"]) if missing else None
            if like is not None:
                state.update({index: _zero_entry(*like, parameter) for parameter, index in missing})

    def _entry_like(self, parameters: list[Tensor]) -> tuple[Tensor, dict[str, Any]] | None:
        """A parameter (or a core) and its state, all of whose entries are of its shape or scalars; None where there is none."""
        pieces = [piece for cohort in self.expanded.now.cohorts for piece in cohort.pieces]
        entries = [(p, self.optimizer.state[p]) for p in parameters if p in self.optimizer.state]
        for parameter, entry in [*entries, *((piece.parameter, piece.state) for piece in pieces)]:
            tensors = [value for value in entry.values() if isinstance(value, Tensor)]
            if tensors and all(value.dim() == 0 or value.shape == parameter.shape for value in tensors):
                return parameter, entry
        return None


def _read_later(flags: Sequence[Tensor]) -> tuple[Tensor, torch.cuda.Event | None]:
    """Whether all flags are set, on its way to the host; nobody waits for it now."""
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).all()
    if finite.device.type != "cuda":
        return finite, None
    host = torch.empty((), dtype=torch.bool, pin_memory=True, device="cpu")
    host.copy_(finite, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    # of the device that copies, which need not be the current one
    event.record(torch.cuda.current_stream(finite.device))
    return host, event


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


def _step_frame() -> FrameType:
    """The frame of torch's wrapper around `step`, which runs the hooks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _HOOKS_FILE:
        frame = frame.f_back
    return sys._getframe(2) if frame is None else frame


def _runs(frame: FrameType, thread: int) -> bool:
    """Whether a thread is still executing `frame`."""
    current = sys._current_frames().get(thread)
    while current is not None:
        if current is frame:
            return True
        current = current.f_back
    return False
