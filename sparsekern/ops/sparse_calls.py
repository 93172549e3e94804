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
from sparsekern.ops.sparse_structure import SparseStructure, compiled_form


@dataclass(frozen=True)
class _Call:
    plan: Tensor
    output: torch.Size
    memory_format: torch.memory_format
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


def _key(input: Tensor, weight: Tensor, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return input.shape, input.stride(), weight.shape, weight.stride(), given


def _direct(input: Tensor, weight: Tensor, structure: SparseStructure, bias: Tensor | None) -> bool:
    if type(structure) is not SparseStructure or not _unobserved(input, weight, bias):
        return False
    if bias is not None and (bias.shape != structure.shape[:1] or not bias.is_contiguous()):
        return False
    return compiled_form(input, weight, bias)


def repeat(
    input: Tensor, weight: Tensor, structure: SparseStructure, bias: Tensor | None, given: tuple[Any, ...]
) -> Tensor | None:
    """The result, if an equal call is known; ``given`` is its geometry as the caller wrote it."""
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and _direct(input, weight, structure, bias)):
        return None
    if not _exact(given):
        return None
    call = sparse_kernels.remembered(structure.tensors).get(_key(input, weight, given))
    if call is None:
        return None
    result = torch.empty(call.output, dtype=torch.float32, memory_format=call.memory_format)
    done = sparse_kernels.product(result, input, weight, call.plan, structure.layout, bias, *call.rest)
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
    if not _exact(given) or not _direct(input, weight, structure, bias):
        return
    form = torch.contiguous_format if result.is_contiguous() else torch.channels_last
    sparse = sparse_kernels.Weight(weight, structure.tensors, structure.layout, structure.shape, structure.groups)
    plan = sparse.plan("product", input, result, geometry)
    call = _Call(plan, result.shape, form, (structure.shape, geometry, structure.groups))
    sparse_kernels.remember(sparse_kernels.remembered(structure.tensors), _key(input, weight, given), call)
