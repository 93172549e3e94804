"""The structures of ResNet-50's convolutions behind the first, made from their masks, and the plans of their passes.

    python -m benchmarks.bench_sparse_structure [--quick] [--threads N] [--json FILE] [--record]

52 layers, 23.5M weights. `structures`: `sk.ops.sparse_structure` of each bool mask. Baselines: torch's compressed rows
of the mask (or those of blocks, of the mask as floats), and numpy's list of the positions that are kept, which is less
than rows of them. `plans`: what the first calls of forward and both gradients on 16 images make of the structures, and
keep; nothing stock does the like. Both are made once per mask: compare them with one step, pass "both" of
`resnet50/all` in bench_sparse_conv2d at the same batch.

Each structure must give its mask back; passes on the plans of one layer must have the results of a dense convolution.

Floor of the structures: their masks, a byte per weight, read and their tensors written at the best rate at which this
run copied, scaled or added arrays. Each timed call follows one of its own kind, so a part of the masks may lie in the
caches, as it does in training, where each mask has just been unpacked.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import sparsekern as sk
from benchmarks import bench_sparse_conv2d as convolutions
from benchmarks import harness
from benchmarks.networks import Conv, resnet50_convs
from benchmarks.optimizer_step import floor_ms, random_mask
from sparsekern.ops import sparse_kernels
from sparsekern.ops.sparse_structure import SparseStructure

IMAGES = 16
CHECKED = "resnet50/layer3.1.conv2"
SMOKE = [Conv(CHECKED, 8, 16, 3, 2, 9)]


def plans_of(conv: Conv, structure: SparseStructure) -> Callable[[], None]:
    """Makes the plans of three passes anew; of operands they see where these lie."""
    x = torch.empty(IMAGES, conv.inputs, conv.size, conv.size)
    g = torch.empty(IMAGES, conv.outputs, conv.output_size, conv.output_size)
    geometry = (conv.stride, conv.stride, conv.padding, conv.padding, 1, 1)
    where = structure.tensors, structure.layout, structure.shape, structure.groups
    sparse = sparse_kernels.Weight(torch.empty(conv.weight_shape), *where)

    def run():
        sparse_kernels.remembered(structure.tensors).clear()
        for kind in ("product", "weight", "input"):
            sparse.plan(kind, x, g, geometry)

    return run


def stock(masks: list[Tensor], pattern: str) -> dict[str, Callable[[], object]]:
    """Baselines, of masks as matrices."""
    found: dict[str, Callable[[], object]] = {"np.flatnonzero": lambda: [m.numpy().ravel().nonzero() for m in masks]}
    if pattern == "unstructured":
        return {**found, "torch to_sparse_csr": lambda: [m.to_sparse_csr() for m in masks]}
    block, floats = tuple(map(int, pattern.split("x"))), [m.float() for m in masks]
    return {**found, "torch to_sparse_bsr": lambda: [m.to_sparse_bsr(block) for m in floats]}


def check(convs: list[Conv], masks: list[Tensor], structures: list[SparseStructure]) -> None:
    """AssertionError unless structures are those of the masks, and passes on them right."""
    for conv, mask, structure in zip(convs, masks, structures, strict=True):
        assert torch.equal(structure.mask(), mask), f"the structure of {conv.name} is not that of its mask"
        if conv.name == CHECKED:
            layer = convolutions.Layer.make(conv, IMAGES)
            sparse = convolutions.sparse(layer, structure)
            for pass_ in convolutions.PASSES:
                found = convolutions.contender(sparse, layer, pass_)()
                convolutions.check(convolutions.dense(layer), layer, pass_, mask, found)


def rows_of(convs: list[Conv], pattern: str, sparsity: float) -> Iterator[dict]:
    """One interleaved run."""
    masks = [random_mask(conv.weight_shape, sparsity, pattern) for conv in convs]
    structures = [sk.ops.sparse_structure(mask, pattern) for mask in masks]
    plans = [plans_of(conv, structure) for conv, structure in zip(convs, structures, strict=True)]
    weights = sum(mask.numel() for mask in masks)
    source = torch.ones(weights)
    target = source.clone()
    own = {
        "structures": lambda: [sk.ops.sparse_structure(mask, pattern) for mask in masks],
        "plans": lambda: [make() for make in plans],
    }
    copies = {
        "copy": lambda: target.copy_(source),
        "scale": lambda: target.mul_(1.0),
        "add": lambda: target.add_(source, alpha=0.0),
    }
    others = stock([mask.flatten(1) for mask in masks], pattern)
    name = f"resnet50/structures {pattern} {sparsity}"
    contenders = {**own, **others, **copies}
    timings = harness.measure(name, lambda: check(convs, masks, own["structures"]()), contenders, settle=1)
    common = dict(bench="sparse_structure", role="info", pass_="step", pattern=pattern, sparsity=sparsity,
                  dtype="float32")  # fmt: skip
    written = 4 * sum(t.numel() for structure in structures for t in structure.tensors)
    for label in others:
        yield harness.make_row(
            timings["structures"], label, timings[label], case="resnet50/structures",
            backend=harness.backend_of(own["structures"]), floor_ms=floor_ms(timings, weights, weights + written),
            **common,
        )  # fmt: skip
    yield harness.make_row(timings["plans"], case="resnet50/plans", backend=harness.backend_of(own["plans"]), **common)


def collect(options: argparse.Namespace) -> Iterator[dict]:
    """Rows of all patterns and sparsities."""
    warnings.filterwarnings("ignore", "Sparse (CSR|BSR) tensor support")
    convs = SMOKE if options.smoke else resnet50_convs()[1:]
    for pattern in convolutions.PATTERNS:
        for sparsity in convolutions.QUICK_SPARSITIES:
            if not harness.left_out(options, f"{pattern} {sparsity}"):
                yield from rows_of(convs, pattern, sparsity)


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.run("sparse_structure", collect, harness.parser(__doc__).parse_args(argv))


if __name__ == "__main__":
    main()
