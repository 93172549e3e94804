"""What may follow a convolution in one pass over its result: scale, bias, residual and activation.

``activation(scale * convolution + bias + residual)``, each step rounded to the dtype: a convolution followed by a
batch-norm in evaluation, folded into one scale and one bias per channel, a skip connection and a ReLU, as in a block of
ResNet (arXiv 1512.03385). Where a gradient is asked for, or nothing is compiled, the same steps run one after another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

UNBOUNDED = -math.inf, math.inf
BOUNDS = {None: UNBOUNDED, "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


@dataclass(frozen=True, eq=False)
class Epilogue:
    """``scale``: (out,) or None; ``residual``: of the result's shape or None; ``activation``: a key of `BOUNDS`."""

    scale: Tensor | None = None
    residual: Tensor | None = None
    activation: str | None = None

    def check(self, like: Tensor, outputs: int) -> None:
        """Raise TypeError or ValueError that names the argument, unless dtypes, devices and ``scale`` fit."""
        if self.activation not in BOUNDS:
            raise ValueError(f"activation={self.activation!r}: expected None, 'relu' or 'relu6'")
        for name, t in (("scale", self.scale), ("residual", self.residual)):
            if t is None:
                continue
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} is a {type(t).__name__}: expected a tensor")
            if t.layout != torch.strided or t.device != like.device:
                raise ValueError(f"{name} is {t.layout} on {t.device}: expected a dense tensor on {like.device}")
            if t.dtype != like.dtype:
                raise TypeError(f"{name} has dtype {t.dtype}: expected {like.dtype}, the dtype of input")
        if self.scale is not None and self.scale.shape != (outputs,):
            raise ValueError(f"scale has shape {tuple(self.scale.shape)}: expected ({outputs},), the output channels")

    def apply(self, result: Tensor, bias: Tensor | None) -> Tensor:
        """The steps one after another; ``bias`` is that of a scaled convolution, which has none of its own."""
        if self.scale is not None:
            result = result * self.scale.reshape(-1, 1, 1)
            result = result if bias is None else result + bias.reshape(-1, 1, 1)
        if self.residual is not None:
            if self.residual.shape != result.shape:
                given = f"residual has shape {tuple(self.residual.shape)}"
                raise ValueError(f"{given}: expected {tuple(result.shape)}, that of the result")
            result = result + self.residual
        return result if self.activation is None else result.clamp(*BOUNDS[self.activation])
