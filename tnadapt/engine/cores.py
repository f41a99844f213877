"""Storage of the cores: one flat buffer per cohort, laid out by site, that folds and pulls back as one batch.

A cohort is a set of expanded matrices that are contracted and stepped as one. They share factorization, dtype, device and
optimizer group. Their cores have the same fused shapes (as the `A` and `B` of transposed shapes have). And they have the same
past: equal step counts, and gradients in the same steps.

Letters: n = members, k = site (or core), core_k = shape of core k, numel = entries of a matrix. The buffer holds
`[site 0: n x core_0][site 1: n x core_1]...`, so the stacked cores of a site are one contiguous tensor. Matrices are handled
as rows: [n, numel], each row-major.

The optimizer steps *pieces* of the buffer, each lent as a Parameter with a state of its own. An elementwise optimizer gets
the whole buffer as one piece. Any other gets one piece per member and site, as a matrix, so that it sees an unfolding of a core.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from tnadapt.backends import Kernel
from tnadapt.engine import ranks
from tnadapt.engine.scaling import cap_tolerance, match_tolerance, search_scale
from tnadapt.factorizations import Factorization, site_axes
from tnadapt.matrices import TrainedMatrix

__all__ = [
    "STACK_BYTES",
    "Cohort",
    "Key",
    "Member",
    "Piece",
    "differs",
    "in_dtype",
    "matrix_view_shape",
    "state_signature",
]

#: Bytes of cores that one cohort stacks at most, and of matrices that are unfolded as one batch; a matrix whose cores are
#: larger is alone. It bounds the scratch of a step. Below a hundredth of it, launches cost more than arithmetic.
STACK_BYTES = 2**28


class Key(NamedTuple):
    """What the members of a cohort have in common besides their past."""

    factorization: Factorization
    fused_shapes: tuple[tuple[int, ...], ...]
    #: of the cores, and of the matrices
    dtype: torch.dtype
    matrix_dtype: torch.dtype
    device: torch.device
    #: index of the optimizer group that holds the matrices
    group: int

    @property
    def capacity(self) -> int:
        """How many matrices may be stacked, see `STACK_BYTES`."""
        return max(1, STACK_BYTES // (self.dtype.itemsize * sum(map(math.prod, self.fused_shapes))))


@dataclass(eq=False)
class Member:
    """One matrix on its way into a cohort.

    Attributes:
        cores: its cores, each of the shape that its structure has.
        value: what the matrix holds, [numel] in its own dtype; None if that must be looked up at the next step.
        state: optimizer state of each core; None where it starts fresh.
        residual: what the cores miss of the matrix, [rows, cols]; None where they are exact.
        update_norm: Frobenius norm of the last update of the matrix; None before any.
        scale: by how much the last step of the cores was scaled, where steps are matched; None before any.
    """

    matrix: TrainedMatrix
    cores: Sequence[Tensor]
    value: Tensor | None = None
    state: list[dict[str, Any]] | None = None
    residual: Tensor | None = None
    update_norm: Tensor | None = None
    scale: Tensor | None = None


@dataclass(eq=False)
class Piece:
    """A contiguous range of the buffer that the optimizer steps as one Parameter."""

    start: int
    parameter: nn.Parameter
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def stop(self) -> int:
        return self.start + self.parameter.numel()


def state_signature(state: Mapping[str, Any]) -> tuple[tuple[str, float | None], ...]:
    """Names of the entries of an optimizer state, with the values of those that are scalars (step counts). Only cores of
    equal signatures can be stepped as one tensor."""
    return tuple(
        (key, None if value is None or (isinstance(value, Tensor) and value.dim() > 0) else float(value))
        for key, value in sorted(state.items())
    )


def matrix_view_shape(core_shape: Sequence[int]) -> tuple[int, int]:
    """The unfolding of a core into a matrix that is nearest to square."""
    splits = [(math.prod(core_shape[:k]), math.prod(core_shape[k:])) for k in range(1, len(core_shape))]
    return min(splits, key=lambda split: abs(math.log(split[0] / split[1])))


class Cohort:
    """The cores of matrices that are contracted and stepped as one, and the work on them.

    A cohort never gains or loses members: whatever changes them makes a new one and leaves this one as it is.

    Args:
        key: what the members have in common.
        elementwise: whether the optimizer's update works element by element.
        members: at least one; all of one past.
    """

    def __init__(self, key: Key, elementwise: bool, members: Sequence[Member]) -> None:
        # matrices of one shape stand together, so that each shape is permuted in one go
        members = sorted(members, key=lambda member: member.matrix.shape)
        self.key = key
        self.elementwise = elementwise
        self.matrices = [member.matrix for member in members]
        self.structures = [key.factorization.structure(matrix.shape) for matrix in self.matrices]
        #: runs of members of one shape: (members, sizes and order of the axes of a matrix, the same of its sites)
        self._runs: list[tuple[slice, Any]] = []
        for m, matrix in enumerate(self.matrices):
            if m and matrix.shape == self.matrices[m - 1].shape:
                self._runs[-1] = (slice(self._runs[-1][0].start, m + 1), self._runs[-1][1])
            else:
                self._runs.append((slice(m, m + 1), site_axes(self.structures[m].sites)))
        count = len(members) * sum(map(math.prod, key.fused_shapes))
        self.buffer = torch.empty(count, dtype=key.dtype, device=key.device)
        self._sites = self._by_site(self.buffer)
        for k, site in enumerate(self._sites):
            for row, member in zip(site, members, strict=True):
                row.copy_(member.cores[k].reshape(row.shape))
        residuals = [member.residual.reshape(-1) for member in members if member.residual is not None]
        #: what the cores of each member miss, [n, numel]; None where the structure is exact
        self.residual = torch.stack(residuals).to(key.device) if residuals else None
        self.pieces = self._make_pieces(members)
        values = [member.value for member in members if member.value is not None]
        #: what the matrices held when they were last written or looked at, [n, numel] in their own dtype; None after loading
        self.written = torch.stack(values).to(key.device) if len(values) == len(members) else None
        #: gradients of all cores, laid out like the buffer; None between steps
        self.grad: Tensor | None = None
        #: members that were written by somebody else while their cores were being stepped, [n]; None where there are none
        self.overtaken: Tensor | None = None
        #: whether the cores are with the optimizer, or have come back and are not folded yet
        self.lent = False
        #: Frobenius norm of the last update of each matrix, [n]; None before any
        norms = [member.update_norm for member in members if member.update_norm is not None]
        self.update_norms = torch.stack(norms).to(key.device) if len(norms) == len(members) else None
        #: largest Frobenius norm of an update in the coming step; None for no cap
        self.cap: float | None = None
        #: the cores before the step and after it, where steps are scaled; stays, since new memory costs as much as the copy
        self._kept: tuple[Tensor, Tensor] | None = None
        # by how much the steps of the cores were scaled last, [n]: where the search for the next scale begins
        scales = [member.scale for member in members if member.scale is not None]
        self._scale = torch.stack(scales).to(key.device, key.dtype) if len(scales) == len(members) else None
        self._kernel: Kernel | None = None
        self._versions = [parameter._version for parameter in self.parameters]

    # -- layout -------------------------------------------------------------------------------------------------------

    def _by_site(self, flat: Tensor) -> list[Tensor]:
        """Views of a tensor like the buffer, one per site: [n, *fused_k]."""
        n = len(self.matrices)
        parts = torch.split(flat, [n * math.prod(shape) for shape in self.key.fused_shapes])
        return [part.view(n, *shape) for part, shape in zip(parts, self.key.fused_shapes, strict=True)]

    def _make_pieces(self, members: Sequence[Member]) -> list[Piece]:
        if self.elementwise:
            sites = range(len(self.key.fused_shapes))
            states = [m.state[k] for k in sites for m in members if m.state is not None]
            return [self._piece(0, self.buffer, states)]
        pieces: list[Piece] = []
        start = 0
        for k, site in enumerate(self._sites):
            for row, member, structure in zip(site, members, self.structures, strict=True):
                view = row.view(matrix_view_shape(structure.core_shapes[k]))
                pieces.append(self._piece(start, view, [] if member.state is None else [member.state[k]]))
                start += row.numel()
        return pieces

    @staticmethod
    def _piece(start: int, view: Tensor, states: Sequence[Mapping[str, Any]]) -> Piece:
        parameter = nn.Parameter(view)
        return Piece(start, parameter, _join(states, parameter))

    def members(self) -> list[Member]:
        """The members with their cores and state as views into the storage; a cohort made of them copies."""
        return [
            Member(
                matrix,
                [site[m].view(shape) for site, shape in zip(self._sites, structure.core_shapes, strict=True)],
                None if self.written is None else self.written[m],
                self._core_states(m),
                None if self.residual is None else self.residual[m].view(matrix.shape),
                None if self.update_norms is None else self.update_norms[m],
                None if self._scale is None else self._scale[m],
            )
            for m, (matrix, structure) in enumerate(zip(self.matrices, self.structures, strict=True))
        ]

    def _core_states(self, m: int) -> list[dict[str, Any]]:
        """Optimizer state of each core of member `m`; entries of the size of cores are views into that of their piece."""
        states: list[dict[str, Any]] = []
        offset = 0
        for shape in self.key.fused_shapes:
            size = math.prod(shape)
            start = offset + m * size
            piece = next(p for p in self.pieces if p.start <= start < p.stop)
            states.append({key: _part(value, piece, start, size) for key, value in piece.state.items()})
            offset += len(self.matrices) * size
        return states

    def signature(self) -> Any:
        """What a newcomer must equal to be stepped together with the members; None where any can."""
        return state_signature(self.pieces[0].state) if self.elementwise else None

    # -- the work of a step -------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The matrices' parameters."""
        return [matrix.parameter for matrix in self.matrices]

    def _rows(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor of each member as rows [n, numel], gathered where they are sharded; may be a view of that of an only member."""
        if any(hasattr(t, "full_tensor") for t in tensors):
            return ranks.stack_rows(tensors)
        flat: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
        return flat.view(len(tensors), -1)

    def pull_back(self, gradients: Sequence[Tensor] | None = None) -> Tensor | None:
        """Pull the gradients of the matrices back to the cores.

        Off the CPU, where looking would wait for the device, zeros are pulled back in place of gradients that are not finite.
        Returns the boolean that tells whether they were finite there, None on the CPU.

        Args:
            gradients: of all members, whole; those of the parameters if None.

        Raises:
            FloatingPointError: a gradient holds NaN or infinity, on the CPU.
        """
        if gradients is None:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
        assert len(gradients) == len(self.matrices), "members of a cohort have gradients in the same steps"
        grads = self._rows(gradients).detach().to(self.key.dtype)
        finite = None
        if self.key.device.type == "cpu":
            # a finite sum has finite terms: one fast pass; where it overflows, each entry is looked at
            if not math.isfinite(float(grads.sum())):
                raise_nonfinite(self.matrices, torch.isfinite(grads).all(1))
        else:
            finite = torch.isfinite(grads).all()
            grads = torch.where(finite, grads, torch.zeros((), dtype=grads.dtype, device=grads.device))
        flat = self._reordered(grads, [(run, sizes, there) for run, (sizes, there, _, _) in self._runs])
        self.grad = self._contraction().pull_back(flat)
        if not self.elementwise:
            # torch's own optimizers copy what they keep of a gradient, others may not: its memory is not used again
            self._kernel = None
        return finite

    def lend(self, cap: float | None, matched: bool) -> list[Piece]:
        """Give the pieces their gradients: the optimizer may step them now.

        Args:
            cap: largest Frobenius norm that the update of a matrix may have; None for no cap.
            matched: whether the optimizer steps the matrices too, and their updates are to be as long as it makes them.
        """
        assert self.grad is not None
        self.cap = cap
        if matched or cap is not None:
            if self._kept is None:
                self._kept = torch.empty_like(self.buffer), torch.empty_like(self.buffer)
            self._kept[0].copy_(self.buffer)
        for piece in self.pieces:
            piece.parameter.grad = self.grad[piece.start : piece.stop].view(piece.parameter.shape)
        self.lent = True
        return self.pieces

    def fold(self) -> Tensor:
        """All members folded, residuals added: [n, numel] in the dtype of the cores. Keeps what the next pull-back reuses."""
        flat = self._contraction().contract()
        rows = self._reordered(flat, [(run, sites, back) for run, (_, _, sites, back) in self._runs])
        return rows if self.residual is None else rows.add_(self.residual)

    @staticmethod
    def _reordered(rows: Tensor, runs: Sequence[tuple[slice, Sequence[int], Sequence[int]]]) -> Tensor:
        """Rows [n, numel] with their axes permuted: for each run of members, the sizes of the axes and their new order."""
        if len(runs) == 1:
            (_, sizes, order) = runs[0]
            whole = rows.view(-1, *sizes).permute(0, *order)
            return whole.clone(memory_format=torch.contiguous_format).view(rows.shape)
        made = torch.empty_like(rows)
        for run, sizes, order in runs:
            part = rows[run].view(-1, *sizes).permute(0, *order)
            made[run].view(part.shape).copy_(part)
        return made

    def _contraction(self) -> Kernel:
        if self._kernel is None:
            with torch.inference_mode(False):  # its memory is written in training, wherever it is made
                self._kernel = self.key.factorization.kernel(self._sites)
        return self._kernel

    def refold(self, matched: bool = False, shadows: Sequence[Tensor] | None = None, died: bool = False) -> None:
        """Write what the stepped cores fold to into the matrices, and let go of the core gradients.

        Args:
            matched: whether updates are to be as long as those that the optimizer has made of the matrices.
            shadows: the matrices as the optimizer has stepped them, whole; the parameters if None.
            died: the step was broken off. Matrices that were written since are left as they are, and `edited` names them.
        """
        self.release_gradients()
        parameters = self.parameters
        except_for = self._overtaken() if died else None
        before = self.written
        assert before is not None, "a matrix is looked at before its cores are stepped"
        start = before.to(self.key.dtype)
        if matched:
            shadow = torch.linalg.vector_norm(self._rows(shadows or parameters).to(start.dtype) - start, dim=1)
            values = self._rescaled(start, shadow, exactly=True)
        elif self.cap is not None:
            values = self._rescaled(start, torch.full_like(start[:, 0], self.cap), exactly=False)
        else:
            values = self.fold()
        written = values.to(self.key.matrix_dtype)
        self.update_norms = torch.linalg.vector_norm(values - before, dim=1)
        moved = list(range(len(parameters)))
        if except_for is not None:
            moved = torch.nonzero(~except_for).flatten().tolist()
            written = torch.where(except_for[:, None], before, written)
        if moved and any(hasattr(p, "full_tensor") for p in parameters):
            ranks.write_rows([parameters[m] for m in moved], torch.stack([written[m] for m in moved]))
        elif moved:
            torch._foreach_copy_([parameters[m] for m in moved], [written[m].view(parameters[m].shape) for m in moved])
        self.written, self.overtaken = written, except_for
        self._versions = [parameter._version for parameter in self.parameters]
        self.settle()

    def _rescaled(self, before: Tensor, wanted: Tensor, exactly: bool) -> Tensor:
        """Scale the step of the cores of each member so that its matrix moves from `before` by the wanted length; returns all
        members folded.

        Args:
            before: what the matrices hold, [n, numel].
            wanted: Frobenius norm of each update, [n].
            exactly: whether shorter steps are lengthened too; they are left alone otherwise.
        """
        assert self._kept is not None
        start, stepped = self._kept
        stepped.copy_(self.buffer)
        one, values = torch.ones_like(wanted), before

        def length_at(scale: Tensor) -> Tensor:
            nonlocal values
            if scale is not one:
                for now, old, new in zip(*map(self._by_site, (self.buffer, start, stepped)), strict=True):
                    torch.lerp(old, new, scale.view(-1, *[1] * (new.dim() - 1)), out=now)
            values = self.fold()
            # what overflowed on the way is too long
            norms: Tensor = torch.linalg.vector_norm(values - before, dim=1)
            return norms.nan_to_num(math.inf, math.inf)

        # the scale of the step before is near already
        first = self._scale if exactly and self._scale is not None else one
        tolerance = match_tolerance(before, wanted) if exactly else cap_tolerance(wanted)
        scale = search_scale(length_at, wanted, first, tolerance, only_shorten=not exactly)
        self._scale = torch.where(scale > 0, scale, one) if exactly else None
        return values

    def take_back(self, state: MutableMapping[Any, Any]) -> None:
        """The optimizer has stepped: its state of the pieces is theirs."""
        for piece in self.pieces:
            piece.state = state.pop(piece.parameter, piece.state)

    def release_gradients(self) -> None:
        """Free the core gradients."""
        self.grad = None
        for piece in self.pieces:
            piece.parameter.grad = None

    def settle(self) -> None:
        """The step is over, or was called off."""
        self.release_gradients()
        self.lent = False

    def close(self) -> None:
        """Free what only training needs; the cores stay."""
        self._kernel = self._kept = None

    # -- writes of others ---------------------------------------------------------------------------------------------

    def was_written_to(self) -> bool:
        """Whether torch has counted a write to a matrix since the last refold. It does not count writes through `.data`. Does not
        wait for the device."""
        return self._versions != [parameter._version for parameter in self.parameters]

    def _overtaken(self) -> Tensor | None:
        """Members that other code has written since the last refold, even with the same numbers, as a restored checkpoint may."""
        pairs = zip(self._versions, self.parameters, strict=True)
        counted = torch.tensor([old != p._version for old, p in pairs], device=self.key.device)
        edited = self.edited()
        flags = counted if edited is None else counted | edited
        return flags if bool(flags.any()) else None

    def edited(self, present: Sequence[Tensor] | None = None) -> Tensor | None:
        """Which matrices somebody else has written since the last refold: [n] booleans (of this rank's shards where they are
        sharded), None where no matrix was. Waits for the device.

        Args:
            present: the matrices whole, which the first look after a state was loaded needs; gathered by themselves if None.
        """
        differs = self._loaded(present) if self.written is None else self._differs()
        if differs is None:
            # what was written since, a loaded adapter say, is what the cores fold to
            self._versions = [parameter._version for parameter in self.parameters]
        if self.overtaken is None or differs is None:
            return differs if self.overtaken is None else self.overtaken
        return differs | self.overtaken

    def named(self, flags: Tensor | None) -> list[str]:
        """Names of the matrices whose flags [n] are set; None for no flags."""
        if flags is None:
            return []
        return [matrix.name for matrix, flag in zip(self.matrices, flags.tolist(), strict=True) if flag]

    def _differs(self) -> Tensor | None:
        """Which matrices hold something else than what was written."""
        assert self.written is not None
        parameters = self.parameters
        if any(hasattr(p, "full_tensor") for p in parameters):
            return self._edited_shards()
        present = self._rows(parameters)
        # a model that was moved or converted since the last step (model.cpu(), model.half()) holds the same
        written = self.written.to(present.device, present.dtype)
        if not differs(present, written):
            return None
        return _unequal(present, written).any(1).to(self.key.device)

    def _edited_shards(self) -> Tensor | None:
        assert self.written is not None
        parts = ranks.local_parts(self.parameters, self.written)
        flags = [differs(ranks.local(p), part) for p, part in zip(self.parameters, parts, strict=True)]
        return torch.tensor(flags, device=self.key.device) if any(flags) else None

    def _loaded(self, whole: Sequence[Tensor] | None) -> Tensor | None:
        """The first look after a state was loaded: whether a matrix differs from what its cores fold to by more than rounding.
        What a matrix that agrees holds counts as written."""
        folded = self.fold()
        # Folding rounds in the cores' dtype once per core. Decomposing, which is done in float64, is the larger error of float64
        # cores. Writing rounds every entry once in the dtype of the matrix.
        many = len(self.key.fused_shapes) * (64 if folded.dtype == torch.float64 else 4)
        bound = torch.finfo(folded.dtype).eps * many * folded.abs().amax(1, keepdim=True)
        # the model may have been moved or converted since, see `_differs`
        present = ranks.stack_rows(self.parameters if whole is None else whole).to(folded.device)
        if present.dtype != folded.dtype:
            bound = bound + torch.finfo(present.dtype).eps * folded.abs()
        agrees = ((present.to(folded.dtype) - folded).abs() <= bound).all(1)  # NaN does not agree
        self.written = torch.where(agrees[:, None], present, folded.to(present.dtype))
        return None if bool(agrees.all()) else ~agrees


def in_dtype(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    """What belongs to cores of another dtype (they themselves, entries of their state, a residual) in that of the cores now. Step counts,
    which have no dimension, keep theirs, as in torch's own loading."""
    return value.to(new) if isinstance(value, Tensor) and value.dim() > 0 and value.dtype == old else value


def differs(present: Tensor, written: Tensor) -> bool:
    """Whether a matrix holds something else than what was written. NaN, which a step that diverged has written, is the same as NaN."""
    return not torch.equal(present, written) and bool(_unequal(present, written).any())


def _unequal(present: Tensor, written: Tensor) -> Tensor:
    return (present != written) & ~(torch.isnan(present) & torch.isnan(written))


def raise_nonfinite(matrices: Iterable[TrainedMatrix], finite: Tensor) -> None:
    """Raise FloatingPointError where a gradient is not finite; the flag is one for each matrix."""
    broken = [matrix.name for matrix, ok in zip(matrices, finite.tolist(), strict=True) if not ok]
    if broken:
        raise FloatingPointError(
            f"the gradient of {', '.join(broken[:5])} holds NaN or infinity; nothing was changed. Lower the learning rate, "
            "clip gradients, skip this batch (zero_grad and go on), or use a GradScaler for float16"
        )


def _part(value: Any, piece: Piece, start: int, size: int) -> Any:
    """The share of one core in an entry of its piece's state."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() == piece.parameter.numel() != size:
        return value.view(-1)[start - piece.start : start - piece.start + size]
    return value if value.dim() > 0 else value.clone()


def _join(states: Sequence[Mapping[str, Any]], parameter: nn.Parameter) -> dict[str, Any]:
    """State of a piece from those of the cores in it, in order. Their scalars (step counts) are equal."""
    if not states:
        return {}
    joined: dict[str, Any] = {}
    for key, first in states[0].items():
        if not isinstance(first, Tensor):
            joined[key] = first
        elif first.dim() == 0:
            joined[key] = first.clone()
        elif len(states) == 1 and first.numel() != parameter.numel():
            joined[key] = first.to(parameter.device, copy=True)
        else:
            value = torch.cat([state[key].reshape(-1) for state in states]).to(parameter.device)
            joined[key] = value.view(parameter.shape)
    return joined
