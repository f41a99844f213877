"""`LoraOver`: the matrices of a model, a factorization, a scheduler and an optimizer, put together."""

from __future__ import annotations

import gc
import json
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tnadapt import state as states
from tnadapt.assignment import FactorizationArgument, assign_factorizations, describe_factorizations
from tnadapt.engine import (
    HANDOVERS,
    CoreRates,
    Event,
    Expanded,
    OwnMethods,
    Roster,
    Step,
    check_factorization,
    check_matrices,
    check_model,
    check_rates,
    check_scheduler,
    check_switches,
    checked_choice,
    checked_names,
    is_elementwise,
    plain_number,
    ranks,
    shown,
    unwrap,
)
from tnadapt.factorizations import Factorization
from tnadapt.finders import Finder, collect
from tnadapt.matrices import TrainedMatrix
from tnadapt.schedulers import Scheduler, Static

__all__ = ["STATE_KEY", "Event", "FoldReport", "LoraOver"]

STATE_KEY = states.STATE_KEY

_attached: weakref.WeakSet[LoraOver] = weakref.WeakSet()


@dataclass(frozen=True)
class FoldReport:
    """What `LoraOver.fold()` ended.

    Attributes:
        steps: optimizer steps that were taken.
        folded: matrices that were expanded until now.
        lora_parameters: numbers in all matrices that can be expanded, which is what the model keeps.
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
            f"folded {len(self.folded)} matrices after {self.steps} steps: their cores are gone. The "
            f"matrices have {self.lora_parameters:,} parameters; {self.trained_parameters:,} were trained ({ratio:.2f}x)"
        )


class LoraOver:
    """Trains LoRA matrices through tensor-network cores, inside the optimizer that the user already has.

    The model stays plain LoRA: its parameters are the same objects before, during and after. When the optimizer steps,
    gradients of expanded matrices are pulled back to their cores, the cores are stepped by the same optimizer, and the
    matrices are refolded in place.

    Memory above plain LoRA, for the matrices that are expanded: cores, their optimizer state, max(core gradients, kept
    prefixes), a copy of the matrices, and the scratch of the largest cohort (its matrices twice, and beyond order 2 two squares
    of the largest bond for each of them); less the optimizer state that plain LoRA would have of these matrices. Gradients
    and prefixes share one memory, which stays between steps. `matched` and `max_update` need the cores twice more. Cohorts of
    at most 512 KiB have their gradients twice, and those that are stepped apart (experts) share a bench, which has copies of their
    cores and gradients.

    Args:
        model: any model with LoRA pairs on linear layers (PEFT, `OverParamAdapter`, or one's own `lora_A`/`lora_B`).
        optimizer: the torch optimizer that holds the LoRA parameters; accelerate's and Lightning's wrappers are unwrapped.
        factorization: `MPO(...)`, `SVD()`, …; or a mapping from groups or patterns of names to factorizations, of which the first
            that fits a matrix counts; or a function of the matrix. A matrix that gets none from it takes that of its adapter
            (see `OverParamAdapter`).
        scheduler: what to expand and when; every matrix from step 0 by default.
        core_lr: learning rate of the cores while their matrices are at the base rate; it follows schedules, warm-up and ratios
            between groups in proportion. The base rate is that of the first optimizer group that holds matrices: the peak or
            initial rate that a schedule has written there, or else the rate at the attachment. None: the matrices' rate.
        core_weight_decay: weight decay of the cores, None for the matrix's. Decay compounds over the cores of a matrix:
            one step shrinks the matrix as many times as it has cores.
        handover: whether the cores of a matrix that is expanded in mid-run take over its optimizer state. `"warm"` pulls
            its moments back to them, which keeps the trajectory smooth. `"restart"` begins with fresh moments.
        max_update: cap on how far a matrix moves in one step: the root mean square of its update is at most
            `max_update` times the rate of its cores. (In plain LoRA, Adam moves an entry by at most about one rate.) The
            step of the cores is shortened until the update ends at the cap. None for no cap.
        matrices: a finder of the parameters to train through cores, see `tnadapt.finders`; None for LoRA pairs.
        matched: scale each step of the cores so that the matrix moves exactly as far as the optimizer would have moved it as a
            plain matrix. The optimizer steps the matrix as well, and the refold overwrites that step. Depth then changes the
            direction of a step and not its size, so rates carry over from plain LoRA and between orders.
        groups: gives a matrix the group it is ranked in, see `default_group`.
        process_group: ranks that train the same matrices; None for all.
        shard: deal the cores out over these ranks: each expanded matrix has an owner that alone holds, steps and refolds its
            cores, and sends the refolded matrix in every step. Memory for cores falls as one over the ranks. `consolidate()`
            then comes before `state_dict()`; on one rank it changes nothing.
        replace: whether to detach a `LoraOver` that is attached to these matrices, or to this optimizer, already.

    Raises:
        TypeError: an argument of a wrong type, or an optimizer that cannot train cores.
        ValueError: no LoRA matrices, an optimizer that does not hold them, a factorization that does not fit a shape, a
            scheduler that names what is not there, or something is attached already. Nothing has changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        factorization: FactorizationArgument = None,
        scheduler: Scheduler | None = None,
        *,
        core_lr: float | None = None,
        core_weight_decay: float | None = None,
        handover: str = "warm",
        max_update: float | None = None,
        matrices: Finder | None = None,
        matched: bool = False,
        groups: Callable[[TrainedMatrix], str] | None = None,
        process_group: Any = None,
        shard: bool = False,
        replace: bool = False,
    ) -> None:
        scheduler = Static() if scheduler is None else scheduler
        check_model(model)
        check_factorization(factorization)
        check_scheduler(scheduler)
        check_switches(matched=matched, shard=shard, replace=replace)
        core_lr = plain_number("core_lr", core_lr)
        core_weight_decay = plain_number("core_weight_decay", core_weight_decay)
        max_update = plain_number("max_update", max_update)
        inner = unwrap(optimizer)
        if handover not in HANDOVERS:
            raise ValueError(f"handover={handover!r} is unknown; choose one of {', '.join(HANDOVERS)}")
        found, skipped = collect(model, matrices, groups)
        mine = {id(matrix.parameter) for matrix in found.values()}
        others = _find_attached(
            lambda other: other.optimizer is inner or any(id(m.parameter) in mine for m in other.matrices.values())
        )
        for other in others:
            # one whose step died inside the optimizer has its cores there still
            other.recover()
        check_matrices(model, found, skipped, inner)
        if others and not replace:
            raise ValueError(
                "a LoraOver is attached to these matrices, or to this optimizer, already; call its fold() or detach() "
                "before attaching another (LoraOver.of(model) finds it), or pass replace=True; give each of several models an "
                "optimizer of its own"
            )
        check_rates(inner, core_lr, core_weight_decay, max_update, matched)
        assign_factorizations(found, factorization)
        if scheduler.state_dict() and _find_attached(lambda o: o.scheduler is scheduler and o not in others):
            raise ValueError(
                f"{scheduler.label} decides for a LoraOver that is attached to another optimizer; what it has seen there would be "
                "mixed with what it sees here: make a new one for each, or detach() that LoraOver first"
            )
        scheduler.attach(found)
        chosen = checked_names(scheduler.select(0, found), f"what {scheduler.label} selected")
        chosen = checked_choice(chosen, found, scheduler)
        for other in others:
            other.detach()
        left_out = [s for s in skipped if s.is_left_out]
        if left_out:
            warnings.warn(
                f"{shown(s.name for s in left_out)}: left as plain LoRA, since {left_out[0].reason}", stacklevel=2
            )

        self.optimizer = inner
        self.factorization = factorization
        self.scheduler = scheduler
        self.matrices = found
        #: LoRA weights that are not candidates, with the reason
        self.skipped = skipped
        self.handover = handover
        self._functions = [name for name, given in (("groups", groups), ("matrices", matrices)) if given is not None]
        self.process_group = process_group
        self.rates = CoreRates(core_lr, core_weight_decay, max_update, matched)
        self._expanded = Expanded(found, inner, is_elementwise(inner), handover == "warm", process_group, shard)
        self._expanded.wait(chosen, 0)
        self._step: Step | None = Step(inner, self._expanded, scheduler, self.rates, skipped)
        self._staged: dict[str, Any] | None = None
        #: what was expanded when `consolidate` ran last, and the cores of all ranks
        self._consolidated: tuple[Roster, dict[str, Any]] | None = None
        #: the step of the state that was loaded last
        self._loaded_step = 0
        # the mark of a checkpoint of a LoraOver, which the optimizer read while none was attached
        marks = [group.pop(STATE_KEY, None) for group in inner.param_groups]
        self._step.missed = any(marks)
        self._handles: list[Any] = [inner.register_state_dict_post_hook(self._save_hook)]
        if type(inner).load_state_dict is torch.optim.Optimizer.load_state_dict:
            self._handles.append(inner.register_load_state_dict_pre_hook(self._stage_hook))
            self._handles.append(inner.register_load_state_dict_post_hook(self._commit_hook))
        else:
            self._handles.append(_WrappedLoading(inner, self._stage_hook, self._commit_hook))
        inner.__deepcopy__ = _refuse_copy  # type: ignore[attr-defined]
        _attached.add(self)

    @staticmethod
    def of(model: nn.Module) -> LoraOver | None:
        """The `LoraOver` that is attached to matrices of `model`, None where there is none."""
        check_model(model)
        mine = {id(module) for module in model.modules()}
        found = (o for o in _attached if any(id(m.owner) in mine for m in o.matrices.values()))
        return next(found, None)

    @classmethod
    def from_config(
        cls, model: nn.Module, optimizer: Any, config: Mapping[str, Any] | str | Path, **options: Any
    ) -> LoraOver:
        """Attach with the settings of another run.

        Args:
            config: what `config()` gave, or a `tnadapt.json`, or the folder of an adapter that has one.
            options: further arguments of `LoraOver`, which go before those of the other run.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not the settings of a run, or some that cannot be rebuilt and are not among `options`.
        """
        if not isinstance(config, Mapping):
            file = Path(config)
            file = file / "tnadapt.json" if file.is_dir() else file
            read: Any = json.loads(file.read_text(encoding="utf-8"))
        else:
            read = config
        inner = read.get("config", read) if isinstance(read, Mapping) else read
        if not isinstance(inner, Mapping):
            raise ValueError(
                f"the config is a {type(inner).__name__} and no mapping; give what config() gave, or a tnadapt.json"
            )
        settings = dict(inner)
        custom = [name for name in settings.pop("functions", []) if name not in options]
        if custom:
            raise ValueError(
                f"{shown(custom)} was a function of the other run, which a file cannot keep: pass it to from_config"
            )
        missing = [name for name in ("factorization", "scheduler") if name not in settings]
        if missing:
            raise ValueError(
                f"the config has no {' and no '.join(missing)}; give what config() gave, or a tnadapt.json"
            )
        chosen, scheduler = settings.pop("factorization"), settings.pop("scheduler")
        if "factorization" not in options:
            one = "type" in chosen
            rebuilt = {name: Factorization.from_dict(entry) for name, entry in ({} if one else chosen).items()}
            options["factorization"] = (
                Factorization.from_dict(chosen) if one else lambda matrix: rebuilt.get(matrix.name)
            )
        if "scheduler" not in options:
            options["scheduler"] = Scheduler.from_dict(scheduler)
        return cls(model, optimizer, **{**settings, **options})

    def config(self) -> dict[str, Any]:
        """Every setting, as JSON data; `from_config` attaches another model with them."""
        used = {m.name: m.factorization.to_dict() for m in self.matrices.values() if m.factorization is not None}
        alike = len({json.dumps(entry, sort_keys=True) for entry in used.values()}) == 1
        return {
            "factorization": next(iter(used.values())) if alike else used,
            "scheduler": self.scheduler.to_dict(),
            "core_lr": self.rates.lr,
            "core_weight_decay": self.rates.weight_decay,
            "max_update": self.rates.max_update,
            "matched": self.rates.matched,
            "handover": self.handover,
            "shard": self._expanded.shard,
            "functions": list(self._functions),
        }

    # -- what is going on ---------------------------------------------------------------------------------------------

    @property
    def expanded(self) -> tuple[str, ...]:
        """Names of the matrices that cores train now, in the order of the model."""
        names = self._expanded.now.names
        return tuple(name for name in self.matrices if name in names)

    @property
    def step(self) -> int:
        """Optimizer steps taken since the attachment."""
        return self._expanded.now.step

    @property
    def history(self) -> list[Event]:
        """Every expansion and folding so far."""
        return list(self._expanded.now.history)

    @property
    def lora_parameters(self) -> int:
        """Numbers in all matrices that can be expanded."""
        return sum(matrix.parameter.numel() for matrix in self.matrices.values())

    @property
    def trained_parameters(self) -> int:
        """Numbers that are trained now: cores in place of expanded matrices."""
        return self.lora_parameters + sum(self.matrices[name].added_parameters for name in self.expanded)

    @property
    def attached(self) -> bool:
        """Whether the optimizer still trains through this object."""
        return self._step is not None

    def core_rate(self) -> float | None:
        """Learning rate of the cores in the last step; None before any. If groups differ, it is that of the first cohort."""
        rate = None if self._step is None else self._step.core_rate
        return None if rate is None else float(rate)

    def update_norms(self) -> dict[str, float]:
        """Frobenius norm of the last update of every expanded matrix whose cores this rank holds (one host synchronisation for
        each device)."""
        norms: dict[str, float] = {}
        for cohort in self._expanded.now.cohorts:
            if cohort.update_norms is not None:
                norms.update(zip((m.name for m in cohort.matrices), cohort.update_norms.tolist(), strict=True))
        return norms

    @torch.no_grad()
    def changed_outside(self) -> tuple[str, ...]:
        """Names of expanded matrices that differ from what their cores fold to, because other code wrote them
        (`load_best_model_at_end`, a hand edit). Waits for the device."""
        return tuple(self._expanded.edited())

    def __repr__(self) -> str:
        how = f"{len(self.expanded)} of {len(self.matrices)} matrices expanded" if self.attached else "folded"
        return f"LoraOver({describe_factorizations(self.matrices)}, {self.scheduler.label}; step {self.step}, {how})"

    # -- ending it ----------------------------------------------------------------------------------------------------

    def fold(self, names: Iterable[str] | None = None) -> FoldReport:
        """Drop the cores. No matrix is written: each holds already what its cores fold to. Folding everything a second time
        does nothing.

        Warns where the method never ran: the optimizer was never stepped, or nothing was ever expanded.

        Args:
            names: the matrices to fold; training through the other cores goes on. None for all, which ends it.

        Raises:
            TypeError: something else than names.
            ValueError: a name that is not expanded.
        """
        if self._step is not None:
            self._step.recover()
        chosen = list(self.expanded) if names is None else checked_names(names, "names")
        unknown = [name for name in chosen if name not in self.expanded]
        if unknown:
            raise ValueError(f"cannot fold {', '.join(unknown[:5])}: not expanded; expanded are {shown(self.expanded)}")
        trained = self.trained_parameters
        if self._step is not None:
            changed = self.changed_outside()
            if changed:
                warnings.warn(
                    f"{shown(changed)} changed outside the optimizer since the last step (load_best_model_at_end does that); "
                    "the model keeps these values, not those of the cores",
                    stacklevel=2,
                )
            if names is None and (idle := self._why_idle()):
                warnings.warn(idle, stacklevel=2)
            # what the optimizer knows of matrices with cores is from before their expansion: they start fresh
            self._step.forget(name for name in chosen if name not in self._expanded.now.waiting)
        self._expanded.drop(chosen)
        if chosen:
            self._expanded.record(self.step, "fold", chosen)
        report = FoldReport(self.step, tuple(chosen), self.lora_parameters, trained, tuple(self.history))
        if names is None:
            self.detach()
        return report

    def _why_idle(self) -> str | None:
        """Why nothing was trained through cores, where that is so."""
        if self.step == self._loaded_step and (self._step is None or self._step.stepped == 0):
            return (
                f"nothing was trained: the {type(self.optimizer).__name__} that LoraOver is attached to never took a step with "
                "gradients of its matrices. Step this one (a trainer may have made an optimizer of its own: give it this one, or "
                "use LoraOverCallback)"
            )
        if not self.history:
            return (
                f"nothing was expanded in {self.step} steps: {self.scheduler.label} chose no matrix, so nothing was trained through cores. Its "
                "first round must come within the run"
            )
        return None

    def detach(self) -> None:
        """Take the hooks off: from now on the optimizer trains the matrices themselves. The cores stay readable through
        `state_dict()`; the matrices keep their values. Detaching twice does nothing."""
        if self._step is None:
            return
        # what the optimizer knows of matrices with cores is from before their expansion
        self._step.forget(matrix.name for matrix in self._expanded.now.trained)
        self._step.remove()
        self._step = None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        vars(self.optimizer).pop("__deepcopy__", None)
        for cohort in self._expanded.now.cohorts:
            cohort.stack.close()
        _attached.discard(self)

    def recover(self) -> None:
        """Take the cores back after a step that died inside the optimizer, so that its groups are the user's own again.
        The next step, `state_dict`, `load_state_dict` and `fold` do it too."""
        if self._step is not None:
            self._step.recover()

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

        It is also part of `optimizer.state_dict()`, under the key "tnadapt". Attach first and load afterwards: an optimizer
        without `LoraOver` drops what it does not know. Tensors are references, as in torch's own state dicts.

        Raises:
            RuntimeError: cores are dealt out over ranks, and `consolidate()` has not run since the last step.
        """
        self.recover()
        cores = self._cores()
        if cores is None:
            raise RuntimeError(
                f"the cores are dealt out over {ranks.position(self.process_group)[1]} ranks, and state_dict() asks no other rank: "
                "call consolidate() on every rank after the step, then state_dict() where it is saved (LoraOverCallback does it "
                "before Trainer saves)"
            )
        return states.saved(self._expanded, self.scheduler, self.rates, cores)

    def _cores(self) -> dict[str, Any] | None:
        """The cores of all ranks; None if they were not brought together since the last step."""
        if not self._expanded.now.owners:
            return self._expanded.state_dict()
        if self._consolidated is None or self._consolidated[0] is not self._expanded.now:
            return None
        return self._consolidated[1]

    def consolidate(self, to: int | None = None) -> None:
        """Bring the cores of all ranks together in the memory of the CPU, so that `state_dict()` has them until the next step.
        Each rank must call it, between steps. It does nothing where every rank holds all cores.

        Args:
            to: the rank that saves; None for all. Others get a state that cannot be loaded.

        Raises:
            ValueError: there is no rank `to`; on every rank, before anything is sent.
        """
        self.recover()
        here, count = ranks.position(self.process_group)
        if to is not None and to not in range(count):
            raise ValueError(f"to={to!r}: give a rank from 0 to {count - 1}, or None for all")
        if self._expanded.now.owners:
            self._consolidated = self._expanded.now, self._expanded.collected(to is None or to == here)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave. Load the adapter before or after: agreement is checked at the next step.

        Raises:
            ValueError: the state is damaged, or of another model, factorization or scheduler; nothing has changed then.
        """
        if self._step is None:
            raise RuntimeError("this LoraOver is folded or detached; attach a new one and load the state into that")
        states.validate(state, self._expanded, self.scheduler)
        self._step.recover()
        self._load(state)

    def _load(self, state: Mapping[str, Any]) -> None:
        assert self._step is not None
        states.load(state, self._expanded, self.scheduler, self.rates)
        self._step.reset()
        self._loaded_step = self.step
        now = {
            "scheduler": self.scheduler.label,
            "core_lr": self.rates.lr,
            "core_weight_decay": self.rates.weight_decay,
            "max_update": self.rates.max_update,
            "matched": self.rates.matched,
            "handover": self.handover,
        }
        saved = {**state, **state["rates"], "scheduler": state["scheduler"]["settings"]}
        others = [what for what, value in now.items() if saved.get(what, value) != value]
        if others:
            warnings.warn(
                f"the state was saved with {', '.join(f'{what} {saved[what]}' for what in others)}, this run has "
                f"{', '.join(f'{what} {now[what]}' for what in others)}: what is expanded already stays, and the rest follows the "
                "new settings",
                stacklevel=3,
            )
        under_one_label = states.other_settings(state, self._expanded, self.scheduler)
        if under_one_label:
            warnings.warn(
                f"the settings of {' and of '.join(under_one_label)} are not those of the run that was saved: what is expanded already "
                "stays, and the rest follows the new settings",
                stacklevel=3,
            )

    def _save_hook(self, _: Any, optimizer_state: dict[str, Any]) -> dict[str, Any]:
        if self._step is not None:
            self._step.fill_missing(optimizer_state)
        groups = [dict(group) for group in optimizer_state["param_groups"]]
        # ranks, and whoever reads what DCP has written, want the same keys
        by_dcp = _asked_by_dcp()
        if by_dcp and self._cores() is None:
            return optimizer_state  # DCP drops what it does not know: the cores are in Checkpointed(over)
        if not by_dcp and not (dist.is_available() and dist.is_initialized()):
            # an optimizer without LoraOver drops what it does not know, but for what is in groups
            groups[0][STATE_KEY] = True
        return {**optimizer_state, "param_groups": groups, STATE_KEY: self.state_dict()}

    def _stage_hook(self, _: Any, optimizer_state: dict[str, Any]) -> dict[str, Any]:
        """Validate ours before torch replaces anything; ours is replaced after torch has validated its own."""
        self.recover()
        rest = dict(optimizer_state)
        self._staged = rest.pop(STATE_KEY, None)
        marked = any(STATE_KEY in group for group in rest["param_groups"])
        rest["param_groups"] = [
            {key: value for key, value in group.items() if key != STATE_KEY} for group in rest["param_groups"]
        ]
        if self._staged is not None:
            states.validate(self._staged, self._expanded, self.scheduler)
        elif self.step != self._loaded_step:  # over.load_state_dict() has run already where they are equal
            warnings.warn(
                "the optimizer state that is being loaded has no tnadapt part (it was saved without LoraOver): the cores "
                "stay as they are, and are unfolded anew where the matrices have changed",
                stacklevel=3,
            )
        elif self.step == 0 and marked and rest["state"]:
            warnings.warn(
                "the optimizer state that is being loaded was saved with LoraOver, but its tnadapt part has been taken out: give that to "
                "over.load_state_dict(), or training goes on from fresh cores",
                stacklevel=3,
            )
        return rest

    def _commit_hook(self, _: Any) -> None:
        staged, self._staged = self._staged, None
        if staged is not None:
            self._load(staged)


class _WrappedLoading:
    """The loading hooks of an optimizer whose class loads in its own way and may not call torch's hooks (bitsandbytes)."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        before: Callable[[Any, dict[str, Any]], dict[str, Any]],
        after: Callable[[Any], None],
    ) -> None:
        self._methods = OwnMethods(optimizer, "load_state_dict")
        original = optimizer.load_state_dict

        def load_state_dict(state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            original(before(optimizer, state_dict), *args, **kwargs)
            after(optimizer)

        optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the optimizer its own method back."""
        self._methods.restore()


def _asked_by_dcp() -> bool:
    """Whether torch.distributed.checkpoint is asking for a state."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch.distributed.checkpoint"):
            return True
        frame = frame.f_back
    return False


def _refuse_copy(memo: Any) -> Any:
    raise TypeError(
        "this optimizer trains matrices through the cores of a LoraOver, and a copy of it would train them without cores: copy the model, "
        "make an optimizer of the copy's parameters, attach a LoraOver to both, and load this optimizer's state_dict()"
    )


def _find_attached(wanted: Callable[[LoraOver], bool]) -> list[LoraOver]:
    """Those among the attached that are wanted."""
    if any(map(wanted, _attached)):
        gc.collect()  # hooks make a cycle: one whose optimizer is gone may still be waiting for the collector
    return [other for other in _attached if wanted(other)]
