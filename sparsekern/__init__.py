"""Sparse training kernels for PyTorch. See README.md."""

from sparsekern import _library, nn, ops
from sparsekern.batch_norm import reestimate_batch_norm
from sparsekern.distributions import erk, global_budget, keep_count, uniform
from sparsekern.flops import dry_run
from sparsekern.learning_rates import constant_lr, cosine_lr, linear_lr
from sparsekern.masks import MaskSet
from sparsekern.methods import (
    ACDC,
    GMP,
    METHODS,
    OBERT,
    SET,
    SRSTE,
    ST3,
    STEP,
    STR,
    DenseTraining,
    FixedMask,
    GraNet,
    LotteryTicket,
    Movement,
    OneShot,
    Powerpropagation,
    RigL,
    RigLITOP,
    SoftMovement,
    TopKAST,
    build_method,
    planned_masks,
)
from sparsekern.optim import MaskedAdamW, MaskedSGD
from sparsekern.phases import Dense, Sparse
from sparsekern.report import sparsity_report
from sparsekern.schedules import acdc_schedule
from sparsekern.updates import update_schedule

degradation = _library.load_kernels()
"""Empty when the compiled kernels are in use, else the reason why they are not."""

__version__ = "0.1.0.dev0"
__all__ = [
    "ACDC", "Dense", "DenseTraining", "FixedMask", "GMP", "GraNet", "LotteryTicket", "METHODS", "MaskSet",
    "MaskedAdamW", "MaskedSGD", "Movement", "OBERT", "OneShot", "Powerpropagation", "RigL", "RigLITOP", "SET",
    "SRSTE", "ST3", "STEP", "STR", "SoftMovement", "Sparse", "TopKAST", "__version__", "acdc_schedule",
    "build_method", "constant_lr", "cosine_lr", "degradation", "dry_run", "erk", "global_budget", "keep_count",
    "linear_lr", "nn", "ops", "planned_masks", "reestimate_batch_norm", "sparsity_report", "uniform",
    "update_schedule",
]  # fmt: skip
