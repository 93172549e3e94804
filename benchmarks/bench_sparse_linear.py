"""Sparse linear layers of BERT-base, forward and both gradients, against the best stock function.

    python -m benchmarks.bench_sparse_linear [--quick] [--threads N] [--batch N] [--passes P,P] [--plot FILE]

Candidate: `sk.ops.sparse_linear` in float32 on `--batch` sequences of 128 tokens, otherwise as in bench_sparse_conv2d.
Baselines, the fastest of them for each row: torch's dense linear layer, and compressed rows (CSR) of an unstructured
mask of the same sparsity. For these the sparse matrix is made beforehand; forward and input gradient are its product
(or that of its transpose, made beforehand too) with the transposed operand, brought back to the layout of a linear
layer; the weight gradient is `torch.sparse.sampled_addmm`, which computes at the mask only.

`efficiency` and `floor` are those of bench_sparse_conv2d. Case `bert-base/all` is the sum over the 72 layers of the
encoder, layers of equal shape measured once.
"""

import argparse
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import sparsekern as sk
from benchmarks import bench_sparse_conv2d as convolutions
from benchmarks import harness, roofline
from benchmarks.bench_sparse_conv2d import PASSES, contender
from benchmarks.optimizer_step import random_mask
from benchmarks.roofline import Work

TOKENS = 128
LAYERS = {
    "bert-base/attention": ((768, 768), 48),  # query, key, value and what follows them
    "bert-base/intermediate": ((3072, 768), 12),
    "bert-base/output": ((768, 3072), 12),
}
"""Case -> outputs and inputs, and how often it occurs."""
SMOKE = {"bert-base/smoke": ((16, 24), 2)}


@dataclass
class Layer:
    """One layer's operands."""

    name: str
    input: Tensor
    weight: Tensor
    grad: Tensor

    @classmethod
    def make(cls, name: str, shape: tuple[int, int], sequences: int) -> "Layer":
        outputs, inputs = shape
        lead = sequences, TOKENS
        return cls(name, torch.randn(*lead, inputs), torch.randn(shape), torch.randn(*lead, outputs))


def candidate(layer: Layer, pass_: str, pattern: str, sparsity: float, layout: str) -> tuple[Tensor, Callable]:
    """A new mask and a call of the sparse operator with it."""
    mask = random_mask(tuple(layer.weight.shape), sparsity, pattern)
    structure = sk.ops.sparse_structure(mask, pattern)
    if layout == "packed":
        layer = replace(layer, weight=structure.pack(layer.weight))
    return mask, contender(lambda x, w: sk.ops.sparse_linear(x, w, structure), layer, pass_)


def compressed(layer: Layer, pass_: str, sparsity: float) -> Callable[[], Tensor]:
    """A call of torch's functions on compressed rows."""
    weight = torch.where(random_mask(tuple(layer.weight.shape), sparsity, "unstructured"), layer.weight, 0)
    x, g = layer.input.flatten(0, -2), layer.grad.flatten(0, -2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that support for it is in beta
        matrix = (weight.t().contiguous() if pass_ == "input_grad" else weight).to_sparse_csr()
    if pass_ == "weight_grad":
        return lambda: torch.sparse.sampled_addmm(matrix, g.t(), x, beta=0.0)
    operand, like = (x, layer.grad) if pass_ == "forward" else (g, layer.input)
    return lambda: (matrix @ operand.t()).t().contiguous().view_as(like)


def layer_rows(layer: Layer, pass_: str, options: argparse.Namespace, roof: roofline.Roof) -> Iterator[dict]:
    """All patterns and sparsities of one pass of one layer, in one interleaved run."""
    sparsities = convolutions.QUICK_SPARSITIES if options.quick or options.smoke else convolutions.SPARSITIES
    layouts = ("contiguous", "packed") if pass_ == "forward" else ("contiguous",)
    made = {key: candidate(layer, pass_, *key) for key in itertools.product(convolutions.PATTERNS, sparsities, layouts)}
    others = {"torch linear": contender(torch.nn.functional.linear, layer, pass_)}
    others |= {f"torch CSR {sparsity}": compressed(layer, pass_, sparsity) for sparsity in sparsities}

    def check_all():
        for mask, run in made.values():
            convolutions.check(torch.nn.functional.linear, layer, pass_, mask, run())

    contenders = {key: run for key, (_, run) in made.items()}
    timings = harness.measure(f"{layer.name} {pass_}", check_all, {**contenders, **others})
    for (pattern, sparsity, layout), (mask, run) in made.items():
        best = harness.fastest(timings, ["torch linear", f"torch CSR {sparsity}"])
        yield harness.make_row(
            timings[pattern, sparsity, layout], best.removesuffix(f" {sparsity}"), timings[best],
            bench="sparse_linear", case=layer.name, role="info", backend=harness.backend_of(run), pass_=pass_,
            pattern=pattern, sparsity=sparsity, dtype="float32", layout=layout, batch=len(layer.input),
            density=int(mask.sum()) / mask.numel(),
            floor_ms=convolutions.floor_ms(layer_work(tuple(mask.shape), len(layer.input), sparsity), roof),
        )  # fmt: skip


def layer_work(shape: tuple[int, int], sequences: int, sparsity: float) -> Work:
    """Two operations per kept weight and token; tokens and kept weights are moved once."""
    tokens, kept = sequences * TOKENS, torch.Size(shape).numel() * (1 - sparsity)
    return Work(2 * kept * tokens, 4 * (sum(shape) * tokens + kept))


def work(row: dict) -> tuple[Work, Work]:
    """Of a row, and of its baseline as if it were dense."""
    shape, _ = {**LAYERS, **SMOKE}[row["case"]]
    return layer_work(shape, row["batch"], row["sparsity"]), layer_work(shape, row["batch"], 0.0)


def collect(options: argparse.Namespace) -> Iterator[dict]:
    """Rows of each layer, then the sums."""
    passes = convolutions.passes_of(options)
    roof = roofline.measure_roof(1000, 32) if options.smoke else roofline.measure_roof()
    rows, layers = [], SMOKE if options.smoke else LAYERS
    for pass_, (name, (shape, _)) in itertools.product(passes, layers.items()):
        if harness.left_out(options, f"{name} {pass_}"):
            return
        found = list(layer_rows(Layer.make(name, shape, options.batch), pass_, options, roof))
        rows += found
        yield from found
    yield from convolutions.totals(rows, {name: count for name, (_, count) in layers.items()}, passes, "bert-base/all")


def main(argv: list[str] | None = None) -> list[dict]:
    parser = roofline.add_option(harness.parser(__doc__))
    parser.add_argument("--batch", type=int, default=1, help="sequences of 128 tokens (default: %(default)s)")
    parser.add_argument("--passes", default=",".join(PASSES), help="some of %(default)s")
    options = parser.parse_args(argv)
    rows = harness.run("sparse_linear", collect, options)
    layers = [row for row in rows if not row["case"].endswith("/all")]
    roofline.save(options, layers, work, f"sparse linear layers, {options.batch} sequences of {TOKENS} tokens")
    return rows


if __name__ == "__main__":
    main()
