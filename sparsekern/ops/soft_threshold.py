"""soft_threshold_: weights drawn towards zero by a threshold, one call for a whole model.

    output = sign(w) * (|w| - threshold)    where |w| > threshold, else 0
    output = gradient                       likewise, if gradients are given: its gradient by w

`thresholds[i]` is a tensor of one number, finite and at least 0, on the device of the weights; it is rounded to the
compute type. With `rescale` each output channel (dim 0) is then multiplied by 1.01 / (share + 0.01), where share is
(mean of the |w| above the threshold + 1e-6) / (mean |w| + 1e-6): that brings it back to about its old size (ST-3,
vanderschuea/stthree). At threshold 0 it is 1, exactly.

NaN stays NaN, and its gradient passes. bfloat16 and float16 compute in float32 and round once when they are stored. The
means are sums in an order of the kernel's own, the same on any number of threads; without `rescale` every backend
agrees bit for bit. On a GPU the reference serves it. No autograd.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern._library import define
from sparsekern.ops.operands import as_layout, check_entry, check_overlap, is_dense, write_back


def reference(outputs, weights, thresholds, gradients, rescale) -> None:
    _check_lists(outputs, weights, thresholds, gradients, rescale)
    for i, (out, weight, threshold) in enumerate(zip(outputs, weights, thresholds, strict=True)):
        w = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        t = threshold.reshape(()).to(w.dtype)
        size = w.abs()
        value = torch.where(size <= t, 0, gradients[i] if gradients else w - torch.copysign(t, w))
        if rescale and w.numel():
            dims = tuple(range(1, w.dim()))
            above = torch.where(size <= t, 0, size).mean(dims, keepdim=True)
            share = (above + 1e-6) / (size.mean(dims, keepdim=True) + 1e-6)
            value = 1.01 / (share + 0.01) * value
        out.copy_(value)


def fake(outputs, weights, thresholds, gradients, rescale) -> None:
    _check_lists(outputs, weights, thresholds, gradients, rescale)


def _check_lists(outputs, weights, thresholds, gradients, rescale) -> None:
    if len(gradients) and rescale:
        raise ValueError("gradients must be empty with rescale, whose straight-through gradient is that of the output")
    given = {"gradients": gradients} if len(gradients) else {}
    for name, values in {"weights": weights, "thresholds": thresholds, **given}.items():
        if len(values) != len(outputs):
            raise ValueError(f"{name} must have one entry for each of the {len(outputs)} outputs, got {len(values)}")
    for i, t in enumerate(thresholds):
        if t.numel() != 1:
            raise ValueError(f"thresholds[{i}] must be one number, got a tensor of shape {tuple(t.shape)}")
    for i, w in enumerate(weights):
        if rescale and w.dim() < 2:
            raise ValueError(f"weights[{i}] must have two dims or more to rescale its channels, got {w.dim()}")


OP = define(
    "soft_threshold_(Tensor(a!)[] outputs, Tensor[] weights, Tensor[] thresholds, Tensor[] gradients, bool rescale)"
    " -> ()",
    reference,
    fake,
)


def soft_threshold_(
    outputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    gradients: Sequence[Tensor] = (),
    *,
    rescale: bool = False,
) -> None:
    """Write `outputs` in place; the module docstring is the contract.

    All tensors are on one device; those of one entry share shape and dtype (float32, float64, bfloat16 or float16); any
    strides. `outputs[i]` may be `weights[i]` or `gradients[i]`; otherwise no output shares memory with anything else.
    Raises ValueError or TypeError, before anything is changed, naming the argument at fault.
    """
    outputs, weights, thresholds, gradients = list(outputs), list(weights), list(thresholds), list(gradients)
    _check_lists(outputs, weights, thresholds, gradients, rescale)
    for i, out in enumerate(outputs):
        operands = {f"weights[{i}]": weights[i], **({f"gradients[{i}]": gradients[i]} if gradients else {})}
        check_entry("outputs", i, out, outputs[0].device, operands, None)
        t = thresholds[i]
        if t.device != out.device or not t.dtype.is_floating_point:
            raise ValueError(f"thresholds[{i}] must be a real number on {out.device}, got {t.dtype} on {t.device}")
    read = {"weights": weights, "gradients": gradients}
    apart = {n: [t for t, o in zip(v, outputs, strict=bool(v)) if t is not o] for n, v in read.items()}
    check_overlap({"outputs": outputs}, {**apart, "thresholds": thresholds})
    dense = [o if by_rows(o) else torch.empty_like(o, memory_format=torch.contiguous_format) for o in outputs]
    numbers = [t if t.dtype in (torch.float32, torch.float64) else t.float() for t in thresholds]
    with torch.no_grad():
        given, slopes = ([as_layout(t, o) for t, o in zip(v, dense, strict=bool(v))] for v in read.values())
        OP(dense, given, numbers, slopes, rescale)
        write_back(outputs, dense)
    # The dispatcher does not bump the counters that let autograd detect a stale saved tensor.
    torch.autograd.graph.increment_version(outputs)


def by_rows(t: Tensor) -> bool:
    """Whether the memory of `t` has no holes and one output channel lies behind the other."""
    return is_dense(t) and (t.dim() < 2 or t.shape[0] < 2 or t.stride(0) * t.shape[0] == t.numel())


soft_threshold_.reference = reference  # type: ignore[attr-defined]
