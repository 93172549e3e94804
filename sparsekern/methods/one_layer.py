"""Operators on the weight of one layer, as its forward or backward pass calls them.

Where the operands lie as the kernels want them, the operator itself is called: what its function checks holds, and that
would take as long as the arithmetic, once for each layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.ops import masked_combine_, soft_threshold_
from sparsekern.ops.masked_combine import OP as MASKED_COMBINE
from sparsekern.ops.operands import is_dense, same_layout
from sparsekern.ops.soft_threshold import OP as SOFT_THRESHOLD
from sparsekern.ops.soft_threshold import by_rows


def combine_one(
    out: Tensor, first: Tensor, times: Tensor | None, packed: Tensor | None, live: tuple[float, float]
) -> None:
    """live[0] * first + live[1] * first * |times| where the packed mask has a bit, else 0, into `out`."""
    second, times = ([], []) if times is None else ([first], [times])
    if is_dense(out) and same_layout(first, out):
        MASKED_COMBINE(
            [out], [first], second, [packed], live=live, pruned=(0.0, 0.0), scale=None, times=times, magnitude=True,
            within=[],
        )  # fmt: skip
    else:
        masked_combine_([out], [first], second, [packed], live=live, pruned=(0, 0), times=times, magnitude=True)


def shrink_one(
    out: Tensor, weight: Tensor, threshold: Tensor, gradient: Tensor | None = None, rescale: bool = False
) -> None:
    """soft_threshold_ of one weight, whose threshold is a float32 or float64 number; `out` is laid out as it is."""
    gradients = [] if gradient is None else [gradient]
    if (
        by_rows(out)
        and all(same_layout(g, out) for g in gradients)
        and threshold.dtype in (torch.float32, torch.float64)
    ):
        SOFT_THRESHOLD([out], [weight], [threshold], gradients, rescale)
    else:
        soft_threshold_([out], [weight], [threshold], gradients, rescale=rescale)
