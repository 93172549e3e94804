"""Sparse training methods, one file per paper."""

from sparsekern.methods.acdc import ACDC
from sparsekern.methods.base import Sparsifier

__all__ = ["ACDC", "Sparsifier"]
