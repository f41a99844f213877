"""Storage of the cores: one flat buffer per cohort, that folds and pulls back as one batch.

A cohort is a set of expanded matrices that are contracted and stepped as one. They share factorization, dtype, device and
optimizer group. Their cores have the same fused shapes (as the `A` and `B` of transposed shapes have). And they have the same
past: equal step counts, and gradients in the same steps.

A cohort keeps cores; a batch does the work of a step on one cohort, or on several small ones, as if they were one.

Letters: n = members, k = site (or core), core_k = shape of core k, numel = entries of a matrix. The buffer of a large cohort is laid
out by site, `[site 0: n x core_0][site 1: n x core_1]...`, as kernels lay out gradients. That of a small one is laid out by member,
`[member 0: core_0, core_1, ...][member 1: ...]...`, so that it can be copied beside others in one go. Matrices are handled as rows:
[n, numel], each row-major.

The optimizer steps *pieces* of the buffer, each lent as a Parameter with a state of its own. An elementwise optimizer gets
the whole buffer as one piece. Any other gets one piece per member and site, as a matrix, so that it sees an unfolding of a core.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from tnadapt.backends import Kernel
from tnadapt.engine import ranks
from tnadapt.engine.scaling import cap_tolerance, match_tolerance, search_scale
from tnadapt.factorizations import Factorization, site_axes
from tnadapt.matrices import TrainedMatrix

__all__ = [
    "JOIN_BYTES",
    "STACK_BYTES",
    "Batch",
    "Bench",
    "Cohort",
    "Key",
    "Member",
    "Piece",
    "Stack",
    "batches",
    "differs",
    "in_dtype",
    "matrix_view_shape",
    "state_signature",
]

#: Bytes of cores that one cohort stacks at most, and of matrices that are unfolded as one batch; a matrix whose cores are
#: larger is alone. It bounds the scratch of a step. Below a hundredth of it, launches cost more than arithmetic.
STACK_BYTES = 2**28

#: Bytes of cores up to which a cohort is copied beside others to be contracted with them; launches of its own cost more.
JOIN_BYTES = 2**19


#: numbers of a matrix up to which a bench has a table of their places
_LOOKED_UP = 2**12


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
    def sizes(self) -> list[int]:
        """How many numbers the core of each site has."""
        return [math.prod(shape) for shape in self.fused_shapes]

    @property
    def size(self) -> int:
        """How many numbers the cores of a matrix have."""
        return sum(self.sizes)

    @property
    def capacity(self) -> int:
        """How many matrices may be stacked, see `STACK_BYTES`."""
        return max(1, STACK_BYTES // (self.dtype.itemsize * self.size))


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


class Stack:
    """Cores of matrices that are contracted as one, in one flat buffer.

    Args:
        key: what the matrices have in common.
        shapes: of the matrices; where equal ones stand together, each shape is permuted in one go.
        by_member: whether the buffer is laid out by member; by site otherwise.
    """

    def __init__(self, key: Key, shapes: Sequence[tuple[int, int]], by_member: bool) -> None:
        self.key = key
        self._by_member = by_member
        self._count, self._sizes = len(shapes), key.sizes
        self.buffer = torch.empty(self._count * key.size, dtype=key.dtype, device=key.device)
        #: the stacked cores of each site, [n, *fused_k]
        self.sites = self.by_site(self.buffer)
        runs = [(shape, len(list(run))) for shape, run in groupby(shapes)]
        # how many matrices of each shape follow each other
        self._runs = [length for _, length in runs]
        self._axes = [site_axes(key.factorization.structure(shape).sites) for shape, _ in runs]
        self._kernel: Kernel | None = None
        # gradients where they are laid out by member, and the cores before the step and after it where steps are scaled; they stay,
        # since new memory costs as much as the copy
        self._grads: Tensor | None = None
        self._kept: tuple[Tensor, Tensor] | None = None

    def by_site(self, flat: Tensor) -> list[Tensor]:
        """Views of a tensor like the buffer, one per site: [n, *fused_k]."""
        parts = torch.split(flat.view(self._count, -1), self._sizes, 1) if self._by_member else self._split(flat)
        return [part.view(self._count, *shape) for part, shape in zip(parts, self.key.fused_shapes, strict=True)]

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The parts of a tensor that is laid out by site."""
        return torch.split(flat, [self._count * size for size in self._sizes])

    def starts(self) -> list[tuple[int, int, int]]:
        """Of each core in the buffer, in order: where it begins, its member, and its site."""
        members = range(self._count)
        return sorted((self.start(k, m), m, k) for k in range(len(self.sites)) for m in members)

    def start(self, k: int, m: int) -> int:
        """Where the core of site `k` of member `m` begins in the buffer."""
        return int(self.sites[k].storage_offset() + m * self.sites[k].stride(0))

    def contract(self) -> Tensor:
        """What the cores fold to, [n, numel]. Keeps what the next pull-back reuses."""
        return self._reordered(self._contraction().contract(), back=True)

    def pull_back(self, grads: Tensor) -> Tensor:
        """Gradients [n, numel] of the matrices pulled back to the cores, laid out like the buffer; they last until the next
        contraction or pull-back."""
        flat = self._contraction().pull_back(self._reordered(grads, back=False))
        if not self._by_member or self._count == 1:
            return flat
        if self._grads is None:
            self._grads = torch.empty_like(flat)
        by_site = [part.view(self._count, -1) for part in self._split(flat)]
        torch.cat(by_site, 1, out=self._grads.view(self._count, -1))
        return self._grads

    def give_away_gradients(self) -> None:
        """The memory of the gradients that were pulled back last is not used again."""
        if self._grads is None:
            self._kernel = None
        self._grads = None

    def _reordered(self, rows: Tensor, back: bool) -> Tensor:
        """Rows [n, numel] with the axes of each matrix in the order of its sites, or back in its own."""
        made = torch.empty_like(rows)
        parts, outs = torch.split(rows, self._runs), torch.split(made, self._runs)
        for part, out, axes in zip(parts, outs, self._axes, strict=True):
            sizes, order = axes[2:] if back else axes[:2]
            permuted = part.view(-1, *sizes).permute(0, *order)
            out.view(permuted.shape).copy_(permuted)
        return made

    def _contraction(self) -> Kernel:
        if self._kernel is None:
            with torch.inference_mode(False):  # its memory is written in training, wherever it is made
                self._kernel = self.key.factorization.kernel(self.sites)
        return self._kernel

    def keep(self) -> None:
        """Keep a copy of the cores for `steps`."""
        if self._kept is None:
            self._kept = torch.empty_like(self.buffer), torch.empty_like(self.buffer)
        self._kept[0].copy_(self.buffer)

    def steps(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each site: the cores, a copy of them from when they were kept, and a copy of them as they are now."""
        assert self._kept is not None
        self._kept[1].copy_(self.buffer)
        return list(zip(self.sites, *map(self.by_site, self._kept), strict=True))

    def close(self) -> None:
        """Free what only training needs; the cores stay."""
        self._kernel = self._grads = self._kept = None


class Bench(Stack):
    """Where the cores of several cohorts stand side by side, in their order, while they are contracted as one.

    Args:
        key: of the cohorts.
        layouts: shapes of the members of each.
    """

    def __init__(self, key: Key, layouts: Sequence[Sequence[tuple[int, int]]]) -> None:
        super().__init__(key, list(chain(*layouts)), by_member=True)
        #: members of each cohort
        self.lengths = [len(shapes) for shapes in layouts]
        # where each number comes from, there and back: with shapes in any order, one look-up is faster than a copy for each run;
        # of large matrices it is not, and the table would be larger than they are
        numel = math.prod(layouts[0][0])
        self._sources: list[Tensor] | None = None
        if numel <= _LOOKED_UP:
            numbers = torch.arange(self._count * numel, dtype=torch.int32, device=key.device).view(-1, numel)
            self._sources = [super(Bench, self)._reordered(numbers, back).view(-1) for back in (False, True)]

    def _reordered(self, rows: Tensor, back: bool) -> Tensor:
        if self._sources is None:
            return super()._reordered(rows, back)
        return rows.view(-1).index_select(0, self._sources[back]).view_as(rows)

    def take(self, cohorts: Sequence[Cohort]) -> None:
        """Copy the cores of cohorts here. What was kept of the last contraction, here and there, is not true any more."""
        for cohort in cohorts:
            cohort.stack.close()
        torch.cat([cohort.buffer for cohort in cohorts], out=self.buffer)
        self._contraction().forget()

    def give(self, cohorts: Sequence[Cohort]) -> None:
        """Copy the cores back."""
        torch._foreach_copy_([cohort.buffer for cohort in cohorts], self.dealt(self.buffer))

    def dealt(self, flat: Tensor) -> list[Tensor]:
        """Of a tensor like the buffer, the part of each cohort, laid out like its own."""
        return list(torch.split(flat, [length * self.key.size for length in self.lengths]))


class Cohort:
    """The cores of matrices that are stepped as one, what the optimizer knows of them, and what they were folded to last.

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
        self.shapes = tuple(matrix.shape for matrix in self.matrices)
        self.structures = [key.factorization.structure(shape) for shape in self.shapes]
        #: whether its cores are copied to a bench where others are active too
        self.small = len(members) * key.size * key.dtype.itemsize <= JOIN_BYTES
        self.stack = Stack(key, self.shapes, by_member=self.small)
        for k, site in enumerate(self.stack.sites):
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
        #: by how much the steps of the cores were scaled last, [n]: where the search for the next scale begins
        scales = [member.scale for member in members if member.scale is not None]
        self.scale = torch.stack(scales).to(key.device, key.dtype) if len(scales) == len(members) else None
        self.counted()

    # -- layout -------------------------------------------------------------------------------------------------------

    @property
    def buffer(self) -> Tensor:
        """All cores, flat."""
        return self.stack.buffer

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The matrices' parameters."""
        return [matrix.parameter for matrix in self.matrices]

    def _make_pieces(self, members: Sequence[Member]) -> list[Piece]:
        starts = self.stack.starts()
        known = [[] if (states := members[m].state) is None else [states[k]] for _, m, k in starts]
        if self.elementwise:
            return [self._piece(0, self.buffer, list(chain(*known)))]
        pieces: list[Piece] = []
        for (start, m, k), state in zip(starts, known, strict=True):
            shape = self.structures[m].core_shapes[k]
            view = self.buffer[start : start + math.prod(shape)].view(matrix_view_shape(shape))
            pieces.append(self._piece(start, view, state))
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
                [site[m].view(shape) for site, shape in zip(self.stack.sites, structure.core_shapes, strict=True)],
                None if self.written is None else self.written[m],
                self._core_states(m),
                None if self.residual is None else self.residual[m].view(matrix.shape),
                None if self.update_norms is None else self.update_norms[m],
                None if self.scale is None else self.scale[m],
            )
            for m, (matrix, structure) in enumerate(zip(self.matrices, self.structures, strict=True))
        ]

    def _core_states(self, m: int) -> list[dict[str, Any]]:
        """Optimizer state of each core of member `m`; entries of the size of cores are views into that of their piece."""
        states: list[dict[str, Any]] = []
        for k, size in enumerate(self.key.sizes):
            start = self.stack.start(k, m)
            piece = next(p for p in self.pieces if p.start <= start < p.stop)
            states.append({key: _part(value, piece, start, size) for key, value in piece.state.items()})
        return states

    def signature(self) -> Any:
        """What a newcomer must equal to be stepped together with the members; None where any can."""
        return state_signature(self.pieces[0].state) if self.elementwise else None

    # -- the loan -----------------------------------------------------------------------------------------------------

    def lend(self) -> list[Piece]:
        """Give the pieces their gradients: the optimizer may step them now."""
        assert self.grad is not None
        for piece in self.pieces:
            piece.parameter.grad = self.grad[piece.start : piece.stop].view(piece.parameter.shape)
        self.lent = True
        return self.pieces

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

    # -- writes of others ---------------------------------------------------------------------------------------------

    def counted(self) -> None:
        """Writes to the matrices that torch has counted until now are known."""
        self._versions = [parameter._version for parameter in self.parameters]

    def was_written_to(self) -> bool:
        """Whether torch has counted a write to a matrix since the last refold. It does not count writes through `.data`. Does not
        wait for the device."""
        return self._versions != [parameter._version for parameter in self.parameters]

    def find_overtaken(self) -> Tensor | None:
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
            self.counted()
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
        present = _rows(parameters)
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
        folded = Batch([self]).fold()
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


class Batch:
    """Cohorts on which the work of a step is done as if they were one.

    A cohort alone is contracted where its cores are. Several are copied to a bench: they are stepped apart, since their members
    have pasts of their own, as those of experts have of which few are active in a step.

    Args:
        cohorts: of one key.
        bench: laid out for them; None for one cohort.
    """

    def __init__(self, cohorts: Sequence[Cohort], bench: Bench | None = None) -> None:
        self.cohorts = cohorts
        self.key = cohorts[0].key
        self._bench = bench
        self._stack = cohorts[0].stack if bench is None else bench
        self.matrices = [matrix for cohort in cohorts for matrix in cohort.matrices]
        #: largest Frobenius norm of an update in the coming step; None for no cap
        self.cap: float | None = None

    @property
    def lent(self) -> bool:
        """Whether cores are with the optimizer, or have come back and are not folded yet."""
        return any(cohort.lent for cohort in self.cohorts)

    def _gathered(self, of_cohorts: Sequence[Tensor | None]) -> Tensor | None:
        """One tensor for each cohort, with a row for each member, as one; None where a cohort has none."""
        known = [each for each in of_cohorts if each is not None]
        if len(known) < len(of_cohorts):
            return None
        return known[0] if self._bench is None else torch.cat(known)

    def _parted(self, rows: Tensor) -> Sequence[Tensor]:
        """The inverse: the rows of each cohort."""
        return [rows] if self._bench is None else torch.split(rows, self._bench.lengths)

    def pull_back(self, gradients: Sequence[Tensor] | None = None) -> Tensor | None:
        """Pull the gradients of the matrices back to the cores.

        Off the CPU, where looking would wait for the device, zeros are pulled back in place of gradients that are not finite.
        Returns the boolean that tells whether they were finite there, None on the CPU.

        Args:
            gradients: of `matrices`, whole; those of the parameters if None.

        Raises:
            FloatingPointError: a gradient holds NaN or infinity, on the CPU.
        """
        if gradients is None:
            gradients = [m.parameter.grad for m in self.matrices if m.parameter.grad is not None]
        assert len(gradients) == len(self.matrices), "members of a cohort have gradients in the same steps"
        grads = _rows(gradients).detach().to(self.key.dtype)
        finite = None
        if self.key.device.type == "cpu":
            # a finite sum has finite terms: one fast pass; where it overflows, each entry is looked at
            if not math.isfinite(float(grads.sum())):
                raise_nonfinite(self.matrices, torch.isfinite(grads).all(1))
        else:
            finite = torch.isfinite(grads).all()
            grads = torch.where(finite, grads, torch.zeros((), dtype=grads.dtype, device=grads.device))
        if self._bench is not None:
            self._bench.take(self.cohorts)
        flat = self._stack.pull_back(grads)
        for cohort, grad in zip(self.cohorts, [flat] if self._bench is None else self._bench.dealt(flat), strict=True):
            cohort.grad = grad
        if not self.cohorts[0].elementwise:
            # torch's own optimizers copy what they keep of a gradient, others may not
            self._stack.give_away_gradients()
        return finite

    def lend(self, cap: float | None, matched: bool) -> list[Piece]:
        """Give the pieces their gradients: the optimizer may step them now.

        Args:
            cap: largest Frobenius norm that the update of a matrix may have; None for no cap.
            matched: whether the optimizer steps the matrices too, and their updates are to be as long as it makes them.
        """
        self.cap = cap
        if matched or cap is not None:
            self._stack.keep()
        return [piece for cohort in self.cohorts for piece in cohort.lend()]

    def fold(self) -> Tensor:
        """All members folded, residuals added: [n, numel] in the dtype of the cores. Keeps what the next pull-back reuses."""
        rows = self._stack.contract()
        residual = self._gathered([cohort.residual for cohort in self.cohorts])
        return rows if residual is None else rows.add_(residual)

    def refold(self, matched: bool = False, shadows: Sequence[Tensor] | None = None, died: bool = False) -> None:
        """Write what the stepped cores fold to into the matrices, and let go of the core gradients.

        Args:
            matched: whether updates are to be as long as those that the optimizer has made of the matrices.
            shadows: the matrices as the optimizer has stepped them, whole; the parameters if None.
            died: the step was broken off. Matrices that were written since are left as they are, and `edited` names them.
        """
        for cohort in self.cohorts:
            cohort.release_gradients()
            cohort.overtaken = cohort.find_overtaken() if died else None
        if self._bench is not None:
            self._bench.take(self.cohorts)
        parameters = [matrix.parameter for matrix in self.matrices]
        before = self._gathered([cohort.written for cohort in self.cohorts])
        assert before is not None, "a matrix is looked at before its cores are stepped"
        start = before.to(self.key.dtype)
        if matched:
            shadow = torch.linalg.vector_norm(_rows(shadows or parameters).to(start.dtype) - start, dim=1)
            values = self._rescaled(start, shadow, exactly=True)
        elif self.cap is not None:
            values = self._rescaled(start, torch.full_like(start[:, 0], self.cap), exactly=False)
        else:
            values = self.fold()
        written = values.to(self.key.matrix_dtype)
        norms = torch.linalg.vector_norm(values - before, dim=1)
        targets, rows_of_targets = parameters, written
        if any(cohort.overtaken is not None for cohort in self.cohorts):
            nobody = torch.zeros(1, dtype=torch.bool, device=self.key.device)
            flags = (nobody.expand(len(c.matrices)) if c.overtaken is None else c.overtaken for c in self.cohorts)
            except_for = self._gathered(list(flags))
            assert except_for is not None
            written = torch.where(except_for[:, None], before, written)
            moved = torch.nonzero(~except_for).flatten()
            targets, rows_of_targets = [parameters[m] for m in moved.tolist()], written[moved]
        # all memory is there before a matrix is written
        parts = list(zip(self.cohorts, self._parted(written), self._parted(norms), strict=True))
        _write(targets, rows_of_targets)
        for cohort, rows, norm in parts:
            cohort.written, cohort.update_norms = rows, norm
            cohort.counted()
            cohort.settle()

    def _rescaled(self, before: Tensor, wanted: Tensor, exactly: bool) -> Tensor:
        """Scale the step of the cores of each member so that its matrix moves from `before` by the wanted length; returns all
        members folded.

        Args:
            before: what the matrices hold, [n, numel].
            wanted: Frobenius norm of each update, [n].
            exactly: whether shorter steps are lengthened too; they are left alone otherwise.
        """
        sites = self._stack.steps()
        one, values = torch.ones_like(wanted), before

        def length_at(scale: Tensor) -> Tensor:
            nonlocal values
            if scale is not one:
                for now, old, new in sites:
                    torch.lerp(old, new, scale.view(-1, *[1] * (new.dim() - 1)), out=now)
            values = self.fold()
            # what overflowed on the way is too long
            norms: Tensor = torch.linalg.vector_norm(values - before, dim=1)
            return norms.nan_to_num(math.inf, math.inf)

        # the scale of the step before is near already
        first = self._gathered([cohort.scale for cohort in self.cohorts]) if exactly else None
        tolerance = match_tolerance(before, wanted) if exactly else cap_tolerance(wanted)
        scale = search_scale(length_at, wanted, one if first is None else first, tolerance, only_shorten=not exactly)
        for cohort, found in zip(self.cohorts, self._parted(torch.where(scale > 0, scale, one)), strict=True):
            cohort.scale = found if exactly else None
        if self._bench is not None:
            self._bench.give(self.cohorts)
        return values


def batches(cohorts: Iterable[Cohort], benches: Mapping[Any, Bench]) -> tuple[list[Batch], dict[Any, Bench]]:
    """Batches of all cohorts, of which small ones of one key are together, and the benches that they use.

    Args:
        benches: of the last step; those that fit are used again.
    """
    found: list[list[Cohort]] = []
    # of each key: the group that is being filled, and for how many more matrices it has room
    filling: dict[Key, tuple[list[Cohort], int]] = {}
    for cohort in cohorts:
        if not cohort.small:
            found.append([cohort])
            continue
        many = len(cohort.matrices)
        group, room = filling.get(cohort.key, ([], 0))
        if many > room:
            group, room = [], cohort.key.capacity
            found.append(group)
        group.append(cohort)
        filling[cohort.key] = group, room - many
    made: list[Batch] = []
    used: dict[Any, Bench] = {}
    for number, group in enumerate(found):
        if len(group) == 1:
            made.append(Batch(group))
            continue
        place = number, group[0].key, tuple(cohort.shapes for cohort in group)
        used[place] = benches.get(place) or Bench(group[0].key, place[2])
        made.append(Batch(group, used[place]))
    return made, used


def _rows(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one size as rows [n, numel], gathered where they are sharded; may be a view of an only one."""
    if any(hasattr(t, "full_tensor") for t in tensors):
        return ranks.stack_rows(tensors)
    flat: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return flat.view(len(tensors), -1)


def _write(tensors: Sequence[Tensor], rows: Tensor) -> None:
    """The inverse, in place: rows [n, numel] into tensors, or each rank's shard of them where they are sharded."""
    if any(hasattr(t, "full_tensor") for t in tensors):
        ranks.write_rows(tensors, rows)
    elif tensors:
        torch._foreach_copy_(list(tensors), list(_unflatten_dense_tensors(rows.reshape(-1), tensors)))  # type: ignore[no-untyped-call]


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
