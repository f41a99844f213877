"""First-order Taylor scores of matrices (LoRA-Over, Eq. 8), shared by the schedulers that use them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tnadapt.matrices import TrainedMatrix

__all__ = ["REDUCTIONS", "check_any", "check_finite", "check_reduction", "taylor_scores", "to_floats"]

REDUCTIONS = ("inner", "elementwise")


def check_reduction(owner: str, reduction: str) -> None:
    """Raise ValueError for a reduction that does not exist."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{owner}: reduction={reduction!r} is unknown; choose one of {', '.join(REDUCTIONS)}")


@torch.no_grad()
def taylor_scores(matrices: Iterable[TrainedMatrix], reduction: str) -> dict[str, Tensor]:
    """Score of this step of every matrix with a gradient: `|<g, W>|` for `"inner"`, `sum |g * w|` for `"elementwise"`.

    One batched product per shape, device and sharding, no host synchronisation.
    """
    alike: dict[object, list[TrainedMatrix]] = {}
    for matrix in matrices:
        parameter = matrix.parameter
        if parameter.grad is not None:
            sharding = (getattr(parameter, "device_mesh", None), getattr(parameter, "placements", None))
            alike.setdefault((parameter.shape, parameter.device, sharding), []).append(matrix)
    scores: dict[str, Tensor] = {}
    for members in alike.values():
        weights = torch.stack([m.value for m in members])
        gradients = torch.stack([g for m in members if (g := m.gradient) is not None])
        wide = torch.promote_types(weights.dtype, torch.float32)
        products = weights.to(wide) * gradients.to(wide)
        entries = tuple(range(1, products.dim()))  # a kernel of a convolution has more than two dimensions
        sums = products.abs().sum(entries) if reduction == "elementwise" else products.sum(entries)
        if hasattr(sums, "full_tensor"):
            sums = _of_all_shards(sums)
        scores.update(zip((m.name for m in members), sums.abs().unbind(0), strict=True))
    return scores


def _of_all_shards(sums: Any) -> Tensor:
    """The sums of the shards (FSDP2) added up, on every rank; over the devices of the mesh where shards are offloaded."""
    from torch.distributed.tensor import DTensor

    held = sums.to_local()
    there = DTensor.from_local(held, sums.device_mesh, sums.placements, run_check=False)
    return there.full_tensor().to(held.device)


def to_floats(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Scores as numbers: one host synchronisation."""
    if not scores:
        return {}
    device = next(iter(scores.values())).device
    values = torch.stack([score.to(device) for score in scores.values()]).tolist()
    return dict(zip(scores, values, strict=True))


def check_finite(owner: str, scores: Mapping[str, float], step: int) -> None:
    """Raise ValueError where a score is not finite: a gradient was not."""
    broken = [name for name, score in scores.items() if not math.isfinite(score)]
    if broken:
        raise ValueError(
            f"{owner}: the score of {', '.join(broken[:3])} is not finite at step {step}; a gradient held NaN or infinity: "
            "lower the learning rate or clip gradients, and resume from the last checkpoint"
        )


def check_any(owner: str, scores: Mapping[str, float], ranked: Iterable[TrainedMatrix], step: int) -> None:
    """Raise ValueError where matrices are to be ranked and none of them has a score, because none had a gradient."""
    names = [matrix.name for matrix in ranked]
    if names and not any(name in scores for name in names):
        raise ValueError(
            f"{owner}: matrices are to be ranked at step {step}, but none of the {len(names)} to choose from, such as "
            f"{', '.join(names[:3])}, has had a gradient since the scores began; call backward() before optimizer.step(), and "
            "zero_grad() only after it"
        )
