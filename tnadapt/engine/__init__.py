"""Cohorts of cores and the coupling to the optimizer."""

from tnadapt.engine.coupling import Coupling
from tnadapt.engine.engine import Engine
from tnadapt.engine.handover import HANDOVERS
from tnadapt.engine.optimizers import is_elementwise, unwrap
from tnadapt.engine.tensors import broadcast_object, is_distributed

__all__ = ["HANDOVERS", "Coupling", "Engine", "broadcast_object", "is_distributed", "is_elementwise", "unwrap"]
