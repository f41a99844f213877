"""What training through cores costs: memory of a rank, what ranks send, arithmetic of a step, and the time to expand.

All but the time follow from shapes. `counting` runs a factorization to count what it multiplies and keeps, so no formula is written down twice.

Letters: C = numbers in all cores of expanded matrices, M = numbers in these matrices, s = numbers that the optimizer keeps for each
that it steps, R = ranks. A flop is a multiplication or an addition.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tnadapt.engine.cores import STACK_BYTES
from tnadapt.engine.owners import deal
from tnadapt.factorizations import Factorization, Structure, core_dtype

if TYPE_CHECKING:
    from tnadapt.counting import StepWork

__all__ = ["ENGINES", "Alike", "Costs", "Expansion", "Memory", "ModelSize", "Sent", "costs_of"]

ENGINES = ("ddp", "fsdp2")

#: Pull-backs by which a warm hand-over estimates second moments, and the one for first moments.
_HANDOVER_PULL_BACKS = 33


# -- what is counted --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alike:
    """Expanded matrices of one structure.

    Attributes:
        count: how many there are.
        factorization: what each is trained through.
        structure: what each becomes.
        dtype: of the matrices.
    """

    count: int
    factorization: Factorization
    structure: Structure
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Numbers in one matrix."""
        return self.structure.shape[0] * self.structure.shape[1]

    @property
    def core_bytes(self) -> int:
        """Bytes of the cores of one matrix."""
        return self.structure.num_parameters * core_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class ModelSize:
    """Of a model with its adapters.

    Attributes:
        frozen: numbers in frozen weights that the forward pass multiplies by: all matrices but embeddings that are looked up.
        trained: the same of weights that are trained.
        frozen_bytes: of all frozen parameters.
        trained_numbers, trained_bytes: of all parameters that are trained.
    """

    frozen: int
    trained: int
    frozen_bytes: int
    trained_numbers: int
    trained_bytes: int

    def flops(self, tokens: int) -> int:
        """Of a forward and a backward pass over so many tokens, without recomputation and without the products of attention:
        4 for each token and frozen weight (2 forward, 2 for the gradient that goes on), 6 for each trained one (2 more for its own
        gradient)."""
        return (4 * self.frozen + 6 * self.trained) * tokens


# -- what it costs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, beside what plain LoRA needs.

    The terms are those of `LoraOver`. Of a truncated factorization, the residuals come on top.

    Attributes:
        cores: C.
        optimizer_state: s C.
        gradients_and_prefixes: core gradients and kept prefixes, which share one memory. The larger of the two counts, core by core.
        copies: of the matrices, M. Where cores are dealt out: of those that the rank owns, and under FSDP2 of its shards of the others.
        residuals: M for truncated factorizations.
        scratch: while pulling back and refolding, of the largest cohort.
        messages: refolded matrices that are sent between ranks, after the scratch is free again; only where cores are dealt out.
        spared: optimizer state that plain LoRA would have of these matrices, s M (under FSDP2, a rank's share of it).
    """

    cores: int
    optimizer_state: int
    gradients_and_prefixes: int
    copies: int
    residuals: int
    scratch: int
    messages: int
    spared: int

    @property
    def total(self) -> int:
        """Bytes at the highest point of a step, above plain LoRA."""
        held = self.cores + self.optimizer_state + self.gradients_and_prefixes + self.copies + self.residuals
        return held + max(self.scratch, self.messages) - self.spared


@dataclass(frozen=True)
class Sent:
    """Numbers in the tensors that ranks reduce, gather or broadcast in one step, and their bytes. Each collective is counted once with
    the whole tensor, however its algorithm moves the parts.

    Attributes:
        gathered, gathered_bytes: gradients of sharded matrices, made whole.
        broadcast, broadcast_bytes: refolded matrices, from their owners, in messages that are filled up to the longest one.
        plain, plain_bytes: gradients of all trained parameters, which plain LoRA sends anyway.
    """

    gathered: int
    gathered_bytes: int
    broadcast: int
    broadcast_bytes: int
    plain: int
    plain_bytes: int

    @property
    def added(self) -> int:
        """Numbers above plain LoRA."""
        return self.gathered + self.broadcast

    @property
    def added_bytes(self) -> int:
        """Bytes above plain LoRA."""
        return self.gathered_bytes + self.broadcast_bytes


@dataclass(frozen=True)
class Expansion:
    """Making the cores, once for each matrix, on the rank that has most of them.

    Attributes:
        flops: of the singular value decompositions, in float64 on the CPU: 6 a b^2 + 20 b^3 for an a x b matrix, a >= b (Golub and
            Van Loan, Matrix Computations, section 8.6).
        rate: flops in a second.
        measured: whether the rate was measured on this machine, with the threads that torch has now.
        handover_flops: of the pull-backs that hand Adam's moments over when expanding in mid-run; on the device.
    """

    flops: int
    rate: float
    measured: bool
    handover_flops: int

    @property
    def seconds(self) -> float:
        """The time that decomposing takes."""
        return self.flops / self.rate


@dataclass(frozen=True)
class Costs:
    """What `Plan.costs` gives; `print` it.

    Attributes:
        ranks, engine, shard, tokens_per_step: as asked.
        memory: of the rank that needs most.
        plain_bytes: adapters, their gradients and optimizer state on a rank, of plain LoRA.
        base_bytes: frozen parameters on a rank.
        sent: by all ranks together in a step.
        flops: of refolding and pulling back in a step, on the rank that has most of it.
        model_flops: of forward and backward passes in a step, on a rank; None without `tokens_per_step`.
        expansion: making the cores.
    """

    ranks: int
    engine: str
    shard: bool
    tokens_per_step: int | None
    memory: Memory
    plain_bytes: int
    base_bytes: int
    sent: Sent
    flops: int
    model_flops: int | None
    expansion: Expansion

    @property
    def ratio(self) -> float | None:
        """Arithmetic of refolding and pulling back over that of the model."""
        return None if self.model_flops is None else self.flops / self.model_flops

    def as_data(self) -> dict[str, Any]:
        """Everything as JSON data."""
        memory, sent, expansion = vars(self.memory), vars(self.sent), vars(self.expansion)
        return {
            "ranks": self.ranks,
            "engine": self.engine,
            "shard": self.shard,
            "tokens_per_step": self.tokens_per_step,
            "memory_bytes": {**memory, "total": self.memory.total},
            "plain_lora_bytes": self.plain_bytes,
            "base_bytes": self.base_bytes,
            "sent": {**sent, "added": self.sent.added, "added_bytes": self.sent.added_bytes},
            "flops": self.flops,
            "model_flops": self.model_flops,
            "ratio": self.ratio,
            "expansion": {**expansion, "seconds": self.expansion.seconds},
        }

    def __str__(self) -> str:
        memory, sent = self.memory, self.sent
        how = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks, {_NAMES[self.engine]}"
        if self.ranks > 1:
            how += ", each matrix's cores on one rank" if self.shard else ", all cores on every rank"
        rows = [
            ("cores", _bytes(memory.cores)),
            ("their optimizer state", _bytes(memory.optimizer_state)),
            ("core gradients or prefixes", _bytes(memory.gradients_and_prefixes)),
            ("copies of the matrices", _bytes(memory.copies)),
            *([("residuals", _bytes(memory.residuals))] if memory.residuals else []),
            ("scratch of a step", _bytes(memory.scratch)),
            *([("refolded matrices being sent", _bytes(memory.messages))] if memory.messages else []),
            ("less the optimizer state of the matrices", f"-{_bytes(memory.spared)}"),
            ("memory of a rank for the cores", _bytes(memory.total)),
            ("beside adapters, gradients and state", _bytes(self.plain_bytes)),
            ("and the frozen model", _bytes(self.base_bytes)),
        ]
        if self.ranks > 1:
            rows.append(("sent in a step for the cores", f"{sent.added:,} numbers, {_bytes(sent.added_bytes)}"))
            rows.append(
                ("beside the gradients that are sent anyway", f"{sent.plain:,} numbers, {_bytes(sent.plain_bytes)}")
            )
        rows.append(("refold and pull back, each step", f"{self.flops:.3g} flops"))
        if self.model_flops is not None:
            rows.append(("of the model's arithmetic", f"{self.ratio:.3%} of {self.model_flops:.3g} flops"))
        rate = f"{self.expansion.rate / 1e9:.3g} Gflop/s{' as measured here' if self.expansion.measured else ''}"
        rows.append(("time to expand", f"{self.expansion.seconds:.2g} s at {rate}"))
        wide = max(len(name) for name, _ in rows)
        return "\n".join([f"{how}:", *(f"  {name.ljust(wide)}  {value}" for name, value in rows)])


_NAMES = {"ddp": "DDP", "fsdp2": "FSDP2"}


def _bytes(count: int) -> str:
    if abs(count) >= 2**30:
        return f"{count / 2**30:,.2f} GiB"
    return f"{round(count / 2**20, 1) + 0.0:,.1f} MiB"  # adding zero takes the sign off what rounds to it


def costs_of(
    matrices: Sequence[Alike],
    model: ModelSize,
    *,
    ranks: int = 1,
    engine: str = "ddp",
    shard: bool = False,
    tokens_per_step: int | None = None,
    optimizer_state: int = 2,
    decompose_rate: float | None = None,
) -> Costs:
    """What training these matrices of `model` through cores costs.

    Args:
        ranks: ranks that train together.
        engine: `"ddp"`, where each rank holds the model, or `"fsdp2"`, where parameters, gradients and optimizer state are sharded.
        shard: whether each expanded matrix has an owner that alone holds and steps its cores.
        tokens_per_step: of one optimizer step, over all ranks and micro-batches; None leaves the model's arithmetic out.
        optimizer_state: numbers that the optimizer keeps for each that it steps: 2 for Adam, 1 for SGD with momentum.
        decompose_rate: flops in a second of singular value decompositions in float64 on the CPU; None measures it here.

    Raises:
        ValueError: an unknown engine, or a number that is too small.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; choose one of {', '.join(ENGINES)}")
    for name, value, least in (
        ("ranks", ranks, 1),
        ("tokens_per_step", tokens_per_step, 1),
        ("optimizer_state", optimizer_state, 0),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name}={value!r}: give a whole number of at least {least}")
    if decompose_rate is not None and not 0 < decompose_rate < math.inf:
        raise ValueError(f"decompose_rate={decompose_rate!r}: give flops in a second, above 0")
    matrices = [one for one in matrices if one.count]
    all_of_them = tuple(one.count for one in matrices)
    several, among = ranks > 1, ranks if engine == "fsdp2" else 1
    dealt = sorted(set(_dealt(matrices, ranks))) if shard and several else [all_of_them]
    numel, numel_bytes = sum(one.count * one.numel for one in matrices), _matrix_bytes(matrices, all_of_them)
    longest = max(_matrix_bytes(matrices, mine) for mine in dealt)
    messages = ranks * longest if shard and several else 0

    def memory_with(mine: tuple[int, ...]) -> Memory:
        own = _matrix_bytes(matrices, mine)
        return Memory(
            **_memory(matrices, mine, optimizer_state),
            # under FSDP2 a rank also has a copy of its shards of the others' matrices
            copies=own + ((numel_bytes - own) // among if among > 1 else 0),
            messages=_exchange(matrices, mine, longest, ranks, among > 1) if messages else 0,
            spared=optimizer_state * numel_bytes // among,
        )

    gathered = several and among > 1
    parameters = model.trained_bytes // among
    flops = [sum(count * _work(one).flops for count, one in zip(mine, matrices, strict=True)) for mine in dealt]
    expansions = [_expansion(matrices, mine, decompose_rate) for mine in dealt]
    return Costs(
        ranks=ranks,
        engine=engine,
        shard=shard,
        tokens_per_step=tokens_per_step,
        memory=max(map(memory_with, dealt), key=lambda memory: memory.total),
        plain_bytes=(2 + optimizer_state) * parameters,
        base_bytes=model.frozen_bytes // among,
        sent=Sent(
            numel if gathered else 0,
            numel_bytes if gathered else 0,
            messages * numel // max(numel_bytes, 1),
            messages,
            model.trained_numbers if several else 0,
            model.trained_bytes if several else 0,
        ),
        flops=max(flops),
        model_flops=None if tokens_per_step is None else model.flops(tokens_per_step) // ranks,
        expansion=max(expansions, key=lambda expansion: expansion.seconds),
    )


# -- ranks ------------------------------------------------------------------------------------------------------------


def _dealt(matrices: Sequence[Alike], ranks: int) -> list[tuple[int, ...]]:
    """How many of each kind each rank owns, as the engine deals them out."""
    kinds = {f"{kind:06} {k:09}": kind for kind, one in enumerate(matrices) for k in range(one.count)}
    sizes = {name: matrices[kind].structure.num_parameters for name, kind in kinds.items()}
    held = [[0] * len(matrices) for _ in range(ranks)]
    for name, rank in deal(list(kinds), {}, sizes, ranks).items():
        held[rank][kinds[name]] += 1
    return [tuple(counts) for counts in held]


def _matrix_bytes(matrices: Sequence[Alike], counts: Sequence[int]) -> int:
    return sum(count * one.numel * one.dtype.itemsize for count, one in zip(counts, matrices, strict=True))


def _exchange(matrices: Sequence[Alike], mine: Sequence[int], longest: int, ranks: int, sharded: bool) -> int:
    """Bytes on a rank while owners send their matrices: its own message, and that filled up to the longest one; those of all ranks, as
    the backend receives them and as it gives them back. Sharded matrices of others are then stacked twice to be cut, those of one
    size at a time, and the shards are written."""
    sending = _matrix_bytes(matrices, mine) + longest + 2 * ranks * longest
    of_others: Counter[int] = Counter()
    for count, one in zip(mine, matrices, strict=True):
        of_others[one.numel] += (one.count - count) * one.numel * one.dtype.itemsize
    writing = ranks * longest + 2 * max(of_others.values(), default=0) + of_others.total() // ranks
    return max(sending, writing) if sharded else sending


def _memory(matrices: Sequence[Alike], counts: Sequence[int], state: int) -> dict[str, int]:
    """What the holder of so many of each kind has of them, in bytes."""
    found = dict.fromkeys(("cores", "gradients_and_prefixes", "residuals", "scratch"), 0)
    cohorts: dict[Any, list[tuple[int, int]]] = {}
    for count, one in zip(counts, matrices, strict=True):
        step, width = _work(one), core_dtype(one.dtype).itemsize
        found["cores"] += count * one.core_bytes
        found["gradients_and_prefixes"] += count * width * step.kept
        found["residuals"] += 0 if one.structure.exact else count * width * one.numel
        fused = one.factorization.fused_shapes(one.structure.core_shapes)
        # gradients as they come, and in the order of the sites
        stack = cohorts.setdefault((one.factorization, fused, one.dtype, one.core_bytes), [])
        stack.append((width * (2 * one.numel + step.scratch), count))
    for (*_, core_bytes), stack in cohorts.items():
        room, total = max(1, STACK_BYTES // core_bytes), 0
        for size, count in sorted(stack, reverse=True):
            taken = min(count, room)
            room, total = room - taken, total + taken * size
        found["scratch"] = max(found["scratch"], total)
    return {**found, "optimizer_state": state * found["cores"]}


def _work(one: Alike) -> StepWork:
    from tnadapt.counting import step_work  # it takes a fifth of a second to import

    return step_work(one.factorization, one.structure)


# -- expanding --------------------------------------------------------------------------------------------------------


def _expansion(matrices: Sequence[Alike], counts: Sequence[int], rate: float | None) -> Expansion:
    from tnadapt.counting import decomposition_work

    made = [decomposition_work(one.factorization, one.structure) for one in matrices]
    flops = sum(count * work for count, (work, _) in zip(counts, made, strict=True))
    seconds = sum(count * taken for count, (_, taken) in zip(counts, made, strict=True))
    handover = sum(count * _HANDOVER_PULL_BACKS * _work(one).flops for count, one in zip(counts, matrices, strict=True))
    measured = flops / seconds if flops else math.inf
    return Expansion(flops, measured if rate is None else rate, rate is None, handover)
