"""What the benchmarks of the masked optimizer steps share: contenders, checks and rows over ResNet-50's parameters.

161 tensors, 25.6M weights; convolutions and the classifier are masked, normalisation and biases are dense. With layout
"packed" the parameters hold only the kept values, as `SparseStructure.pack` leaves them, and the pattern means nothing.
Candidate: `step()` of the masked optimizer, Python included. Baselines: torch's optimizer `fused` and without a mask,
fused and then a multiplication of every weight by its mask, torch's default and its `foreach` variant. Every contender
owns its tensors, so none finds them in cache; all of them lie in huge pages where the system gives them.

The result of two steps, the first and an ordinary one, must equal torch's default optimizer on masked gradients
(fused, it rounds the last elements of a tensor in another way).

Floor: the bytes of each float32 weight and its bit over the best rate at which this run copied, scaled or added arrays
of that size. It holds for all cache lines; a sparse step may skip some and beat it.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sparsekern as sk
from benchmarks import harness, machine, roofline
from benchmarks.networks import resnet50_parameters
from benchmarks.roofline import Work

QUICK = [("unstructured", "contiguous"), ("4x1", "contiguous"), ("1x4", "channels_last"), ("unstructured", "packed")]
FULL = [*QUICK, ("4x1", "channels_last"), ("1x4", "contiguous")]
SPARSITIES, ALL_SPARSITIES = (0.9, 0.95, 0.98), (0.8, 0.9, 0.95, 0.98, 0.99)
SMOKE_SHAPES = {"conv.weight": (16, 8, 3, 3), "bn.weight": (16,), "fc.weight": (10, 16)}
COPIES = {"copy": 8, "scale": 8, "add": 12}
"""What moves memory -> bytes per element that it moves."""
LINE = 16
"""Float32 weights in a cache line."""


@dataclass(frozen=True)
class Step:
    """One kind of optimizer. `bytes` are read and written per weight, `operations` computed."""

    bench: str
    title: str
    masked: Callable[..., torch.optim.Optimizer]
    torch: Callable[..., torch.optim.Optimizer]
    hyper: dict[str, Any]
    state: tuple[str, ...]
    bytes: int
    operations: int
    exact: bool
    """Equal to torch's bit for bit where torch has fused multiply-adds."""
    role: str

    @property
    def fused(self) -> str:
        return f"torch {self.title} fused, no mask"

    @property
    def multiply(self) -> str:
        return f"torch {self.title} fused + mask multiply"

    @property
    def variants(self) -> dict[str, dict[str, bool]]:
        """Baselines without a mask -> their options."""
        default, foreach = (f"torch {self.title} {name}, no mask" for name in ("default", "foreach"))
        return {self.fused: {"fused": True}, default: {}, foreach: {"foreach": True}}


def random_mask(shape: tuple[int, ...], sparsity: float, pattern: str) -> Tensor:
    """A bool mask that keeps a random share of 1 - sparsity of the groups, exactly."""
    grid = list(shape)
    axis = {"4x1": 0, "1x4": 1}.get(pattern)
    if axis is not None:
        grid[axis] = -(-shape[axis] // 4)
    chosen = torch.zeros(grid, dtype=torch.bool)
    chosen.view(-1)[torch.randperm(chosen.numel())[: sk.keep_count(chosen.numel(), sparsity)]] = True
    return chosen if axis is None else chosen.repeat_interleave(4, axis).narrow(axis, 0, shape[axis]).contiguous()


def parameters(shapes: list[tuple[int, ...]], layout: str) -> list[Tensor]:
    """Fresh parameters with gradients."""
    params = [p.requires_grad_() for p in machine.one_buffer(shapes, layout)]
    for param, grad in zip(params, machine.one_buffer(shapes, layout), strict=True):
        param.grad = grad
    return params


def candidate(
    kind: Step, shapes: list[tuple[int, ...]], pattern: str, layout: str, sparsity: float
) -> tuple[torch.optim.Optimizer, dict[Tensor, Tensor]]:
    """A masked optimizer and its masks."""
    if layout == "packed":
        sizes = [(sk.keep_count(torch.Size(s).numel(), sparsity),) if len(s) > 1 else s for s in shapes]
        return kind.masked(parameters(sizes, "contiguous"), **kind.hyper), {}
    params = parameters(shapes, layout)
    masks = {p: random_mask(tuple(p.shape), sparsity, pattern) for p in params if p.dim() > 1}
    return kind.masked(params, **kind.hyper, masks=masks), masks


def baselines(kind: Step, shapes: list[tuple[int, ...]]) -> dict[str, Callable[[], object]]:
    """Steps of torch's optimizers, and what moves bytes for the floor."""
    step = {
        name: kind.torch(parameters(shapes, "contiguous"), **kind.hyper, **options).step
        for name, options in kind.variants.items()
    }
    params = parameters(shapes, "contiguous")
    masks = [(torch.rand(shape) < 0.05).float() for shape in shapes if len(shape) > 1]
    fused = kind.torch(params, **kind.hyper, fused=True)
    weights = [p.detach() for p in params if p.dim() > 1]

    def multiply():
        fused.step()
        for weight, mask in zip(weights, masks, strict=True):
            weight.mul_(mask)

    source = torch.ones(sum(p.numel() for p in params))
    target = source.clone()
    return {
        **step,
        kind.multiply: multiply,
        "copy": lambda: target.copy_(source),
        "scale": lambda: target.mul_(1.0),
        "add": lambda: target.add_(source, alpha=0.0),
    }


def floor_ms(timings: dict[str, harness.Timing], weights: int, moved: float) -> float:
    """`moved` bytes at the best rate that `timings` show."""
    return moved * min(timings[name].median_ms / (size * weights) for name, size in COPIES.items())


def check(kind: Step, optimizer: torch.optim.Optimizer, masks: dict[Tensor, Tensor]) -> None:
    """Two steps of the optimizer that will be timed, against torch's on masked gradients."""
    params = optimizer.param_groups[0]["params"]
    expected = []
    for p in params:
        keep = masks.get(p, torch.ones_like(p, dtype=torch.bool))
        copy = torch.where(keep, p.detach(), 0).requires_grad_()
        copy.grad = torch.where(keep, p.grad, 0)
        expected.append(copy)
    oracle = kind.torch(expected, **kind.hyper, foreach=False)
    exact = kind.exact and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    tolerance = dict(rtol=0, atol=0) if exact else dict(rtol=1e-6, atol=1e-6)
    for _ in range(2):
        optimizer.step()
        oracle.step()
    for p, want in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), want.detach(), **tolerance)
        for name in kind.state:
            torch.testing.assert_close(optimizer.state[p][name], oracle.state[want][name], **tolerance)


def work(kind: Step, optimizer: torch.optim.Optimizer, masks: dict[Tensor, Tensor]) -> Work:
    """What a step must compute and move: live weights, and the cache lines that hold any."""
    live = lines = bits = 0
    for p in optimizer.param_groups[0]["params"]:
        mask = masks.get(p)
        if mask is None:
            live, lines = live + p.numel(), lines + -(-p.numel() // LINE)
            continue
        packed = sk.ops.pack_mask(torch.empty_like(p, dtype=torch.bool).copy_(mask))
        live, bits = live + int(mask.sum()), bits + packed.numel()
        words = torch.nn.functional.pad(packed, (0, packed.numel() % 2)).view(torch.int16)
        lines += int(words.count_nonzero())
    return Work(kind.operations * live, kind.bytes * LINE * lines + bits)


def pattern_rows(kind: Step, pattern: str, layout: str, options: argparse.Namespace) -> Iterator[dict]:
    """All sparsities of one pattern, timed together with all baselines."""
    shapes = list((SMOKE_SHAPES if options.smoke else resnet50_parameters()).values())
    masked = sum(torch.Size(s).numel() for s in shapes if len(s) > 1)
    weights = sum(torch.Size(s).numel() for s in shapes)
    sparsities = SPARSITIES if options.quick or options.smoke else ALL_SPARSITIES
    made = {sparsity: candidate(kind, shapes, pattern, layout, sparsity) for sparsity in sparsities}

    def check_all():
        for optimizer, masks in made.values():
            check(kind, optimizer, masks)

    case = "resnet50/all"
    contenders = {sparsity: optimizer.step for sparsity, (optimizer, _) in made.items()}
    others = baselines(kind, shapes)
    timings = harness.measure(f"{case} {pattern} {layout}", check_all, {**contenders, **others})
    moved = kind.bytes * weights + masked / 8
    backend = harness.backend_of(contenders[0.9])
    common = dict(bench=kind.bench, case=case, backend=backend, pass_="step", pattern=pattern, dtype="float32",
                  layout=layout, floor_ms=floor_ms(timings, weights, moved))  # fmt: skip
    for sparsity, (optimizer, masks) in made.items():
        options.work[pattern, layout, sparsity] = work(kind, optimizer, masks)
        for name in dict.fromkeys([kind.fused, kind.multiply, *kind.variants]):
            if name == kind.fused or sparsity == 0.95:
                role = kind.role if name == kind.fused and (pattern, layout) in QUICK else "info"
                yield harness.make_row(timings[sparsity], name, timings[name], role=role, sparsity=sparsity, **common)
    options.work[None] = Work(kind.operations * weights, kind.bytes * weights)


def collect(kind: Step, options: argparse.Namespace) -> Iterator[dict]:
    """Rows of all patterns. `options.work` learns what each does."""
    options.work = {}
    for pattern, layout in QUICK if options.quick or options.smoke else FULL:
        if not harness.left_out(options, f"{pattern} {layout}"):
            yield from pattern_rows(kind, pattern, layout, options)


def main(kind: Step, doc: str, argv: list[str] | None) -> list[dict]:
    """The command of one kind; `doc` is its module's docstring."""
    options = roofline.add_option(harness.parser(doc)).parse_args(argv)
    rows = harness.run(kind.bench, functools.partial(collect, kind), options)

    def done(row: dict) -> tuple[Work, Work]:
        return options.work[row["pattern"], row["layout"], row["sparsity"]], options.work[None]

    roofline.save(options, rows, done, f"one {kind.title} step of ResNet-50")
    return rows
