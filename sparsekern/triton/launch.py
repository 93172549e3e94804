"""What the Triton kernels share: arithmetic that the interpreter lacks, tables on the device, and launching."""

from __future__ import annotations

import contextlib
import functools
import struct
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern import _library
from sparsekern.ops import fallbacks

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether the kernels of this process run in Triton's interpreter, on CPU tensors."""
TYPES = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64,
}  # fmt: skip

EMPTY = "an operand is empty"
"""Why the reference runs where there is nothing to do; no reason to warn."""
tracing: ContextVar[bool] = ContextVar("tracing", default=False)
"""Whether torch.compile is looking through an operator at its kernels."""
_captured: list[Tensor] = []
"""Pinned memory that CUDA graphs copy from each time they are replayed."""


@triton.jit
def _split(x):
    """x as a sum of two float64 of half the digits (Veltkamp)."""
    high = x * 134217729.0 - (x * 134217729.0 - x)
    return high, x - high


@triton.jit
def _fma_of_float64(x, y, z):
    """For the interpreter: the rounding errors of product and sum (Dekker, Knuth) are added last."""
    product = x * y
    x_high, x_low = _split(x)
    y_high, y_low = _split(y)
    error = ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low
    sum = product + z
    part = sum - product
    exact = sum + ((product - (sum - part)) + (z - part) + error)
    return tl.where(exact == exact, exact, sum)


@triton.jit
def fma(x, y, z):
    """x * y + z, rounded once."""
    if INTERPRETED and x.dtype == tl.float32:
        # NumPy has no fma; float64 holds the product of two float32 exactly.
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    elif INTERPRETED:
        return _fma_of_float64(x, y, z)
    else:
        return tl.fma(x, y, z)


@triton.jit
def divide(x, y):
    """x / y, correctly rounded; Triton's own float32 division is not."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def root(x):
    """The square root, correctly rounded; Triton's own float32 root is not."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """``x`` to the nearest value of TYPE, ties to even."""
    if INTERPRETED and TYPE == tl.bfloat16:  # noqa: SIM300
        # The interpreter cuts the lower half off.
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x != x, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(TYPE)


@triton.jit
def number(bits, TYPE: tl.constexpr):
    """The double whose bits `double_bits` passed as an integer, rounded once to TYPE."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(TYPE)


def double_bits(value: float) -> int:
    """A Python float as an integer argument: as a float argument it would arrive as float32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def wrapped(kernel: Any) -> Any:
    """The kernel, in the form that torch.compile sees through while it looks; that form is slow to call."""
    return torch.library.wrap_triton(kernel) if tracing.get() else kernel


def table_on(device: torch.device, rows: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """A small table as a tensor on the device, without waiting for it; safe while a CUDA graph is captured."""
    if device.type == "cpu":
        return torch.tensor(rows, dtype=dtype)
    host = torch.tensor(rows, dtype=dtype, pin_memory=True)
    if torch.cuda.is_current_stream_capturing():
        _captured.append(host)
    return host.to(device, non_blocking=True)


def operator(uncovered: Callable[..., str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function the Triton form of the operator of its name.

    It runs on the device of its first tensor, which Triton takes from the context. ``uncovered(arguments)`` is why the
    reference must run instead, or ''; that is said once. The result has it as an attribute.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if why := uncovered(*args, **kwargs):
                _say(name, why)
                if name.startswith("sparse_"):  # the structure comes after a weight
                    fallbacks.note(next(a for a in args if isinstance(a, (list, tuple))), name, why)
                return _library.OPS[name](*args, **kwargs)
            with _device_of(args):
                return function(*args, **kwargs)

        run.uncovered = uncovered  # type: ignore[attr-defined]
        return run

    return wrap


def first_device(args: Sequence[Any]) -> torch.device | None:
    """The device of the first tensor among arguments and lists of them."""
    tensors = (t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor))
    return next((t.device for t in tensors), None)


def _device_of(args: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    device = first_device(args)
    wanted = device is not None and device.type == "cuda" and not tracing.get()
    return torch.cuda.device(device) if wanted else contextlib.nullcontext()


@functools.cache
def _say(name: str, why: str) -> None:
    if why != EMPTY:
        text = f"{name} has no Triton kernel for these operands ({why}): the slow PyTorch reference runs"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
