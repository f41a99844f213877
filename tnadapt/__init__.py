"""Train LoRA adapters through tensor networks and fold them back to plain LoRA."""

from tnadapt.adapter import OverParamAdapter
from tnadapt.factorizations import CP, MPO, SVD, Factorization, Tucker
from tnadapt.lora_over import Event, FoldReport, LoraOver
from tnadapt.matrices import TrainedMatrix, find_lora_matrices
from tnadapt.planning import Plan, plan
from tnadapt.schedulers import Budget, LossAblation, Scheduler, Static, TaylorRuntime, ablation_scores, predefined

__all__ = [
    "CP",
    "MPO",
    "SVD",
    "Budget",
    "Event",
    "Factorization",
    "FoldReport",
    "LoraOver",
    "LossAblation",
    "OverParamAdapter",
    "Plan",
    "Scheduler",
    "Static",
    "TaylorRuntime",
    "TrainedMatrix",
    "Tucker",
    "ablation_scores",
    "find_lora_matrices",
    "plan",
    "predefined",
]

__version__ = "0.1.0"
