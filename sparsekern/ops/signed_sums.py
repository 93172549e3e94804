"""signed_sums: of each tensor the sum of its elements, each times the sign of an element of another tensor.

    sums[i] = sum(values[i] * sign(signs[i]))        an element whose sign is 0 is left out, also if it is NaN

A float64 tensor with one number per entry, on the device of the values: the gradient by a threshold of a weight that
the threshold draws towards zero is minus the sum of the weight's gradients times their weights' signs. A float32 or
float64 sum of short stretches first, then float64; the same on any number of threads. One call for a whole model, one
pass on a CPU; on a GPU the reference serves it. Not differentiable.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern._library import define
from sparsekern.ops.operands import as_layout, check_numbers, is_dense


def reference(values: Sequence[Tensor], signs: Sequence[Tensor]) -> Tensor:
    check(values, signs)
    return torch.stack([
        torch.where(s == 0, 0, torch.where(torch.signbit(s), -v, v)).sum(dtype=torch.float64)
        for v, s in zip(values, signs, strict=True)
    ])  # fmt: skip


def fake(values: Sequence[Tensor], signs: Sequence[Tensor]) -> Tensor:
    check(values, signs)
    return values[0].new_empty((len(values),), dtype=torch.float64)


def check(values: Sequence[Tensor], signs: Sequence[Tensor]) -> None:
    """Raise ValueError or TypeError, naming the argument at fault."""
    if not values or len(signs) != len(values):
        raise ValueError(f"values and signs must have as many entries, one at least, got {len(values)}, {len(signs)}")
    check_numbers("values", values)
    for i, (v, s) in enumerate(zip(values, signs, strict=True)):
        if s.shape != v.shape or s.dtype != v.dtype or s.device != v.device:
            raise ValueError(
                f"signs[{i}] must be {v.dtype} of shape {tuple(v.shape)} on {v.device} like values[{i}], "
                f"got {s.dtype} of shape {tuple(s.shape)} on {s.device}"
            )


_op = define("signed_sums(Tensor[] values, Tensor[] signs) -> Tensor", reference, fake)


def signed_sums(values: Sequence[Tensor], signs: Sequence[Tensor]) -> Tensor:
    """The sums as a float64 tensor; the module docstring is the contract. Any strides."""
    check(values, signs)
    # The kernel walks storage.
    dense = [v.detach() if is_dense(v) else v.detach().contiguous() for v in values]
    return _op(dense, [as_layout(s.detach(), v) for s, v in zip(signs, dense, strict=True)])


signed_sums.reference = reference  # type: ignore[attr-defined]
