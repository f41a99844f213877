"""Train LoRA adapters through tensor networks and fold them back to plain LoRA."""

from tnadapt.adapter import OverParamAdapter
from tnadapt.backends import Backend, register_backend
from tnadapt.factorizations import CP, MPO, SVD, Factorization, TensorRing, Tucker, register_factorization
from tnadapt.lora_matrices import LoraMatrix, find_lora_matrices
from tnadapt.lora_over import Event, FoldReport, LoraOver
from tnadapt.planning import Plan, plan
from tnadapt.schedulers import (
    Budget,
    LossAblation,
    Scheduler,
    Static,
    TaylorRuntime,
    ablation_scores,
    predefined,
    register_scheduler,
)

__all__ = [
    "CP",
    "MPO",
    "SVD",
    "Backend",
    "Budget",
    "Event",
    "Factorization",
    "FoldReport",
    "LoraMatrix",
    "LoraOver",
    "LossAblation",
    "OverParamAdapter",
    "Plan",
    "Scheduler",
    "Static",
    "TaylorRuntime",
    "TensorRing",
    "Tucker",
    "ablation_scores",
    "find_lora_matrices",
    "plan",
    "predefined",
    "register_backend",
    "register_factorization",
    "register_scheduler",
]

__version__ = "0.1.0"
