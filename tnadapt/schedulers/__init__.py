"""Scheduler objects: what to expand and when."""

from tnadapt.schedulers.base import Scheduler, by_group
from tnadapt.schedulers.budget import Budget
from tnadapt.schedulers.loss_ablation import LossAblation, ablation_scores, predefined
from tnadapt.schedulers.static import Static
from tnadapt.schedulers.taylor_runtime import TaylorRuntime, round_sizes

__all__ = [
    "Budget",
    "LossAblation",
    "Scheduler",
    "Static",
    "TaylorRuntime",
    "ablation_scores",
    "by_group",
    "predefined",
    "round_sizes",
]
