"""`LoraOver`: the matrices of a model, a factorization, a scheduler and an optimizer, put together."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import nn

from tnadapt.engine import (
    HANDOVERS,
    Coupling,
    Engine,
    Outside,
    WrappedLoading,
    check_matrices,
    check_rates,
    gather_objects,
    is_distributed,
    is_elementwise,
    shown,
    unwrap,
)
from tnadapt.factorizations import Factorization
from tnadapt.lora_matrices import LoraMatrix, find_lora_matrices
from tnadapt.schedulers import Scheduler, Static

__all__ = ["STATE_KEY", "Event", "FoldReport", "LoraOver"]

#: key of our part in the state dict of an optimizer
STATE_KEY = "tnadapt"
_STATE_VERSION = 1

_attached: weakref.WeakSet[LoraOver] = weakref.WeakSet()


@dataclass(frozen=True)
class Event:
    """Matrices that were expanded or folded back at an optimizer step (0: at the attachment)."""

    step: int
    action: Literal["expand", "fold"]
    names: tuple[str, ...]


@dataclass(frozen=True)
class FoldReport:
    """What `LoraOver.fold()` ended.

    Attributes:
        steps: optimizer steps that were taken.
        folded: matrices that were expanded until now.
        lora_parameters: numbers in all LoRA matrices, which is what the model has.
        trained_parameters: numbers that were trained until now, cores in place of expanded matrices.
        history: every expansion and folding.
    """

    steps: int
    folded: tuple[str, ...]
    lora_parameters: int
    trained_parameters: int
    history: tuple[Event, ...]

    def __str__(self) -> str:
        ratio = self.trained_parameters / max(self.lora_parameters, 1)
        return (
            f"folded {len(self.folded)} matrices after {self.steps} steps: the model is plain LoRA with "
            f"{self.lora_parameters:,} parameters; {self.trained_parameters:,} were trained ({ratio:.2f}x)"
        )


class LoraOver:
    """Trains LoRA matrices through tensor-network cores, inside the optimizer that the user already has.

    The model stays plain LoRA: its parameters are the same objects before, during and after. When the optimizer steps,
    gradients of expanded matrices are pulled back to their cores, the cores are stepped by the same optimizer, and the
    matrices are refolded in place.

    Memory above plain LoRA, for the matrices that are expanded: cores, their optimizer state, max(core gradients, kept
    prefixes), and the scratch of the largest cohort (its matrices twice, and beyond order 2 two squares of the largest bond
    for each of them); less the optimizer state that plain LoRA would have of these matrices. Gradients and prefixes share one
    memory, which stays between steps. Sharded matrices and those of lower precision than their cores have a copy besides.

    Args:
        model: any model with LoRA pairs on linear layers (PEFT, `OverParamAdapter`, or one's own `lora_A`/`lora_B`).
        optimizer: the torch optimizer that holds the LoRA parameters; accelerate's wrapper is unwrapped.
        factorization: `MPO(...)`, `SVD()`, …
        scheduler: what to expand and when; every matrix from step 0 by default.
        core_lr: learning rate of the cores where the optimizer's default rate is `optimizer.defaults["lr"]`: a core's
            rate is its matrix's current rate times `core_lr / optimizer.defaults["lr"]`, so schedules and layer-wise
            rates carry over. None: the matrix's rate.
        core_weight_decay: weight decay of the cores, None for the matrix's. Decay compounds over the cores of a matrix:
            a deep factorization shrinks the matrix as often as it has cores.
        handover: what the cores of a matrix that is expanded in mid-run know of its optimizer state: `"warm"` pulls its
            moments back to them, which keeps the trajectory smooth; `"restart"` starts them fresh.
        max_update: cap on how far a matrix moves in one step: the root mean square of its update is at most
            `max_update` times its cores' rate, in which Adam moves an entry of a plain LoRA matrix by at most about 1. The
            step of the cores is shortened, keeping its direction. None for no cap.
        groups: gives a matrix the group it is ranked in, see `default_group`.
        process_group: ranks that train the same matrices; None for all.

    Raises:
        TypeError: an optimizer that cannot train cores.
        ValueError: no LoRA matrices, an optimizer that does not hold them, a factorization that does not fit a shape, a
            scheduler that names what is not there, or something is attached already. Nothing has changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        factorization: Factorization,
        scheduler: Scheduler | None = None,
        *,
        core_lr: float | None = None,
        core_weight_decay: float | None = None,
        handover: str = "warm",
        max_update: float | None = None,
        groups: Callable[[LoraMatrix], str] | None = None,
        process_group: Any = None,
    ) -> None:
        scheduler = Static() if scheduler is None else scheduler
        inner = unwrap(optimizer)
        if handover not in HANDOVERS:
            raise ValueError(f"handover={handover!r} is unknown; choose one of {', '.join(HANDOVERS)}")
        matrices, skipped = find_lora_matrices(model, groups)
        check_matrices(matrices, skipped, inner)
        _require_unattached(matrices, inner)
        check_rates(inner, core_lr, core_weight_decay)
        if max_update is not None and not max_update > 0:
            raise ValueError(f"max_update={max_update!r} must be positive, or None for no cap")
        if max_update is not None and any(group.get("lr") is None for group in inner.param_groups):
            raise ValueError(
                f"max_update is relative to the learning rate, which {type(inner).__name__} sets itself (lr=None); give it one"
            )
        for matrix in matrices.values():
            matrix.added_parameters = factorization.added_parameters(matrix.shape)
        scheduler.attach(matrices)
        pending = _checked_names(scheduler.select(0, matrices), matrices, scheduler)

        self.optimizer = inner
        self.factorization = factorization
        self.scheduler = scheduler
        self.matrices = matrices
        #: LoRA weights that are not candidates, with the reason
        self.skipped = skipped
        #: every expansion and folding so far
        self.history: list[Event] = []
        #: optimizer steps taken since the attachment
        self.step = 0
        self.process_group = process_group
        self._engine = Engine(
            factorization,
            matrices,
            is_elementwise(inner),
            (lambda matrix: inner.state.get(matrix.parameter, {})) if handover == "warm" else None,
            process_group,
        )
        # Matrices chosen at step 0 get their cores at the first step: by then the model is where it will be trained,
        # wrapped, loaded and the same on all ranks.
        self._pending: list[str] = []
        self._mark_pending(pending)
        self._coupling: Coupling | None = Coupling(
            inner, self._engine, self._before_step, core_lr, core_weight_decay, max_update
        )
        self._staged: dict[str, Any] | None = None
        #: the step of the state that was loaded last
        self._loaded_step = 0
        self._ranks_agree = False
        self._outside = Outside(self._engine, skipped)
        self._handles: list[Any] = [inner.register_state_dict_post_hook(self._save_hook)]
        if type(inner).load_state_dict is torch.optim.Optimizer.load_state_dict:
            self._handles.append(inner.register_load_state_dict_pre_hook(self._stage_hook))
            self._handles.append(inner.register_load_state_dict_post_hook(self._commit_hook))
        else:
            self._handles.append(WrappedLoading(inner, self._stage_hook, self._commit_hook))
        _attached.add(self)

    # -- what is going on ---------------------------------------------------------------------------------------------

    @property
    def expanded(self) -> tuple[str, ...]:
        """Names of the matrices that cores train now, in the order of the model."""
        return tuple(name for name, matrix in self.matrices.items() if matrix.expanded)

    @property
    def lora_parameters(self) -> int:
        """Numbers in all LoRA matrices that can be expanded."""
        return sum(matrix.parameter.numel() for matrix in self.matrices.values())

    @property
    def trained_parameters(self) -> int:
        """Numbers that are trained now: cores in place of expanded matrices."""
        return sum(
            self.factorization.num_parameters(matrix.shape) if matrix.expanded else matrix.parameter.numel()
            for matrix in self.matrices.values()
        )

    @property
    def attached(self) -> bool:
        """Whether the optimizer still trains through this object."""
        return self._coupling is not None

    def core_rate(self) -> float | None:
        """Learning rate of the cores in the last step (of the first that were expanded, where groups differ); None before
        any."""
        rate = None if self._coupling is None else self._coupling.core_rate
        return None if rate is None else float(rate)

    def update_norms(self) -> dict[str, float]:
        """Frobenius norm of the last update of every expanded matrix (one host synchronisation)."""
        norms = self._engine.update_norms
        if not norms:
            return {}
        device = next(iter(norms.values())).device
        values = torch.stack([norm.to(device) for norm in norms.values()]).tolist()
        return dict(zip(norms, values, strict=True))

    # -- ending it ----------------------------------------------------------------------------------------------------

    def fold(self, names: Iterable[str] | None = None) -> FoldReport:
        """Drop the cores. The matrices, which hold what the cores fold to already, are never written.

        Args:
            names: only these matrices, and go on; None for all, which ends the training through cores.

        Raises:
            ValueError: a name that is not expanded.
            RuntimeError: everything has been folded before.
        """
        if self._coupling is None:
            raise RuntimeError(
                "this LoraOver is folded or detached already; the model is plain LoRA: save it, or attach anew"
            )
        self._coupling.recover()
        chosen = list(self.expanded if names is None else names)
        unknown = [name for name in chosen if name not in self.matrices or not self.matrices[name].expanded]
        if unknown:
            raise ValueError(f"cannot fold {', '.join(unknown[:5])}: not expanded; expanded are {shown(self.expanded)}")
        self._warn_changed()
        trained = self.trained_parameters
        self._fold_now(chosen)
        report = FoldReport(self.step, tuple(chosen), self.lora_parameters, trained, tuple(self.history))
        if names is None:
            self.detach()
        return report

    def detach(self) -> None:
        """Take the hooks off: the optimizer trains plain LoRA matrices from now on. The cores stay readable through
        `state_dict()`; the matrices keep their values. Detaching twice does nothing."""
        if self._coupling is None:
            return
        # what the optimizer knows of expanded matrices is from before their expansion
        self._coupling.forget([matrix for matrix in self.matrices.values() if matrix.expanded])
        self._coupling.remove()
        self._coupling = None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._engine.close()
        _attached.discard(self)

    def recover(self) -> None:
        """Take the cores back after a step that died inside the optimizer, so that its groups are the user's own again.
        The next step, `state_dict` and `fold` do it too."""
        if self._coupling is not None:
            self._coupling.recover()

    def __deepcopy__(self, memo: Any) -> LoraOver:
        raise TypeError(
            "a LoraOver cannot be copied: it belongs to one optimizer. Attach a new one to the copied model and its optimizer, "
            "and give it this one's state_dict()"
        )

    def __reduce__(self) -> Any:
        raise TypeError("a LoraOver cannot be pickled: save its state_dict(), or that of the optimizer, which has it")

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: tensors and plain containers, so `torch.load(weights_only=True)` reads it.

        It rides in `optimizer.state_dict()` too, under the key "tnadapt": attach first and load afterwards, since an
        optimizer without `LoraOver` drops what it does not know. Tensors are references, as in torch's own.
        """
        if self._coupling is not None:
            self._coupling.recover()
        return {
            "version": _STATE_VERSION,
            "factorization": self.factorization.label,
            "step": self.step,
            "pending": list(self._pending),
            "expanded": list(self.expanded),
            "engine": self._engine.state_dict(),
            "scheduler": {
                "label": type(self.scheduler).__name__,
                "settings": self.scheduler.label,
                "state": self.scheduler.state_dict(),
            },
            "history": [{"step": e.step, "action": e.action, "names": list(e.names)} for e in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave. Load the adapter before or after: agreement is checked at the next step.

        Raises:
            ValueError: the state is damaged, or of another model, factorization or scheduler; nothing has changed then.
        """
        if self._coupling is None:
            raise RuntimeError("this LoraOver is folded or detached; attach a new one and load the state into that")
        self._validate(state)
        self._load(state)

    def _load(self, state: Mapping[str, Any]) -> None:
        """Replace everything by a validated state."""
        assert self._coupling is not None
        before = self.scheduler.state_dict()
        self.scheduler.load_state_dict(state["scheduler"]["state"])
        try:
            self._engine.load_state(state["engine"], self._coupling.group_of)
        except BaseException:
            self.scheduler.load_state_dict(before)
            raise
        self._ranks_agree = False
        self._coupling.reset_checks()
        if state["scheduler"]["settings"] != self.scheduler.label:
            warnings.warn(
                f"the state was saved with {state['scheduler']['settings']}, this run has {self.scheduler.label}: what is "
                "expanded already stays, and the rest follows the new settings",
                stacklevel=3,
            )
        self.step = self._loaded_step = int(state["step"])
        self._pending = list(state["pending"])
        for name in self._pending:
            self.matrices[name].expanded = True
        self.history = [Event(e["step"], e["action"], tuple(e["names"])) for e in state["history"]]

    def _validate(self, state: Mapping[str, Any]) -> None:
        wanted = {"version", "factorization", "step", "pending", "expanded", "engine", "scheduler", "history"}
        if not isinstance(state, Mapping) or wanted - set(state):
            missing = sorted(wanted - set(state)) if isinstance(state, Mapping) else ["everything"]
            raise ValueError(
                f"the state lacks {', '.join(missing)}; it is damaged, or was not made by LoraOver.state_dict()"
            )
        if state["version"] != _STATE_VERSION:
            raise ValueError(
                f"the state has format version {state['version']}, this tnadapt reads {_STATE_VERSION}; "
                "resume with the version that saved it"
            )
        try:
            self._validate_parts(state)
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"the state is damaged ({type(error).__name__}: {error}); resume from an earlier checkpoint"
            ) from error

    def _validate_parts(self, state: Mapping[str, Any]) -> None:
        kind = type(self.scheduler).__name__
        if state["scheduler"]["label"] != kind:
            raise ValueError(
                f"the state was saved with the scheduler {state['scheduler']['label']}, this run has {kind}; use the same"
            )
        if state["factorization"] != self.factorization.label:
            raise ValueError(
                f"the state was saved with {state['factorization']}, this run has {self.factorization.label}; resume with "
                "the factorization of the run that was saved"
            )
        if isinstance(state["step"], bool) or not isinstance(state["step"], int):
            raise TypeError(f"step is {state['step']!r}")
        for event in state["history"]:
            Event(event["step"], event["action"], tuple(event["names"]))
        strangers = [name for name in state["pending"] if name not in self.matrices]
        if strangers:
            raise ValueError(
                f"the state names {shown(strangers)}, which this model has not; load it into its own model"
            )
        self._engine.validate_state(state["engine"])
        if set(state["expanded"]) != {*state["engine"]["members"], *state["pending"]}:
            raise ValueError(
                "the state has lost cores: it was read into a LoraOver that had not expanded the same matrices, as "
                "torch.distributed.checkpoint does. Save and load tnadapt.integrations.distributed.Checkpointed(over) instead"
            )
        # only the scheduler knows what it takes: let it load, and put back what it had
        before = self.scheduler.state_dict()
        try:
            self.scheduler.load_state_dict(state["scheduler"]["state"])
        finally:
            self.scheduler.load_state_dict(before)

    def _save_hook(self, _: Any, optimizer_state: dict[str, Any]) -> dict[str, Any]:
        if self._coupling is not None:
            self._coupling.fill_missing(optimizer_state)
        return {**optimizer_state, STATE_KEY: self.state_dict()}

    def _stage_hook(self, _: Any, optimizer_state: dict[str, Any]) -> dict[str, Any]:
        """Validate ours before torch replaces anything; ours is replaced after torch has validated its own."""
        rest = dict(optimizer_state)
        self._staged = rest.pop(STATE_KEY, None)
        if self._staged is not None:
            self._validate(self._staged)
        elif self.step != self._loaded_step:  # where they are equal, ours has just been read from elsewhere
            warnings.warn(
                "the optimizer state that is being loaded has no tnadapt part (it was saved without LoraOver): the cores "
                "stay as they are, and are unfolded anew where the matrices have changed",
                stacklevel=3,
            )
        return rest

    def _commit_hook(self, _: Any) -> None:
        staged, self._staged = self._staged, None
        if staged is not None:
            self._load(staged)

    # -- the decisions of a step --------------------------------------------------------------------------------------

    def _before_step(self) -> Callable[[], None]:
        """Observe, release, select and unfold for the coming step; returns how to undo all of it."""
        assert self._coupling is not None
        step = self.step + 1
        engine_before, scheduler_before = self._engine.snapshot(), self.scheduler.state_dict()
        pending, history, count = list(self._pending), list(self.history), self.step
        coupling = self._coupling
        known = coupling.known(self.matrices.values())

        def undo() -> None:
            coupling.restore_known(known)
            self._engine.restore(engine_before)
            self._mark_pending(pending)
            self.history, self.step = history, count
            self.scheduler.load_state_dict(scheduler_before)

        try:
            if not self._ranks_agree and is_distributed(self.process_group):
                self._require_agreement()
            self._follow_outside_changes(step)
            self._outside.warn_of_switches(self.matrices.values(), coupling.holds)
            if self._pending:
                names, self._pending = self._pending, []
                self._engine.expand(names, self._coupling.group_of)
            self.scheduler.observe(step, self.matrices)
            if self.scheduler.due(step):
                self._decide(step)
            self.step = step
        except BaseException:
            undo()
            raise
        return undo

    def _decide(self, step: int) -> None:
        assert self._coupling is not None
        released, chosen = self._choose(step)
        strangers = [name for name in released if name not in self.matrices or not self.matrices[name].expanded]
        if strangers:
            raise ValueError(f"{self.scheduler.label} released {shown(strangers)}, which is not expanded")
        if released:
            self._fold_now(released, step)
        names = _checked_names(chosen, self.matrices, self.scheduler)
        if names:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("cannot expand while a CUDA graph is captured; capture after the last expansion")
            self._engine.expand(names, self._coupling.group_of)
            self.history = [*self.history, Event(step, "expand", tuple(names))]

    def _choose(self, step: int) -> tuple[list[str], list[str]]:
        """What the scheduler releases and selects: on all ranks what the first one does, and an error where any fails."""
        if not is_distributed(self.process_group):
            released = list(self.scheduler.release(step, self.matrices))
            return released, list(self.scheduler.select(step, self.matrices))
        choice: tuple[list[str], list[str]] = ([], [])
        failure: Exception | None = None
        try:
            released = list(self.scheduler.release(step, self.matrices))
            choice = (released, list(self.scheduler.select(step, self.matrices)))
        except Exception as error:
            failure = error
        outcomes = gather_objects((choice, None if failure is None else repr(failure)), self.process_group)
        if failure is not None:
            raise failure
        for rank, (_, problem) in enumerate(outcomes):
            if problem is not None:
                raise RuntimeError(f"{self.scheduler.label} failed on rank {rank} at step {step}: {problem}")
        return outcomes[0][0]  # type: ignore[no-any-return]

    def _require_agreement(self) -> None:
        """Raise on every rank where ranks do not train the same matrices in the same way from the same state."""
        matrices = [(name, tuple(m.shape), str(m.parameter.dtype)) for name, m in self.matrices.items()]
        cores = [float(value) for value in self._engine.fingerprint()]
        facts: dict[str, Any] = {
            "matrices": matrices,
            "the factorization": self.factorization.label,
            "the scheduler": self.scheduler.label,
            "steps taken": self.step,
            "expanded matrices": self.expanded,
            "the values of the cores": cores,
        }
        ranks = gather_objects(facts, self.process_group)
        for what, first in ranks[0].items():
            for rank, others in enumerate(ranks):
                if others[what] == first:
                    continue
                where = _first_difference(first, others[what])
                raise RuntimeError(
                    f"ranks 0 and {rank} differ in {what}: {where}. All ranks of process_group must attach LoraOver to the "
                    "same model in the same way, and load its state on every rank; where ranks train different models or "
                    "parts of one (pipelines, several jobs in one world), give each the ranks that train the same matrices "
                    "as process_group="
                )
        self._ranks_agree = True

    def _fold_now(self, names: list[str], step: int | None = None) -> None:
        """Drop cores. What the optimizer knew of the matrices is from before their expansion: they start fresh."""
        if self._coupling is not None:
            self._coupling.forget([self.matrices[name] for name in names])
        self._engine.drop(names)
        self._pending = [name for name in self._pending if name not in set(names)]
        if names:
            self.history = [*self.history, Event(self.step if step is None else step, "fold", tuple(names))]

    def _mark_pending(self, names: list[str]) -> None:
        self._pending = list(names)
        for name in names:
            self.matrices[name].expanded = True
        if names and not self.history:
            self.history = [Event(0, "expand", tuple(names))]

    # -- matrices changed by others -----------------------------------------------------------------------------------

    def _follow_outside_changes(self, step: int) -> None:
        """Unfold anew what somebody else wrote (a loaded adapter, a hand edit)."""
        assert self._coupling is not None
        names = self._outside.changed(step)
        if names:
            warnings.warn(
                f"{shown(names)} changed outside the optimizer (a loaded adapter, a hand edit); unfolding anew, with "
                "fresh optimizer state for the cores",
                stacklevel=2,
            )
            # what the optimizer knows of them is from before their first expansion
            self._coupling.forget([self.matrices[name] for name in names])
            self._engine.drop(names)
            self._engine.expand(names, self._coupling.group_of)

    def changed_outside(self) -> tuple[str, ...]:
        """Names of expanded matrices that hold something else than what their cores fold to, because somebody wrote them
        (`load_best_model_at_end`, a hand edit). Waits for the device."""
        return self._outside.changed_now()

    def _warn_changed(self) -> None:
        changed = self.changed_outside()
        if changed:
            warnings.warn(
                f"{shown(changed)} changed outside the optimizer since the last step (load_best_model_at_end does that); "
                "the model keeps these values, not those of the cores",
                stacklevel=3,
            )


def _require_unattached(matrices: Mapping[str, LoraMatrix], optimizer: torch.optim.Optimizer) -> None:
    if _find_attached(matrices, optimizer):
        gc.collect()  # hooks make a cycle: one whose optimizer is gone may still be waiting for the collector
        if _find_attached(matrices, optimizer):
            raise ValueError(
                "a LoraOver is attached to these LoRA matrices, or to this optimizer, already; call its fold() or detach() "
                "before attaching another, and give each of several models an optimizer of its own"
            )


def _find_attached(matrices: Mapping[str, LoraMatrix], optimizer: torch.optim.Optimizer) -> bool:
    mine = {id(matrix.parameter) for matrix in matrices.values()}
    return any(
        other.optimizer is optimizer or mine & {id(matrix.parameter) for matrix in other.matrices.values()}
        for other in _attached
    )


def _first_difference(one: Any, other: Any) -> str:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        for a, b in zip_longest(one, other, fillvalue="nothing"):
            if a != b:
                return f"{a} and {b}"
    return f"{one} and {other}"


def _checked_names(chosen: Iterable[str], matrices: Mapping[str, LoraMatrix], scheduler: Scheduler) -> list[str]:
    names = list(dict.fromkeys(chosen))
    strangers = [name for name in names if name not in matrices]
    if strangers:
        raise ValueError(f"{scheduler.label} selected {shown(strangers)}, which is not among {shown(list(matrices))}")
    again = [name for name in names if matrices[name].expanded]
    if again:
        raise ValueError(f"{scheduler.label} selected {shown(again)}, which is expanded already")
    return names
