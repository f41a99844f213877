"""Storage of the cores: one flat buffer per cohort, laid out by site, that folds and pulls back as one batch.

A cohort is the expanded matrices of one device and optimizer group whose cores can be contracted as one batch: those of one
structure, and of structures that differ only in which share of a site is rows and which is columns, such as the `A` and
`B` of transposed shapes. Letters: n = members, k = site (or core), core_k = shape of core k, numel = entries of a matrix. The
buffer holds `[site 0: n x core_0][site 1: n x core_1]...`, so the stacked cores of a site are one contiguous tensor however
many rounds of expansion brought the members in.

What the optimizer steps are *pieces*: contiguous ranges of the buffer, lent as Parameters with a state of their own.
- whole: the buffer itself, for an elementwise optimizer while all members are of one round;
- one per site and round, for an elementwise optimizer after later rounds (step counts differ between rounds);
- one per site and member otherwise, as a matrix, so that optimizers that look at shapes see an unfolding of the core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.engine.handover import what_is_behind
from tnadapt.factorizations import Factorization, Structure, Workspace, rows_from_sites, rows_to_sites
from tnadapt.lora_matrices import LoraMatrix

#: rounds of shortening a step at most; two are enough unless a step goes far beyond its limit
_SHORTENINGS = 8

__all__ = ["Cohort", "Member", "Piece", "matrix_view_shape"]


@dataclass(eq=False)
class Member:
    """One expanded matrix of a cohort.

    Attributes:
        matrix: the LoRA matrix.
        round: number that members share which were expanded together, or with the same step counts behind them, and had
            gradients in the same steps since.
        cores: its cores, before they enter the buffer.
        state: optimizer state of each core, where it brings one along.
        residual: what its cores missed of the matrix at expansion, None where they are exact.
    """

    matrix: LoraMatrix
    round: int
    cores: Sequence[Tensor]
    state: list[dict[str, Any]] | None = None
    residual: Tensor | None = None


@dataclass(eq=False)
class Piece:
    """A contiguous range of the buffer that the optimizer steps as one Parameter."""

    start: int
    shape: tuple[int, ...]
    members: range
    parameter: nn.Parameter
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def matrix_view_shape(core_shape: Sequence[int]) -> tuple[int, int]:
    """The unfolding of a core into a matrix that is nearest to square."""
    splits = [(math.prod(core_shape[:k]), math.prod(core_shape[k:])) for k in range(1, len(core_shape))]
    return min(splits, key=lambda split: abs(math.log(split[0] / split[1])))


class Cohort:
    """The cores of matrices that are contracted and stepped together, and the work on all of them.

    Args:
        members: matrices whose structures have the same fused shapes (see `Factorization.fused_shapes`).
    """

    def __init__(
        self,
        factorization: Factorization,
        dtype: torch.dtype,
        device: torch.device,
        elementwise: bool,
        members: Sequence[Member],
    ) -> None:
        self.factorization = factorization
        self.dtype = dtype
        self.device = device
        self.elementwise = elementwise
        # members that are stepped as one stay together, so that their ranges are contiguous, and of these those of one shape
        stacks = {id(member): repr(_stack_of(member)) if elementwise else "" for member in members}
        ordered = sorted(members, key=lambda member: (member.round, stacks[id(member)], member.matrix.shape))
        #: ranges of members that are stepped as one tensor
        self.spans = _runs([stacks[id(member)] or id(member) for member in ordered])
        #: which matrices, without tensors
        self.members = [replace(member, cores=(), state=None, residual=None) for member in ordered]
        self.structures: list[Structure] = [factorization.structure(member.matrix.shape) for member in ordered]
        #: shapes of the cores with each site as one mode; all members have the same
        self.fused_shapes = factorization.fused_shapes(self.structures[0].core_shapes)
        self.buffer = torch.empty(
            sum(structure.num_parameters for structure in self.structures), dtype=dtype, device=device
        )
        for k, site in enumerate(self.stacked(self.buffer)):
            for row, member in zip(site, ordered, strict=True):
                row.copy_(member.cores[k].reshape(row.shape))
        residuals = [member.residual.reshape(-1) for member in ordered if member.residual is not None]
        #: what the cores of each member miss, [n, numel]; None where the structure is exact
        self.residual = torch.stack(residuals).to(device) if residuals else None
        self.pieces = self._make_pieces(ordered)
        #: runs of members of one shape, and their structure
        self._shapes = [
            (slice(run.start, run.stop), self.structures[run.start])
            for run in _runs([member.matrix.shape for member in ordered])
        ]
        self.grad: Tensor | None = None
        #: whether the cores are lent, or were stepped and not folded since
        self.stepped = False
        #: which members rest in the coming step
        self.idle: list[int] = []
        #: what the cores folded to last, [n, numel], where the parameters do not tell (sharded, or of lower precision)
        self.written: Tensor | None = None
        #: of the parameters when they were last written or left alone by a refold; None where they do not tell
        self.checksums: Tensor | None = None
        #: torch's count of writes to each matrix, after it was refolded
        self.versions: list[int] = []
        #: largest norm of a member's update in the coming step; None for no limit
        self.limit: float | None = None
        self._before_step: Tensor | None = None
        self._workspace: Workspace | None = None

    # -- layout -------------------------------------------------------------------------------------------------------

    def stacked(self, buffer: Tensor) -> list[Tensor]:
        """Views of `buffer` per site, with rows and columns of the site as one mode: [n, *fused_k]."""
        n, offset, views = len(self.members), 0, []
        for shape in self.fused_shapes:
            size = n * math.prod(shape)
            views.append(buffer[offset : offset + size].view(n, *shape))
            offset += size
        return views

    def _make_pieces(self, members: Sequence[Member]) -> list[Piece]:
        n = len(members)
        if self.elementwise and len(self.spans) == 1:
            states = [s for k in range(len(self.fused_shapes)) for m in members for s in _state_of(m, k)]
            return [self._piece(0, (self.buffer.numel(),), range(n), states)]
        pieces: list[Piece] = []
        offset = 0
        for k, shape in enumerate(self.fused_shapes):
            size = math.prod(shape)
            for span in self.spans:
                states = [s for m in span for s in _state_of(members[m], k)]
                view: tuple[int, ...] = (len(span) * size,)
                if not self.elementwise:
                    view = matrix_view_shape(self.structures[span.start].core_shapes[k])
                pieces.append(self._piece(offset + span.start * size, view, span, states))
            offset += n * size
        return pieces

    def extract(self) -> list[Member]:
        """The members with their cores and state as views into the storage; a new cohort made of them copies."""
        sites = self.stacked(self.buffer)
        return [
            replace(
                member,
                cores=[site[m].view(shape) for site, shape in zip(sites, self.structures[m].core_shapes, strict=True)],
                state=self.core_states(m),
                residual=None if self.residual is None else self.residual[m].view(member.matrix.shape),
            )
            for m, member in enumerate(self.members)
        ]

    def core_states(self, m: int) -> list[dict[str, Any]]:
        """Optimizer state of each core of member `m`; entries of the cores' size are views into the stacked state."""
        states: list[dict[str, Any]] = []
        offset = 0
        for shape in self.fused_shapes:
            size = math.prod(shape)
            start = offset + m * size
            piece = next(p for p in self.pieces if p.start <= start < p.start + p.numel)
            states.append({key: _part(value, piece, start, size) for key, value in piece.state.items()})
            offset += len(self.members) * size
        return states

    def with_members(self, members: Sequence[Member]) -> Cohort:
        """A cohort like this one with other members; this one stays as it is."""
        return Cohort(self.factorization, self.dtype, self.device, self.elementwise, members)

    def round_like(self, member: Member) -> int | None:
        """Round of the members that the cores of a new one can be stepped with, as one tensor; None where there are none."""
        for span in self.spans if self.elementwise else ():
            present = replace(self.members[span.start], state=self.core_states(span.start))
            if _stack_of(replace(member, round=present.round)) == _stack_of(present):
                return present.round
        return None

    def with_round(self, chosen: Sequence[int], number: int) -> Cohort:
        """A cohort in which the `chosen` members are a round of their own."""
        rest = set(chosen)
        return self.with_members([replace(m, round=number) if k in rest else m for k, m in enumerate(self.extract())])

    def _piece(self, start: int, shape: tuple[int, ...], members: range, states: list[dict[str, Any]]) -> Piece:
        parameter = nn.Parameter(self.buffer[start : start + math.prod(shape)].view(shape))
        return Piece(start, shape, members, parameter, _join(states, parameter))

    # -- the work of a step -------------------------------------------------------------------------------------------

    def fold(self) -> Tensor:
        """All members folded, residuals added: [n, numel]. Keeps what the next pull-back reuses."""
        flat = self._ready_workspace().contract()
        rows = torch.empty_like(flat)
        for run, structure in self._shapes:
            rows_from_sites(flat[run], structure.sites, rows[run])
        return rows if self.residual is None else rows.add_(self.residual)

    def pull_back(self, grads: Tensor) -> None:
        """Compute core gradients from matrix gradients [n, numel], laid out like the cores."""
        flat = torch.empty_like(grads)
        for run, structure in self._shapes:
            rows_to_sites(grads[run], structure.sites, flat[run])
        self.grad = self._ready_workspace().pull_back(flat)
        if not self.elementwise:
            # torch's own optimizers copy what they keep of a gradient, others may not: their memory is not used again
            self._workspace = None

    def _ready_workspace(self) -> Workspace:
        if self._workspace is None:
            with torch.inference_mode(False):  # its memory is written in training, wherever it is made
                self._workspace = self.factorization.workspace(self.stacked(self.buffer))
        return self._workspace

    def close(self) -> None:
        """Free what only training needs; the cores stay."""
        self._workspace = None

    def lend(self, active: Callable[[Member], bool]) -> list[Piece]:
        """Give pieces whose members are `active` their gradients; the others are not stepped."""
        assert self.grad is not None
        self._before_step = None if self.limit is None else self.buffer.clone()
        moves = [active(member) for member in self.members]
        self.idle = [m for m, moving in enumerate(moves) if not moving]
        lent = [piece for piece in self.pieces if all(moves[piece.members.start : piece.members.stop])]
        for piece in lent:
            grad = self.grad[piece.start : piece.start + piece.parameter.numel()]
            piece.parameter.grad = grad if len(piece.shape) == 1 else grad.view(piece.shape)
        self.stepped = True
        return lent

    def shorten(self, values: Tensor, before: Tensor) -> Tensor:
        """Move the cores of members whose matrix went further from `before` to `values` than `limit` back towards where they
        were, until it is not; returns all members folded. The step of the cores is scaled, so its direction is kept; since the
        matrix is not linear in that, it may take a few rounds."""
        assert self.limit is not None
        assert self._before_step is not None
        start, stepped = self._before_step, self.buffer.clone()
        scale = torch.ones(len(self.members), dtype=self.dtype, device=self.device)
        for _ in range(_SHORTENINGS):
            norms = torch.linalg.vector_norm(values - before, dim=1)
            if bool((norms <= self.limit * (1 + 1e-3)).all()):
                break
            # a norm of zero is within any limit, also within one of zero (the first step of a warm-up)
            scale = scale * torch.where(norms > self.limit, self.limit / norms, torch.ones_like(norms))
            for now, old, new in zip(*map(self.stacked, (self.buffer, start, stepped)), strict=True):
                torch.lerp(old, new, scale.view(-1, *[1] * (new.dim() - 1)), out=now)
            values = self.fold()
        return values

    def settle(self) -> None:
        """The step is over: the matrices are what the cores fold to."""
        self.stepped = False
        self._before_step = None

    def clear_grad(self) -> None:
        """Free the core gradients."""
        self.grad = None
        for piece in self.pieces:
            piece.parameter.grad = None


def _runs(keys: Sequence[Any]) -> list[range]:
    """Ranges of neighbours with equal keys."""
    runs: list[range] = []
    for k, key in enumerate(keys):
        if runs and keys[k - 1] == key:
            runs[-1] = range(runs[-1].start, k + 1)
        else:
            runs.append(range(k, k + 1))
    return runs


def _stack_of(member: Member) -> tuple[int, list[tuple[str, float | None]]]:
    """What members have in common that are stepped as one tensor."""
    return member.round, what_is_behind(member.state[0] if member.state else {})


def _state_of(member: Member, k: int) -> list[dict[str, Any]]:
    return [] if member.state is None else [member.state[k]]


def _part(value: Any, piece: Piece, start: int, size: int) -> Any:
    """The share of one core in an entry of its piece's state."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() == piece.numel != size:
        return value.view(-1)[start - piece.start : start - piece.start + size]
    return value if value.dim() > 0 else value.clone()


def _join(states: list[dict[str, Any]], parameter: nn.Parameter) -> dict[str, Any]:
    """State of a piece from those of the cores in it, in order. Scalars (step counts) of one round are equal."""
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
