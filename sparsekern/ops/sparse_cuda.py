"""sparse_conv2d and sparse_linear on CUDA: what the kernels take, and the dense path for the rest.

The kernels take float32, and with pattern 4x1, but for the gradient of the input, float16 and bfloat16 (on tensor
cores, sm_80 and newer), one group, and images in channels_last; other images are copied into it. Everything else, and
a window too large for shared memory, is torch's dense operator on the masked weight, the operators' reference; that
is said once for each reason. Structures are not read back from the GPU: of one that is wrong a kernel drops what lies
outside of the weight, and its result is then unspecified.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekern import _library
from sparsekern.ops import fallbacks
from sparsekern.ops.sparse_conv2d import backward_fake as conv2d_backward_fake
from sparsekern.ops.sparse_conv2d import backward_reference as conv2d_backward_reference
from sparsekern.ops.sparse_conv2d import fake as conv2d_fake
from sparsekern.ops.sparse_conv2d import reference as conv2d_reference
from sparsekern.ops.sparse_kernels import remember, remembered
from sparsekern.ops.sparse_linear import backward_fake as linear_backward_fake
from sparsekern.ops.sparse_linear import backward_reference as linear_backward_reference
from sparsekern.ops.sparse_linear import fake as linear_fake
from sparsekern.ops.sparse_linear import reference as linear_reference
from sparsekern.ops.sparse_structure import check_form, check_packed

_LAST = torch.channels_last
_HALVES = (torch.float16, torch.bfloat16)
_told: set[str] = set()


def dense_reason(groups: int, *operands: Tensor | None, halves: bool = False) -> str:
    """Why these operands take the dense path, '' if the kernels serve them; ``halves``: float16 and bfloat16 too."""
    given = [t for t in operands if t is not None]
    for t in given:
        if t.dtype != torch.float32 and not (halves and t.dtype in _HALVES):
            return f"{t.dtype}: the sparse kernels are float32, and with pattern 4x1 float16 and bfloat16"
        if t.dtype != given[0].dtype:
            return "operands of several dtypes"
        if t.dtype in _HALVES and t.is_cuda and torch.cuda.get_device_capability(t.device) < (8, 0):
            return f"{t.dtype}: the GPU is older than sm_80"
        if not t.numel():
            return "empty"
    return f"groups={groups}: the sparse kernels are for one group" if groups != 1 else ""


def _tell(operator: str, structure: Sequence[Tensor], reason: str) -> None:
    """Once per reason, except for what is empty; noted each time."""
    fallbacks.note(structure, operator, reason)
    if reason != "empty" and reason not in _told:
        _told.add(reason)
        text = f"{operator} on CUDA runs as a dense operator with a masked weight ({reason})"
        warnings.warn(text, RuntimeWarning, stacklevel=4)


def _weight(weight: Tensor, shape: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
    """Shape (4-d) and strides, which are 0 for packed values."""
    sizes = list(weight.shape if weight.dim() > 1 or shape is None else shape)
    strides = list(weight.stride()) if weight.dim() > 1 else [0] * len(sizes)
    return sizes + [1] * (4 - len(sizes)), strides + [0] * (4 - len(strides))


def _check(weight: Tensor, structure: Sequence[Tensor], layout: str, shape: Sequence[int], groups: int = 1) -> None:
    """Raise unless the kernels can take the structure without reading it."""
    check_form(structure, layout, shape, groups)
    check_packed(weight, structure, layout)


def _into(result: Tensor, fill: Any) -> bool:
    """``fill(image)`` a channels_last image that is, or is then copied into, ``result``; whether the kernels could."""
    image = result if result.is_contiguous(memory_format=_LAST) else torch.empty_like(result, memory_format=_LAST)
    done = fill(image)
    if done and image is not result:
        result.copy_(image)
    return done


def transposed(structure: Sequence[Tensor], layout: str, shape: Sequence[int]) -> list[Tensor]:
    """The structure of the weight with inputs and outputs exchanged, and for each of its blocks its number before.

    Made without reading from the GPU, and kept as long as the structure's tensors are unchanged.
    """
    found, key = remembered(structure), ("transposed for CUDA", layout, tuple(shape))
    if key not in found:
        remember(found, key, _transpose(structure, layout, shape))
    return found[key]


def _transpose(structure: Sequence[Tensor], layout: str, shape: Sequence[int]) -> list[Tensor]:
    pointers, indices = structure
    taps, rows = shape[2] * shape[3], pointers.numel() - 1
    channels = shape[1] // (4 if layout == "1x4" else 1)
    each = torch.arange(rows, device=pointers.device)
    row = each.repeat_interleave(pointers.long().diff(), output_size=indices.numel())
    place = (indices // taps * rows + row) * taps + indices % taps
    place, source = place.sort()
    starts = torch.arange(channels + 1, device=pointers.device) * (rows * taps)
    return [torch.searchsorted(place, starts).int(), (place % (rows * taps)).int(), source.int()]


def conv2d(
    input: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, *shape: Any,
) -> Tensor:  # fmt: skip
    """The operator sparse_conv2d on CUDA."""
    result = conv2d_fake(input, weight, structure, layout, bias, stride, padding, dilation, groups, *shape)
    reason = dense_reason(groups, input, weight, bias, result, halves=layout == "4x1")
    if not reason:
        sizes, strides = _weight(weight, *shape)
        _check(weight, structure, layout, sizes, groups)
        geometry = [*stride, *padding, *dilation]
        added, source = None if bias is None else bias.contiguous(), input.contiguous(memory_format=_LAST)
        if _into(result, lambda to: product(
            to, source, weight, list(structure), layout, added, sizes, strides, geometry
        )):  # fmt: skip
            return result
        reason = "the window of the convolution is too large for shared memory"
    _tell("sparse_conv2d", structure, reason)
    return conv2d_reference(input, weight, structure, layout, bias, stride, padding, dilation, groups, *shape)


def conv2d_backward(
    grad: Tensor, input: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, needs: Sequence[bool], *shape: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator sparse_conv2d_backward on CUDA."""
    operands, geometry = (grad, input, weight, structure, layout), [stride, padding, dilation, groups]
    reason = dense_reason(groups, grad, input, weight, halves=layout == "4x1")
    if not reason:
        sizes, strides = _weight(weight, *shape)
        _check(weight, structure, layout, sizes, groups)
        below = needs[0] and grad.dtype == torch.float32
        results = conv2d_backward_fake(*operands, *geometry, [below, *needs[1:]], *shape)
        if needs[2]:
            results[2].copy_(grad.sum((0, 2, 3)))
        if _gradients(results, *operands, sizes, strides, [*stride, *padding, *dilation]):
            if needs[0] == below:
                return results
            _tell("sparse_conv2d_backward of the input", structure, f"{grad.dtype}: that kernel is float32")
            dense = conv2d_backward_reference(*operands, *geometry, [True, False, False], *shape)
            return dense[0], *results[1:]
        reason = "the window of the convolution is too large for shared memory"
    _tell("sparse_conv2d_backward", structure, reason)
    return conv2d_backward_reference(*operands, *geometry, needs, *shape)


def _gradients(results, grad, input, weight, structure, layout, sizes, strides, geometry) -> bool:
    """Fill the gradients of input and weight that have elements; False if the kernels do not take the geometry."""
    above, below = grad.contiguous(memory_format=_LAST), input.contiguous(memory_format=_LAST)
    if results[0].numel():
        turned = transposed(structure, layout, sizes)

        def fill(to: Tensor) -> bool:
            if max(geometry[:2]) > 1:
                to.zero_()  # the stride may leave pixels that no tap reaches
            return input_gradient(to, above, weight, turned, layout, sizes, strides, geometry)

        if not _into(results[0], fill):
            return False
    if results[1].numel():
        own = _weight(results[1], sizes)[1]
        results[1].zero_()
        return weight_gradient(results[1], above, below, list(structure), layout, sizes, own, geometry)
    return True


def _rows(t: Tensor) -> Tensor:
    """(*, channels) as an image of one row whose pixels are the rows of the matrix."""
    return t.reshape(1, 1, -1, t.shape[-1]).permute(0, 3, 1, 2)


_POINTWISE = [1, 1, 0, 0, 1, 1]


def linear_forward(
    input: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str, bias: Tensor | None, *shape: Any
) -> Tensor:
    """The operator sparse_linear on CUDA."""
    result = linear_fake(input, weight, structure, layout, bias, *shape)
    reason = dense_reason(1, input, weight, bias, result, halves=layout == "4x1")
    if reason:
        _tell("sparse_linear", structure, reason)
        return linear_reference(input, weight, structure, layout, bias, *shape)
    sizes, strides = _weight(weight, *shape)
    _check(weight, structure, layout, sizes[:2])
    added = None if bias is None else bias.contiguous()
    operands = _rows(result), _rows(input.contiguous()), weight, list(structure), layout, added
    assert product(*operands, sizes, strides, _POINTWISE)  # one tap always fits
    return result


def linear_backward(
    grad: Tensor, input: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str, needs: Sequence[bool],
    *shape: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator sparse_linear_backward on CUDA."""
    given = grad, input, weight, structure, layout
    reason = dense_reason(1, grad, input, weight, halves=layout == "4x1")
    if reason:
        _tell("sparse_linear_backward", structure, reason)
        return linear_backward_reference(*given, needs, *shape)
    sizes, strides = _weight(weight, *shape)
    _check(weight, structure, layout, sizes[:2])
    from_kernel = needs[0] and grad.dtype == torch.float32
    results = linear_backward_fake(*given, [from_kernel, *needs[1:]], *shape)
    if needs[2]:
        results[2].copy_(grad.reshape(-1, grad.shape[-1]).sum(0))
    below = _rows(results[0]) if from_kernel else results[0]
    operands = _rows(grad.contiguous()), _rows(input.contiguous()), weight, structure, layout
    assert _gradients((below, results[1]), *operands, sizes, strides, _POINTWISE)  # as above
    if needs[0] == from_kernel:
        return results
    _tell("sparse_linear_backward of the input", structure, f"{grad.dtype}: that kernel is float32")
    return linear_backward_reference(*given, [True, False, False], *shape)[0], *results[1:]


_ARGUMENTS = "Tensor[] structure, str layout"
_NUMBERS = "int[] shape, int[] strides, int[] geometry) -> bool"
product = _library.define_cuda(
    f"_sparse_product_cuda(Tensor(a!) result, Tensor input, Tensor weight, {_ARGUMENTS}, Tensor? bias, {_NUMBERS}",
    {"sparse_conv2d": conv2d, "sparse_linear": linear_forward},
)
input_gradient = _library.define_cuda(
    f"_sparse_input_gradient_cuda(Tensor(a!) result, Tensor grad, Tensor weight, {_ARGUMENTS}, {_NUMBERS}",
    {"sparse_conv2d_backward": conv2d_backward},
)
weight_gradient = _library.define_cuda(
    f"_sparse_weight_gradient_cuda(Tensor(a!) result, Tensor grad, Tensor input, {_ARGUMENTS}, {_NUMBERS}",
    {"sparse_linear_backward": linear_backward},
)
