"""Repeated calls of sparse_conv2d that need no gradient go straight to the kernel.

Checks, the dispatcher and the layers of Python behind it cost tens of microseconds, as much as a small layer takes.
What they decide depends on shapes, strides, geometry and structure only, so it is kept with the structure's plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparsekern.ops import sparse_kernels
from sparsekern.ops.epilogue import BOUNDS, Epilogue
from sparsekern.ops.sparse_structure import SparseStructure, compiled_product


@dataclass(frozen=True)
class Call:
    """How to run a call again, as long as the structure's tensors are still of these versions."""

    versions: tuple[int, int]
    plan: Tensor
    output: torch.Size
    last: bool  # channels_last
    rest: tuple[Any, ...]  # shape, geometry and groups, for the kernel


def _unobserved(*tensors: Tensor | None) -> bool:
    """Plain tensors that no gradient is asked for, and nothing that records or transforms operators."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    graph = torch.is_grad_enabled()
    return all(t is None or (type(t) in _PLAIN and not (graph and t.requires_grad)) for t in tensors)


_PLAIN = (Tensor, torch.nn.Parameter)


def _exact(given: tuple[Any, ...]) -> bool:
    """Ints and tuples of them: a list has no hash, and 1.0 and True have that of 1 but are refused."""
    for value in given:
        if type(value) is tuple:
            for part in value:
                if type(part) is not int:
                    return False
        elif type(value) is not int:
            return False
    return True


def _compiled(t: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    return t.dtype is dtype and t.is_cpu


def _key(input: Tensor, weight: Tensor, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return input.dtype, input.shape, input.stride(), weight.shape, weight.stride(), given


def _after(epilogue: Epilogue, result: Tensor) -> tuple[Any, ...] | None:
    """What the kernel takes of an epilogue, None if it does not."""
    if epilogue.activation not in BOUNDS or not _unobserved(epilogue.scale, epilogue.residual):
        return None
    if not all(t is None or _compiled(t) for t in (epilogue.scale, epilogue.residual)):
        return None
    return epilogue.for_kernel(result)


def repeat(
    input: Tensor,
    weight: Tensor,
    structure: SparseStructure,
    bias: Tensor | None,
    given: tuple[Any, ...],
    epilogue: Epilogue | None = None,
) -> Tensor | None:
    """The result, if an equal call is known; ``given`` is its geometry as the caller wrote it."""
    try:
        call = structure.calls[_key(input, weight, given)]
    except (AttributeError, KeyError, TypeError):  # not tensors, not known, a list
        return None
    dtype = input.dtype
    if not (
        _exact(given) and _unobserved(input, weight, bias) and _compiled(input, dtype) and _compiled(weight, dtype)
    ):
        return None
    if bias is not None and not (_compiled(bias, dtype) and bias.shape == structure.shape[:1] and bias.is_contiguous()):
        return None
    if call.versions != sparse_kernels.versions(structure.tensors):
        return None
    # Each step of an epilogue rounds to the dtype, which kernels do for float32.
    if epilogue is not None and dtype is not torch.float32:
        return None
    if call.last:
        result = torch.empty(call.output, dtype=dtype, memory_format=torch.channels_last)
    else:
        result = input.new_empty(call.output)
    after = sparse_kernels.PLAIN if epilogue is None else _after(epilogue, result)
    if after is None:
        return None
    bias = None if bias is None else bias.float()
    done = sparse_kernels.product(result, input, weight, call.plan, structure.layout, bias, *after, *call.rest)
    return result if done else None


def remember(
    input: Tensor,
    weight: Tensor,
    structure: SparseStructure,
    bias: Tensor | None,
    given: tuple[Any, ...],
    geometry: tuple[int, ...],
    result: Tensor,
) -> None:
    """Keep a call that passed all checks, if its like may skip them; operands must be dense as they are."""
    if not (_exact(given) and type(structure) is SparseStructure and compiled_product(input, weight, bias)):
        return
    if not _unobserved(input, weight, bias):
        return
    sparse = sparse_kernels.Weight(weight, structure.tensors, structure.layout, structure.shape, structure.groups)
    plan, rest = sparse.plan("product", input, result, geometry), (structure.shape, geometry, structure.groups)
    call = Call(sparse_kernels.versions(structure.tensors), plan, result.shape, not result.is_contiguous(), rest)
    sparse_kernels.remember(structure.calls, _key(input, weight, given), call)
