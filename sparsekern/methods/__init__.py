"""Sparse training methods, one file per paper."""

from sparsekern.methods.acdc import ACDC
from sparsekern.methods.allocation import planned_masks
from sparsekern.methods.base import Sparsifier
from sparsekern.methods.gmp import GMP
from sparsekern.methods.granet import GraNet
from sparsekern.methods.itop import RigLITOP
from sparsekern.methods.rigl import RigL
from sparsekern.methods.set import SET

__all__ = ["ACDC", "GMP", "GraNet", "RigL", "RigLITOP", "SET", "Sparsifier", "planned_masks"]
