"""Train LoRA adapters through tensor networks and fold them back to plain LoRA.

Every name of `__all__`, and every module of the package, is imported when it is first asked for. So `import tnadapt` does not
import torch yet, and the command line starts at once.
"""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

#: The module of each public name. A type checker reads the imports above instead; a test holds that the two say the same.
_HOME = {
    name: module
    for module, names in {
        "adapter": "OverParamAdapter add_adapters export_peft find_adapters import_peft load_adapters merge_adapters "
        "save_adapters",
        "backends": "Backend register_backend",
        "factorizations": "CP MPO SVD Factorization TensorRing Tucker register_factorization",
        "lora_over": "Event FoldReport LoraOver",
        "matrices": "TrainedMatrix find_lora_matrices",
        "planning": "Plan plan",
        "row_rescale": "RowRescale",
        "schedulers": "Budget LossAblation Scheduler Static TaylorRuntime ablation_scores predefined register_scheduler",
        "tt_lora": "TTLoraLinear",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> object:
    """Import what is asked for the first time (PEP 562)."""
    if name in _HOME:
        value: object = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
