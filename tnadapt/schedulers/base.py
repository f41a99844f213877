"""What to expand and when. A scheduler decides; it moves nothing and changes no matrix."""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from tnadapt.matrices import TrainedMatrix
from tnadapt.registry import Registry, plain

__all__ = ["Scheduler", "by_group", "check_switches", "register_scheduler", "warn_small_groups"]

S = TypeVar("S", bound="type[Scheduler]")


class Scheduler(ABC):
    """Decides which LoRA matrices are expanded at which optimizer step.

    Steps count optimizer steps from 1; step 0 is the attachment, before any training. At each step `observe` comes
    first, with gradients present, then `release`, then `select`. Matrices selected at a step are trained through their
    cores from that very step on, or from the next one where `after_update` is set.

    Laws (`tnadapt.testing.check_scheduler` checks them):

    1. `select` names matrices that are there and not expanded, each once; `release` names expanded ones. One that is released
       may be selected in the same step: its cores are made anew of what it holds.
    2. Nothing is selected before `first_step`. After step 0, both are asked only at steps that are `due`.
    3. Matrices and gradients are only read.
    4. A scheduler that loads the state of another goes on as that one would have; a state is a copy.
    5. Equal schedulers that see the same matrices name the same: ranks must agree.
    6. `from_dict(to_dict())` is a scheduler with the same settings.

    A subclass keeps every argument of its `__init__` as an attribute of the same name, for `repr` and `to_dict`. One whose
    `state_dict` is not empty serves one `LoraOver` at a time.

    Attributes:
        after_update: whether the matrices that are selected at step t are expanded after the update of that step, as in
            Algorithm 2 as it is printed. Otherwise they are expanded before the update of step t, which is then the first
            that goes through their cores.
    """

    after_update: bool = False

    def attach(self, matrices: Mapping[str, TrainedMatrix]) -> None:
        """Check the settings against the matrices of a model; raise ValueError before anything changed."""

    def observe(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> None:
        """Look at the gradients of `step`; do not write to them."""

    @abstractmethod
    def select(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> Iterable[str]:
        """Names of matrices, not yet expanded, to expand now."""

    def release(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> Iterable[str]:
        """Names of expanded matrices to fold back now."""
        return ()

    def due(self, step: int) -> bool:
        """Whether `select` or `release` may name anything at `step`; must be the same on every rank."""
        return True

    def first_step(self) -> int | None:
        """The first step at which anything can be expanded, 0 for the attachment; None where the scheduler cannot tell.
        Callbacks warn of runs that end before it."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: numbers, strings, tensors and plain containers only."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave. Must raise before changing anything where the state does not fit."""

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain JSON data, beside the name of the type: `{"type": "TaylorRuntime", "top_n": 9, ...}`. What
        the scheduler has seen is not among them, see `state_dict`.

        Raises:
            TypeError: a setting is no JSON data; its class then writes its own `to_dict`.
            ValueError: the class is not registered, and its name is that of another one.
        """
        name = _SCHEDULERS.name_of(type(self))
        return {"type": name, **{key: plain(self, key, value) for key, value in _settings(self).items()}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Scheduler:
        """The scheduler that `to_dict` described, new, of a type of this package or a registered one. Settings that are not
        there have their defaults.

        Raises:
            TypeError: `data` is not a mapping, or lacks a setting that has no default.
            ValueError: an unknown type or setting, or settings that mean nothing.
        """
        cls, settings = _SCHEDULERS.read(data)
        _SCHEDULERS.check_settings(cls.__name__, settings, _arguments(cls))
        return cls(**settings)

    def __repr__(self) -> str:
        """The settings that are not the default ones, as they would be written."""
        defaults = {name: parameter.default for name, parameter in _arguments(type(self)).items()}
        shown = [f"{name}={value!r}" for name, value in _settings(self).items() if value != defaults[name]]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def label(self) -> str:
        """Name for tables and messages. A run that is resumed is compared by it, so it has every setting; the name of the class
        alone where settings were not kept as attributes."""
        try:
            return repr(self)
        except TypeError:
            return type(self).__name__


def register_scheduler(cls: S, name: str | None = None) -> S:
    """Make a scheduler known to `Scheduler.from_dict`, by the name of its class or another. Usable as a decorator.

    Raises:
        TypeError: `cls` is not a subclass of `Scheduler`.
        ValueError: the name belongs to another class.
    """
    _SCHEDULERS.add(cls, Scheduler, name)  # type: ignore[type-abstract]
    return cls


#: What `from_dict` knows. `tnadapt.schedulers` registers those of the package.
_SCHEDULERS: Registry[Scheduler] = Registry("scheduler", "register_scheduler")


def _arguments(cls: type[Scheduler]) -> dict[str, inspect.Parameter]:
    """The arguments of `__init__` by name; none where the class has no `__init__` of its own."""
    if cls.__init__ is object.__init__:
        return {}
    return {name: p for name, p in inspect.signature(cls).parameters.items() if p.kind is not p.VAR_KEYWORD}


def _settings(scheduler: Scheduler) -> dict[str, Any]:
    """The value of each argument that the scheduler was made with."""
    names = _arguments(type(scheduler))
    missing = [name for name in names if not hasattr(scheduler, name)]
    if missing:
        raise TypeError(
            f"{type(scheduler).__name__} does not keep its argument {', '.join(missing)} as an attribute of that name, which "
            "repr and to_dict read; add it, or write both"
        )
    return {name: getattr(scheduler, name) for name in names}


def check_switches(owner: str, **switches: object) -> None:
    """Raise TypeError for a switch that is not True or False: a text such as "no" would switch it on."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{owner}: {name}={value!r} must be True or False")


def by_group(matrices: Mapping[str, TrainedMatrix]) -> dict[str, list[TrainedMatrix]]:
    """Matrices of each group, in the order of the model."""
    groups: dict[str, list[TrainedMatrix]] = {}
    for matrix in matrices.values():
        groups.setdefault(matrix.group, []).append(matrix)
    return groups


def warn_small_groups(owner: str, top_n: int, matrices: Mapping[str, TrainedMatrix]) -> None:
    """Warn once where groups have fewer than `top_n` matrices; called from `attach`, so that it points at whoever attaches."""
    groups = by_group(matrices)
    small = {group: len(members) for group, members in groups.items() if len(members) < top_n}
    if small:
        shown = ", ".join(f"{group} ({size})" for group, size in list(small.items())[:3])
        warnings.warn(
            f"{owner}: top_n={top_n} exceeds the size of {len(small)} of {len(groups)} groups, such as {shown}; these are "
            "expanded whole",
            stacklevel=4,
        )
