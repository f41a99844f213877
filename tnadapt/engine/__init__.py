"""Cohorts of cores and the coupling to the optimizer."""

from tnadapt.engine.attachment import WrappedLoading, check_matrices, check_rates, shown
from tnadapt.engine.coupling import Coupling
from tnadapt.engine.engine import Engine
from tnadapt.engine.handover import HANDOVERS
from tnadapt.engine.optimizers import is_elementwise, unwrap
from tnadapt.engine.outside import Outside
from tnadapt.engine.tensors import gather_objects, is_distributed

__all__ = [
    "HANDOVERS",
    "Coupling",
    "Engine",
    "Outside",
    "WrappedLoading",
    "check_matrices",
    "check_rates",
    "gather_objects",
    "is_distributed",
    "is_elementwise",
    "shown",
    "unwrap",
]
