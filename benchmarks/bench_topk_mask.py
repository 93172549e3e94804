"""Exact top-k masks over the convolutions and the classifier of ResNet-50, against selection by stock functions.

    python -m benchmarks.bench_topk_mask [--quick] [--threads N] [--json FILE] [--plot FILE] [--record]

Candidate: `sk.ops.topk_mask` over 54 tensors, 25.5M weights, from the list of weights to written mask bits. Case
`resnet50/all` has one budget over the list, `resnet50/per-tensor` one for each tensor. Baselines are granted the
scores: |w|, or the sums over blocks, in one flat buffer (one per tensor); they only find the threshold or, for n:m,
the indices, and write no mask. "np.partition to masks" is the whole job done with stock functions, with ties left
undecided. np.partition and np.sort run on one thread whatever `--threads` says. `--quick` leaves out what takes
seconds (sorting, n:m) and, but for the global choice at 95%, the slower stock functions.

The masks must equal those of the operator's plain PyTorch reference, bit for bit, at every sparsity.

The weights are views of one buffer, so that they lie in huge pages as the baselines' scores do.

Floor: reading every score once, as fast as the best of sum, amax and dot reads a flat buffer of them in this run.
"""

import argparse
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import sparsekern as sk
from benchmarks import harness, machine, roofline
from benchmarks.networks import resnet50_parameters
from benchmarks.roofline import Work

SMOKE_SHAPES = [(16, 3, 7, 7), (32, 16, 1, 1), (10, 32)]
PARTITION, WHOLE = "np.partition", "np.partition to masks"
GOALS = (PARTITION, "torch.topk")
FAST = (*GOALS, "torch.kthvalue")
ALL = (*FAST, "np.sort", "torch.sort")


def weights(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Of the usual initial scale, which differs between layers."""
    scales = [(2 / (torch.Size(shape).numel() / shape[0])) ** 0.5 for shape in shapes]
    return [weight.mul_(scale) for weight, scale in zip(machine.one_buffer(shapes), scales, strict=True)]


def group_scores(weight: Tensor, pattern: str) -> Tensor:
    """What the baselines are granted, flat: |w|, or its sums over blocks."""
    magnitude = weight.abs()
    if pattern not in ("4x1", "1x4"):
        return magnitude.flatten()
    axis = 0 if pattern == "4x1" else 1
    padding = [0, 0] * (weight.dim() - 1 - axis) + [0, -weight.shape[axis] % 4]
    return torch.nn.functional.pad(magnitude, padding).unflatten(axis, (-1, 4)).sum(axis + 1).flatten()


def floors(flat: Tensor) -> dict[str, Callable[[], object]]:
    """Three ways to read a buffer once."""
    return {"sum": flat.sum, "amax": flat.amax, "dot": lambda: flat.dot(flat)}


def selections(parts: list[Tensor], keeps: list[int], names: tuple[str, ...]) -> dict[str, Callable[[], object]]:
    """The stock ways to the `keeps` highest of each of `parts`; `names` chooses from them."""
    import numpy

    arrays = [part.numpy() for part in parts]
    pairs = [(part, part.numel() - keep, keep) for part, keep in zip(parts, keeps, strict=True)]
    found = {
        PARTITION: lambda: [numpy.partition(a, p[1]) for a, p in zip(arrays, pairs, strict=True)],
        "torch.kthvalue": lambda: [part.kthvalue(rank + 1) for part, rank, _ in pairs],
        "torch.topk": lambda: [part.topk(keep, sorted=False) for part, _, keep in pairs],
        "np.sort": lambda: [numpy.sort(a) for a in arrays],
        "torch.sort": lambda: [part.sort() for part in parts],
    }
    return {name: found[name] for name in names}


def whole_job(tensors: list[Tensor], keep: int) -> Callable[[], object]:
    """Masks from weights by np.partition and a comparison."""
    import numpy

    def run():
        flat = torch.cat([t.abs().flatten() for t in tensors]).numpy()
        threshold = float(numpy.partition(flat, flat.size - keep)[flat.size - keep])
        return [t.abs() >= threshold for t in tensors]

    return run


def check(tensors: list[Tensor], keep: int | list[int] | None, pattern: str) -> None:
    """Equal to the reference bit for bit."""
    counts = [] if keep is None else keep if isinstance(keep, list) else [keep]
    want, _ = sk.ops.topk_mask.reference(tensors, counts, isinstance(keep, int), pattern, True, [])
    for found, expected in zip(sk.ops.topk_mask(tensors, keep, pattern=pattern), want, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def rows_for(
    case: str,
    tensors: list[Tensor],
    keep: int | list[int] | None,
    pattern: str,
    sparsity: float,
    others: dict[str, Callable[[], object]],
) -> Iterator[dict]:
    """One row per baseline; the goal is stated for the global, unstructured choice."""
    timings = harness.measure(
        f"{case} {pattern} {sparsity}",
        lambda: check(tensors, keep, pattern),
        {"candidate": lambda: sk.ops.topk_mask(tensors, keep, pattern=pattern), **others},
    )
    reads = [name for name in ("sum", "amax", "dot") if name in timings]
    backend = harness.backend_of(lambda: sk.ops.topk_mask(tensors, keep, pattern=pattern))
    for name in others:
        if name not in reads:
            goal = pattern == "unstructured" and isinstance(keep, int) and name in GOALS
            yield harness.make_row(
                timings["candidate"], name, timings[name], bench="topk_mask", case=case, backend=backend, pass_="step",
                role="goal" if goal else "info", pattern=pattern, sparsity=sparsity, dtype="float32",
                layout="contiguous", floor_ms=timings[harness.fastest(timings, reads)].median_ms,
            )  # fmt: skip


def collect(options: argparse.Namespace) -> Iterator[dict]:
    """Global budgets of all patterns, budgets per tensor, and 2:4."""
    shapes = SMOKE_SHAPES if options.smoke else [s for s in resnet50_parameters().values() if len(s) > 1]
    tensors = weights(shapes)
    read = floors(torch.cat([t.flatten() for t in tensors]))
    sparsities = (0.9, 0.95, 0.98) if options.quick or options.smoke else (0.8, 0.9, 0.95, 0.98, 0.99)
    for pattern in ("unstructured", "4x1", "1x4"):
        parts = [group_scores(t, pattern) for t in tensors]
        flat, sizes = torch.cat(parts), [part.numel() for part in parts]
        for sparsity in sparsities:
            middle = sparsity == 0.95
            if options.quick and pattern != "unstructured" and not middle:
                continue
            if harness.left_out(options, f"{pattern} {sparsity}"):
                return
            keep = sk.keep_count(flat.numel(), sparsity)
            names = (FAST if middle else GOALS) if options.quick else ALL
            others = {**selections([flat], [keep], names), **read}
            if pattern == "unstructured" and middle:
                others[WHOLE] = whole_job(tensors, keep)
            yield from rows_for("resnet50/all", tensors, keep, pattern, sparsity, others)
            if middle and (pattern == "unstructured" or not options.quick):
                keeps = [sk.keep_count(size, sparsity) for size in sizes]
                others = {**selections(parts, keeps, GOALS[:1] if options.quick else FAST), **read}
                yield from rows_for("resnet50/per-tensor", tensors, keeps, pattern, sparsity, others)
    if options.quick:
        return
    groups = torch.cat([t.abs().flatten() for t in tensors]).view(-1, 4)
    yield from rows_for(
        "resnet50/all", tensors, None, "2:4", 0.5, {"torch.topk": lambda: groups.topk(2, sorted=False), **read}
    )


def work(row: dict, weights: int) -> tuple[Work, Work]:
    """A comparison per weight, or per block score that a baseline is granted; the candidate writes a bit per weight."""
    scores = weights // 4 if row["pattern"] in ("4x1", "1x4") else weights
    return Work(weights, 4.125 * weights), Work(scores, 4 * scores)


def main(argv: list[str] | None = None) -> list[dict]:
    options = roofline.add_option(harness.parser(__doc__)).parse_args(argv)
    rows = harness.run("topk_mask", collect, options)
    weights = sum(torch.Size(s).numel() for s in resnet50_parameters().values() if len(s) > 1)
    roofline.save(options, rows, functools.partial(work, weights=weights), "top-k masks of ResNet-50")
    return rows


if __name__ == "__main__":
    main()
