"""The expanded matrices of a model: their cohorts, and what happens to all of them.

Changing which matrices are expanded makes new cohorts and leaves the old ones as they are, so that a step that fails half
way is undone by putting the old ones back (`snapshot`, `restore`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tnadapt.engine.cohort import Cohort, Member, Piece
from tnadapt.engine.handover import warm_state, what_is_behind
from tnadapt.engine.tensors import (
    agree_any,
    broadcast_from_first,
    checksums,
    is_distributed,
    is_sharded,
    local,
    local_parts,
    stack_rows,
    write_rows,
)
from tnadapt.factorizations import Factorization, core_dtype
from tnadapt.lora_matrices import LoraMatrix

__all__ = ["Engine"]

#: fused shapes of the cores, their dtype and device, index of the optimizer group
_Key = tuple[tuple[tuple[int, ...], ...], torch.dtype, torch.device, int]


class Engine:
    """Cores of the expanded matrices.

    Args:
        factorization: how matrices become cores.
        matrices: all LoRA matrices of the model, by name.
        elementwise: whether the optimizer's update works element by element.
        state_of: the optimizer's state of a matrix, to hand over to its cores at expansion; None to start them fresh.
        process_group: ranks that train the same matrices; None for all.
    """

    def __init__(
        self,
        factorization: Factorization,
        matrices: Mapping[str, LoraMatrix],
        elementwise: bool,
        state_of: Callable[[LoraMatrix], Mapping[str, Any]] | None = None,
        process_group: Any = None,
    ) -> None:
        self.factorization = factorization
        self.matrices = matrices
        self.elementwise = elementwise
        self._state_of = state_of
        self.process_group = process_group
        self.cohorts: dict[_Key, Cohort] = {}
        self._rounds = 0
        self.update_norms: dict[str, Tensor] = {}

    # -- which matrices are expanded ----------------------------------------------------------------------------------

    def expand(self, names: Iterable[str], group_of: Callable[[LoraMatrix], int]) -> None:
        """Unfold the matrices called `names` and train them through cores from now on.

        Args:
            group_of: index of the optimizer group that holds a matrix; only matrices of one group share a cohort.

        Raises:
            ValueError: a matrix holds NaN or infinity; nothing has changed then.
            RuntimeError: ranks hold different values of a matrix; nothing has changed then, on any rank.
        """
        new: dict[tuple[tuple[int, int], _Key], list[LoraMatrix]] = {}
        for name in names:
            matrix = self.matrices[name]
            new.setdefault((matrix.shape, self._key(matrix, group_of(matrix))), []).append(matrix)
        unfolded = [(key, self._unfold(matrices)) for (_, key), matrices in new.items()]
        members: dict[_Key, list[Member]] = {}
        for key, added in unfolded:
            members.setdefault(key, []).extend(added)
        for key, added in members.items():
            present = self.cohorts.get(key)
            for member in added:
                like = None if present is None else present.round_like(member)
                member.round = self._rounds if like is None else like
            self.cohorts[key] = self._joined(present, key, added)
        self._rounds += 1
        for added in members.values():
            for member in added:
                member.matrix.expanded = True

    def _key(self, matrix: LoraMatrix, group: int) -> _Key:
        shapes = self.factorization.fused_shapes(self.factorization.structure(matrix.shape).core_shapes)
        return shapes, core_dtype(matrix.parameter.dtype), matrix.parameter.device, group

    def _unfold(self, matrices: Sequence[LoraMatrix]) -> list[Member]:
        rows = self._same_on_all_ranks(matrices, stack_rows([m.parameter.detach() for m in matrices]))
        values = rows.view(-1, *matrices[0].shape)
        finite = torch.isfinite(rows).all(1).tolist()
        broken = [m.name for m, ok in zip(matrices, finite, strict=True) if not ok]
        if broken:
            raise ValueError(
                f"cannot expand {', '.join(broken[:5])}: the matrix holds NaN or infinity; restore it from the last good "
                "checkpoint, or lower the learning rate that broke it"
            )
        cores = self.factorization.unfold(values)
        broadcast_from_first(cores, self.process_group)
        residual = None
        if not self.factorization.structure(matrices[0].shape).exact:
            residual = values.to(cores[0].dtype) - self.factorization.fold(cores)
        states = [self._known_state(m) for m in matrices]
        known = [k for k, state in enumerate(states) if state]
        warm = warm_state(self.factorization, [core[known] for core in cores], [states[k] for k in known])
        handed = {} if warm is None else dict(zip(known, warm, strict=True))
        return [
            Member(
                matrix,
                self._rounds,
                [core[k] for core in cores],
                state=handed.get(k),
                residual=None if residual is None else residual[k],
            )
            for k, matrix in enumerate(matrices)
        ]

    def _known_state(self, matrix: LoraMatrix) -> dict[str, Any]:
        """What the optimizer knows of a matrix, where it is to be handed over."""
        if self._state_of is None or not self.elementwise:
            return {}
        state = {
            key: stack_rows([value]).view(value.shape) if isinstance(value, Tensor) and is_sharded(value) else value
            for key, value in self._state_of(matrix).items()
        }
        # zeros are no moments: torch.distributed.checkpoint makes such entries by an empty step
        moments = [value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0]
        return state if any(bool(moment.any()) for moment in moments) else {}

    def _same_on_all_ranks(self, matrices: Sequence[LoraMatrix], values: Tensor) -> Tensor:
        """The first rank's values, which all others must have too, to rounding."""
        if not is_distributed(self.process_group):
            return values
        first = values.clone()
        broadcast_from_first([first], self.process_group)
        # what is not finite on all ranks alike is reported by the caller
        known, mine = first.nan_to_num(), values.nan_to_num()
        same = (mine - known).abs().amax(1) <= torch.finfo(known.dtype).eps * 4 * known.abs().amax(1)
        differs = agree_any(~same, self.process_group)
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

    def _joined(self, present: Cohort | None, key: _Key, members: Sequence[Member]) -> Cohort:
        """The cohort of `members`, and of those that are `present` already."""
        if present is not None:
            return present.with_members([*present.extract(), *members])
        _, dtype, device, _ = key
        return Cohort(self.factorization, dtype, device, self.elementwise, members)

    def drop(self, names: Iterable[str]) -> None:
        """Forget the cores of these matrices; the matrices keep their values."""
        chosen = set(names)
        for key, cohort in list(self.cohorts.items()):
            kept = [m for m in cohort.extract() if m.matrix.name not in chosen]
            if not kept:
                del self.cohorts[key]
            elif len(kept) < len(cohort.members):
                self.cohorts[key] = cohort.with_members(kept)
        for name in chosen:
            self.matrices[name].expanded = False
            self.update_norms.pop(name, None)

    def follow(self, group_of: Callable[[LoraMatrix], int]) -> None:
        """Put cores where their matrices are now: on their device, and with the optimizer group that holds them."""
        staying: dict[_Key, Cohort] = {}
        moving: dict[_Key, list[Member]] = {}
        for key, cohort in self.cohorts.items():
            shapes, dtype, *here = key
            homes = [(m.matrix.parameter.device, group_of(m.matrix)) for m in cohort.members]
            if all(home == tuple(here) for home in homes):
                staying[key] = cohort
                continue
            for member, home in zip(cohort.extract(), homes, strict=True):
                moving.setdefault((shapes, dtype, *home), []).append(member)
        if moving:
            self.cohorts = staying | {key: self._joined(staying.get(key), key, m) for key, m in moving.items()}

    def fingerprint(self) -> Tensor:
        """One number per cohort that other values of the cores would change."""
        sums = [cohort.buffer.double().sum().cpu() for cohort in self.cohorts.values()]
        return torch.stack(sums) if sums else torch.zeros(0)

    def snapshot(self) -> Any:
        """What `restore` needs to undo every change to which matrices are expanded."""
        expanded = {name for name, m in self.matrices.items() if m.expanded}
        return dict(self.cohorts), expanded, self._rounds, dict(self.update_norms)

    def restore(self, snapshot: Any) -> None:
        """Put back what `snapshot` gave."""
        cohorts, expanded, rounds, norms = snapshot
        self.cohorts = dict(cohorts)
        self._rounds, self.update_norms = rounds, dict(norms)
        for cohort in self.cohorts.values():
            cohort.clear_grad()
            cohort.settle()
        for name, matrix in self.matrices.items():
            matrix.expanded = name in expanded

    def close(self) -> None:
        """Free what only training needs; the cores stay."""
        for cohort in self.cohorts.values():
            cohort.close()

    # -- the work of a step -------------------------------------------------------------------------------------------

    def pull_back(self) -> list[Tensor]:
        """Pull the gradients of all expanded matrices back to their cores.

        A matrix without gradient is not stepped; its cores are a round of their own from then on.
        Returns a boolean per cohort off the CPU, true where its gradients were finite: where they were not, zeros were
        pulled back, and the caller reads the flag when that does not stall the device.

        Raises:
            FloatingPointError: gradients that are not finite, on the CPU.
        """
        self._require_finite_plain()
        flags: list[Tensor] = []
        for key in list(self.cohorts):
            cohort = self.cohorts[key]
            idle = [m.matrix.parameter.grad is None for m in cohort.members]
            if all(idle):
                continue
            mixed = [m for span in cohort.spans if len({idle[m] for m in span}) == 2 for m in span if idle[m]]
            if mixed:
                cohort = self.cohorts[key] = cohort.with_round(mixed, self._rounds)
                self._rounds += 1
            grads = self._stack_gradients(cohort)
            if cohort.device.type == "cpu":
                self._require_finite(cohort, grads)
            else:
                finite = torch.isfinite(grads).all()
                flags.append(finite)
                grads = torch.where(finite, grads, torch.zeros((), dtype=grads.dtype, device=grads.device))
            cohort.pull_back(grads)
        return flags

    def _stack_gradients(self, cohort: Cohort) -> Tensor:
        """Gradients of a cohort's matrices, [n, numel]; zeros where there is none."""
        grads = [member.matrix.parameter.grad for member in cohort.members]
        stacked = stack_rows([grad for grad in grads if grad is not None]).to(cohort.dtype)
        if len(stacked) == len(grads):
            return stacked
        full = torch.zeros((len(grads), stacked.shape[1]), dtype=cohort.dtype, device=cohort.device)
        full[[k for k, grad in enumerate(grads) if grad is not None]] = stacked
        return full

    def _require_finite(self, cohort: Cohort, grads: Tensor) -> None:
        # a finite sum has finite terms: one fast pass; where it overflows, look at each entry
        if bool(torch.isfinite(grads.sum())):
            return
        finite = torch.isfinite(grads).all(1).tolist()
        broken = [m.matrix.name for m, ok in zip(cohort.members, finite, strict=True) if not ok]
        if broken:
            self._raise_nonfinite(broken)

    def _require_finite_plain(self) -> None:
        """The same for matrices that are not expanded; only on the CPU, where it makes nobody wait."""
        grads = {
            name: m.parameter.grad
            for name, m in self.matrices.items()
            if not m.expanded and m.parameter.grad is not None and m.parameter.device.type == "cpu"
        }
        if not grads:
            return
        held = [local(grad) for grad in grads.values()]
        # a finite norm has finite entries, and all norms are one call; where the squares overflow, look at each entry
        broken = ~torch.isfinite(torch.stack(torch._foreach_norm(held)))
        if bool(broken.any()):
            broken = ~torch.stack([torch.isfinite(g).all() for g in held])
        if any(is_sharded(grad) for grad in grads.values()):
            broken = agree_any(broken, self.process_group)
        if bool(broken.any()):
            self._raise_nonfinite([name for name, flag in zip(grads, broken.tolist(), strict=True) if flag])

    @staticmethod
    def _raise_nonfinite(broken: list[str]) -> None:
        raise FloatingPointError(
            f"the gradient of {', '.join(broken[:5])} holds NaN or infinity; nothing was changed. Lower the learning rate, "
            "clip gradients, skip this batch (zero_grad and go on), or use a GradScaler for float16"
        )

    def lend(self, limit_of: Callable[[int, int], float | None]) -> list[tuple[int, list[Piece]]]:
        """Pieces to step now, with their gradients in place, and the index of the optimizer group they belong to.

        `limit_of` gives the largest norm that the update of a matrix of so many entries may have in an optimizer group.
        """
        for key, cohort in self.cohorts.items():
            cohort.limit = limit_of(key[3], math.prod(cohort.members[0].matrix.shape))
        return [
            (key[3], cohort.lend(lambda member: member.matrix.parameter.grad is not None))
            for key, cohort in self.cohorts.items()
            if cohort.grad is not None
        ]

    @torch.no_grad()
    def refold(self) -> None:
        """Write `fold(cores)` into the matrices of the cohorts that were stepped, in place, and free core gradients."""
        for cohort in self.cohorts.values():
            if not cohort.stepped:
                continue
            cohort.clear_grad()
            parameters = [m.matrix.parameter for m in cohort.members]
            values = cohort.fold()
            before = cohort.written
            if before is None:
                before = stack_rows(parameters).to(cohort.dtype)
            if cohort.limit is not None:
                values = cohort.shorten(values, before)
            # what rests is left as it is, to the bit
            idle = set(cohort.idle)
            for m in idle:
                values[m] = before[m]
            moved = [m for m in range(len(parameters)) if m not in idle]
            # what was written is needed again where this fails and is tried once more
            change = before.sub_(values) if cohort.written is None else before - values
            norms = torch.linalg.vector_norm(change, dim=1).unbind(0)
            self.update_norms.update((cohort.members[m].matrix.name, norms[m]) for m in moved)
            rows = torch.stack([values[m] for m in moved]) if idle else values
            write_rows([parameters[m] for m in moved], rows)
            tells = _tells(parameters, cohort)
            cohort.written, cohort.checksums = (None, checksums(values)) if tells else (values, None)
            cohort.versions = [p._version for p in parameters]
            cohort.settle()

    def touched(self, cohort: Cohort) -> bool:
        """Whether somebody wrote a matrix since it was refolded, as far as torch counts writes: those through `.data` it does
        not. Does not wait for the device."""
        return cohort.versions != [m.matrix.parameter._version for m in cohort.members]

    @torch.no_grad()
    def may_be_changed(self, cohort: Cohort) -> Tensor:
        """Per member, whether the matrix may hold something else than what its cores fold to: [n] booleans, and cheap. What
        torch counts as a write is looked at in full; of what it does not, only a write that keeps `checksums` is missed."""
        parameters = [m.matrix.parameter for m in cohort.members]
        if cohort.checksums is None or not _tells(parameters, cohort) or self.touched(cohort):
            return self.changed_outside(cohort)
        return checksums(stack_rows(parameters)) != cohort.checksums

    @torch.no_grad()
    def changed_outside(self, cohort: Cohort) -> Tensor:
        """Per member, whether the matrix (where it is sharded: this rank's shard) differs from what its cores fold to by
        more than rounding: [n] booleans."""
        folded = cohort.fold() if cohort.written is None else cohort.written
        parameters = [m.matrix.parameter.detach() for m in cohort.members]
        # folding rounds in the cores' dtype once per core, writing once in the matrix's; decomposing, which is done in float64,
        # is the larger error of float64 cores
        eps = torch.finfo(folded.dtype).eps * len(cohort.fused_shapes) * (64 if folded.dtype == torch.float64 else 4)
        allowed = folded.abs().amax(1) * folded.new_tensor([eps + torch.finfo(p.dtype).eps for p in parameters])
        if not any(is_sharded(p) for p in parameters):
            return ~((stack_rows(parameters).to(folded.dtype) - folded).abs().amax(1) <= allowed)
        # a comparison holds of every element of a shard without elements, and of none that is NaN
        within = [
            ((local(p).to(folded.dtype) - part).abs() <= bound).all()
            for p, part, bound in zip(parameters, local_parts(parameters, folded), allowed.unbind(0), strict=True)
        ]
        return ~torch.stack(within)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Cores and their optimizer state by matrix name: tensors and plain containers. Tensors are references."""
        members: dict[str, Any] = {}
        for cohort in self.cohorts.values():
            for member in cohort.extract():
                members[member.matrix.name] = {
                    "round": member.round,
                    "cores": [core.detach() for core in member.cores],
                    "state": member.state,
                    "residual": member.residual,
                }
        return {"members": members, "rounds": self._rounds}

    def validate_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError where `state` does not fit the matrices and the factorization; change nothing.

        What lacks a part or has one of a wrong type may raise KeyError, TypeError or AttributeError instead.
        """
        if not isinstance(state["rounds"], int):
            raise TypeError(f"the number of rounds is {state['rounds']!r}")
        for name, entry in state["members"].items():
            if name not in self.matrices:
                raise ValueError(
                    f"the state has cores of {name}, which is not among the {len(self.matrices)} LoRA matrices of this "
                    "model; load it into the model that it was saved from"
                )
            shape = self.matrices[name].shape
            wanted = self.factorization.structure(shape).core_shapes
            got = tuple(tuple(core.shape) for core in entry["cores"])
            if got != wanted:
                raise ValueError(
                    f"the state has cores {got} of {name} ({shape[0]}x{shape[1]}), but {self.factorization.label} makes "
                    f"{wanted}; resume with the factorization of the run that was saved"
                )
            if not all(bool(torch.isfinite(core).all()) for core in entry["cores"]):
                raise ValueError(f"the saved cores of {name} hold NaN or infinity; resume from an earlier checkpoint")
            if not isinstance(entry["round"], int):
                raise TypeError(f"the round of {name} is {entry['round']!r}")
            residual = entry["residual"]
            if (residual is None) != self.factorization.structure(shape).exact or (
                residual is not None and (tuple(residual.shape) != shape or not bool(torch.isfinite(residual).all()))
            ):
                raise ValueError(f"the saved residual of {name} is damaged; resume from an earlier checkpoint")
            if entry["state"] is not None:
                self._validate_moments(name, entry["cores"], entry["state"])

    def _validate_moments(self, name: str, cores: Sequence[Tensor], states: Sequence[Mapping[str, Any]]) -> None:
        """Check the saved optimizer state of the cores of one matrix."""
        if len(states) != len(cores):
            raise ValueError(f"the optimizer state of {name} is damaged: {len(states)} states of {len(cores)} cores")
        if self.elementwise and any(what_is_behind(state) != what_is_behind(states[0]) for state in states):
            raise ValueError(
                f"the optimizer state of {name} is damaged: that of its cores, which are stepped together, differs in step "
                "counts or entries; resume from an earlier checkpoint"
            )
        for core, state in zip(cores, states, strict=True):
            for key, value in state.items():
                if not isinstance(value, Tensor) or value.dim() == 0:
                    continue
                if self.elementwise and value.numel() != core.numel():
                    raise ValueError(
                        f"the optimizer state of {name} is damaged: {key} has {value.numel()} numbers for a core of "
                        f"{core.numel()}; resume from an earlier checkpoint"
                    )
                if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                    raise ValueError(
                        f"the saved optimizer state of {name} holds NaN or infinity in {key}; resume from an earlier checkpoint"
                    )

    def load_state(self, state: Mapping[str, Any], group_of: Callable[[LoraMatrix], int]) -> None:
        """Replace all cores by those of a validated `state`; tensors are copied."""
        grouped: dict[_Key, list[Member]] = {}
        for name, entry in state["members"].items():
            matrix = self.matrices[name]
            grouped.setdefault(self._key(matrix, group_of(matrix)), []).append(
                Member(matrix, entry["round"], entry["cores"], entry["state"], entry["residual"])
            )
        made = {key: self._joined(None, key, members) for key, members in grouped.items()}
        self.cohorts = made
        self._rounds = int(state["rounds"])
        self.update_norms.clear()
        for name, matrix in self.matrices.items():
            matrix.expanded = name in state["members"]


def _tells(parameters: Sequence[Tensor], cohort: Cohort) -> bool:
    """Whether the parameters hold what was written to them as it was: whole, and in the precision of the cores."""
    return all(not is_sharded(p) and p.dtype == cohort.dtype for p in parameters)
