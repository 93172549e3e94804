"""Sparse phases on the sparse kernels: `accelerate` a model, `restore` it, `acceleration_report` what runs how."""

from sparsekern.nn.acceleration import AccelerationReport, Choice, accelerate, acceleration_report
from sparsekern.nn.roofline import predicted_speeds
from sparsekern.nn.swapping import restore
from sparsekern.nn.timing import Speeds, measured_choice, measured_speeds

__all__ = [
    "AccelerationReport",
    "Choice",
    "Speeds",
    "accelerate",
    "acceleration_report",
    "measured_choice",
    "measured_speeds",
    "predicted_speeds",
    "restore",
]
