"""Decompositions behind one interface: the structure plan (integers), `Factorization`, and its implementations."""

from tnadapt.factorizations.base import Factorization, core_dtype
from tnadapt.factorizations.mpo import GAUGES, MPO, SVD
from tnadapt.factorizations.structure import Shape, Structure, full_bonds, near_square, paper_sites

__all__ = [
    "GAUGES",
    "MPO",
    "SVD",
    "Factorization",
    "Shape",
    "Structure",
    "core_dtype",
    "full_bonds",
    "near_square",
    "paper_sites",
]
