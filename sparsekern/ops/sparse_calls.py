"""Repeated calls of sparse_conv2d and sparse_linear go straight to the kernel, and their gradients to theirs.

Checks, the dispatcher and the layers of Python behind it cost more than a hundred microseconds where a gradient is
asked for, as much as a small layer takes. What they decide depends on shapes, strides, geometry and structure only, so
it is kept with the structure's plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from sparsekern import _direct
from sparsekern.ops import sparse_kernels
from sparsekern.ops.epilogue import BOUNDS, UNBOUNDED, Epilogue
from sparsekern.ops.sparse_operands import compiled_product
from sparsekern.ops.sparse_structure import SparseStructure


class Call(NamedTuple):
    """How to run a call again, as long as the structure's tensors are still of these versions (none for those of
    inference mode, which count none). The first six are read by csrc/direct_call.cpp."""

    given: tuple[Any, ...]
    versions: tuple[int, int] | None
    dtype: torch.dtype
    plan: Tensor
    shape: tuple[int, ...]  # of the result
    strides: tuple[int, ...]
    geometry: tuple[int, ...]
    backward: Backward
    plans: dict[str, Tensor]  # of gradients
    operands: tuple[Any, ...]  # how input and weight lie

    @staticmethod
    def form(input: Tensor, weight: Tensor) -> tuple[Any, ...]:
        """How operands lie."""
        return input.dtype, input.shape, input.stride(), weight.dtype, weight.shape, weight.stride()

    def gradients(
        self, grad: Tensor, input: Tensor, weight: Tensor, structure: SparseStructure, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of input, weight and bias that are needed; nobody watches, and no graph of them is asked for."""
        if grad.stride() != self.strides:
            grad = _direct.empty_strided(self.shape, self.strides, self.dtype).copy_(grad)
        rows, columns, channel = None, None, 1 if self.geometry else grad.dim() - 1
        if needs[0]:
            rows = torch.empty_like(input)
            run = lambda plan: sparse_kernels.input_gradient(rows, grad, weight, plan)  # noqa: E731
            self._fill("input", weight, structure, rows, grad, run)
        if needs[1]:
            columns = torch.empty_like(weight)
            run = lambda plan: sparse_kernels.weight_gradient(columns, grad, input, plan)  # noqa: E731
            self._fill("weight", weight, structure, input, grad, run)
        others = [i for i in range(grad.dim()) if i != channel]
        return rows, columns, grad.sum(others) if needs[2] else None

    def _fill(
        self,
        kind: str,
        weight: Tensor,
        structure: SparseStructure,
        image: Tensor,
        grad: Tensor,
        run: Callable[[Tensor], bool],
    ) -> None:
        plan = self.plans.get(kind)
        if plan is None or not run(plan):  # or made for another instruction set
            sparse = _described(weight, structure)
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
        result = (_direct.run or _run)(call, input, weight, bias, None, None, *UNBOUNDED)
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


# Found once: what Python looks up has left the caches, too.
_is_dynamo, _grad_enabled = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled


def _described(weight: Tensor, structure: SparseStructure) -> sparse_kernels.Weight:
    return sparse_kernels.Weight(weight, structure.tensors, structure.layout, structure.shape, structure.groups)


def _differentiated(*tensors: Tensor | None) -> bool:
    """Whether a gradient is asked for, if gradients are enabled."""
    return any(t is not None and t.requires_grad for t in tensors)


def _exact(given: tuple[Any, ...]) -> bool:
    """Ints and tuples of them: a list may change, and 1.0 and True equal 1 but are refused."""
    return all(_exact(value) if type(value) is tuple else type(value) is int for value in given)


def _find(
    calls: list[Call], given: tuple[Any, ...], tensors: tuple[Tensor, Tensor], input: Tensor, weight: Tensor, *rest: Any
) -> Call | None:
    """The one of ``calls`` with geometry ``given``, made for operands that lie as input and weight do and for the
    structure of ``tensors`` as it is now; None if any operand, ``rest`` too, is not plain, or if somebody records
    operators."""
    if not (_exact(given) and _direct.plain(input, weight, *rest)):
        return None
    form = Call.form(input, weight)
    for call in calls:
        if call.given == given and call.operands == form:
            unchanged = call.versions is None or call.versions == sparse_kernels.versions(tensors)
            return call if unchanged else None
    return None


def _run(call: Call, input: Tensor, weight: Tensor, *rest: Any) -> Tensor | None:
    """The result for bias, scale, residual and bounds; None if they do not fit, or if the plan is for another
    instruction set."""
    return sparse_kernels.product(input, weight, call.plan, *rest)


def repeat(
    input: Tensor,
    weight: Tensor,
    structure: SparseStructure,
    bias: Tensor | None,
    given: tuple[Any, ...],
    epilogue: Epilogue | None = None,
) -> Tensor | None:
    """The result, if an equal call is known; ``given`` is the geometry of a convolution as the caller wrote it."""
    if _is_dynamo() or forward_ad._current_level >= 0 or profiler._is_profiler_enabled:
        return None
    try:
        scale, residual, bounds, added = None, None, UNBOUNDED, bias
        if epilogue is not None:
            scale, residual, bounds = epilogue.scale, epilogue.residual, BOUNDS[epilogue.activation]
        find, run = _direct.find or _find, _direct.run or _run
        call = find(structure.calls, given, structure.tensors, input, weight, bias, scale, residual)
        if call is None:
            return None
        asked = _grad_enabled() and _differentiated(input, weight, bias, scale, residual)
        if call.dtype is not torch.float32:  # kernels round each step of an epilogue to float32
            if asked or epilogue is not None or (bias is not None and bias.dtype is not call.dtype):
                return None
            added = None if bias is None else bias.float()
        if not asked:
            return run(call, input, weight, added, scale, residual, *bounds)
        if epilogue is None:
            return SparseProduct.apply(input, weight, bias, call, structure)
    except (AttributeError, KeyError, TypeError, RuntimeError):
        pass  # not tensors, an activation nobody knows, a bias of another size: the checks will tell
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
    plan = _described(weight, structure).plan("product", input, result, geometry)
    versions = None if uncounted else sparse_kernels.versions(structure.tensors)
    shape, strides, form = tuple(result.shape), result.stride(), Call.form(input, weight)
    call = Call(given, versions, input.dtype, plan, shape, strides, geometry, backward, {}, form)
    others = [other for other in structure.calls if (other.given, other.operands) != (given, form)]
    structure.calls[:] = [call, *others][: sparse_kernels.MOST]
