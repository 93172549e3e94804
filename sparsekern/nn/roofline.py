"""How fast a layer could be on a GPU, sparse and dense: a roofline model, to choose by where nothing can be measured.

A pass takes as long as the slowest of three things: moving input and output once through memory, the multiplications,
and, sparse, reading each gathered value from shared memory, 128 bytes per clock and multiprocessor. Shares of the peaks
are assumed: 85% of memory, 85% of the CUDA cores and 60-70% of the tensor cores dense, 50% and 70% sparse. None of it
is a measurement; `sparsekern.nn.timing` makes one wherever that is possible.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.nn.layers import output_pixels
from sparsekern.nn.timing import Speeds
from sparsekern.ops import SparseStructure


@dataclass(frozen=True)
class Gpu:
    """Multiprocessors, clock in Hz, bytes per second of memory, and float32 multiply-adds per clock and multiprocessor.

    `tensor` and `mma` are those of its tensor cores in 16 bits: by the best instructions, of which a dense kernel
    reaches the share `reached`, and by mma.sync.
    """

    name: str
    processors: int
    clock: float
    bandwidth: float
    cores: int
    tensor: int
    mma: int
    reached: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 108, 1.41e9, 1.94e12, 64, 1024, 1024, 0.70),
        Gpu("H100", 132, 1.75e9, 3.35e12, 128, 2048, 1270, 0.60),
        Gpu("H200", 132, 1.75e9, 4.80e12, 128, 2048, 1270, 0.60),
    )
}
"""As their makers publish them; mma of the H100 is a common estimate."""

PASSES = ("forward", "input", "weight")
"""A layer's passes: forward, gradient of the input, gradient of the weight."""
Rates = dict[tuple[str, str], float]
RATES: Rates = {
    ("4x1", "forward"): 128, ("1x4", "forward"): 32, ("unstructured", "forward"): 32,
    ("4x1", "input"): 32, ("1x4", "input"): 128, ("unstructured", "input"): 32,
    ("4x1", "weight"): 26, ("1x4", "weight"): 26, ("unstructured", "weight"): 16,
}  # fmt: skip
"""Multiply-adds per clock and multiprocessor that shared memory allows the float32 kernels: it gives a warp 16 bytes
per lane, one pixel of four images, in four clocks. Forward, the outputs of a block share them; the input gradient is
the product with the transposed pattern; for the weight, both operands are read, five units for the 16 of a block."""
_TENSOR_PASSES = {("4x1", "forward"), ("4x1", "weight")}
_ROWS = (8, 16, 32)


def gpu_of(properties: Any) -> Gpu | None:
    """The GPU with these properties, as torch.cuda.get_device_properties gives them; None for one too old or unknown.

    Of a GPU outside the table, what its generation computes per clock is that of the table's nearest.
    """
    for gpu in GPUS.values():
        if gpu.name in properties.name:
            return gpu
    clock, memory, width = (
        getattr(properties, name, 0) for name in ("clock_rate", "memory_clock_rate", "memory_bus_width")
    )
    if properties.major < 8 or not (clock and memory and width):
        return None
    like = GPUS["A100" if properties.major == 8 else "H100"]
    cores = 64 if (properties.major, properties.minor) == (8, 0) else 128
    # Clocks are in kHz, and memory moves twice per clock.
    return Gpu(properties.name, properties.multi_processor_count, clock * 1e3, memory * 2e3 * width / 8, cores,
               like.tensor, like.mma, like.reached)  # fmt: skip


@dataclass(frozen=True)
class LayerSize:
    """Multiply-adds of a dense pass, and the values that it reads and writes besides the weight. `images`: of what is
    more than a matrix product, where a pixel of one image cannot take the place of that of another."""

    products: float
    values: float
    images: int | None = None

    @classmethod
    def of(cls, weight: tuple[int, ...], groups: int, into: int, out: int, images: int | None = None) -> LayerSize:
        """Of a weight (out, in / groups, ...) on `into` input pixels (rows of a linear layer) that give `out`."""
        touched = min(into, out * prod(weight[2:]))  # a stride beyond the kernel leaves pixels out
        return cls(float(out) * prod(weight), float(touched) * weight[1] * groups + float(out) * weight[0], images)

    def sparse_products(self, dtype: torch.dtype) -> float:
        """Multiply-adds of the sparse kernels if all weights are kept: of four images at a time, or eight of 16 bits,
        be they there or not."""
        together = 4 if dtype == torch.float32 else 8
        return self.products * (-(-self.images // together) * together / self.images if self.images else 1)


def pass_speeds(
    gpu: Gpu, size: LayerSize, density: float, layout: str, dtype: torch.dtype, which: str, rates: Rates = RATES
) -> Speeds:
    """Seconds of one pass (`PASSES`) with this share of weights kept in blocks of `layout`; both dense where no sparse
    kernel serves the pass. float32 does not use TF32."""
    clock = gpu.processors * gpu.clock
    bytes = 4 if dtype == torch.float32 else 2
    moving = size.values * bytes / (0.85 * gpu.bandwidth)
    if dtype == torch.float32:
        dense = size.products / (clock * gpu.cores * 0.85)
        sparse = size.sparse_products(dtype) * density / (clock * min(rates[layout, which], gpu.cores) * 0.5)
    else:
        dense = size.products / (clock * gpu.tensor * gpu.reached)
        sparse = _tensor_seconds(gpu, size.sparse_products(dtype) / clock, density, layout, which)
    dense = max(dense, moving)
    served = dtype == torch.float32 or (layout, which) in _TENSOR_PASSES
    return Speeds(max(sparse, moving) if served else dense, dense, predicted=True)


def _tensor_seconds(gpu: Gpu, products: float, density: float, layout: str, which: str) -> float:
    """A tile takes a column if any weight of its rows is kept, and reads it from shared memory once."""
    block = 4 if (layout == "1x4") == (which == "input") and layout != "unstructured" else 1
    found = []
    for rows in _ROWS:
        filled = 1 - (1 - density) ** (rows / block)
        found.append(products * filled * max(1 / (0.9 * gpu.mma), 2 / (128 * rows)) / 0.7)
    return min(found)


def layer_speeds(
    gpu: Gpu, size: LayerSize, density: float, layout: str, dtype: torch.dtype, passes: tuple[str, ...] = PASSES
) -> Speeds:
    """Seconds of all these passes of a layer."""
    found = [pass_speeds(gpu, size, density, layout, dtype, which) for which in passes]
    return Speeds(sum(s.sparse for s in found), sum(s.dense for s in found), predicted=True)


def _images(module: nn.Module, input: Tensor) -> int | None:
    """For `LayerSize`: None of a matrix product, which a 1x1 convolution without stride and padding is too."""
    if isinstance(module, nn.Linear):
        return None
    padding = 0 if isinstance(module.padding, str) else max(module.padding)
    if prod(module.kernel_size) == 1 and max(module.stride) == 1 and padding == 0:
        return None
    return input.shape[0] if input.dim() == 4 else 1


def predicted_speeds(module: nn.Module, structure: SparseStructure, input: Tensor) -> Speeds | bool:
    """What the model says of this layer on the GPU of `input`, with the gradients that the call will need.

    A choice for `accelerate`, made without running anything. False, which is dense, for a GPU that the model does not
    know. Raises ValueError for an input that is on no GPU.
    """
    if not input.is_cuda:
        raise ValueError(f"input is on {input.device}: the model is of GPUs")
    gpu = gpu_of(torch.cuda.get_device_properties(input.device))
    if gpu is None:
        return False
    needs = [torch.is_grad_enabled() and t.requires_grad for t in (input, module.weight)]
    passes = ("forward", *(which for which, need in zip(PASSES[1:], needs, strict=True) if need))
    into = input.numel() // input.shape[-1 if isinstance(module, nn.Linear) else -3]
    size = LayerSize.of(structure.shape, structure.groups, into, output_pixels(module, input), _images(module, input))
    return layer_speeds(gpu, size, structure.kept / prod(structure.shape), structure.layout, input.dtype, passes)
