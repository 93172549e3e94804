"""Sparse training kernels for PyTorch. See README.md."""

from sparsekern import _library, nn, ops
from sparsekern.batch_norm import reestimate_batch_norm
from sparsekern.distributions import global_budget, keep_count, uniform
from sparsekern.learning_rates import constant_lr, cosine_lr, linear_lr
from sparsekern.masks import MaskSet
from sparsekern.methods import (
    ACDC,
    GMP,
    SET,
    SRSTE,
    STEP,
    DenseTraining,
    FixedMask,
    GraNet,
    LotteryTicket,
    OneShot,
    Powerpropagation,
    RigL,
    RigLITOP,
    TopKAST,
)
from sparsekern.optim import MaskedSGD
from sparsekern.phases import Dense, Sparse
from sparsekern.report import sparsity_report
from sparsekern.schedules import acdc_schedule
from sparsekern.updates import update_schedule

degradation = _library.load_kernels()
"""Empty when the compiled kernels are in use, else the reason why they are not."""

__version__ = "0.1.0.dev0"
__all__ = [
    "ACDC", "Dense", "DenseTraining", "FixedMask", "GMP", "GraNet", "LotteryTicket", "MaskSet", "MaskedSGD",
    "OneShot", "Powerpropagation", "RigL", "RigLITOP", "SET", "SRSTE", "STEP", "Sparse", "TopKAST",
    "__version__", "acdc_schedule", "constant_lr", "cosine_lr", "degradation", "global_budget", "keep_count",
    "linear_lr", "nn", "ops", "reestimate_batch_norm", "sparsity_report", "uniform", "update_schedule",
]  # fmt: skip
