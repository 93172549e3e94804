"""topk_bounds: the magnitudes on both sides of a global top-k choice.

A float64 tensor of two numbers on the device of the scores: the lowest |score| among the ``keep`` highest of the whole
list, and the highest among the others. Exact. Infinity stands for the first if ``keep`` is 0, minus infinity for the
second if everything is kept, and both are NaN if any score is. Scores are float16, bfloat16, float32 or float64, of any
strides. With ``factors``, one number per tensor, scores are multiplied by them first: factor and product are rounded to
float64 if any score is of that type, else to float32. Nothing is sorted or copied as a whole on a CPU; on a GPU the
reference serves it, which does both. Not differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern._library import define
from sparsekern.ops.operands import check_numbers


def reference(scores: Sequence[Tensor], keep: int, factors: Sequence[float] = ()) -> Tensor:
    check(scores, keep, factors)
    compute = torch.float64 if any(s.dtype == torch.float64 for s in scores) else torch.float32
    scaled = [s.to(compute) * f for s, f in zip(scores, factors, strict=True)] if factors else scores
    sizes = torch.cat([s.abs().double().reshape(-1) for s in scaled])
    left = sizes.numel() - keep
    inf = sizes.new_full((), float("inf"))
    kept = sizes.kthvalue(left + 1).values if keep else inf
    found = torch.stack([kept, sizes.kthvalue(left).values if left else -inf])
    return torch.where(sizes.isnan().any(), float("nan"), found)


def fake(scores: Sequence[Tensor], keep: int, factors: Sequence[float] = ()) -> Tensor:
    check(scores, keep, factors)
    return scores[0].new_empty((2,), dtype=torch.float64)


def check(scores: Sequence[Tensor], keep: int, factors: Sequence[float]) -> None:
    """Raise ValueError or TypeError, naming the argument at fault."""
    check_numbers("scores", scores)
    total = sum(score.numel() for score in scores)
    if not 0 <= keep <= total:
        raise ValueError(f"keep must be from 0 to {total}, the number of scores, got {keep}")
    if len(factors) not in (0, len(scores)):
        raise ValueError(f"factors must be empty or hold {len(scores)} numbers, one per tensor, got {len(factors)}")


_op = define("topk_bounds(Tensor[] scores, int keep, float[] factors=[]) -> Tensor", reference, fake)


def topk_bounds(scores: Sequence[Tensor], keep: int, factors: Sequence[float] = ()) -> Tensor:
    """(lowest |score| kept, highest left out); the module docstring is the contract."""
    check(scores, keep, factors)
    return _op([score.detach() for score in scores], keep, list(map(float, factors)))


topk_bounds.reference = reference  # type: ignore[attr-defined]
