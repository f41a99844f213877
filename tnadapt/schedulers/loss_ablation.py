"""Expand what an ablation of a trained model finds important (LoRA-Over, Eq. 7; MPO_P, "predefined")."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from tnadapt.matrices import TrainedMatrix, find_lora_matrices
from tnadapt.schedulers.base import Scheduler, by_group, warn_small_groups

__all__ = ["LossAblation", "ablation_scores", "predefined"]


class LossAblation(Scheduler):
    """Expand from step 0 the `top_n` matrices of each group with the highest scores.

    Args:
        scores: score of every matrix by name, as `ablation_scores` gives them.
        top_n: matrices to expand in each group; a smaller group is expanded whole.
    """

    def __init__(self, scores: Mapping[str, float], top_n: int) -> None:
        if isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 1:
            raise ValueError(f"LossAblation: top_n={top_n!r} must be an integer of at least 1")
        broken = [name for name, score in scores.items() if not math.isfinite(score)]
        if broken:
            raise ValueError(
                f"LossAblation: the score of {', '.join(broken[:3])} is not finite; score a model whose loss is"
            )
        self.scores = {name: float(score) for name, score in scores.items()}
        self.top_n = top_n

    def attach(self, matrices: Mapping[str, TrainedMatrix]) -> None:
        missing = [name for name in matrices if name not in self.scores]
        if missing:
            raise ValueError(
                f"LossAblation: {len(missing)} of {len(matrices)} matrices have no score, such as "
                f"{', '.join(missing[:3])}; score a model with the same adapters (ablation_scores)"
            )

        warn_small_groups("LossAblation", self.top_n, matrices)

    def select(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> Iterable[str]:
        if step != 0:
            return ()
        chosen: list[str] = []
        for members in by_group(matrices).values():
            names = [m.name for m in members]
            chosen += sorted(names, key=lambda name: -self.scores[name])[: self.top_n]
        return chosen

    def due(self, step: int) -> bool:
        return step == 0

    def first_step(self) -> int:
        return 0

    def __repr__(self) -> str:
        return f"LossAblation(scores={{… {len(self.scores)} matrices}}, top_n={self.top_n})"

    @property
    def label(self) -> str:
        return f"LossAblation(top_n={self.top_n})"


@torch.no_grad()
def ablation_scores(model: nn.Module, evaluate: Callable[[], float], progress: bool | None = None) -> dict[str, float]:
    """Importance `|L - L with the matrix zeroed|` of every LoRA matrix (LoRA-Over, Eq. 7).

    Zeroing A or B of a pair gives the same loss, since both make BA zero, so a pair is evaluated once. The model is in
    evaluation mode meanwhile. Mode and values are put back afterwards, also after an interruption.

    Args:
        model: a model whose LoRA matrices have been trained.
        evaluate: returns the mean loss of `model` on data of your choice. It is called once, and then once per pair.
        progress: whether to show a progress bar; by default where standard error is a terminal.

    Returns:
        Score by matrix name, for `LossAblation`.

    Raises:
        ValueError: no LoRA matrices, adapters that are merged into the base, or a loss that is not finite.
    """
    matrices = _matrices_to_score(model)
    pairs: dict[str, list[TrainedMatrix]] = {}
    for matrix in matrices.values():
        pairs.setdefault(matrix.name.removesuffix(f".{matrix.kind}"), []).append(matrix)
    scores: dict[str, float] = {}
    with _evaluation_mode(model):
        whole = _finite(evaluate(), "the model as it is")
        for pair, members in _progress(pairs, progress):
            with _zeroed(members[-1].parameter):
                loss = _finite(evaluate(), f"the model without {pair}")
            scores.update({matrix.name: abs(whole - loss) for matrix in members})
    return {name: scores[name] for name in matrices}


def predefined(
    model: nn.Module, train: Callable[[], object], evaluate: Callable[[], float], top_n: int
) -> LossAblation:
    """The paper's two stages: train plain LoRA, score its matrices, and put the model back to where it started.

    Train the model again afterwards with a new optimizer and a `LoraOver` whose scheduler is what this returns.

    Args:
        model: a model with fresh adapters.
        train: fine-tunes `model` as plain LoRA, with an optimizer of its own.
        evaluate: as for `ablation_scores`.
        top_n: as for `LossAblation`.

    Raises:
        ValueError: as for `ablation_scores` and `LossAblation`; before the training, but for a loss that is not finite.
    """
    LossAblation({}, top_n)
    _matrices_to_score(model)
    kept = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    start = {name: t.detach().clone() for name, t in kept.items() if t.requires_grad or not isinstance(t, nn.Parameter)}
    try:
        train()
        scores = ablation_scores(model, evaluate)
    finally:
        with torch.no_grad():
            for name, value in start.items():
                kept[name].copy_(value)
                kept[name].grad = None
    return LossAblation(scores, top_n)


def _matrices_to_score(model: nn.Module) -> dict[str, TrainedMatrix]:
    """The LoRA matrices of the model; ValueError where there are none, or where they do not decide what it computes."""
    matrices, _ = find_lora_matrices(model)
    if not matrices:
        raise ValueError("nothing to score: the model has no LoRA matrices that can be expanded")
    merged = [name for name, module in model.named_modules() if getattr(module, "merged", False) is True]
    if merged:
        raise ValueError(
            f"the adapter is merged into the base ({merged[0]} and others), so that zeroing its matrices would change "
            "nothing; call unmerge_adapter() first"
        )
    return matrices


@contextmanager
def _zeroed(parameter: nn.Parameter) -> Iterator[None]:
    kept = parameter.detach().clone()
    try:
        parameter.zero_()
        yield
    finally:
        parameter.copy_(kept)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _finite(loss: object, of: str) -> float:
    value = float(loss)  # type: ignore[arg-type]
    if not math.isfinite(value):
        raise ValueError(f"the loss of {of} is {value}; scores need a finite loss: check the data and the precision")
    return value


def _progress(
    pairs: Mapping[str, list[TrainedMatrix]], wanted: bool | None
) -> Iterable[tuple[str, list[TrainedMatrix]]]:
    show = sys.stderr.isatty() if wanted is None else wanted
    if show:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return pairs.items()
        return tqdm(pairs.items(), desc="ablation", unit="pair")  # type: ignore[no-any-return]
    return pairs.items()
