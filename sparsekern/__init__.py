"""Sparse training kernels for PyTorch. See README.md."""

from sparsekern import _library, nn, ops
from sparsekern.distributions import erk, global_budget, keep_count, uniform
from sparsekern.flops import dry_run
from sparsekern.masks import MaskSet
from sparsekern.methods import ACDC, GMP, SET, GraNet, RigL, RigLITOP, planned_masks
from sparsekern.optim import MaskedSGD
from sparsekern.report import sparsity_report
from sparsekern.schedules import Dense, Sparse, acdc_schedule, constant_lr, cosine_lr, linear_lr
from sparsekern.updates import update_schedule

degradation = _library.load_kernels()
"""Empty when the compiled kernels are in use, else the reason why they are not."""

__version__ = "0.1.0.dev0"
__all__ = [
    "ACDC", "Dense", "GMP", "GraNet", "MaskSet", "MaskedSGD", "RigL", "RigLITOP", "SET", "Sparse",
    "__version__", "acdc_schedule", "constant_lr", "cosine_lr", "degradation", "dry_run", "erk",
    "global_budget", "keep_count", "linear_lr", "nn", "ops", "planned_masks", "sparsity_report", "uniform",
    "update_schedule",
]  # fmt: skip
