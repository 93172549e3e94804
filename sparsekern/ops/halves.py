"""bfloat16 and float16 on the float32 kernels: widened exactly, summed in float32, rounded once at the end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsekern import _library

HALVES = (torch.bfloat16, torch.float16)


def widened(serve: Callable[..., Any], native: tuple[torch.dtype, ...] = ()) -> Callable[..., Any]:
    """``serve`` for 16-bit operands too, where kernels are loaded; its results have the dtype of its first argument.
    It takes the ``native`` ones as they are."""

    @functools.wraps(serve)
    def call(*args: Any) -> Any:
        dtype = args[0].dtype
        if dtype not in HALVES or dtype in native or not _library.kernels_loaded:
            return serve(*args)
        found = serve(*(t.float() if isinstance(t, Tensor) and t.dtype == dtype else t for t in args))
        return found.to(dtype) if isinstance(found, Tensor) else tuple(t.to(dtype) for t in found)

    return call
