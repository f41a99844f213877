"""Which matrices are expanded: the one place that knows.

What is expanded is a value, `Roster`, that is replaced whole. Expanding, dropping and regrouping make new cohorts and leave the
old ones as they are, so that a step that fails half way is undone by putting the old roster back.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor

from tnadapt.engine import ranks
from tnadapt.engine.checks import lost
from tnadapt.engine.cores import Batch, Cohort, Key, Member, in_dtype, state_signature
from tnadapt.engine.handover import warm_state
from tnadapt.engine.owners import deal
from tnadapt.factorizations import core_dtype
from tnadapt.matrices import TrainedMatrix

__all__ = ["Event", "Expanded", "Roster", "on_cpu"]

_LOGGER = logging.getLogger("tnadapt")


@dataclass(frozen=True)
class Event:
    """Matrices that were expanded or folded back at an optimizer step (0: at the attachment)."""

    step: int
    action: Literal["expand", "fold"]
    names: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.names[:3]) + (f" and {len(self.names) - 3} more" if len(self.names) > 3 else "")
        return f"step {self.step}: {self.action} {shown}"


@dataclass(frozen=True)
class Roster:
    """What is expanded, and how it came about.

    Attributes:
        step: optimizer steps taken.
        cohorts: the cores that this rank holds.
        owners: rank that holds the cores of each matrix, by name, where they are dealt out over ranks; empty otherwise.
        elsewhere: matrices whose cores another rank holds.
        waiting: names of matrices that get their cores at the next step. By then the model is where it will be trained:
            wrapped, loaded, and the same on all ranks.
        history: every expansion and folding so far.
    """

    step: int = 0
    cohorts: tuple[Cohort, ...] = ()
    owners: Mapping[str, int] = field(default_factory=dict)
    elsewhere: tuple[TrainedMatrix, ...] = ()
    waiting: tuple[str, ...] = ()
    history: tuple[Event, ...] = ()

    @cached_property
    def names(self) -> frozenset[str]:
        """Of all expanded matrices, waiting ones included."""
        return frozenset(self.waiting).union(matrix.name for matrix in self.trained)

    @cached_property
    def trained(self) -> tuple[TrainedMatrix, ...]:
        """All matrices that have cores, on whichever rank, in an order that is the same on all ranks."""
        here = (matrix for cohort in self.cohorts for matrix in cohort.matrices)
        return tuple(sorted((*here, *self.elsewhere), key=lambda matrix: matrix.name))


class Expanded:
    """The expanded matrices among `matrices`, and the changes to which they are.

    Args:
        matrices: all that can be expanded, by name; each with its factorization.
        optimizer: it holds the matrices.
        elementwise: whether its update works element by element.
        warm: whether cores take over what the optimizer knows of their matrix; they start fresh otherwise.
        process_group: ranks that train the same matrices; None for all.
        shard: whether the cores are dealt out over these ranks, see `tnadapt.engine.owners`; each rank holds all otherwise.
    """

    def __init__(
        self,
        matrices: Mapping[str, TrainedMatrix],
        optimizer: torch.optim.Optimizer,
        elementwise: bool,
        warm: bool,
        process_group: Any = None,
        shard: bool = False,
    ) -> None:
        self.matrices = matrices
        self.elementwise = elementwise
        self.process_group = process_group
        self.shard = shard
        self.now = Roster()
        #: whether the matrices have not been looked at since a state was loaded
        self.unseen = False
        self._optimizer = optimizer
        self.warm = warm
        for matrix in matrices.values():
            matrix.roster = lambda: self.now.names

    def wait(self, names: Sequence[str], step: int) -> None:
        """Choose matrices that get their cores at the next step."""
        if names:
            self.now = replace(self.now, waiting=(*self.now.waiting, *names))
            self.record(step, "expand", names)

    def expand(self, names: Sequence[str], fresh: bool = False) -> None:
        """Make cores of these matrices, which are trained through them from now on.

        Args:
            fresh: whether the cores start without what the optimizer knows of the matrices.

        Raises:
            ValueError: a matrix holds NaN or infinity; nothing has changed then.
            RuntimeError: ranks hold different values of a matrix; nothing has changed then, on any rank.
        """
        alike: dict[tuple[Any, ...], list[TrainedMatrix]] = {}
        for name in names:
            matrix = self.matrices[name]
            alike.setdefault((matrix.shape, self._key(matrix)), []).append(matrix)
        owners = self._deal(names, self.now.owners)
        added: dict[Key, list[Member]] = {}
        for (_, key), matrices in alike.items():
            for stack in _batched(matrices, key.capacity):
                added.setdefault(key, []).extend(self._unfold(stack, fresh, owners))
        cohorts = list(self.now.cohorts)
        for key, members in added.items():
            for past in _by_past(members, self.elementwise).values():
                _join_in(cohorts, key, self.elementwise, past)
        chosen = set(names)
        waiting = tuple(name for name in self.now.waiting if name not in chosen)
        elsewhere = (*self.now.elsewhere, *(self.matrices[name] for name in names if not self._is_here(name, owners)))
        self.now = replace(
            self.now, cohorts=tuple(cohorts), owners={**self.now.owners, **owners}, elsewhere=elsewhere, waiting=waiting
        )

    def _deal(self, names: Sequence[str], taken: Mapping[str, int]) -> dict[str, int]:
        """Owners of the cores of these matrices, beside those that have one; none where every rank holds all cores."""
        count = ranks.position(self.process_group)[1]
        if not self.shard or count == 1:
            return {}
        sizes = {name: self._core_numbers(self.matrices[name]) for name in (*taken, *names)}
        return deal(names, taken, sizes, count)

    def _is_here(self, name: str, owners: Mapping[str, int]) -> bool:
        """Whether this rank holds the cores of a matrix."""
        return name not in owners or owners[name] == ranks.position(self.process_group)[0]

    @staticmethod
    def _core_numbers(matrix: TrainedMatrix) -> int:
        assert matrix.factorization is not None
        return sum(map(math.prod, matrix.factorization.core_shapes(matrix.shape)))

    def drop(self, names: Iterable[str]) -> None:
        """Forget the cores of these matrices, which keep their values."""
        chosen = set(names)
        cohorts: list[Cohort] = []
        for cohort in self.now.cohorts:
            kept = [member for member in cohort.members() if member.matrix.name not in chosen]
            if len(kept) == len(cohort.matrices):
                cohorts.append(cohort)
            elif kept:
                cohorts.append(Cohort(cohort.key, self.elementwise, kept))
        self.now = replace(
            self.now,
            cohorts=tuple(cohorts),
            owners={name: rank for name, rank in self.now.owners.items() if name not in chosen},
            elsewhere=tuple(matrix for matrix in self.now.elsewhere if matrix.name not in chosen),
            waiting=tuple(name for name in self.now.waiting if name not in chosen),
        )

    def record(self, step: int, action: Literal["expand", "fold"], names: Iterable[str]) -> None:
        """Note an expansion or a folding in the history, and log it."""
        event = Event(step, action, tuple(names))
        _LOGGER.info("%s", event)
        self.now = replace(self.now, history=(*self.now.history, event))

    def divide(self, cohort: Cohort, idle: Sequence[bool]) -> Cohort:
        """Put members that rest in this step into a cohort of their own; returns that of the others."""
        members = cohort.members()
        active, resting = (
            Cohort(cohort.key, self.elementwise, [m for m, rests in zip(members, idle, strict=True) if rests is wanted])
            for wanted in (False, True)
        )
        cohorts = tuple(c for old in self.now.cohorts for c in ((active, resting) if old is cohort else (old,)))
        self.now = replace(self.now, cohorts=cohorts)
        return active

    def follow(self) -> None:
        """Put cores where their matrices are now: on their device, and with the optimizer group that holds them."""
        cohorts: list[Cohort] = []
        for cohort in self.now.cohorts:
            homes = [(m.parameter.device, m.parameter.dtype, self.group_of(m)) for m in cohort.matrices]
            if all(home == (cohort.key.device, cohort.key.matrix_dtype, cohort.key.group) for home in homes):
                cohorts.append(cohort)
                continue
            moved: dict[Key, list[Member]] = {}
            for member in cohort.members():
                key = self._key(member.matrix)
                if key.matrix_dtype != cohort.key.matrix_dtype:
                    member = _converted(member, cohort.key.dtype, key)
                moved.setdefault(key, []).append(member)
            for key, members in moved.items():
                _join_in(cohorts, key, self.elementwise, members)
        if any(new is not old for new, old in zip(cohorts, self.now.cohorts, strict=False)):
            self.now = replace(self.now, cohorts=tuple(cohorts))

    def group_of(self, matrix: TrainedMatrix) -> int:
        """Index of the optimizer group that holds the matrix now.

        Raises:
            RuntimeError: the optimizer does not hold it any more.
        """
        for index, group in enumerate(self._optimizer.param_groups):
            if any(parameter is matrix.parameter for parameter in group["params"]):
                return index
        raise RuntimeError(lost(matrix))

    def _key(self, matrix: TrainedMatrix) -> Key:
        factorization = matrix.factorization
        assert factorization is not None
        fused = factorization.fused_shapes(factorization.structure(matrix.shape).core_shapes)
        parameter = matrix.parameter
        dtype = core_dtype(parameter.dtype)
        return Key(factorization, fused, dtype, parameter.dtype, parameter.device, self.group_of(matrix))

    def gathered(
        self, of: Callable[[TrainedMatrix], Any], among: Sequence[TrainedMatrix]
    ) -> Callable[[Cohort | Batch], list[Tensor]] | None:
        """The whole parameter or gradient of each member of a cohort or batch, for ranks that hold different cohorts and shards of the
        matrices. Then the tensors of all matrices in `among`, of which the members are a part, are gathered at once, so that every
        rank enters the same collectives. None in all other cases: a cohort gathers its own."""
        if not (self.now.owners and any(ranks.is_sharded(m.parameter) for m in among)):
            return None
        found = dict(zip((m.name for m in among), ranks.whole([of(m) for m in among]), strict=True))
        return lambda cohort: [found[matrix.name] for matrix in cohort.matrices]

    def edited(self) -> list[str]:
        """Names of matrices with cores on this rank that hold something else than what their cores fold to, because somebody wrote
        them; where they are sharded, those of which it can be told from this rank's shards. Waits for the device."""
        present = self.gathered(lambda matrix: matrix.parameter, self.now.trained) if self.unseen else None
        return [
            name
            for cohort in self.now.cohorts
            for name in cohort.named(cohort.edited(None if present is None else present(cohort)))
        ]

    def _unfold(self, matrices: Sequence[TrainedMatrix], fresh: bool, owners: Mapping[str, int]) -> list[Member]:
        """Members for those of the matrices, of one shape and factorization, whose cores this rank is to hold."""
        rows = self._same_on_all_ranks(matrices, ranks.stack_rows([m.parameter.detach() for m in matrices]))
        finite = torch.isfinite(rows).all(1).tolist()
        broken = [m.name for m, ok in zip(matrices, finite, strict=True) if not ok]
        if broken:
            raise ValueError(
                f"cannot expand {', '.join(broken[:5])}: the matrix holds NaN or infinity; restore it from the last good "
                "checkpoint, or lower the learning rate that broke it"
            )
        factorization, shape = matrices[0].factorization, matrices[0].shape
        assert factorization is not None
        values = rows.view(-1, *shape)
        gradient = None
        if factorization.needs_gradient:
            # that of a matrix which has none yet points nowhere
            grads = [torch.zeros_like(m.parameter) if m.parameter.grad is None else m.parameter.grad for m in matrices]
            gradient = ranks.stack_rows(grads).view_as(values)
        states = [{} if fresh else self._known_state(m) for m in matrices]
        # all that is collective is done
        here = [k for k, matrix in enumerate(matrices) if self._is_here(matrix.name, owners)]
        if len(here) < len(matrices):
            matrices, states = [matrices[k] for k in here], [states[k] for k in here]
            rows, values, gradient = rows[here], values[here], None if gradient is None else gradient[here]
        if not matrices:
            return []
        cores = factorization.unfold(values, gradient)
        if not owners:
            ranks.broadcast_from_first(cores, self.process_group)
        residual = None
        if not factorization.structure(shape).exact:
            residual = values.to(cores[0].dtype) - factorization.fold(cores)
        known = [k for k, state in enumerate(states) if state]
        warm = warm_state(factorization, [core[known] for core in cores], [states[k] for k in known])
        handed = {} if warm is None else dict(zip(known, warm, strict=True))
        return [
            Member(
                matrix,
                [core[k] for core in cores],
                rows[k],
                handed.get(k),
                None if residual is None else residual[k],
            )
            for k, matrix in enumerate(matrices)
        ]

    def _known_state(self, matrix: TrainedMatrix) -> dict[str, Any]:
        """What the optimizer knows of a matrix, where it is to be handed over."""
        if not (self.warm and self.elementwise):
            return {}
        state = {
            key: ranks.stack_rows([value]).view(matrix.shape)
            if isinstance(value, Tensor) and value.numel() == math.prod(matrix.shape) and value.dim() > 0
            else value
            for key, value in self._optimizer.state.get(matrix.parameter, {}).items()
        }
        # zeros are no moments: torch.distributed.checkpoint makes such entries by an empty step
        moments = [value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0]
        return state if any(bool(moment.any()) for moment in moments) else {}

    def _same_on_all_ranks(self, matrices: Sequence[TrainedMatrix], values: Tensor) -> Tensor:
        """The first rank's values, which all others must have too, to rounding."""
        if not ranks.is_distributed(self.process_group):
            return values
        first = values.clone()
        ranks.broadcast_from_first([first], self.process_group)
        # what is not finite on all ranks alike is reported by the caller
        known, mine = first.nan_to_num(), values.nan_to_num()
        same = (mine - known).abs().amax(1) <= torch.finfo(known.dtype).eps * 4 * known.abs().amax(1)
        differs = ranks.agree_any(~same, self.process_group)
        if bool(differs.any()):
            names = [m.name for m, flag in zip(matrices, differs.tolist(), strict=True) if flag]
            raise RuntimeError(
                f"ranks hold different values of {', '.join(names[:3])}"
                + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                + ", so they do not train the same matrices. Wrap the model in DistributedDataParallel, make adapters with one "
                "seed on all ranks where nothing broadcasts them, or give LoraOver the ranks that belong together as "
                "process_group="
            )
        return first

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Cores and their optimizer state by matrix name: tensors and plain containers. Tensors are references. Of what is
        dealt out over ranks, the part of this rank."""
        here, count = ranks.position(self.process_group) if self.now.owners else (0, 1)
        return {
            member.matrix.name: {
                "owner": here,
                "cohort": number * count + here,
                "cores": [core.detach() for core in member.cores],
                "state": member.state,
                "residual": member.residual,
                "scale": member.scale,
            }
            for number, cohort in enumerate(self.now.cohorts)
            for member in cohort.members()
        }

    def collected(self, wanted: bool) -> dict[str, Any]:
        """`state_dict` of all ranks together, on the CPU, where it is `wanted`; empty elsewhere. Each rank must call it. Matrices
        travel one at a time."""
        here = ranks.position(self.process_group)[0]
        mine, found = self.state_dict(), dict[str, Any]()
        for matrix in self.now.trained:
            owner = self.now.owners[matrix.name]
            own = on_cpu(mine[matrix.name]) if owner == here else None
            entry = ranks.object_of(owner, own, self.process_group)
            if wanted:
                found[matrix.name] = entry
        return found

    def load_state(
        self, cores: Mapping[str, Any], count: int, step: int, waiting: Sequence[str], history: Sequence[Event]
    ) -> None:
        """Replace everything by a validated state (see `tnadapt.state`); tensors are copied.

        Cores go to the ranks that held them where there are as many ranks now, and are dealt out anew otherwise.

        Args:
            count: ranks over which the cores were dealt out.
        """
        anew = self._deal(list(cores), {})
        same = count == (ranks.position(self.process_group)[1] if self.shard else 1)
        owners = {name: int(cores[name]["owner"]) for name in anew} if same else anew
        grouped: dict[tuple[Any, Key], list[Member]] = {}
        for name, entry in cores.items():
            if not self._is_here(name, owners):
                continue
            matrix = self.matrices[name]
            key = self._key(matrix)
            group = self._optimizer.param_groups[key.group]
            state = entry["state"]
            if state is not None and (group.get("fused") or group.get("capturable")):
                # torch's own loading does the same: these read their step counts on the device
                state = [{**one, "step": one["step"].to(key.device)} if "step" in one else one for one in state]
            member = Member(matrix, entry["cores"], None, state, entry["residual"], scale=entry["scale"])
            # what was stepped together goes on together; what ranks have stepped apart is joined
            (past,) = [entry["cohort"]] if same or count == 1 else _by_past([member], self.elementwise)
            grouped.setdefault((past, key), []).append(member)
        cohorts = tuple(
            Cohort(key, self.elementwise, stack)
            for (_, key), members in grouped.items()
            for stack in _batched(members, key.capacity)
        )
        elsewhere = tuple(self.matrices[name] for name in cores if not self._is_here(name, owners))
        self.now = Roster(step, cohorts, owners, elsewhere, tuple(waiting), tuple(history))
        self.unseen = True


def on_cpu(value: Any) -> Any:
    """Containers with their tensors copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: on_cpu(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_cpu(entry) for entry in value)
    return value


def _batched(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """Runs of at most `size` items, in order."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _by_past(members: Sequence[Member], elementwise: bool) -> dict[Any, list[Member]]:
    """Members that can be stepped as one, together."""
    found: dict[Any, list[Member]] = {}
    for member in members:
        past = state_signature(member.state[0] if member.state else {}) if elementwise else None
        found.setdefault(past, []).append(member)
    return found


def _join_in(cohorts: list[Cohort], key: Key, elementwise: bool, members: Sequence[Member]) -> None:
    """Add members of one past to the cohorts that they can be stepped with, as far as these have room; make new ones of the
    others."""
    (past,) = _by_past(members, elementwise)
    rest = list(members)
    for k, present in enumerate(cohorts):
        room = key.capacity - len(present.matrices)
        if rest and room > 0 and present.key == key and present.signature() == past:
            cohorts[k] = Cohort(key, elementwise, [*present.members(), *rest[:room]])
            rest = rest[room:]
    cohorts += [Cohort(key, elementwise, stack) for stack in _batched(rest, key.capacity)]


def _converted(member: Member, old: torch.dtype, key: Key) -> Member:
    """A member whose matrix was converted: its cores follow, and so does what was last written, rounding and all."""

    convert = partial(in_dtype, old=old, new=key.dtype)
    states = member.state and [{key: convert(value) for key, value in state.items()} for state in member.state]
    value = None if member.value is None else member.value.to(key.matrix_dtype)
    return replace(
        member, cores=[convert(c) for c in member.cores], value=value, state=states, residual=convert(member.residual)
    )
