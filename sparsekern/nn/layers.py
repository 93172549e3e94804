"""How one convolution or linear layer runs, dense or sparse; the layer itself only provides weight and geometry."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsekern.ops import SparseStructure, sparse_conv2d, sparse_linear
from sparsekern.ops.sparse_structure import coarsest_structure


def supported(module: nn.Module) -> bool:
    """Whether this is a Conv2d or Linear with the ordinary forward, so that replacing it changes no behaviour."""
    kind = type(module)
    if isinstance(module, nn.Linear):
        return kind.forward is nn.Linear.forward
    return isinstance(module, nn.Conv2d) and kind.forward is nn.Conv2d.forward and _padding(module) is not None


def _padding(module: nn.Conv2d) -> list[int] | None:
    """Zeros on either side as (vertical, horizontal); None where the two sides differ or are not zeros."""
    if module.padding_mode != "zeros":
        return None
    if module.padding == "valid":
        return [0, 0]
    if module.padding == "same":
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return None if any(r % 2 for r in reach) else [r // 2 for r in reach]
    return list(module.padding)


def groups_of(module: nn.Module) -> int:
    """The groups of a convolution, 1 of a linear layer."""
    return module.groups if isinstance(module, nn.Conv2d) else 1


def output_pixels(module: nn.Module, input: Tensor) -> int:
    """How many pixels of all images, or rows of a linear layer, the layer makes of this input."""
    if isinstance(module, nn.Linear):
        return input.numel() // input.shape[-1]
    images = input.shape[0] if input.dim() == 4 else 1
    geometry = zip(
        input.shape[-2:], _padding(module), module.dilation, module.kernel_size, module.stride, strict=True
    )  # fmt: skip
    return images * prod((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in geometry)


def run_dense(module: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer on torch's own operator."""
    if isinstance(module, nn.Linear):
        return functional.linear(input, weight, bias)
    return functional.conv2d(
        input, weight, bias, module.stride, _padding(module), module.dilation, module.groups
    )  # fmt: skip


def run_sparse(
    module: nn.Module, structure: SparseStructure, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The layer on the sparse operator of this package."""
    if isinstance(module, nn.Linear):
        return sparse_linear(input, weight, structure, bias)
    return sparse_conv2d(
        input, weight, structure, bias, module.stride, tuple(_padding(module)), module.dilation, module.groups
    )  # fmt: skip


def why_dense(module: nn.Module, input: Tensor) -> str | None:
    """Why the sparse operator cannot take this call, None if it can."""
    if torch.is_autocast_enabled(input.device.type):
        return "autocast"
    if input.dtype != module.weight.dtype:
        return f"input is {input.dtype}, weight {module.weight.dtype}"
    return None if input.device == module.weight.device else "input and weight are on different devices"


def structure_of(mask: Tensor, groups: int) -> SparseStructure | None:
    """The structure of a bool mask in the coarsest pattern that it has; None if it keeps every weight."""
    if bool(mask.all()):
        return None
    return coarsest_structure(mask, groups)
