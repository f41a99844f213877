"""Cohorts of cores and the coupling to the optimizer."""

from tnadapt.engine.coupling import Coupling
from tnadapt.engine.engine import Engine
from tnadapt.engine.handover import HANDOVERS
from tnadapt.engine.optimizers import is_elementwise, unwrap
from tnadapt.engine.tensors import agree_any, gather_objects, is_distributed, local, obstacle_to_gathering

__all__ = [
    "HANDOVERS",
    "Coupling",
    "Engine",
    "agree_any",
    "gather_objects",
    "is_distributed",
    "is_elementwise",
    "local",
    "obstacle_to_gathering",
    "unwrap",
]
