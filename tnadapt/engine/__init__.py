"""What happens to expanded matrices: their cores, which matrices they are, and the optimizer step."""

from tnadapt.engine import ranks
from tnadapt.engine.checks import (
    check_factorization,
    check_matrices,
    check_model,
    check_rates,
    check_scheduler,
    check_switches,
    checked_choice,
    checked_names,
    is_elementwise,
    plain_number,
    shown,
    unwrap,
)
from tnadapt.engine.cores import in_dtype, state_signature
from tnadapt.engine.expanded import Event, Expanded, Roster, on_cpu
from tnadapt.engine.handover import HANDOVERS
from tnadapt.engine.step import CoreRates, OwnMethods, Step

__all__ = [
    "HANDOVERS",
    "CoreRates",
    "Event",
    "Expanded",
    "OwnMethods",
    "Roster",
    "Step",
    "check_factorization",
    "check_matrices",
    "check_model",
    "check_rates",
    "check_scheduler",
    "check_switches",
    "checked_choice",
    "checked_names",
    "in_dtype",
    "is_elementwise",
    "on_cpu",
    "plain_number",
    "ranks",
    "shown",
    "state_signature",
    "unwrap",
]
