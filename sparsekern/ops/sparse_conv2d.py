"""Two-dimensional convolution with a sparse weight, forward and backward.

This file is the specification of ``torch.ops.sparsekern.sparse_conv2d`` and of its backward; kernels agree with
`reference` to the rounding of a sum taken in another order.

- ``input``: (N, in, H, W) or (in, H, W), any strides. ``weight``: (out, in / groups, kh, kw), dense, or its kept values
  only, 1-d, as ``structure.pack`` orders them; bare operators are then told the ``shape`` of the weight.
- W is the weight where ``structure`` (see `sparsekern.ops.sparse_structure`) keeps it and 0 elsewhere, selected and
  never multiplied: NaN and Inf off the mask reach nothing. The result is torch.nn.functional.conv2d with W, the layer
  of a pruned model in arXiv 2308.02060. ``structure`` is built for the same ``groups``.
- A non-finite input may or may not reach an output that sees it through pruned weights only (0 * NaN).
- ``stride``, ``padding`` (zeros) and ``dilation``: an int or two, (vertical, horizontal).
- float16, bfloat16, float32 or float64, one dtype for all operands. Kernels sum the 16-bit types in float32.
- Gradients: those of that convolution; of weight, exactly 0 where it is not kept; of bias, the sum of grad over all but
  the channels. Second derivatives are refused.
- The result and the gradient of input are channels_last if input is channels_last and not contiguous, else contiguous;
  the gradient of weight likewise follows weight, and is packed if weight is.
- Empty operands are ordinary: a sum of no terms is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekern import _library
from sparsekern.ops import sparse_calls, sparse_kernels
from sparsekern.ops.epilogue import Epilogue
from sparsekern.ops.geometry import empty, output_size, pair, without_gaps
from sparsekern.ops.halves import widened
from sparsekern.ops.sparse_autograd import differentiate
from sparsekern.ops.sparse_operands import check_dims, check_operands, compiled_form, compiled_product
from sparsekern.ops.sparse_structure import SparseStructure, kept_values, selected, weight_shape

SCHEMA = (
    "sparse_conv2d(Tensor input, Tensor weight, Tensor[] structure, str layout, Tensor? bias, int[] stride,"
    " int[] padding, int[] dilation, int groups, int[]? shape=None) -> Tensor"
)
BACKWARD_SCHEMA = (
    "sparse_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor[] structure, str layout, int[] stride,"
    " int[] padding, int[] dilation, int groups, bool[] needs, int[]? shape=None)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)


def reference(
    input: Tensor,
    weight: Tensor,
    structure: Sequence[Tensor],
    layout: str,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Plain PyTorch: the dense operator on the selected weight."""
    kept = selected(weight, structure, layout, shape, groups)
    result = fake(input, weight, structure, layout, bias, stride, padding, dilation, groups, shape)
    if not result.numel():
        return result
    if not (input.numel() and kept.numel()):  # torch refuses some of these
        return result.zero_() if bias is None else result.copy_(bias.reshape(-1, 1, 1))
    return result.copy_(torch.nn.functional.conv2d(input, kept, bias, stride, padding, dilation, groups))


def fake(
    input: Tensor,
    weight: Tensor,
    structure: Sequence[Tensor],
    layout: str,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Shapes and memory format only."""
    check_dims(4, {"input": input}, weight)
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        pair(name, list(values), least)
    out, _, *kernel = weight_shape(weight, shape, 4)
    sizes = [output_size(input.shape[i + 2], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1)]
    return empty((input.shape[0], out, *sizes), input)


def backward_reference(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    structure: Sequence[Tensor],
    layout: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs: Sequence[bool],
    shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; one that ``needs`` does not ask for has no elements."""
    kept = selected(weight, structure, layout, shape, groups)
    results = backward_fake(grad, input, weight, structure, layout, stride, padding, dilation, groups, needs, shape)
    if needs[2]:
        results[2].copy_(grad.sum((0, 2, 3)))
    if not (grad.numel() and input.numel() and kept.numel()):
        return results[0].zero_(), results[1].zero_(), results[2]
    found = torch.ops.aten.convolution_backward(
        grad, input, kept, None, stride, padding, dilation, False, [0, 0], groups,
        [needs[0], needs[1], False],
    )  # fmt: skip
    if needs[0]:
        results[0].copy_(found[0])
    if needs[1]:
        values = kept_values(found[1], structure, layout, kept.shape)
        results[1].copy_(values if weight.dim() == 1 else selected(values, structure, layout, kept.shape, groups))
    return results


def backward_fake(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    structure: Sequence[Tensor],
    layout: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs: Sequence[bool],
    shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and memory formats only."""
    check_dims(4, {"grad": grad, "input": input}, weight, needs)
    return (
        empty(input.shape, input) if needs[0] else grad.new_empty((0,)),
        empty(weight.shape, weight) if needs[1] else grad.new_empty((0,)),
        grad.new_empty((weight_shape(weight, shape, 4)[0] if needs[2] else 0,)),
    )


def _cpu(
    input: Tensor,
    weight: Tensor,
    structure: Sequence[Tensor],
    layout: str,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """The CPU operator: compiled for float32 and bfloat16, the reference for the rest and where nothing is compiled."""
    if not compiled_product(input, weight, bias):
        return reference(input, weight, structure, layout, bias, stride, padding, dilation, groups, shape)
    like = fake(input, weight, structure, layout, bias, stride, padding, dilation, groups, shape)
    sparse = sparse_kernels.Weight(without_gaps(weight), structure, layout, weight_shape(weight, shape, 4), groups)
    return sparse_kernels.run_product(sparse, without_gaps(input), like, bias, (*stride, *padding, *dilation))


def _backward_cpu(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    structure: Sequence[Tensor],
    layout: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs: Sequence[bool],
    shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU gradients: compiled for float32, the reference for the rest and where nothing is compiled."""
    rest = stride, padding, dilation, groups, needs, shape
    if not compiled_form(grad, input, weight):
        return backward_reference(grad, input, weight, structure, layout, *rest)
    results = backward_fake(grad, input, weight, structure, layout, *rest)
    if needs[2]:
        results[2].copy_(grad.sum((0, 2, 3)))
    sparse = sparse_kernels.Weight(without_gaps(weight), structure, layout, weight_shape(weight, shape, 4), groups)
    geometry = (*stride, *padding, *dilation)
    sparse_kernels.run_gradients(sparse, without_gaps(grad), without_gaps(input), results[0], results[1], geometry)
    return results


_op = _library.define(SCHEMA, reference, fake)
_backward_op = _library.define(BACKWARD_SCHEMA, backward_reference, backward_fake)
_library.define_cpu("sparse_conv2d", sparse_kernels.product, widened(_cpu, native=(torch.bfloat16,)))
_library.define_cpu("sparse_conv2d_backward", sparse_kernels.input_gradient, widened(_backward_cpu))
differentiate("sparse_conv2d", _backward_op)


def sparse_conv2d(
    input: Tensor,
    weight: Tensor,
    structure: SparseStructure,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Convolution with the weights that ``structure`` keeps; see the head of this file for every rule.

    ``scale`` (out,), ``residual`` (of the result's shape) and ``activation`` ("relu" or "relu6") are done in the same
    pass over the result where no gradient is asked for: ``activation(scale * convolution + bias + residual)``.
    """
    plain = scale is None and residual is None and activation is None
    after = None if plain else Epilogue(scale, residual, activation)
    given = stride, padding, dilation, groups
    if (known := sparse_calls.repeat(input, weight, structure, bias, given, after)) is not None:
        return known
    check_operands(input, weight, structure, bias, 4)
    if after is None:
        return _checked(input, weight, structure, bias, given)
    after.check(input, structure.shape[0])
    return after.apply(_checked(input, weight, structure, bias if scale is None else None, given), bias)


def _checked(
    input: Tensor, weight: Tensor, structure: SparseStructure, bias: Tensor | None, given: tuple[Any, ...]
) -> Tensor:
    """Checks what is left to check, and calls the operator."""
    stride, padding, dilation, groups = given
    if isinstance(groups, bool) or groups != structure.groups:
        raise ValueError(f"groups={groups!r}: expected {structure.groups}, the groups of structure")
    steps, pads, holes = pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1)
    shape = structure.shape
    channels = shape[1] * structure.groups
    if input.dim() not in (3, 4) or input.shape[-3] != channels:
        raise ValueError(
            f"input has shape {tuple(input.shape)}: expected (N, {channels}, H, W) or ({channels}, H, W) for a weight "
            f"of shape {tuple(shape)} with groups={groups}"
        )
    if min(shape[2:]) < 1:
        raise ValueError(f"weight has shape {tuple(shape)}: expected a kernel of one element or more")
    for i in (0, 1):
        reach, size = holes[i] * (shape[i + 2] - 1) + 1, input.shape[i - 2] + 2 * pads[i]
        if size < reach:
            wanted = f"expected a padded size of at least {reach} in dim {i - 2}, the extent of the kernel, got {size}"
            raise ValueError(f"input has shape {tuple(input.shape)}: {wanted}")
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    result = _op(
        batch, weight, list(structure.tensors), structure.layout, bias, steps, pads, holes, structure.groups, shape
    )  # fmt: skip
    if input.dim() == 3:
        return result.squeeze(0)
    if without_gaps(input) is input and without_gaps(weight) is weight:
        backward = sparse_calls.Backward(_backward_op, (steps, pads, holes, structure.groups))
        sparse_calls.remember(input, weight, structure, bias, given, (*steps, *pads, *holes), result, backward)
    return result


sparse_conv2d.reference = reference  # type: ignore[attr-defined]
