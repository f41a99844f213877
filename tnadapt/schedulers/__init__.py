"""Scheduler objects: what to expand and when."""

from tnadapt.schedulers.base import Scheduler, by_group, register_scheduler
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
    "register_scheduler",
    "round_sizes",
]

for _cls in (Budget, LossAblation, Static, TaylorRuntime):
    register_scheduler(_cls)
