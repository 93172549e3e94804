"""One optimizer step over the whole parameter list of ResNet-50 (161 tensors, 25.6M weights), against torch.optim.SGD.

    python -m benchmarks.bench_masked_sgd [--quick] [--threads N] [--json FILE] [--record]

Candidate: `MaskedSGD.step()`, Python included, with momentum and weight decay; convolutions and the classifier are
masked, normalisation and biases are dense. Baselines: torch.optim.SGD.step() with `fused` and without a mask (the goal
is to be no slower), fused and then a multiplication of every weight by its mask, torch's default and its `foreach`
variant. Every contender owns its tensors, so none finds them in cache. Needs about 3 GB of memory.

The result of two steps, the first and an ordinary one, must equal torch's fused SGD on masked gradients: bit for bit
where torch itself has fused multiply-adds.

Floor: 20 bytes and one bit of each float32 weight (read w, g, m, mask; write w, m) over the best rate at which this run
copied, scaled or added arrays of that size. It holds for all cache lines; a sparse step may skip some and beat it.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import sparsekern as sk
from benchmarks import harness
from benchmarks.networks import resnet50_parameters

HYPER = dict(lr=1e-3, momentum=0.9, weight_decay=1e-4)
FUSED, MULTIPLY = "torch SGD fused, no mask", "torch SGD fused + mask multiply"
DEFAULT, FOREACH = "torch SGD default, no mask", "torch SGD foreach, no mask"
QUICK = [("unstructured", "contiguous"), ("4x1", "contiguous"), ("1x4", "channels_last")]
FULL = [*QUICK, ("4x1", "channels_last"), ("1x4", "contiguous")]
SMOKE_SHAPES = {"conv.weight": (16, 8, 3, 3), "bn.weight": (16,), "fc.weight": (10, 16)}


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
    result = []
    for shape in shapes:
        format = torch.channels_last if layout == "channels_last" and len(shape) == 4 else torch.contiguous_format
        param = torch.randn(shape).contiguous(memory_format=format).requires_grad_()
        param.grad = torch.randn(shape).contiguous(memory_format=format)
        result.append(param)
    return result


def baselines(shapes: list[tuple[int, ...]]) -> dict[str, Callable[[], object]]:
    """Steps of torch's optimizers, and what moves bytes for the floor."""
    step = {
        name: torch.optim.SGD(parameters(shapes, "contiguous"), **HYPER, **kwargs).step
        for name, kwargs in {FUSED: {"fused": True}, DEFAULT: {}, FOREACH: {"foreach": True}}.items()
    }
    params = parameters(shapes, "contiguous")
    masks = [(torch.rand(shape) < 0.05).float() for shape in shapes if len(shape) > 1]
    fused = torch.optim.SGD(params, **HYPER, fused=True)
    weights = [p.detach() for p in params if p.dim() > 1]

    def multiply():
        fused.step()
        for weight, mask in zip(weights, masks, strict=True):
            weight.mul_(mask)

    source = torch.ones(sum(p.numel() for p in params))
    target = source.clone()
    return {
        **step,
        MULTIPLY: multiply,
        "copy": lambda: target.copy_(source),
        "scale": lambda: target.mul_(1.0),
        "add": lambda: target.add_(source, alpha=0.0),
    }


def floor_ms(timings: dict[str, harness.Timing], weights: int, masked: int) -> float:
    """The bytes of a step at the best rate seen: copy and scale move 8 bytes per weight, add 12."""
    per_byte = min(timings[name].median_ms / size for name, size in (("copy", 8), ("scale", 8), ("add", 12)))
    return per_byte * (20 * weights + masked / 8) / weights


def check(optimizer: sk.MaskedSGD, masks: dict[Tensor, Tensor]) -> None:
    """Two steps of the optimizer that will be timed, against torch's on masked gradients."""
    params = optimizer.param_groups[0]["params"]
    expected = []
    for p in params:
        keep = masks.get(p, torch.ones_like(p, dtype=torch.bool))
        copy = torch.where(keep, p.detach(), 0).requires_grad_()
        copy.grad = torch.where(keep, p.grad, 0)
        expected.append(copy)
    oracle = torch.optim.SGD(expected, **HYPER, fused=True)
    exact = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    tolerance = dict(rtol=0, atol=0) if exact else dict(rtol=1e-6, atol=1e-6)
    for _ in range(2):
        optimizer.step()
        oracle.step()
    for p, want in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), want.detach(), **tolerance)
        found = optimizer.state[p]["momentum_buffer"]
        torch.testing.assert_close(found, oracle.state[want]["momentum_buffer"], **tolerance)


def collect(options: argparse.Namespace) -> Iterator[dict]:
    """Rows of all patterns; those of one pattern are timed together with all baselines."""
    shapes = list((SMOKE_SHAPES if options.smoke else resnet50_parameters()).values())
    masked = sum(torch.Size(s).numel() for s in shapes if len(s) > 1)
    weights = sum(torch.Size(s).numel() for s in shapes)
    for pattern, layout in QUICK if options.quick or options.smoke else FULL:
        if harness.left_out(options, f"{pattern} {layout}"):
            continue
        checks, contenders = [], {}
        for sparsity in (0.9, 0.95, 0.98):
            params = parameters(shapes, layout)
            masks = {p: random_mask(tuple(p.shape), sparsity, pattern) for p in params if p.dim() > 1}
            optimizer = sk.MaskedSGD(params, **HYPER, masks=masks)
            checks.append((optimizer, masks))
            contenders[sparsity] = optimizer.step
        others = baselines(shapes)

        def check_all(checks=checks):
            for pair in checks:
                check(*pair)

        case = "resnet50/all"
        timings = harness.measure(f"{case} {pattern} {layout}", check_all, {**contenders, **others})
        floor = floor_ms(timings, weights, masked)
        backend = harness.backend_of(contenders[0.9])
        common = dict(bench="masked_sgd", case=case, backend=backend, pass_="step", pattern=pattern, dtype="float32",
                      layout=layout, floor_ms=floor)  # fmt: skip
        for sparsity in contenders:
            for name in (FUSED, MULTIPLY, DEFAULT, FOREACH):
                if name == FUSED or sparsity == 0.95:
                    role = "goal" if name == FUSED and (pattern, layout) in QUICK else "info"
                    yield harness.make_row(
                        timings[sparsity], name, timings[name], role=role, sparsity=sparsity, **common
                    )


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.run("masked_sgd", collect, harness.parser(__doc__).parse_args(argv))


if __name__ == "__main__":
    main()
