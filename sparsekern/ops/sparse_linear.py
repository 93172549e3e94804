"""Linear layer with a sparse weight: ``input @ W.T + bias``, forward and backward.

This file is the specification of ``torch.ops.sparsekern.sparse_linear`` and of its backward; kernels agree with
`reference` to the rounding of a sum taken in another order.

- ``input``: (*, in), any number of leading dims, any strides. ``weight``: (out, in), an ordinary dense parameter.
- W is the weight where ``structure`` (see `sparsekern.ops.sparse_structure`) keeps it and 0 elsewhere, selected and
  never multiplied: NaN and Inf off the mask reach nothing. The layer of a pruned model in arXiv 2308.02060.
- A non-finite input may or may not reach an output that sees it through pruned weights only (0 * NaN).
- float16, bfloat16, float32 or float64, one dtype for all operands. The result, (*, out), is contiguous.
- Gradients: of input, grad @ W; of weight, grad.T @ input where it is kept and exactly 0 elsewhere; of bias, the sum of
  grad over the leading dims. All contiguous. Second derivatives are refused.
- Empty operands are ordinary: a sum of no terms is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsekern import _library
from sparsekern.ops.sparse_structure import (
    SparseStructure,
    check_dims,
    check_form,
    check_operands,
    check_tensors,
    compiled_form,
    mask_from_tensors,
)

SCHEMA = "sparse_linear(Tensor input, Tensor weight, Tensor[] structure, str layout, Tensor? bias) -> Tensor"
BACKWARD_SCHEMA = (
    "sparse_linear_backward(Tensor grad, Tensor input, Tensor weight, Tensor[] structure, str layout, bool[] needs)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)


def reference(input: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str, bias: Tensor | None) -> Tensor:
    """Plain PyTorch: the dense operator on the selected weight."""
    kept = torch.where(mask_from_tensors(structure, layout, weight.shape), weight, 0)
    return torch.nn.functional.linear(input, kept, bias).contiguous()


def fake(input: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str, bias: Tensor | None) -> Tensor:
    """Shapes only."""
    check_dims(2, {"weight": weight})
    if input.dim() < 1:
        raise ValueError("input has 0 dims: expected one or more")
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def backward_reference(
    grad: Tensor, input: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; one that ``needs`` does not ask for has no elements."""
    mask = mask_from_tensors(structure, layout, weight.shape)
    results = list(backward_fake(grad, input, weight, structure, layout, needs))
    rows = math.prod(input.shape[:-1])
    flat = grad.reshape(rows, weight.shape[0])
    if needs[0]:
        results[0].copy_((flat @ torch.where(mask, weight, 0)).reshape(input.shape))
    if needs[1]:
        results[1].copy_(torch.where(mask, flat.t() @ input.reshape(rows, weight.shape[1]), 0))
    if needs[2]:
        results[2].copy_(flat.sum(0))
    return results[0], results[1], results[2]


def backward_fake(
    grad: Tensor, input: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes only."""
    check_dims(2, {"weight": weight}, needs)
    shapes = (input.shape, weight.shape, weight.shape[:1])
    results = [grad.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)]
    return results[0], results[1], results[2]


def _cpu(native: Callable[..., bool]) -> Callable[..., Tensor]:
    """The CPU operator: compiled for float32, the reference for the rest and where nothing is compiled."""

    def sparse_linear_cpu(
        input: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str, bias: Tensor | None
    ) -> Tensor:
        if not compiled_form(input, weight, bias):
            return reference(input, weight, structure, layout, bias)
        check_form(structure, layout, weight.shape)
        result = fake(input, weight, structure, layout, bias)
        added = None if bias is None else bias.contiguous()
        flat = input.reshape(-1, input.shape[-1])
        if not native(result.reshape(-1, weight.shape[0]), flat, weight, structure, layout, added):
            check_tensors(structure, layout, weight.shape)
        return result

    return sparse_linear_cpu


def _backward_cpu(native: Callable[..., bool]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The CPU gradients: compiled for float32, the reference for the rest and where nothing is compiled."""

    def sparse_linear_backward_cpu(
        grad: Tensor, input: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str, needs: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not compiled_form(grad, input, weight):
            return backward_reference(grad, input, weight, structure, layout, needs)
        check_form(structure, layout, weight.shape)
        results = backward_fake(grad, input, weight, structure, layout, needs)
        flat, rows = grad.reshape(-1, weight.shape[0]), input.reshape(-1, weight.shape[1])
        results[1].zero_()
        if needs[2]:
            results[2].copy_(flat.sum(0))
        into = results[0].reshape(-1, weight.shape[1])
        if not native(into, results[1], flat, rows, weight, structure, layout):
            check_tensors(structure, layout, weight.shape)
        return results

    return sparse_linear_backward_cpu


_op = _library.define(SCHEMA, reference, fake)
_backward_op = _library.define(BACKWARD_SCHEMA, backward_reference, backward_fake)
_library.define_cpu(
    "sparse_linear",
    "_sparse_linear_cpu(Tensor(a!) result, Tensor input, Tensor weight, Tensor[] structure, str layout, Tensor? bias)"
    " -> bool",
    _cpu,
)
_library.define_cpu(
    "sparse_linear_backward",
    "_sparse_linear_backward_cpu(Tensor(a!) grad_input, Tensor(b!) grad_weight, Tensor grad, Tensor input,"
    " Tensor weight, Tensor[] structure, str layout) -> bool",
    _backward_cpu,
)


def _setup_context(ctx, inputs, output) -> None:
    input, weight, structure, layout, _ = inputs
    ctx.save_for_backward(input, weight, *structure)
    ctx.layout = layout


def _backward(ctx, grad: Tensor):
    input, weight, *structure = ctx.saved_tensors
    needs = [bool(ctx.needs_input_grad[i]) for i in (0, 1, 4)]
    found = _backward_op(grad, input, weight, structure, ctx.layout, needs)
    g = [t if need else None for t, need in zip(found, needs, strict=True)]
    return g[0], g[1], [None] * len(structure), None, g[2]


def _refuse(ctx, *grads):
    raise NotImplementedError("sparse_linear has no second derivative")


torch.library.register_autograd(
    "sparsekern::sparse_linear", _backward, setup_context=_setup_context, lib=_library._definitions
)
torch.library.register_autograd("sparsekern::sparse_linear_backward", _refuse, lib=_library._definitions)


def sparse_linear(input: Tensor, weight: Tensor, structure: SparseStructure, bias: Tensor | None = None) -> Tensor:
    """``input @ W.T + bias`` with the weights that ``structure`` keeps; see the head of this file for every rule."""
    check_operands(input, weight, structure, bias, 2)
    if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input has shape {tuple(input.shape)}: expected (*, {weight.shape[1]}), the weight's inputs")
    return _op(input, weight, list(structure.tensors), structure.layout, bias)


sparse_linear.reference = reference  # type: ignore[attr-defined]
