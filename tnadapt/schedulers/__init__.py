"""Scheduler objects: what to expand and when."""

from tnadapt.schedulers.base import Scheduler, by_group
from tnadapt.schedulers.static import Static
from tnadapt.schedulers.taylor_runtime import TaylorRuntime, round_sizes

__all__ = ["Scheduler", "Static", "TaylorRuntime", "by_group", "round_sizes"]
