"""Train LoRA adapters through tensor networks and fold them back to plain LoRA."""

from tnadapt import finders
from tnadapt.adapter import (
    OverParamAdapter,
    add_adapters,
    export_peft,
    find_adapters,
    import_peft,
    load_adapters,
    merge_adapters,
    save_adapters,
)
from tnadapt.backends import Backend, register_backend
from tnadapt.factorizations import CP, MPO, SVD, Factorization, TensorRing, Tucker, register_factorization
from tnadapt.lora_over import Event, FoldReport, LoraOver
from tnadapt.matrices import TrainedMatrix, find_lora_matrices
from tnadapt.planning import Plan, plan
from tnadapt.row_rescale import RowRescale
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
from tnadapt.tt_lora import TTLoraLinear

__all__ = [
    "CP",
    "MPO",
    "SVD",
    "Backend",
    "Budget",
    "Event",
    "Factorization",
    "FoldReport",
    "LoraOver",
    "LossAblation",
    "OverParamAdapter",
    "Plan",
    "RowRescale",
    "Scheduler",
    "Static",
    "TTLoraLinear",
    "TaylorRuntime",
    "TensorRing",
    "TrainedMatrix",
    "Tucker",
    "ablation_scores",
    "add_adapters",
    "export_peft",
    "find_adapters",
    "find_lora_matrices",
    "finders",
    "import_peft",
    "load_adapters",
    "merge_adapters",
    "plan",
    "predefined",
    "register_backend",
    "register_factorization",
    "register_scheduler",
    "save_adapters",
]

__version__ = "0.1.0"
