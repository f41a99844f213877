"""Train LoRA adapters through tensor networks and fold them back to plain LoRA."""

from tnadapt.adapter import OverParamAdapter
from tnadapt.factorizations import MPO, SVD, Factorization
from tnadapt.lora_matrices import LoraMatrix, find_lora_matrices
from tnadapt.lora_over import Event, FoldReport, LoraOver
from tnadapt.planning import Plan, plan
from tnadapt.schedulers import Scheduler, Static, TaylorRuntime

__all__ = [
    "MPO",
    "SVD",
    "Event",
    "Factorization",
    "FoldReport",
    "LoraMatrix",
    "LoraOver",
    "OverParamAdapter",
    "Plan",
    "Scheduler",
    "Static",
    "TaylorRuntime",
    "find_lora_matrices",
    "plan",
]

__version__ = "0.1.0"
