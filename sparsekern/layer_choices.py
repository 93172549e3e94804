"""Sparse or dense, and how fast, for layers of ResNet-50 on this machine: what `sparsekern doctor --layers` shows.

The measurement is the one that `sk.nn.accelerate` decides by, on random masks and inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

import sparsekern as sk

LAYERS = {
    "layer1.0.conv2": (64, 64, 3, 1, 56),
    "layer2.0.downsample.0": (256, 512, 1, 2, 56),
    "layer3.1.conv1": (1024, 256, 1, 1, 14),
    "layer3.1.conv2": (256, 256, 3, 1, 14),
    "layer4.1.conv1": (2048, 512, 1, 1, 7),
}
"""Name -> inputs, outputs, kernel, stride and size of the image, as torchvision's ResNet-50 (arXiv 1512.03385) has
them: one for each kind of layer and image."""
SPARSITIES = (0.9, 0.95, 0.98)
PATTERNS = ("4x1", "1x4", "unstructured")
OVERRIDE = (
    "sk.nn.accelerate(model, masks) measures your layers so, once per mask and size of input, and\n"
    "sk.nn.acceleration_report(model) shows it; choose=lambda layer, structure, input: True (sparse) or False overrides"
)


def rows(dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, str]]:
    """(layer, pattern and pass) and its cells, one per sparsity, under a heading; takes seconds."""
    yield (
        f"one image, {str(dtype).removeprefix('torch.')}: choice, ms sparse/dense",
        _line(f"{s:.0%}" for s in SPARSITIES),
    )
    for name, (inputs, outputs, kernel, stride, size) in LAYERS.items():
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False, dtype=dtype)
        x = torch.randn(1, inputs, size, size, dtype=dtype)
        for pattern in PATTERNS:
            cells: dict[str, list[str]] = {"inference": [], "training": []}
            for sparsity in SPARSITIES:
                structure = sk.ops.sparse_structure(_random_mask(layer.weight, pattern, sparsity), pattern)
                for pass_, found in cells.items():
                    training = pass_ == "training"
                    with torch.set_grad_enabled(training):
                        speeds = sk.nn.measured_speeds(layer, structure, x.requires_grad_(training))
                    choice = "sparse" if speeds else "dense"
                    found.append(f"{choice} {speeds.sparse * 1e3:.3g}/{speeds.dense * 1e3:.3g}")
            for pass_, found in cells.items():
                yield f"{name} {pattern} {pass_}", _line(found)


def _line(cells: Iterable[str]) -> str:
    return " ".join(f"{cell:19}" for cell in cells).rstrip()


def _random_mask(weight: torch.Tensor, pattern: str, sparsity: float) -> torch.Tensor:
    scores = torch.rand(weight.shape)
    size = 1 if pattern == "unstructured" else 4
    keep = round(weight.numel() // size * (1 - sparsity))
    return sk.ops.unpack_mask(sk.ops.topk_mask([scores], keep, pattern=pattern)[0], weight)
