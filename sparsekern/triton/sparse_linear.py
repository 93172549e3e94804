"""sparse_linear and its backward in Triton. `sparsekern.ops.sparse_linear` is the contract, `gather.py` the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparsekern.ops.sparse_linear import backward_fake, fake
from sparsekern.triton.gather import Geometry, convolve, uncovered, weight_gradient
from sparsekern.triton.launch import operator
from sparsekern.triton.structures import check_structure


def _image(t: Tensor) -> Tensor:
    """(*, features) as images of one pixel; a view unless the leading dims do not merge."""
    return t.reshape(-1, t.shape[-1], 1, 1)


def _check(input: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str) -> None:
    """Raise unless the kernels stay inside of these operands: also bare calls of the operator come here."""
    if input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input has shape {tuple(input.shape)}: expected (*, {weight.shape[1]}), the weight's inputs")
    check_structure(structure, layout, weight.shape)


def _forward_uncovered(
    input: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str, bias: Tensor | None, *rest: Any
) -> str:
    return uncovered({"input": input, "weight": weight, "bias": bias})


def _backward_uncovered(
    grad: Tensor, input: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str, *rest: Any
) -> str:
    return uncovered({"grad": grad, "input": input, "weight": weight})


@operator(_forward_uncovered)
def sparse_linear(
    input: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str, bias: Tensor | None,
    shape: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """The operator on GPU tensors."""
    result = fake(input, weight, structure, layout, bias)
    _check(input, weight, structure, layout)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected ({weight.shape[0]},), the output channels")
    kernel, added = weight[:, :, None, None], None if bias is None else bias.contiguous()
    convolve(_image(input), kernel, structure, layout, added, Geometry(), _image(result), back=False)
    return result


@operator(_backward_uncovered)
def sparse_linear_backward(
    grad: Tensor, input: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str, needs: Sequence[bool],
    shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight and bias on GPU tensors; one that ``needs`` does not ask for has no elements."""
    results = backward_fake(grad, input, weight, structure, layout, needs)
    _check(input, weight, structure, layout)
    if grad.shape != (*input.shape[:-1], weight.shape[0]):
        raise ValueError(f"grad has shape {tuple(grad.shape)}: expected {(*input.shape[:-1], weight.shape[0])}")
    if needs[0]:
        into = _image(results[0])
        convolve(_image(grad), weight[:, :, None, None], structure, layout, None, Geometry(), into, back=True)
    if needs[1]:
        into = results[1][:, :, None, None]
        weight_gradient(_image(input), _image(grad), structure, layout, Geometry(), into)
    if needs[2]:
        results[2].copy_(grad.reshape(-1, weight.shape[0]).sum(0))
    return results
