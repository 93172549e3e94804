"""Repeated calls of sparse_conv2d and sparse_linear go straight to the kernel, and their gradients to theirs.

Checks, the dispatcher and the layers of Python behind it cost more than a hundred microseconds where a gradient is
asked for, as much as a small layer takes. What they decide depends on shapes, strides, geometry and structure only, so
it is kept with the structure's plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler

from sparsekern import _direct
from sparsekern.ops import sparse_kernels
from sparsekern.ops.epilogue import BOUNDS, UNBOUNDED, Epilogue
from sparsekern.ops.sparse_operands import compiled_product
from sparsekern.ops.sparse_structure import SparseStructure


@dataclass(frozen=True)
class Call:
    """How to run a call again, as long as the structure's tensors are still of these versions; those of inference mode
    count none."""

    versions: tuple[int, int] | None
    dtype: torch.dtype
    plan: Tensor
    shape: tuple[int, ...]  # of the result
    strides: tuple[int, ...]
    geometry: tuple[int, ...]
    backward: Backward
    plans: dict[str, Tensor] = field(default_factory=dict)  # of gradients

    def run(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        low: float,
        high: float,
    ) -> Tensor | None:
        """The result, if operands, which are plain, are of the same dtypes and lie the same way."""
        if _direct.product is None or profiler._is_profiler_enabled:
            return sparse_kernels.product(input, weight, self.plan, bias, scale, residual, low, high)
        result = _direct.empty_strided(self.shape, self.strides, self.dtype)
        done = _direct.product(input, weight, self.plan, bias, scale, residual, result, low, high)
        return result if done else None

    def gradients(
        self, grad: Tensor, input: Tensor, weight: Tensor, structure: SparseStructure, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of input, weight and bias that are needed; nobody watches, and no graph of them is asked for."""
        if grad.stride() != self.strides:
            grad = _direct.empty_strided(self.shape, self.strides, self.dtype).copy_(grad)
        sparse = sparse_kernels.Weight(weight, structure.tensors, structure.layout, structure.shape, structure.groups)
        rows, columns, channel = None, None, 1 if self.geometry else grad.dim() - 1
        if needs[0]:
            rows = torch.empty_like(input)
            self._run("input", sparse, rows, grad, lambda plan: sparse_kernels.input_gradient(rows, grad, weight, plan))
        if needs[1]:
            columns = torch.empty_like(weight)
            self._run(
                "weight", sparse, input, grad, lambda plan: sparse_kernels.weight_gradient(columns, grad, input, plan)
            )
        others = [i for i in range(grad.dim()) if i != channel]
        return rows, columns, grad.sum(others) if needs[2] else None

    def _run(self, kind: str, sparse: sparse_kernels.Weight, image: Tensor, grad: Tensor, run: Any) -> None:
        plan = self.plans.get(kind)
        if plan is None or not run(plan):  # or made for another instruction set
            sparse.run(kind, image, grad, self.geometry, run)
            self.plans[kind] = sparse.plan(kind, image, grad, self.geometry)


@dataclass(frozen=True)
class Backward:
    """The ``operator`` for the gradient of a call, and what it takes before ``needs``."""

    operator: Callable[..., Any]
    geometry: tuple[Any, ...]


class SparseProduct(torch.autograd.Function):
    """A repeated float32 call that a gradient is asked of."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, call: Call, structure: SparseStructure
    ) -> Tensor:
        result = call.run(input, weight, bias, None, None, *UNBOUNDED)
        if result is None:
            raise _DoesNotFit
        ctx.save_for_backward(input, weight, *structure.tensors)
        ctx.call, ctx.structure = call, structure
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, *tensors = ctx.saved_tensors
        call, structure, needs = ctx.call, ctx.structure, list(ctx.needs_input_grad[:3])
        if _direct.plain(grad) and not torch.is_grad_enabled():
            return *call.gradients(grad, input, weight, structure, needs), None, None
        operator, geometry = call.backward.operator, call.backward.geometry
        found = operator(grad, input, weight, tensors, structure.layout, *geometry, needs, structure.shape)
        return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None


class _DoesNotFit(RuntimeError):
    """The kept plan is for other operands or another instruction set."""


_grad_enabled = torch.is_grad_enabled  # found once: what Python looks up has left the caches, too


def _differentiated(*tensors: Tensor | None) -> bool:
    """Whether a gradient is asked for, if gradients are enabled."""
    return any(t is not None and t.requires_grad for t in tensors)


def _exact(given: tuple[Any, ...]) -> bool:
    """Ints and tuples of them: a list has no hash, and 1.0 and True have that of 1 but are refused."""
    for value in given:
        if type(value) is tuple:
            if not _exact(value):
                return False
        elif type(value) is not int:
            return False
    return True


def repeat(
    input: Tensor,
    weight: Tensor,
    structure: SparseStructure,
    bias: Tensor | None,
    given: tuple[Any, ...],
    epilogue: Epilogue | None = None,
) -> Tensor | None:
    """The result, if an equal call is known; ``given`` is the geometry of a convolution as the caller wrote it."""
    try:
        call = structure.calls[input.shape, given]
        first, second = structure.tensors
        if call.versions is not None and call.versions != (first._version, second._version):
            return None
        scale, residual, bounds, halves = None, None, UNBOUNDED, call.dtype is not torch.float32
        if epilogue is not None:
            scale, residual, bounds = epilogue.scale, epilogue.residual, BOUNDS[epilogue.activation]
        if not (_exact(given) and _direct.plain(input, weight, bias, scale, residual)):
            return None
        if halves and (epilogue is not None or (bias is not None and bias.dtype is not call.dtype)):
            return None  # kernels round each step of an epilogue to float32
        if not (_grad_enabled() and _differentiated(input, weight, bias, scale, residual)):
            added = bias.float() if halves and bias is not None else bias
            return call.run(input, weight, added, scale, residual, *bounds)
        if epilogue is None and not halves:
            return SparseProduct.apply(input, weight, bias, call, structure)
    except (AttributeError, KeyError, TypeError, RuntimeError):
        pass  # not tensors, not known, a list, not on CPU, a bias of another size: the checks will tell
    return None


def remember(
    input: Tensor,
    weight: Tensor,
    structure: SparseStructure,
    bias: Tensor | None,
    given: tuple[Any, ...],
    geometry: tuple[int, ...],
    result: Tensor,
    backward: Backward,
) -> None:
    """Keep a call that passed all checks, if its like may skip them; operands must be dense as they are."""
    if not (_exact(given) and type(structure) is SparseStructure and compiled_product(input, weight, bias)):
        return
    uncounted, *other = {t.is_inference() for t in structure.tensors}
    if other or not _direct.plain(input, weight, bias):
        return
    sparse = sparse_kernels.Weight(weight, structure.tensors, structure.layout, structure.shape, structure.groups)
    plan = sparse.plan("product", input, result, geometry)
    versions = None if uncounted else sparse_kernels.versions(structure.tensors)
    call = Call(versions, input.dtype, plan, tuple(result.shape), result.stride(), geometry, backward)
    sparse_kernels.remember(structure.calls, (input.shape, given), call)
