"""Operands of the masked optimizer steps and of other operators on lists with one entry per parameter: checked, laid
out, launched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def launch(op: Callable[..., Any], params, grads, buffers, masks, counts, **hyper) -> None:
    """Operator ``op`` on operands that `check_operands` has seen and whose layouts agree.

    ``buffers`` holds one list for each kind of state, ``counts`` the tensor with one entry per parameter.
    """
    with torch.no_grad():
        op(params, grads, *buffers, masks, counts, **hyper)
    # The dispatcher does not bump the counters that let autograd detect a stale saved tensor.
    torch.autograd.graph.increment_version([*params, *(t for each in buffers for t in each), counts])


def launch_any_layout(op: Callable[..., Any], params, grads, buffers, masks, counts, **hyper) -> None:
    """As `launch`, for operands of any strides."""
    # The kernel walks storage: an operand with holes or another stride order is brought into the order of its mask.
    dense = [p if is_dense(p) else p.clone() for p in params]
    grads = [as_layout(g, p) for g, p in zip(grads, dense, strict=True)]
    # A kind of state that nobody reads may be an empty list.
    ordered = [[as_layout(t, p) for t, p in zip(each, dense[: len(each)], strict=True)] for each in buffers]
    launch(op, dense, grads, ordered, masks, counts, **hyper)
    with torch.no_grad():
        write_back([*params, *(t for each in buffers for t in each)], [*dense, *(t for each in ordered for t in each)])


def write_back(targets: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Bring results that lie in other memory, because a kernel wanted another layout, to their targets."""
    for target, result in zip(targets, results, strict=True):
        if result is not target:
            target.copy_(result)


def check_numbers(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise unless the list has an entry, and all are floating-point tensors on one device."""
    if not tensors:
        raise ValueError(f"{name} must hold at least one tensor")
    for i, t in enumerate(tensors):
        if t.dtype not in DTYPES or t.device != tensors[0].device:
            raise TypeError(
                f"{name}[{i}] must be one of {', '.join(map(str, DTYPES))} on {tensors[0].device}, "
                f"got {t.dtype} on {t.device}"
            )


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill their memory without holes, in any order of the dimensions."""
    return t.is_contiguous() or torch.empty_like(t, device="meta").stride() == t.stride()


def same_layout(t: Tensor, like: Tensor) -> bool:
    """Whether element i of one's memory is element i of the other's; strides of dimensions of size 1 say nothing."""
    a, b = t.stride(), like.stride()
    return a == b or all(x == y or n == 1 for x, y, n in zip(a, b, like.shape, strict=True))


def as_layout(t: Tensor, like: Tensor) -> Tensor:
    """`t`, copied into the layout of the dense tensor `like` if it has another."""
    return t if same_layout(t, like) else torch.empty_like(like).copy_(t)


Counts = tuple[str, Tensor, torch.dtype]
"""Name, tensor and required dtype of the operand with one entry per parameter."""


def _bad_counts(params: Sequence[Tensor], counts: Counts) -> ValueError:
    name, got, dtype = counts
    wanted = f"{str(dtype).removeprefix('torch.')} of shape ({len(params)},)"
    return ValueError(f"{name} must be contiguous {wanted}, got {got.dtype} {tuple(got.shape)}")


def check_lengths(
    params: Sequence[Tensor], lists: Mapping[str, Sequence[Any]], counts: Counts, known_zero: Sequence[Any] | None
) -> None:
    """Raise ValueError, naming the argument, unless each list has one entry per parameter."""
    for name, values in lists.items():
        if len(values) != len(params):
            raise ValueError(f"{name} must have one entry for each of the {len(params)} params, got {len(values)}")
    if counts[1].numel() != len(params):
        raise _bad_counts(params, counts)
    if known_zero is not None and len(known_zero) != len(params):
        raise ValueError(f"known_zero must be None or hold {len(params)} bools, got {len(known_zero)}")


def check_operands(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Mapping[str, Sequence[Tensor]],
    masks: Sequence[Tensor | None],
    counts: Counts,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    inner: Sequence[Tensor | None] = (),
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless operands that `check_lengths` has seen are what a
    masked step asks for.

    ``buffers`` maps names to lists of state, ``counts`` is the name, the tensor and the dtype of the one entry per
    parameter.
    """
    label, entries, _ = counts
    if entries.dtype != counts[2] or entries.shape != (len(params),) or not entries.is_contiguous():
        raise _bad_counts(params, counts)
    for i, param in enumerate(params):
        operands = {f"{name}[{i}]": values[i] for name, values in {"grads": grads, **buffers}.items()}
        check_entry("params", i, param, entries.device, operands, masks[i], f"like {label}")
        check_mask(f"inner[{i}]", inner[i] if inner else None, param)
    scalars = {name: t for name, t in (("grad_scale", grad_scale), ("found_inf", found_inf)) if t is not None}
    for name, t in scalars.items():
        check_scalar(name, t, entries.device)
    check_overlap(
        {"params": params, **buffers, label: [entries]},
        {
            "grads": grads,
            "masks": [m for m in masks if m is not None],
            "inner": [m for m in inner if m is not None],
            "grad_scale, found_inf": list(scalars.values()),
        },
    )


def check_entry(
    label: str, i: int, param: Tensor, device: torch.device, operands: Mapping[str, Tensor], mask: Tensor | None,
    why: str = "like the first",
) -> None:  # fmt: skip
    """Raise unless `param`, entry `i` of the list `label`, can be written on `device`, and `operands` and `mask` fit
    it."""
    _check_param(f"{label}[{i}]", param, device, why)
    for name, t in operands.items():
        _check_like(name, t, param)
    check_mask(f"masks[{i}]", mask, param)


def check_scalar(name: str, t: Any, device: torch.device) -> None:
    """Raise ValueError unless `t` is one float32 or float64 number in a tensor on `device`."""
    if not isinstance(t, Tensor) or t.numel() != 1 or t.dtype not in DTYPES[:2] or t.device != device:
        got = f"{t.dtype} of shape {tuple(t.shape)} on {t.device}" if isinstance(t, Tensor) else repr(t)
        raise ValueError(f"{name} must be one float32 or float64 number in a tensor on {device}, got {got}")


def _check_like(name: str, t: Tensor, param: Tensor) -> None:
    if t.layout != torch.strided:
        raise ValueError(f"{name} must be dense (torch.strided), got layout {t.layout}")
    if t.shape != param.shape or t.dtype != param.dtype or t.device != param.device:
        raise ValueError(
            f"{name} must be {param.dtype} of shape {tuple(param.shape)} on {param.device} like its "
            f"parameter, got {t.dtype} of shape {tuple(t.shape)} on {t.device}"
        )


def _check_param(name: str, param: Tensor, device: torch.device, why: str) -> None:
    if param.layout != torch.strided:
        raise ValueError(f"{name} must be dense (torch.strided), got layout {param.layout}")
    if param.dtype not in DTYPES:
        raise TypeError(f"{name} must be one of {[str(d) for d in DTYPES]}, got {param.dtype}")
    if param.device != device:
        raise ValueError(f"{name} must be on {device} {why}, got {param.device}")
    if any(step == 0 and n > 1 for step, n in zip(param.stride(), param.shape, strict=True)):
        raise ValueError(f"{name} must have memory for each element, got an expanded tensor")


def check_mask(name: str, mask: Tensor | None, param: Tensor) -> None:
    """Raise ValueError unless `mask` is None or holds one bit for each element of `param`."""
    size = (param.numel() + 7) // 8
    if mask is None:
        return
    if mask.dtype != torch.uint8 or mask.shape != (size,) or mask.device != param.device or not mask.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous uint8 of shape ({size},) on {param.device}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)} on {mask.device}"
        )


def check_overlap(written: Mapping[str, Sequence[Tensor]], read: Mapping[str, Sequence[Tensor]]) -> None:
    """Refuse a written tensor whose span of memory meets that of any other operand."""
    spans = []
    for name, tensors in (*written.items(), *read.items()):
        for i, t in enumerate(tensors):
            if t.numel():
                last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size(), name, i))
    reach, holder = 0, ("", 0)  # the furthest end so far
    written_reach, writer = 0, ("", 0)  # and that of a written tensor
    for start, stop, name, i in sorted(spans):
        other, end = (holder, reach) if name in written else (writer, written_reach)
        if start < end:
            raise ValueError(f"{other[0]}[{other[1]}] overlaps the memory of {name}[{i}], and one of them is written")
        if stop > reach:
            reach, holder = stop, (name, i)
        if name in written and stop > written_reach:
            written_reach, writer = stop, (name, i)
