"""Linear layer with a sparse weight: ``input @ W.T + bias``, forward and backward.

This file is the specification of ``torch.ops.sparsekern.sparse_linear`` and of its backward; kernels agree with
`reference` to the rounding of a sum taken in another order.

- ``input``: (*, in), any number of leading dims, any strides. ``weight``: (out, in), dense, or its kept values only,
  1-d, as ``structure.pack`` orders them; bare operators are then told the ``shape`` of the weight.
- W is the weight where ``structure`` (see `sparsekern.ops.sparse_structure`) keeps it and 0 elsewhere, selected and
  never multiplied: NaN and Inf off the mask reach nothing. The layer of a pruned model in arXiv 2308.02060.
- A non-finite input may or may not reach an output that sees it through pruned weights only (0 * NaN).
- float16, bfloat16, float32 or float64, one dtype for all operands; kernels sum the 16-bit types in
  float32. The result, (*, out), is contiguous.
- Gradients: of input, grad @ W; of weight, grad.T @ input where it is kept and exactly 0 elsewhere; of bias, the sum of
  grad over the leading dims. All contiguous; that of a packed weight is packed. Second derivatives are refused.
- Empty operands are ordinary: a sum of no terms is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern import _library
from sparsekern.ops import sparse_calls, sparse_kernels
from sparsekern.ops.halves import widened
from sparsekern.ops.sparse_autograd import differentiate
from sparsekern.ops.sparse_operands import check_dims, check_operands, compiled_form, compiled_product
from sparsekern.ops.sparse_structure import SparseStructure, kept_values, selected, weight_shape

SCHEMA = (
    "sparse_linear(Tensor input, Tensor weight, Tensor[] structure, str layout, Tensor? bias, int[]? shape=None)"
    " -> Tensor"
)
BACKWARD_SCHEMA = (
    "sparse_linear_backward(Tensor grad, Tensor input, Tensor weight, Tensor[] structure, str layout, bool[] needs,"
    " int[]? shape=None) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)


def reference(
    input: Tensor,
    weight: Tensor,
    structure: Sequence[Tensor],
    layout: str,
    bias: Tensor | None,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Plain PyTorch: the dense operator on the selected weight."""
    kept = selected(weight, structure, layout, shape)
    return torch.nn.functional.linear(input, kept, bias).contiguous()


def fake(
    input: Tensor,
    weight: Tensor,
    structure: Sequence[Tensor],
    layout: str,
    bias: Tensor | None,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Shapes only."""
    check_dims(2, {}, weight)
    if input.dim() < 1:
        raise ValueError("input has 0 dims: expected one or more")
    return input.new_empty((*input.shape[:-1], weight_shape(weight, shape, 2)[0]))


def backward_reference(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    structure: Sequence[Tensor],
    layout: str,
    needs: Sequence[bool],
    shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; one that ``needs`` does not ask for has no elements."""
    kept = selected(weight, structure, layout, shape)
    results = backward_fake(grad, input, weight, structure, layout, needs, shape)
    rows = math.prod(input.shape[:-1])
    flat = grad.reshape(rows, kept.shape[0])
    if needs[0]:
        results[0].copy_((flat @ kept).reshape(input.shape))
    if needs[1]:
        values = kept_values(flat.t() @ input.reshape(rows, kept.shape[1]), structure, layout, kept.shape)
        results[1].copy_(values if weight.dim() == 1 else selected(values, structure, layout, kept.shape))
    if needs[2]:
        results[2].copy_(flat.sum(0))
    return results


def backward_fake(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    structure: Sequence[Tensor],
    layout: str,
    needs: Sequence[bool],
    shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes only."""
    check_dims(2, {}, weight, needs)
    shapes = (input.shape, weight.shape, weight_shape(weight, shape, 2)[:1])
    results = [grad.new_empty(size if need else (0,)) for size, need in zip(shapes, needs, strict=True)]
    return results[0], results[1], results[2]


def _sparse(
    weight: Tensor, structure: Sequence[Tensor], layout: str, shape: Sequence[int] | None
) -> sparse_kernels.Weight:
    return sparse_kernels.Weight(weight.contiguous(), structure, layout, weight_shape(weight, shape, 2), 1)


def _few(input: Tensor) -> Tensor:
    """Contiguous, and of no more dims than kernels take."""
    return (input if input.dim() <= _MOST_DIMS else input.flatten(0, -2)).contiguous()


_MOST_DIMS = 4


def _cpu(
    input: Tensor,
    weight: Tensor,
    structure: Sequence[Tensor],
    layout: str,
    bias: Tensor | None,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """The CPU operator: compiled for float32 and bfloat16, the reference for the rest and where nothing is compiled."""
    if not compiled_product(input, weight, bias):
        return reference(input, weight, structure, layout, bias, shape)
    like = fake(input, weight, structure, layout, bias, shape)
    sparse = _sparse(weight, structure, layout, shape)
    return sparse_kernels.run_product(sparse, _few(input), _few(like), bias, ()).reshape(like.shape)


def _backward_cpu(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    structure: Sequence[Tensor],
    layout: str,
    needs: Sequence[bool],
    shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU gradients: compiled for float32, the reference for the rest and where nothing is compiled."""
    if not compiled_form(grad, input, weight):
        return backward_reference(grad, input, weight, structure, layout, needs, shape)
    results = backward_fake(grad, input, weight, structure, layout, needs, shape)
    if needs[2]:
        results[2].copy_(grad.reshape(-1, grad.shape[-1]).sum(0))
    sparse = _sparse(weight, structure, layout, shape)
    into = _few(results[0]) if needs[0] else results[0]
    sparse_kernels.run_gradients(sparse, _few(grad), _few(input), into, results[1], ())
    return results


_op = _library.define(SCHEMA, reference, fake)
_backward_op = _library.define(BACKWARD_SCHEMA, backward_reference, backward_fake)
_library.define_cpu("sparse_linear", sparse_kernels.product, widened(_cpu, native=(torch.bfloat16,)))
_library.define_cpu("sparse_linear_backward", sparse_kernels.input_gradient, widened(_backward_cpu))
differentiate("sparse_linear", _backward_op)


_backward = sparse_calls.Backward(_backward_op, ())


def sparse_linear(input: Tensor, weight: Tensor, structure: SparseStructure, bias: Tensor | None = None) -> Tensor:
    """``input @ W.T + bias`` with the weights that ``structure`` keeps; see the head of this file for every rule."""
    if (known := sparse_calls.repeat(input, weight, structure, bias, ())) is not None:
        return known
    check_operands(input, weight, structure, bias, 2)
    shape = structure.shape
    if input.dim() < 1 or input.shape[-1] != shape[1]:
        raise ValueError(f"input has shape {tuple(input.shape)}: expected (*, {shape[1]}), the weight's inputs")
    result = _op(input, weight, list(structure.tensors), structure.layout, bias, shape)
    if input.dim() <= _MOST_DIMS and input.is_contiguous() and weight.is_contiguous():
        sparse_calls.remember(input, weight, structure, bias, (), (), result, _backward)
    return result


sparse_linear.reference = reference  # type: ignore[attr-defined]
