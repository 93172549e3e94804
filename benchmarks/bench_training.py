"""One training step of ResNet-50 in a sparse phase on the sparse kernels, against the same step dense.

    python -m benchmarks.bench_training [--quick] [--threads N] [--batch N] [--patterns P,P] [--json FILE] [--record]

Needs torchvision. A step is forward, cross entropy, backward and optimizer on random 224x224 images. Candidate: masks
of the same sparsity in each of the 52 convolutions behind the stem, chosen by `topk_mask`, `sk.nn.accelerate` with its
own choice per layer, and `sk.MaskedSGD`. Baseline: the faster of the contiguous and the channels_last model with
torch.optim.SGD, fused, which is what a dense phase costs without this package.

A step follows one of its own kind, in training and here: contenders take turns, and the first step of each turn is not
timed. After a step of another model, memory and caches are that one's; measured so, sparse steps took 1.4 times as
long and dense ones 1.1 times (ResNet-50, batch 16, two threads, 95%).

Loss and gradients of an accelerated step must equal those of the same masked model on torch's own operators.

Case `resnet50/step` is the step. `resnet50/dense step, our norms` is the contiguous baseline with the batch-norms of an
accelerated model: what is gained without any sparsity. The others say where its time goes, from one profiled step:
`resnet50/step/PART`, with PART convolution, batch-norm (with the residual and the ReLU behind it where they are fused),
optimizer or rest. `resnet50/mask update` is what a change of all masks costs: the new masks, and the structures at the
next step; plans are made in that step too. Its baseline is the dense step.

`--quick`: batch 4 unless given, pattern 4x1, every step timed.
"""

import argparse
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import sparsekern as sk
from benchmarks import harness
from sparsekern.nn.layers import structure_of

PATTERNS = ("4x1", "unstructured", "1x4")
SPARSITIES = (0.9, 0.95, 0.98)
HYPER = dict(lr=1e-3, momentum=0.9, weight_decay=1e-4)
PARTS = {"convolution": ("conv", "sparse_", "Sparse"), "batch-norm": ("batch_norm",), "optimizer": ("sgd",)}


def network(smoke: bool) -> nn.Module:
    """ResNet-50, or something with its parts that a test can afford; the same weights at every call."""
    torch.manual_seed(0)
    if smoke:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, bias=False),
            nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        )  # fmt: skip
    from torchvision.models import resnet50

    return resnet50()


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all convolutions but the first."""
    names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return {name: model.get_parameter(name) for name in names[1:]}


def choose(masks: sk.MaskSet, sparsity: float, pattern: str) -> None:
    """New masks by magnitude, the same sparsity in each."""
    weights = [masks.parameter(name).detach() for name in masks]
    groups = [w.numel() if pattern == "unstructured" else w.numel() // 4 for w in weights]
    found = sk.ops.topk_mask(weights, [sk.keep_count(n, sparsity) for n in groups], pattern=pattern)
    for name, packed in zip(masks, found, strict=True):
        masks.set_packed(name, packed)


def backward(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    return loss.detach()


def contender(model: nn.Module, optimizer: torch.optim.Optimizer, *data: Tensor) -> Callable[[], None]:
    def run() -> None:
        backward(model, *data)
        optimizer.step()

    return run


class Sparse:
    """An accelerated model in a sparse phase, and its step."""

    def __init__(self, smoke: bool, sparsity: float, pattern: str, data: tuple[Tensor, Tensor]):
        self.sparsity, self.pattern, self.data = sparsity, pattern, data
        self.model = network(smoke).train()
        self.masks = sk.MaskSet(prunable(self.model))
        choose(self.masks, sparsity, pattern)
        self.masks.apply()
        self.optimizer = sk.MaskedSGD(self.model.parameters(), **HYPER, masks=self.masks)
        sk.nn.accelerate(self.model, self.masks)
        self.step = contender(self.model, self.optimizer, *data)

    def update(self) -> None:
        choose(self.masks, self.sparsity, self.pattern)
        for name in self.masks:
            structure_of(self.masks.bool(name), 1)


class Dense:
    """A dense model with the batch-norms of an accelerated one, and its step."""

    def __init__(self, smoke: bool, data: tuple[Tensor, Tensor]):
        self.data, self.model = data, network(smoke).train()
        self.masks = sk.MaskSet(prunable(self.model))  # they keep every weight
        sk.nn.accelerate(self.model, self.masks)
        optimizer = torch.optim.SGD(self.model.parameters(), **HYPER, fused=True)
        self.step = contender(self.model, optimizer, *data)


def check(model: nn.Module, data: tuple[Tensor, Tensor], masks: sk.MaskSet) -> None:
    """AssertionError unless an accelerated step computes what torch does; rounding grows through the layers."""
    plain = copy.deepcopy(model)
    torch.testing.assert_close(backward(model, *data), backward(plain, *data), rtol=1e-3, atol=1e-4)
    kept = {name: masks.bool(name) for name in masks}
    for (name, found), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        got, expected = found.grad, want.grad
        if name in kept:  # a layer that runs dense has gradients off the mask too, which the optimizer leaves out
            got, expected = (torch.where(kept[name], g, 0) for g in (got, expected))
        error = float((got - expected).norm() / expected.norm().clamp_min(1e-12))
        assert error < 0.05, f"the gradient of {name} is off by {error:.1%}"


def parts(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of one step by what they were spent on, gradients included."""
    step()  # the one before it is of its kind
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    found = dict.fromkeys([*PARTS, "rest"], 0.0)
    for event in profile.key_averages():
        part = next((p for p, words in PARTS.items() if any(w in event.key for w in words)), "rest")
        found[part] += event.self_cpu_time_total / 1e3
    return found


def rows(pattern: str, options: argparse.Namespace) -> Iterator[dict]:
    """All sparsities of one pattern, in one interleaved run."""
    size = 12 if options.smoke else 224
    images, labels = torch.randn(options.batch, 3, size, size), torch.randint(10, (options.batch,))
    baselines = {}
    for layout, form in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        model = network(options.smoke).train().to(memory_format=form)
        optimizer = torch.optim.SGD(model.parameters(), **HYPER, fused=True)
        baselines[f"dense {layout}"] = contender(model, optimizer, images.to(memory_format=form), labels)
    sparse = {s: Sparse(options.smoke, s, pattern, (images, labels)) for s in SPARSITIES}
    normed = Dense(options.smoke, (images, labels))

    def check_all() -> None:
        for candidate in (*sparse.values(), normed):
            check(candidate.model, candidate.data, candidate.masks)

    contenders: dict = {("step", s): c.step for s, c in sparse.items()}
    contenders |= {("mask update", s): c.update for s, c in sparse.items()}
    contenders["norms"] = normed.step
    timings = harness.measure(
        f"resnet50/step {pattern}", check_all, {**contenders, **baselines}, settle=0 if options.quick else 1
    )
    best = harness.fastest(timings, list(baselines))
    common = dict(
        bench="training", backend=harness.backend_of(sparse[0.9].step), pass_="step", pattern=pattern, dtype="float32",
        layout="contiguous", batch=options.batch,
    )  # fmt: skip
    for sparsity, candidate in sparse.items():
        role = "goal" if options.batch == 16 else "info"
        for what in ("step", "mask update"):
            timing = timings[what, sparsity]
            yield harness.make_row(
                timing, best, timings[best], case=f"resnet50/{what}", sparsity=sparsity,
                role=role if what == "step" else "info", **common,
            )  # fmt: skip
        for part, ms in parts(candidate.step).items():
            case = f"resnet50/step/{part}"
            yield harness.make_row(harness.Timing(ms, 0.0), case=case, sparsity=sparsity, role="info", **common)
        print(f"  {sk.nn.acceleration_report(candidate.model).sparse} of {len(candidate.masks)} layers ran sparse")
    dense = {**common, "pattern": None}
    yield harness.make_row(
        timings["norms"], best, timings[best], case="resnet50/dense step, our norms", role="info", **dense
    )  # fmt: skip
    dense |= {"backend": "native", "layout": best.removeprefix("dense ")}
    for part, ms in parts(baselines[best]).items():
        case = f"resnet50/dense step/{part}"
        yield harness.make_row(harness.Timing(ms, 0.0), case=case, role="info", **dense)


def collect(options: argparse.Namespace) -> Iterator[dict]:
    """Rows of each pattern."""
    patterns = options.patterns.split(",") if options.patterns else list(PATTERNS[: 1 if options.quick else None])
    if not set(patterns) <= set(PATTERNS):
        raise SystemExit(f"--patterns must be of {','.join(PATTERNS)}, got {options.patterns!r}")
    options.batch = options.batch or (4 if options.quick else 2 if options.smoke else 16)
    for pattern in patterns:
        yield from rows(pattern, options)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = harness.parser(__doc__)
    parser.add_argument("--batch", type=int, help="images (default: 16)")
    parser.add_argument("--patterns", help=f"some of {','.join(PATTERNS)} (default: all)")
    return harness.run("training", collect, parser.parse_args(argv))


if __name__ == "__main__":
    main()
