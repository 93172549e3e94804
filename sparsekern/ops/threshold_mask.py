"""threshold_mask: packed masks of the elements above a number, and how many there are of each tensor.

    bit = value > threshold

One float for the whole list, compared without rounding; NaN is above nothing. Values are float16, bfloat16, float32 or
float64, of any strides. Masks as `topk_mask` returns them: one per tensor, uint8, bits in the storage order of the
values, padding bits zero; counts: int64, on the device of the values. One pass on a CPU; on a GPU the reference serves
it. Not differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern._library import define
from sparsekern.ops.operands import check_numbers
from sparsekern.ops.packing import count_live, pack_mask, storage_order


def reference(values: Sequence[Tensor], threshold: float) -> tuple[list[Tensor], Tensor]:
    check(values, threshold)
    # Where torch compares with a number it may round that to the type of the tensor first.
    masks = [pack_mask(storage_order(v).copy_(v.double() > threshold)) for v in values]
    return masks, torch.stack([count_live(m) for m in masks])


def fake(values: Sequence[Tensor], threshold: float) -> tuple[list[Tensor], Tensor]:
    check(values, threshold)
    masks = [v.new_empty(((v.numel() + 7) // 8,), dtype=torch.uint8) for v in values]
    return masks, values[0].new_empty((len(values),), dtype=torch.int64)


def check(values: Sequence[Tensor], threshold: float) -> None:
    """Raise ValueError or TypeError, naming the argument at fault."""
    check_numbers("values", values)
    if threshold != threshold:
        raise ValueError("threshold must be a number, got NaN")


_op = define("threshold_mask(Tensor[] values, float threshold) -> (Tensor[] masks, Tensor counts)", reference, fake)


def threshold_mask(values: Sequence[Tensor], threshold: float) -> tuple[list[Tensor], Tensor]:
    """(masks, counts); the module docstring is the contract."""
    check(values, threshold)
    return _op([value.detach() for value in values], float(threshold))


threshold_mask.reference = reference  # type: ignore[attr-defined]
