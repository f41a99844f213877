"""`plan`: what a factorization would do to a model, as a table, before any training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tnadapt.assignment import FactorizationArgument, assign_factorizations
from tnadapt.costs import Alike, Costs, ModelSize, costs_of
from tnadapt.engine import check_factorization, check_scheduler
from tnadapt.factorizations import Factorization, Structure
from tnadapt.finders import Finder, collect
from tnadapt.matrices import Skipped, TrainedMatrix
from tnadapt.schedulers import Scheduler, by_group

__all__ = ["Plan", "PlanRow", "plan"]

#: below this growth of a matrix's parameters, expanding it changes next to nothing
_LITTLE_GAIN = 1.1


@dataclass(frozen=True)
class PlanRow:
    """Matrices of one group, shape and dtype.

    Attributes:
        group: the group they are ranked in.
        count: how many there are.
        expanded: how many of them would be expanded.
        structure: what each of these would become.
        factorization: what makes its cores.
        dtype: of the matrices.
    """

    group: str
    count: int
    expanded: int
    structure: Structure
    factorization: Factorization
    dtype: torch.dtype

    @property
    def label(self) -> str:
        """The label of the factorization."""
        return self.factorization.label

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
    """The table that `plan` makes; `print` it.

    Attributes:
        rows: matrices that are alike.
        skipped: LoRA weights that are left as they are, with the reason.
        model: the size of the model with its adapters.
    """

    rows: tuple[PlanRow, ...]
    skipped: tuple[Skipped, ...]
    model: ModelSize

    @property
    def lora_parameters(self) -> int:
        """Numbers in all matrices that can be expanded, which is what the model keeps."""
        return sum(row.lora_parameters for row in self.rows)

    @property
    def trained_parameters(self) -> int:
        """Numbers trained at the end, cores in place of the expanded matrices."""
        return sum(row.trained_parameters for row in self.rows)

    def costs(
        self,
        *,
        ranks: int = 1,
        engine: str = "ddp",
        shard: bool = False,
        tokens_per_step: int | None = None,
        optimizer_state: int = 2,
        decompose_rate: float | None = None,
    ) -> Costs:
        """Memory of a rank, what is sent in a step, its arithmetic, and the time to expand.

        Args:
            ranks: ranks that train together.
            engine: `"ddp"`, where each rank holds the model, or `"fsdp2"`, where parameters, gradients and optimizer state are
                sharded.
            shard: whether each expanded matrix has an owner that alone holds and steps its cores.
            tokens_per_step: of one optimizer step, over all ranks and micro-batches; None leaves the model's arithmetic out.
            optimizer_state: numbers that the optimizer keeps for each that it steps: 2 for Adam, 1 for SGD with momentum.
            decompose_rate: flops in a second of singular value decompositions in float64 on the CPU; None measures it here.

        Raises:
            ValueError: an unknown engine, or a number that is too small.
        """
        return costs_of(
            [Alike(row.expanded, row.factorization, row.structure, row.dtype) for row in self.rows],
            self.model,
            ranks=ranks,
            engine=engine,
            shard=shard,
            tokens_per_step=tokens_per_step,
            optimizer_state=optimizer_state,
            decompose_rate=decompose_rate,
        )

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
                why, remedy = _why_little(structure)
                lines.append(
                    f"{rows}x{cols}: little to gain, {found} ({why}). Leave such matrices out (Static with a pattern), {remedy}"
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
            f"{' and '.join(dict.fromkeys(row.label for row in self.rows))}: {self.lora_parameters:,} parameters in the matrices, "
            f"{self.trained_parameters:,} trained ({ratio:.2f}x)"
        )
        return "\n".join([title, "", *table, *([""] if self.advice else []), *(f"- {line}" for line in self.advice)])


def plan(
    model: nn.Module,
    factorization: FactorizationArgument = None,
    top_n: int | Scheduler | None = None,
    groups: Callable[[TrainedMatrix], str] | None = None,
    matrices: Finder | None = None,
) -> Plan:
    """What training through cores would make of the matrices of `model`, which may be on the meta device.

    `plan(...).costs(ranks=8)` has the costs: memory, what ranks send, arithmetic, and the time to expand.

    Args:
        factorization: as for `LoraOver`.
        top_n: matrices to expand in each group, None for all; or the scheduler of the run, whose last round counts.
        groups, matrices: as for `LoraOver`.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: the model has no LoRA matrices, `top_n` is below 1, the factorization does not fit a shape, or the scheduler
            decides by what it sees in training (`Budget`).
    """
    if isinstance(top_n, int) and (isinstance(top_n, bool) or top_n < 1):
        raise ValueError(f"top_n={top_n!r} must be at least 1, or None for every matrix")
    check_factorization(factorization)
    if top_n is not None and not isinstance(top_n, int):
        check_scheduler(top_n)
    found, skipped = collect(model, matrices, groups)
    if not found:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:3]) or "there is no lora_A/lora_B pair in it"
        raise ValueError(f"nothing to plan: the model has no LoRA matrices that can be expanded ({reasons})")
    assign_factorizations(found, factorization)
    limit, chosen = _choice(top_n, found)
    rows: list[PlanRow] = []
    for group, members in by_group(found).items():
        counts: dict[tuple[Structure, Factorization, torch.dtype], list[TrainedMatrix]] = {}
        for matrix in members:
            one = matrix.factorization
            assert one is not None
            counts.setdefault((one.structure(matrix.shape), one, matrix.parameter.dtype), []).append(matrix)
        budget = len(members) if limit is None else limit
        for (structure, factor, dtype), alike in counts.items():
            candidates = len(alike) if chosen is None else sum(matrix.name in chosen for matrix in alike)
            expanded = min(candidates, budget)
            budget -= expanded
            rows.append(PlanRow(group, len(alike), expanded, structure, factor, dtype))
    return Plan(tuple(rows), tuple(Skipped(s.name, s.reason, s.is_left_out) for s in skipped), _size(model))


def _size(model: nn.Module) -> ModelSize:
    """Numbers and bytes of the model. A weight that several modules share counts in each for arithmetic, and once for memory."""
    multiplied = {True: 0, False: 0}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear) and name == "weight":
                # a quantized weight holds several numbers in one
                multiplied[parameter.requires_grad] += module.in_features * module.out_features
            elif parameter.dim() > 1:
                multiplied[parameter.requires_grad] += parameter.numel()
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    trained_bytes = sum(p.numel() * p.dtype.itemsize for p in trained)
    return ModelSize(
        frozen=multiplied[False],
        trained=multiplied[True],
        frozen_bytes=sum(p.numel() * p.dtype.itemsize for p in parameters) - trained_bytes,
        trained_numbers=sum(p.numel() for p in trained),
        trained_bytes=trained_bytes,
    )


def _choice(top_n: int | Scheduler | None, matrices: dict[str, TrainedMatrix]) -> tuple[int | None, set[str] | None]:
    """How many matrices of each group are expanded in the end, or which; None where that sets no limit."""
    if not isinstance(top_n, Scheduler):
        return top_n, None
    if top_n.first_step() == 0:
        top_n.attach(matrices)
        return None, set(top_n.select(0, matrices))
    limit = getattr(top_n, "top_n", None)
    if not isinstance(limit, int):
        raise ValueError(f"{top_n.label} decides by what it sees in training; plan with top_n= for an estimate")
    return limit, None


def _why_little(structure: Structure) -> tuple[str, str]:
    """Why the cores of a matrix have few parameters, and what else can be done than leaving it out."""

    def prime(n: int) -> bool:
        return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))

    stuck = [f"{n} is prime" for n in structure.shape if prime(n)] + [
        f"{n} cannot be split" for n in structure.shape if n == 1
    ]
    if not stuck and not structure.exact:
        return "the cores are truncated", "or raise the cap"
    why = " and ".join(stuck) if stuck else "its dimensions do not split evenly into these sites"
    return why, "choose a rank and dimensions that split, or give explicit sites"
