"""Decompositions behind one interface: the structure plan (integers), `Factorization`, and its implementations."""

from tnadapt.factorizations.base import Factorization, core_dtype, register_factorization
from tnadapt.factorizations.cp import CP, CP_GAUGES
from tnadapt.factorizations.mpo import GAUGES, MPO, SVD
from tnadapt.factorizations.sites import site_axes
from tnadapt.factorizations.structure import Shape, Structure, full_bonds, near_square, paper_sites
from tnadapt.factorizations.tensor_ring import TensorRing
from tnadapt.factorizations.tucker import TUCKER_GAUGES, Tucker

__all__ = [
    "CP",
    "CP_GAUGES",
    "GAUGES",
    "MPO",
    "SVD",
    "TUCKER_GAUGES",
    "Factorization",
    "Shape",
    "Structure",
    "TensorRing",
    "Tucker",
    "core_dtype",
    "full_bonds",
    "near_square",
    "paper_sites",
    "register_factorization",
    "site_axes",
]

for _cls in (CP, MPO, SVD, TensorRing, Tucker):
    register_factorization(_cls)
