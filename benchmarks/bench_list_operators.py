"""The operators of methods with a dense store, each one call over the prunable weights of ResNet-50.

    python -m benchmarks.bench_list_operators [--quick] [--threads N] [--json FILE] [--record]

54 tensors, 25.5M float32 weights, masks that keep 10% (A) and 20% (B) of them at random. A case is an operator and what
a method does with it. Baselines are torch's own functions, numpy's selection where there is one, and for topk_nested
what it replaces. They are granted what they need: masks as floats, the weights' magnitudes in one array. Each timed
call follows one of its own kind, as numpy's leave the machine busy with memory; so the weights may lie in a cache,
where topk_nested has nothing to save. Its hint is of weights that did not move at all. Results must equal plain
formulas to rounding.

Floor: the bytes that must be read and written at least, over the best rate at which this run copied, scaled or added
arrays of that size. Results that go past the caches may beat it.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import sparsekern as sk
from benchmarks import harness, machine
from benchmarks.networks import resnet50_parameters
from benchmarks.optimizer_step import SMOKE_SHAPES, floor_ms

LIVE, RANGE, RATE = (0.1, 0.2), 0.02, 1e-6
BIT = 1 / 8


@dataclass
class Model:
    """Weights, gradients, scores, results; masks A and B as bools, packed and, for the baselines, as floats."""

    w: list[Tensor]
    g: list[Tensor]
    s: list[Tensor]
    out: list[Tensor]
    bools: list[list[Tensor]]
    packed: list[list[Tensor]]
    masks: list[list[Tensor]]

    @classmethod
    def make(cls, shapes: list[tuple[int, ...]]) -> "Model":
        w, g, s, out = (machine.one_buffer(shapes, "contiguous") for _ in range(4))
        for t in (*w, *g, *s):
            t.normal_(std=0.01)
        chance = [torch.rand_like(t) for t in w]
        bools = [[c < live for c in chance] for live in LIVE]
        packed = [list(map(sk.ops.pack_mask, b)) for b in bools]
        return cls(w, g, s, out, bools, packed, [[m.float() for m in b] for b in bools])


@dataclass(frozen=True)
class Case:
    """`run` may write to `out` and change `g` and `s`; `want` gives what it leaves there or returns."""

    run: Callable[[Model], object]
    result: Callable[[Model, object], object]
    want: Callable[[Model], object]
    bytes: float
    """That must be read and written, per weight."""
    baselines: dict[str, Callable[[Model], object]]


def _each(f: Callable[..., object], *lists: list[Tensor]) -> list[object]:
    return [f(*tensors) for tensors in zip(*lists, strict=True)]


def _combine(m: Model, **options) -> None:
    sk.ops.masked_combine_(m.out, m.w, [], m.packed[0], live=(1, 0), pruned=(0, 0), **options)


def _power(m: Model) -> None:
    sk.ops.masked_combine_(m.out, m.w, m.w, m.packed[0], live=(0, 1), pruned=(0, 0), times=m.w, magnitude=True)


def _penalty(m: Model) -> None:
    sk.ops.masked_combine_(m.g, m.g, m.w, m.packed[0], live=(1, 1e-4), pruned=(1, 1e-3), within=m.packed[1])


def _torch_penalty(m: Model) -> None:
    for g, w, a, b in zip(m.g, m.w, *m.masks, strict=True):
        g.addcmul_(w, torch.sub(1e-3, a, alpha=9e-4)).mul_(b)


def _torch_shrink(m: Model) -> None:
    _each(lambda o, w: torch.ops.aten.softshrink.out(w, RANGE, out=o), m.out, m.w)


def _rescaled(w: Tensor) -> Tensor:
    dims = tuple(range(1, w.dim()))
    share = (torch.nn.functional.hardshrink(w, RANGE).abs().mean(dims, True) + 1e-6) / (w.abs().mean(dims, True) + 1e-6)
    return torch.nn.functional.softshrink(w, RANGE).mul_(1.01 / (share + 0.01))


def _movement(m: Model, penalty: float) -> None:
    sk.ops.movement_step_(m.s, m.g, m.w, m.packed[0], lr=RATE, penalties=[penalty] * len(m.s))


def _torch_movement(m: Model, penalty: float) -> None:
    for s, g, w, a in zip(m.s, m.g, m.w, m.masks[0], strict=True):
        if penalty:
            gate = s.sigmoid()
            s.addcmul_(gate, 1 - gate, value=-RATE * penalty)
        s.addcmul_(g, w, value=-RATE)
        g.mul_(a)


def _magnitudes(m: Model) -> Tensor:
    return torch.cat([w.abs().flatten() for w in m.w])


def _partition(m: Model, shares: tuple[float, ...]) -> Callable[[Model], object]:
    import numpy

    sizes = _magnitudes(m).numpy()
    places = sorted({place for share in shares for place in _places(m, share)})
    return lambda _: numpy.partition(sizes, places)[places]


def _places(m: Model, share: float) -> tuple[int, int]:
    total = sum(w.numel() for w in m.w)
    return total - _keep(m, share) - 1, total - _keep(m, share)


def _keep(m: Model, share: float) -> int:
    return max(1, round(share * sum(w.numel() for w in m.w)))


def _bounds(m: Model) -> Tensor:
    sizes = _magnitudes(m).sort().values
    low, high = _places(m, LIVE[0])
    return sizes[[high, low]].double()


def _out(m: Model, _: object) -> list[Tensor]:
    return m.out


def _returned(_: Model, found: object) -> object:
    return found


def forward_cases() -> dict[str, Case]:
    """What forward passes compute, and the gradients of Top-KAST."""
    shrink, thresholds = sk.ops.soft_threshold_, lambda m: [torch.tensor(RANGE)] * len(m.w)
    return {
        "masked_combine_/forward": Case(
            _combine, _out, lambda m: _each(torch.mul, m.w, m.masks[0]), 8 + BIT,
            {"torch.mul by a mask": lambda m: _each(lambda o, w, a: torch.mul(w, a, out=o), m.out, m.w, m.masks[0])},
        ),
        "masked_combine_/power": Case(
            _power, _out, lambda m: _each(lambda w, a: w * w.abs() * a, m.w, m.masks[0]), 8 + BIT,
            {"torch abs, mul, mul by a mask": lambda m: _each(
                lambda o, w, a: torch.abs(w, out=o).mul_(w).mul_(a), m.out, m.w, m.masks[0])},
        ),
        "masked_combine_/penalty": Case(
            _penalty, lambda m, _: m.g,
            lambda m: _each(lambda g, w, a, b: (g + w * torch.where(a > 0, 1e-4, 1e-3)) * b, m.g, m.w, *m.masks),
            12 + 2 * BIT, {"torch addcmul, mul by a mask": _torch_penalty},
        ),
        "soft_threshold_/plain": Case(
            lambda m: shrink(m.out, m.w, thresholds(m)), _out,
            lambda m: _each(lambda w: torch.nn.functional.softshrink(w, RANGE), m.w), 8,
            {"torch softshrink": _torch_shrink},
        ),
        "soft_threshold_/gradient": Case(
            lambda m: shrink(m.out, m.w, thresholds(m), m.g), _out,
            lambda m: _each(lambda g, w: torch.where(w.abs() > RANGE, g, 0), m.g, m.w), 12,
            {"torch softshrink_backward": lambda m: _each(
                lambda o, g, w: torch.ops.aten.softshrink_backward.grad_input(g, w, RANGE, grad_input=o),
                m.out, m.g, m.w)},
        ),
        "soft_threshold_/rescale": Case(
            lambda m: shrink(m.out, m.w, thresholds(m), rescale=True), _out,
            lambda m: _each(_rescaled, m.w), 8, {"torch shrink, means, mul": lambda m: _each(_rescaled, m.w)},
        ),
    }  # fmt: skip


def choice_cases(m: Model) -> dict[str, Case]:
    """What chooses thresholds and masks."""
    ops, counts, hint = sk.ops, [_keep(m, live) for live in LIVE], torch.zeros(2, 2, dtype=torch.int64)
    return {
        "topk_bounds": Case(
            lambda m: ops.topk_bounds(m.w, counts[0]), _returned, _bounds, 4,
            {"np.partition of magnitudes": _partition(m, LIVE[:1])},
        ),
        "topk_nested": Case(
            lambda m: ops.topk_nested(m.w, counts), _returned, lambda m: [ops.topk_mask(m.w, k) for k in counts],
            4 + 2 * BIT,
            {"topk_mask twice": lambda m: [ops.topk_mask(m.w, k) for k in counts],
             "np.partition of magnitudes, no mask": _partition(m, LIVE)},
        ),
        "topk_nested/hint": Case(
            lambda m: ops.topk_nested(m.w, counts, hint=hint), _returned,
            lambda m: [ops.topk_mask(m.w, k) for k in counts], 4 + 2 * BIT,
            {"topk_nested": lambda m: ops.topk_nested(m.w, counts)},
        ),
        "threshold_mask": Case(
            lambda m: ops.threshold_mask(m.s, RANGE), lambda _, found: found[0],
            lambda m: _each(lambda s: ops.pack_mask(s > RANGE), m.s), 4 + BIT,
            {"torch.gt to a byte each": lambda m: _each(lambda s: s > RANGE, m.s)},
        ),
    }  # fmt: skip


def learned_cases() -> dict[str, Case]:
    """What trains thresholds and scores."""
    found = {
        "signed_sums": Case(
            lambda m: sk.ops.signed_sums(m.g, m.w), lambda _, found: found.float(),
            lambda m: torch.stack(_each(lambda g, w: (g * w.sign()).sum(dtype=torch.float64).float(), m.g, m.w)), 8,
            {"torch sign, dot": lambda m: _each(lambda g, w: torch.dot(w.sign().flatten(), g.flatten()), m.g, m.w)},
        ),
    }  # fmt: skip
    for name, penalty in (("hard", 0.0), ("soft", 1.0)):
        found[f"movement_step_/{name}"] = Case(
            lambda m, p=penalty: _movement(m, p), lambda m, _: [*m.s, *m.g],
            lambda m, p=penalty: [
                *_each(lambda s, g, w: s - RATE * (g * w + p * s.sigmoid() * (-s).sigmoid()), m.s, m.g, m.w),
                *_each(torch.mul, m.g, m.masks[0]),
            ], 20 + BIT, {"torch addcmul, mul by a mask": lambda m, p=penalty: _torch_movement(m, p)},
        )  # fmt: skip
    return found


def packing_cases(m: Model) -> dict[str, Case]:
    """Masks between a byte and a bit per weight."""
    import numpy

    arrays, bits = [[t.numpy() for t in tensors] for tensors in (m.bools[0], m.packed[0])]
    return {
        "pack_mask": Case(
            lambda m: _each(sk.ops.pack_mask, m.bools[0]), _returned,
            lambda m: [torch.from_numpy(numpy.packbits(a, bitorder="little")) for a in arrays], 1 + BIT,
            {"np.packbits": lambda _: [numpy.packbits(a, bitorder="little") for a in arrays]},
        ),
        "unpack_mask": Case(
            lambda m: _each(sk.ops.unpack_mask, m.packed[0], m.w), _returned, lambda m: m.bools[0], 1 + BIT,
            {"np.unpackbits": lambda _: [
                numpy.unpackbits(b, count=a.size, bitorder="little") for a, b in zip(arrays, bits, strict=True)]},
        ),
    }  # fmt: skip


def cases(m: Model) -> dict[str, Case]:
    return {**forward_cases(), **choice_cases(m), **learned_cases(), **packing_cases(m)}


def check(case: Case, m: Model) -> None:
    """The candidate's result is that of plain formulas."""
    want = case.want(m)
    torch.testing.assert_close(case.result(m, case.run(m)), want, rtol=1e-5, atol=1e-6)


def collect(options: argparse.Namespace) -> Iterator[dict]:
    """A row per case and baseline."""
    shapes = (SMOKE_SHAPES if options.smoke else resnet50_parameters()).values()
    m = Model.make([shape for shape in shapes if len(shape) > 1])
    weights = sum(w.numel() for w in m.w)
    source = torch.ones(weights)
    target = source.clone()
    copies = {
        "copy": lambda: target.copy_(source),
        "scale": lambda: target.mul_(1.0),
        "add": lambda: target.add_(source, alpha=0.0),
    }
    for name, case in cases(m).items():
        if harness.left_out(options, name):
            continue
        others = {label: lambda run=run: run(m) for label, run in case.baselines.items()}
        timings = harness.measure(
            f"resnet50/{name}", lambda case=case: check(case, m),
            {"candidate": lambda case=case: case.run(m), **others, **copies}, settle=1,
        )  # fmt: skip
        for label in others:
            yield harness.make_row(
                timings["candidate"], label, timings[label], bench="list_operators", case=f"resnet50/{name}",
                role="info", pass_="step", backend=harness.backend_of(lambda case=case: case.run(m)), dtype="float32",
                floor_ms=floor_ms(timings, weights, case.bytes * weights),
            )  # fmt: skip


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.run("list_operators", collect, harness.parser(__doc__).parse_args(argv))


if __name__ == "__main__":
    main()
