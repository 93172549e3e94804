"""Sparse training methods, one file per paper."""

from sparsekern.methods.acdc import ACDC

__all__ = ["ACDC"]
