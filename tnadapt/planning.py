"""`plan`: what a factorization would do to a model, as a table, before any training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from tnadapt.factorizations import Factorization, Structure
from tnadapt.matrices import Skipped, TrainedMatrix, find_lora_matrices
from tnadapt.schedulers import by_group

__all__ = ["Plan", "PlanRow", "plan"]

#: below this growth of a matrix's parameters, expanding it changes next to nothing
_LITTLE_GAIN = 1.1


@dataclass(frozen=True)
class PlanRow:
    """Matrices of one group and shape.

    Attributes:
        group: the group they are ranked in.
        count: how many there are.
        expanded: how many would be expanded.
        structure: what each would become.
    """

    group: str
    count: int
    expanded: int
    structure: Structure

    @property
    def lora_parameters(self) -> int:
        """Numbers in the matrices."""
        rows, cols = self.structure.shape
        return self.count * rows * cols

    @property
    def trained_parameters(self) -> int:
        """Numbers trained once all of `expanded` are: cores in place of those matrices."""
        return self.lora_parameters + self.expanded * self.structure.added_parameters


@dataclass(frozen=True)
class Plan:
    """The table that `plan` makes; `print` it."""

    factorization: Factorization
    rows: tuple[PlanRow, ...]
    skipped: tuple[Skipped, ...]

    @property
    def lora_parameters(self) -> int:
        """Numbers in all LoRA matrices that can be expanded: what the model keeps."""
        return sum(row.lora_parameters for row in self.rows)

    @property
    def trained_parameters(self) -> int:
        """Numbers trained at the end, cores in place of the expanded matrices."""
        return sum(row.trained_parameters for row in self.rows)

    @property
    def advice(self) -> tuple[str, ...]:
        """What to know before training, in plain sentences."""
        lines: list[str] = []
        for structure in dict.fromkeys(row.structure for row in self.rows if row.expanded):
            rows, cols = structure.shape
            scalars = sum(math.prod(shape) > 1 for shape in structure.core_shapes) <= 1
            if scalars or structure.expansion < _LITTLE_GAIN:
                found = (
                    "all cores but one are single numbers"
                    if scalars
                    else f"the cores have only {structure.expansion:.2f}x its parameters"
                )
                lines.append(
                    f"{rows}x{cols}: little to gain, {found} ({_why_little(structure)}). Leave such matrices out (Static with a pattern), choose a rank and "
                    "dimensions that split, or give explicit sites"
                )
            if not structure.exact:
                lines.append(
                    f"{rows}x{cols}: truncated; what the cores miss is kept as a frozen residual, one more matrix each"
                )
        if self.skipped:
            shown = "; ".join(f"{s.name}: {s.reason}" for s in self.skipped[:3])
            more = f"; and {len(self.skipped) - 3} more" if len(self.skipped) > 3 else ""
            lines.append(f"{len(self.skipped)} LoRA weights are left as they are ({shown}{more})")
        return tuple(lines)

    def __str__(self) -> str:
        header = ("group", "matrices", "shape", "expanded", "widest core", "parameters each", "growth")
        body = [
            (
                row.group,
                f"{row.count}",
                "{}x{}".format(*row.structure.shape),
                f"{row.expanded}",
                "x".join(map(str, max(row.structure.core_shapes, key=lambda shape: math.prod(shape)))),
                f"{row.structure.shape[0] * row.structure.shape[1]:,} -> {row.structure.num_parameters:,}",
                f"{row.structure.expansion:.2f}x",
            )
            for row in self.rows
        ]
        widths = [max(len(line[k]) for line in (header, *body)) for k in range(len(header))]
        table = [
            "  ".join(
                cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in (header, tuple("-" * w for w in widths), *body)
        ]
        ratio = self.trained_parameters / max(self.lora_parameters, 1)
        title = (
            f"{self.factorization.label}: {self.lora_parameters:,} LoRA parameters, "
            f"{self.trained_parameters:,} trained ({ratio:.2f}x)"
        )
        return "\n".join([title, "", *table, *([""] if self.advice else []), *(f"- {line}" for line in self.advice)])


def plan(
    model: nn.Module,
    factorization: Factorization,
    top_n: int | None = None,
    groups: Callable[[TrainedMatrix], str] | None = None,
) -> Plan:
    """What `factorization` would make of the LoRA matrices of `model`, which may be on the meta device.

    Args:
        top_n: matrices to expand in each group, None for all.
        groups: as for `LoraOver`.

    Raises:
        ValueError: the model has no LoRA matrices, `top_n` is below 1, or the factorization does not fit a shape.
    """
    if top_n is not None and top_n < 1:
        raise ValueError(f"top_n={top_n!r} must be at least 1, or None for every matrix")
    matrices, skipped = find_lora_matrices(model, groups)
    if not matrices:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:3]) or "there is no lora_A/lora_B pair in it"
        raise ValueError(f"nothing to plan: the model has no LoRA matrices that can be expanded ({reasons})")
    rows: list[PlanRow] = []
    for group, members in by_group(matrices).items():
        counts: dict[tuple[int, int], int] = {}
        for matrix in members:
            counts[matrix.shape] = counts.get(matrix.shape, 0) + 1
        budget = len(members) if top_n is None else top_n
        for shape, count in counts.items():
            expanded = min(count, budget)
            budget -= expanded
            rows.append(PlanRow(group, count, expanded, factorization.structure(shape)))
    return Plan(factorization, tuple(rows), tuple(Skipped(s.name, s.reason, s.is_left_out) for s in skipped))


def _why_little(structure: Structure) -> str:
    def prime(n: int) -> bool:
        return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))

    stuck = [f"{n} is prime" for n in structure.shape if prime(n)] + [
        f"{n} cannot be split" for n in structure.shape if n == 1
    ]
    return " and ".join(stuck) if stuck else "its dimensions do not split evenly into these sites"
