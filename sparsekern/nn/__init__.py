"""Sparse phases on the sparse kernels: `accelerate` a model, `restore` it, `acceleration_report` what runs how."""

from sparsekern.nn.acceleration import AccelerationReport, Choice, accelerate, acceleration_report, restore
from sparsekern.nn.timing import measured_choice

__all__ = ["AccelerationReport", "Choice", "accelerate", "acceleration_report", "measured_choice", "restore"]
