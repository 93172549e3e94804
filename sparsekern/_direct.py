"""Calls of the operator library that go past torch's dispatcher, through the module `_C`.

Where its code has left the caches, the way through the dispatcher takes as long as a small layer. Only calls of `plain`
tensors go past it, and none that a profiler is to see.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from sparsekern import _C
except ImportError:
    _C = None

find: Callable[..., Any] | None = None
"""What `_find` of `sparsekern.ops.sparse_calls` does, compiled."""
run: Callable[..., Tensor | None] | None = None
"""What its `_run` does, past the dispatcher."""
obstacle = "the compiled kernels are not in use"
"""Why there is none, '' if there is."""

# Found once: what Python looks up has left the caches, too.
_is_dynamo, _tracing = torch.compiler.is_dynamo_compiling, torch._C._get_tracing_state
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_PLAIN = (Tensor, torch.nn.Parameter)


def _empty_strided(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype)


# What compiled graphs of torch call, which does not go through the dispatcher either.
empty_strided = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", _empty_strided)


def connect(library: Path) -> None:
    """Let `_C` call the operator library."""
    global find, obstacle, run
    find = run = None
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        obstacle = f"torch {torch.__version__} lacks DLPack's C functions"
    elif not hasattr(_C, "find"):
        obstacle = "the module _C is missing" if _C is None else "the module _C is of an older build"
    else:
        table = ctypes.addressof(ctypes.c_char.in_dll(ctypes.CDLL(str(library)), "sparsekern_direct"))
        # Transforms wrap tensors, which then have no memory to read.
        watchers = _dispatch_modes, _function_modes, _tracing
        if _C.connect(capsule, table, *_PLAIN, watchers, Tensor.is_neg, empty_strided):
            find, run, obstacle = _C.find, _C.run, ""
        else:
            obstacle = f"torch {torch.__version__} has another version of DLPack's C functions"


def plain(*tensors: Tensor | None) -> bool:
    """Ordinary tensors that hold their own values, and nobody who records or transforms operators."""
    if _is_dynamo() or _dispatch_modes() or _function_modes() or _tracing() is not None or _transforms() is not None:
        return False
    for t in tensors:  # a generator would cost more than the checks
        if t is not None and (type(t) not in _PLAIN or t.is_neg()):
            return False
    return forward_ad._current_level < 0
