"""Sparse convolutions of ResNet-50, forward and both gradients, against the best dense convolution.

    python -m benchmarks.bench_sparse_conv2d [--quick] [--threads N] [--batch N] [--passes P,P] [--compile]
                                             [--minutes M] [--resume FILE] [--plot FILE]

Candidate: `sk.ops.sparse_conv2d` in float32 with a structure of random groups and, column `layout`, an ordinary dense
weight ("contiguous": what training does) or its kept values ("packed", forward only: what inference does); gradients
through autograd, one at a time. Baseline: the fastest of torch's dense convolution with contiguous and with
channels_last operands and, with `--compile`, of both through torch.compile (forward only); gradients through autograd
too. Losing rows stay in.

Each result must equal the dense convolution with the masked weight to the rounding of a float32 sum, and the gradient
of weight must be exactly zero off the mask.

`efficiency` = speedup x density. `floor`: the multiply-adds left, at the rate of a large dense product in this run, or,
if that is more and the images exceed 8 MiB, one reading of all that the pass reads and writes. Case `resnet50/all`
(without `--quick`) is the sum over the 52 convolutions behind the stem, layers of equal shape measured once; its pass
"both" is the sum of the three passes with the dense weight. Its IQR is the sum of theirs. `--quick`: eight layers and
three sparsities; gradients of as many as its time allows. Without it, MobileNetV1's pointwise layers run too, in up to
five minutes; `--minutes` stops it before, and with the same `--resume` FILE the next run goes on where this one
stopped.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import sparsekern as sk
from benchmarks import harness, roofline
from benchmarks.networks import Conv, mobilenet_v1_pointwise, resnet50_convs
from benchmarks.optimizer_step import random_mask
from benchmarks.roofline import Work

PASSES = ("forward", "input_grad", "weight_grad")
PATTERNS = ("unstructured", "4x1", "1x4")
SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
QUICK_SPARSITIES = (0.9, 0.95, 0.98)
QUICK = ("layer1.0.conv2", "layer1.0.conv3", "layer2.0.downsample.0", "layer2.1.conv2", "layer3.1.conv1",
         "layer3.1.conv2", "layer4.1.conv1", "layer4.1.conv2")  # fmt: skip
SMOKE = [Conv("resnet50/layer0.conv", 8, 16, 3, 2, 9)]
CACHED_BYTES = 8 << 20
"""Images up to here may stay in the caches from call to call."""
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass
class Layer:
    """One layer's operands."""

    conv: Conv
    input: Tensor
    weight: Tensor
    grad: Tensor

    @classmethod
    def make(cls, conv: Conv, batch: int) -> "Layer":
        size = conv.output_size
        return cls(
            conv,
            torch.randn(batch, conv.inputs, conv.size, conv.size),
            torch.randn(conv.weight_shape),
            torch.randn(batch, conv.outputs, size, size),
        )


Forward = Callable[[Tensor, Tensor], Tensor]


def contender(forward: Forward, layer: Layer, pass_: str, layout: str = "contiguous") -> Callable[[], Tensor]:
    """A call of one pass of ``forward(input, weight)``; what it does not need is prepared outside."""
    input, weight, grad = (
        t.detach().clone(memory_format=FORMATS[layout] if t.dim() == 4 else torch.contiguous_format)
        for t in (layer.input, layer.weight, layer.grad)
    )
    if pass_ == "forward":
        return lambda: forward(input, weight)  # nothing here asks for a gradient
    target = (input if pass_ == "input_grad" else weight).requires_grad_()
    forward(input, weight)  # training repeats calls, and repeated ones have a shorter way
    output = forward(input, weight)
    return lambda: torch.autograd.grad(output, target, grad, retain_graph=True)[0]


def dense(layer: Layer) -> Forward:
    conv = layer.conv
    return lambda x, w: torch.nn.functional.conv2d(x, w, None, conv.stride, conv.padding)


def sparse(layer: Layer, structure: sk.ops.SparseStructure) -> Forward:
    conv = layer.conv
    return lambda x, w: sk.ops.sparse_conv2d(x, w, structure, None, conv.stride, conv.padding)


def baselines(layer: Layer, pass_: str, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    found = {f"torch {layout}": contender(dense(layer), layer, pass_, layout) for layout in FORMATS}
    if compiled and pass_ == "forward":
        torch.compiler.reset()
        for layout in FORMATS:
            found[f"torch.compile {layout}"] = contender(torch.compile(dense(layer)), layer, pass_, layout)
    return found


def check(forward: Forward, layer: Layer, pass_: str, mask: Tensor, found: Tensor) -> None:
    """AssertionError unless `found` is the result of the dense ``forward`` with the masked weight."""
    want = contender(forward, replace(layer, weight=torch.where(mask, layer.weight, 0)), pass_)()
    if pass_ == "weight_grad":
        want = torch.where(mask, want, 0)
        assert not found[~mask].any(), "the gradient of weight is not zero off the mask"
    # Scaled by the largest result: single results may cancel, while a missing product of a sum shows.
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5 * float(want.abs().amax()))


def candidate(layer: Layer, pass_: str, pattern: str, sparsity: float, layout: str) -> tuple[Tensor, Forward]:
    """A new mask and a call of the sparse operator with it."""
    mask = random_mask(layer.conv.weight_shape, sparsity, pattern)
    structure = sk.ops.sparse_structure(mask, pattern)
    if layout == "packed":
        layer = replace(layer, weight=structure.pack(layer.weight))
    return mask, contender(sparse(layer, structure), layer, pass_)


def layer_rows(
    layer: Layer, pass_: str, role: str, compiled: bool, sparsities: Sequence[float], roof: roofline.Roof
) -> Iterator[dict]:
    """All patterns and sparsities of one pass of one layer, in one interleaved run."""
    layouts = ("contiguous", "packed") if pass_ == "forward" else ("contiguous",)
    made = {key: candidate(layer, pass_, *key) for key in itertools.product(PATTERNS, sparsities, layouts)}
    candidates = {key: run for key, (_, run) in made.items()}

    def check_all():
        for mask, run in made.values():
            check(dense(layer), layer, pass_, mask, run())

    others = baselines(layer, pass_, compiled)
    timings = harness.measure(f"{layer.conv.name} {pass_}", check_all, {**candidates, **others})
    best = harness.fastest(timings, list(others))
    for key, (mask, run) in made.items():
        pattern, sparsity, layout = key
        yield harness.make_row(
            timings[key], best, timings[best], bench="sparse_conv2d", case=layer.conv.name, role=role,
            backend=harness.backend_of(run), pass_=pass_, pattern=pattern, sparsity=sparsity, dtype="float32",
            layout=layout, batch=len(layer.input), density=int(mask.sum()) / mask.numel(),
            floor_ms=floor_ms(layer_work(layer.conv, len(layer.input), sparsity, inputs_moved(mask, pass_)), roof),
        )  # fmt: skip


def total(rows: list[dict], counts: dict[str, int], pass_: str, case: str) -> dict:
    """One row that sums rows of one pattern and sparsity, each as often as its layer occurs."""

    def sum_of(key: str) -> float:
        return sum(row[key] * counts[row["case"]] for row in rows)

    first = rows[0]
    backends = {row["backend"] for row in rows}
    fields = {key: first[key] for key in ("bench", "role", "pattern", "sparsity", "dtype", "layout", "batch")}
    return harness.make_row(
        harness.Timing(sum_of("median_ms"), sum_of("iqr_ms")), "torch, best per layer",
        harness.Timing(sum_of("baseline_ms"), 0.0), case=case, pass_=pass_, floor_ms=sum_of("floor_ms"),
        backend="native" if backends == {"native"} else "reference", density=1 - first["sparsity"], **fields,
    )  # fmt: skip


def totals(
    rows: list[dict], counts: dict[str, int], passes: Sequence[str], case: str = "resnet50/all"
) -> Iterator[dict]:
    """The sums over a network for each pattern and sparsity: each pass and layout, then all three passes."""
    for pattern in PATTERNS:
        for sparsity in sorted({r["sparsity"] for r in rows}):
            chosen = [r for r in rows if (r["pattern"], r["sparsity"]) == (pattern, sparsity) and r["case"] in counts]
            for pass_ in passes:
                for layout in dict.fromkeys(r["layout"] for r in chosen if r["pass"] == pass_):
                    yield total([r for r in chosen if (r["pass"], r["layout"]) == (pass_, layout)], counts, pass_, case)
            if set(passes) == set(PASSES):
                yield total([r for r in chosen if r["layout"] != "packed"], counts, "both", case)


def passes_of(options: argparse.Namespace) -> list[str]:
    """Those that --passes asks for, in the order of `PASSES`."""
    passes = [p for p in PASSES if p in options.passes.split(",")]
    if not passes or len(passes) != len(options.passes.split(",")):
        raise SystemExit(f"--passes must be of {','.join(PASSES)}, got {options.passes!r}")
    return passes


def collect(options: argparse.Namespace) -> Iterator[dict]:
    """Rows of each layer, then the sums."""
    passes = passes_of(options)
    followers = resnet50_convs()[1:]
    counts: dict[str, int] = {}
    if options.smoke:
        convs = SMOKE
    elif options.quick:
        convs = [c for c in followers if c.name.removeprefix("resnet50/") in QUICK]
    else:
        distinct = {c.shape_key: c for c in reversed(followers)}
        convs = [c for c in followers if distinct[c.shape_key] is c]
        counts = {c.name: sum(c.shape_key == other.shape_key for other in followers) for c in convs}
        convs = [*convs, *mobilenet_v1_pointwise()]
    roof = roofline.measure_roof(1000, 32) if options.smoke else roofline.measure_roof()
    rows, progress = [], harness.Progress(options.resume, options.where)
    sparsities = QUICK_SPARSITIES if options.quick or options.smoke else SPARSITIES
    jobs = [(pass_, conv) for pass_ in passes for conv in convs]
    for i, (pass_, conv) in enumerate(jobs):
        if harness.left_out(options, ", ".join(f"{c.name} {p}" for p, c in jobs[i:])):
            break
        # What a goal speaks of: forward at any batch, gradients at batch 16, ResNet-50 only.
        goal = conv.name.startswith("resnet50/") and (pass_ == "forward" or options.batch == 16)
        role = "goal" if goal else "info"

        def measured(conv: Conv = conv, pass_: str = pass_, role: str = role) -> Iterator[dict]:
            return layer_rows(Layer.make(conv, options.batch), pass_, role, options.compile, sparsities, roof)

        for row in progress.rows(f"{conv.name} {pass_}", measured):
            rows.append(row)
            yield row
    else:
        if counts:
            yield from totals(rows, counts, passes)


def inputs_moved(mask: Tensor, pass_: str) -> float:
    """The share of input channels that a pass must move: where all weights of one are pruned, nobody reads it."""
    return 1.0 if pass_ == "input_grad" else float(mask.any(dim=0).flatten(1).any(dim=1).float().mean())


def layer_work(conv: Conv, images: int, sparsity: float, inputs: float = 1.0) -> Work:
    """Two operations per kept weight and output pixel; images are moved once, a share ``inputs`` of the channels that
    go in, and of the weight what is computed with. Small images stay in the caches from call to call, so such layers
    may lie above memory's roof."""
    pixels = images * conv.output_size**2
    kept = torch.Size(conv.weight_shape).numel() * (1 - sparsity)
    return Work(2 * kept * pixels, 4 * (inputs * images * conv.inputs * conv.size**2 + conv.outputs * pixels + kept))


def floor_ms(work: Work, roof: roofline.Roof) -> float:
    """What arithmetic takes at the rate of a dense product or, if more, what large images take to move, all of it read:
    the kinder assumption."""
    moved = work.bytes / roof.reads if work.bytes > CACHED_BYTES else 0.0
    return 1e3 * max(work.operations / roof.operations, moved)


def work(row: dict) -> tuple[Work, Work]:
    """Of a row, and of its dense baseline."""
    known = {c.name: c for c in (*SMOKE, *resnet50_convs(), *mobilenet_v1_pointwise())}
    conv, images = known[row["case"]], row["batch"]
    return layer_work(conv, images, row["sparsity"]), layer_work(conv, images, 0.0)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = roofline.add_option(harness.parser(__doc__))
    parser.add_argument("--batch", type=int, default=1, help="images (default: %(default)s)")
    parser.add_argument("--passes", default=",".join(PASSES), help="some of %(default)s")
    parser.add_argument("--minutes", type=float, help="start nothing new after this time")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep what is done in FILE, and go on from it")
    parser.add_argument("--compile", action="store_true", help="torch.compile among the baselines; slow to start")
    options = parser.parse_args(argv)
    rows = harness.run("sparse_conv2d", collect, options)
    layers = [row for row in rows if not row["case"].endswith("/all")]
    roofline.save(options, layers, work, f"sparse convolutions, batch {options.batch}")
    return rows


if __name__ == "__main__":
    main()
