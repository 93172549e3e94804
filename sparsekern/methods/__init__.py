"""Sparse training methods, one file per paper."""

from sparsekern.methods.acdc import ACDC
from sparsekern.methods.allocation import planned_masks
from sparsekern.methods.base import Sparsifier
from sparsekern.methods.dense import DenseTraining
from sparsekern.methods.fixed_mask import FixedMask
from sparsekern.methods.gmp import GMP
from sparsekern.methods.granet import GraNet
from sparsekern.methods.itop import RigLITOP
from sparsekern.methods.lottery_ticket import LotteryTicket
from sparsekern.methods.movement import Movement, SoftMovement
from sparsekern.methods.obert import OBERT
from sparsekern.methods.one_shot import OneShot
from sparsekern.methods.powerpropagation import Powerpropagation
from sparsekern.methods.registry import METHODS, build_method
from sparsekern.methods.rigl import RigL
from sparsekern.methods.set import SET
from sparsekern.methods.srste import SRSTE
from sparsekern.methods.st3 import ST3
from sparsekern.methods.step import STEP
from sparsekern.methods.str import STR
from sparsekern.methods.topkast import TopKAST

__all__ = [
    "ACDC", "DenseTraining", "FixedMask", "GMP", "GraNet", "LotteryTicket", "METHODS", "Movement", "OBERT", "OneShot",
    "Powerpropagation", "RigL", "RigLITOP", "SET", "SRSTE", "ST3", "STEP", "STR", "SoftMovement", "Sparsifier",
    "TopKAST", "build_method", "planned_masks",
]  # fmt: skip
