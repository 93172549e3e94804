"""sparse_conv2d and its backward in Triton. `sparsekern.ops.sparse_conv2d` is the contract, `gather.py` the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparsekern.ops.sparse_conv2d import backward_fake, fake
from sparsekern.triton.gather import Geometry, convolve, uncovered, weight_gradient
from sparsekern.triton.launch import operator
from sparsekern.triton.structures import check_structure


def _check(input: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str, geometry: Geometry) -> None:
    """Raise unless the kernels stay inside of these operands: also bare calls of the operator come here."""
    if geometry.groups < 1 or input.shape[1] != weight.shape[1] * geometry.groups:
        raise ValueError(
            f"input has {input.shape[1]} channels: expected {weight.shape[1]} x groups={geometry.groups}, as the weight"
        )
    check_structure(structure, layout, weight.shape, geometry.groups)


def _forward_uncovered(
    input: Tensor,
    weight: Tensor,
    structure: Sequence[Tensor],
    layout: str,
    bias: Tensor | None,
    *rest: Any,
    **options: Any,
) -> str:
    return uncovered({"input": input, "weight": weight, "bias": bias})


def _backward_uncovered(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any, **options: Any) -> str:
    return uncovered({"grad": grad, "input": input, "weight": weight})


@operator(_forward_uncovered)
def sparse_conv2d(
    input: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    shape: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """The operator on GPU tensors."""
    result = fake(input, weight, structure, layout, bias, stride, padding, dilation, groups)
    geometry = Geometry(stride, padding, dilation, groups)
    _check(input, weight, structure, layout, geometry)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected ({weight.shape[0]},), the output channels")
    if result.numel():
        added = None if bias is None else bias.contiguous()
        convolve(input, weight, structure, layout, added, geometry, result, back=False)
    return result


@operator(_backward_uncovered)
def sparse_conv2d_backward(
    grad: Tensor, input: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, needs: Sequence[bool],
    shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight and bias on GPU tensors; one that ``needs`` does not ask for has no elements."""
    results = backward_fake(grad, input, weight, structure, layout, stride, padding, dilation, groups, needs)
    geometry = Geometry(stride, padding, dilation, groups)
    _check(input, weight, structure, layout, geometry)
    expected = fake(input.to("meta"), weight.to("meta"), structure, layout, None, stride, padding, dilation, groups)
    if grad.shape != expected.shape:
        raise ValueError(f"grad has shape {tuple(grad.shape)}: expected {tuple(expected.shape)}, that of the result")
    if needs[0]:
        convolve(grad, weight, structure, layout, None, geometry, results[0], back=True)
    if needs[1]:
        weight_gradient(input, grad, structure, layout, geometry, results[1])
    if needs[2]:
        results[2].copy_(grad.sum((0, 2, 3)))
    return results
