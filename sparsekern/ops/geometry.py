"""What a convolution's operands look like in memory and how large its result is."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Uninitialised, in the memory format that follows ``like``."""
    last = not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    chosen = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=chosen)


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Of one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def without_gaps(t: Tensor) -> Tensor:
    """Contiguous in one of the two memory formats."""
    return t if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) else t.contiguous()


def pair(name: str, value: object, least: int) -> list[int]:
    """Two ints of one or two, each at least ``least``; else TypeError or ValueError that names the argument."""
    values = list(value) if isinstance(value, (list, tuple)) else [value, value]
    for v in values:
        # A protocol takes microseconds to ask, which a small layer feels.
        if type(v) is not int and (isinstance(v, (bool, Tensor)) or not isinstance(v, SupportsIndex)):
            raise TypeError(f"{name}={value!r}: expected an int or two ints")
    if len(values) != 2 or any(operator.index(v) < least for v in values):
        raise ValueError(f"{name}={value!r}: expected an int or two ints, {least} or more")
    return [operator.index(v) for v in values]
