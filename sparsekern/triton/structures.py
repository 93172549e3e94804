"""What is found out once per sparse structure and remembered as long as its tensors live: a check, its transpose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekern.ops.sparse_kernels import remember, remembered
from sparsekern.ops.sparse_structure import check_form, check_tensors
from sparsekern.triton.launch import tracing

BLOCKS = {"unstructured": (1, 1), "1x4": (1, 4), "4x1": (4, 1)}
"""Layout -> (result channels, source channels) of one block."""


def _once(structure: Sequence[Tensor], key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
    """``compute()``, or what it gave for the same tensors, unchanged since, and the same key."""
    found = remembered(structure)
    if key not in found:
        remember(found, key, compute())
    return found[key]


def check_structure(structure: Sequence[Tensor], layout: str, shape: Sequence[int], groups: int = 1) -> None:
    """Raise unless this is a structure of that layout. The contents are read, which waits for the device, at first
    sight only; and not while torch.compile looks on or a CUDA graph is captured, when nothing can be read."""
    check_form(structure, layout, shape, groups)
    blind = tracing.get() or (structure[0].is_cuda and torch.cuda.is_current_stream_capturing())
    if not blind:
        key = ("check", layout, tuple(shape), groups)
        _once(structure, key, lambda: check_tensors(structure, layout, shape, groups))


def transposed(structure: Sequence[Tensor], layout: str, shape: Sequence[int], groups: int) -> tuple[Tensor, Tensor]:
    """Row pointers and column indices of the same blocks by source channel; a block of the layout is turned as well.

    Row: group, then source channel (or block of 4). Column: result channel (or block of 4) within the group, then the
    place in the kernel. Never waits for the device.
    """
    key = ("transposed", layout, tuple(shape), groups)
    return _once(structure, key, lambda: _transpose(structure, layout, shape, groups))


def _transpose(structure: Sequence[Tensor], layout: str, shape: Sequence[int], groups: int) -> tuple[Tensor, Tensor]:
    pointers, indices = structure
    height, width = BLOCKS[layout]
    taps = math.prod(shape[2:])
    own_rows, own_channels = shape[0] // height // groups, shape[1] // width
    place = torch.arange(indices.numel(), device=indices.device, dtype=torch.int32)
    # Clamped, because the structure may be unchecked.
    row = (torch.searchsorted(pointers, place, right=True) - 1).clamp(0, own_rows * groups - 1)
    column = indices.long().clamp(0, own_channels * taps - 1)
    new_row = row // own_rows * own_channels + column // taps
    new_column = row % own_rows * taps + column % taps
    order = (new_row * (own_rows * taps) + new_column).sort().values
    starts = torch.arange(own_channels * groups + 1, device=indices.device) * (own_rows * taps)
    return torch.searchsorted(order, starts, out_int32=True), (order % (own_rows * taps)).int()
