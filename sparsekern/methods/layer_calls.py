"""Operators on the weights of layers, as their forward or backward passes call them.

Where the operands lie as the kernels want them, the operator itself is called: what its function checks holds, and for
one layer that would take as long as the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern.ops import masked_combine_, soft_threshold_
from sparsekern.ops.masked_combine import OP as MASKED_COMBINE
from sparsekern.ops.operands import is_dense, same_layout
from sparsekern.ops.soft_threshold import OP as SOFT_THRESHOLD
from sparsekern.ops.soft_threshold import by_rows


def combine_layers(
    outs: Sequence[Tensor], first: Sequence[Tensor], times: Sequence[Tensor], packed: Sequence[Tensor | None],
    live: tuple[float, float],
) -> None:  # fmt: skip
    """live[0] * first + live[1] * first * |times| where the packed mask has a bit, else 0, into each of `outs`."""
    second = first if times else []
    if all(map(is_dense, outs)) and all(map(same_layout, first, outs)):
        MASKED_COMBINE(
            outs, first, second, packed, live=live, pruned=(0.0, 0.0), scale=None, times=times, magnitude=True,
            within=[],
        )  # fmt: skip
    else:
        masked_combine_(outs, first, second, packed, live=live, pruned=(0, 0), times=times, magnitude=True)


def shrink_layers(
    outs: Sequence[Tensor], weights: Sequence[Tensor], thresholds: Sequence[Tensor], gradients: Sequence[Tensor] = (),
    rescale: bool = False,
) -> None:  # fmt: skip
    """soft_threshold_ of weights, whose thresholds are numbers; each of `outs` is laid out as its weight is."""
    if (
        all(map(by_rows, outs))
        and all(map(same_layout, gradients, outs))
        and all(t.dtype in (torch.float32, torch.float64) for t in thresholds)
    ):
        SOFT_THRESHOLD(outs, weights, thresholds, gradients, rescale)
    else:
        soft_threshold_(outs, weights, thresholds, gradients, rescale=rescale)
