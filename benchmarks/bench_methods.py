"""What each method costs per training step of ResNet-50 beyond the masked optimizer step, mask updates amortised.

    python -m benchmarks.bench_methods [--quick] [--threads N] [--methods M,M] [--json FILE] [--record]

Needs torchvision for the training step that it is compared with: forward, cross entropy, backward and MaskedSGD on 16
random 224x224 images. The goal is to stay below 2% of it, a speedup of 0.98x.

A method's own work does not depend on the images. So it is timed on the 54 layers of ResNet-50, each applied to one
pixel, forward, backward and step, against the same with the same optimizer and held masks of the same sparsity, step
by step in turn. That is done in a short run, which holds all of the method's updates close together; the steps that
changed masks are told apart, and their extra cost is divided by the interval that the method has in a run of 90 epochs
of ImageNet; so is that of steps that collect gradients for an update. STEP counts as if it watched Adam's variance from
its lower bound to its upper one and learned masks in the other half of the run. A row is the training step plus that
overhead, its baseline the training step, its range that of the overhead. The line above it says what the overhead is
made of.

What is measured must be right: at the end of the short run as many weights live as the method promises, but for one per
layer, which rounding may move, and all others are zero in the forward pass. str and soft-movement promise no number.
obert collects 50 numbers per weight, so it runs on every fourth layer, and its times are scaled to all weights; its
work goes by blocks of weights. `--quick` takes methods in their order until its time is over, and fewer steps.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

import sparsekern as sk
from benchmarks import harness
from benchmarks.bench_training import HYPER, contender
from benchmarks.bench_training import network as resnet50
from benchmarks.networks import Conv, resnet50_convs
from sparsekern.methods import Sparsifier

SPARSITY, BATCH, STEPS_PER_EPOCH, EPOCHS = 0.9, 16, 80_072, 90
BASELINE = "ResNet-50 training step, batch 16"


class Layers(nn.Module):
    """The convolutions and the classifier of a network, each applied to one pixel of its own."""

    def __init__(self, convs: list[Conv]):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(c.inputs, c.outputs, c.kernel, padding=c.padding, bias=False) for c in convs
        )
        self.fc = nn.Linear(convs[-1].outputs, 1000)
        self.pixels = [torch.randn(1, c.inputs, 1, 1) for c in convs]

    def forward(self) -> torch.Tensor:
        total = self.fc(torch.ones(1, self.fc.in_features)).square().mean()
        for layer, pixel in zip(self.layers, self.pixels, strict=True):
            total = total + layer(pixel).square().mean()
        return total


class Trained:
    """Layers under a method, in a run of `steps` steps."""

    def __init__(self, name: str, steps: int, convs: list[Conv], adam: bool = False):
        torch.manual_seed(0)
        self.model = Layers(convs)
        parameters = self.model.parameters()
        self.optimizer = torch.optim.AdamW(parameters) if adam else sk.MaskedSGD(parameters, **HYPER)
        options = {"initial": copy.deepcopy(self.model.state_dict())} if name == "lottery-ticket" else {}
        if sk.METHODS[name].start == "sparse":
            sk.OneShot(SPARSITY).attach(self.model, self.optimizer, verbose=False).finalize()
        # Learnables have optimizers of their own at the rate of this one.
        self.sparsifier = sk.build_method(name, SPARSITY, epochs=1, steps_per_epoch=steps, **options)
        self.sparsifier.attach(self.model, self.optimizer, steps, verbose=False)

    def step(self) -> tuple[float, str]:
        """Milliseconds of one step, and its kind.

        "update" of masks, "gather" gradients for one, "watch" statistics to find the next phase, or "plain".
        """
        before = self._versions()
        watches = isinstance(self.sparsifier, sk.STEP) and self.sparsifier.watching()
        gathers = gathered(self.sparsifier) and self.sparsifier.needs_dense_gradient()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.model().backward()
        self.optimizer.step()
        self.sparsifier.step()
        taken = (time.perf_counter() - start) * 1e3
        if self._versions() != before:
            return taken, "update"
        return taken, "watch" if watches else "gather" if gathers else "plain"

    def _versions(self) -> list[int]:
        masks = self.sparsifier.masks
        return [masks.version(name) for name in masks]


def gathered(sparsifier: Sparsifier) -> int:
    """Of how many steps the gradients are collected for one update."""
    return getattr(sparsifier, "gradients", 0)


def check(name: str, sparsifier: Sparsifier) -> None:
    """WrongResult unless as many weights are live as the method promises, and the others are zero."""
    masks, entry = sparsifier.forward_masks(), sk.METHODS[name]
    sizes = [masks.parameter(each).numel() for each in masks]
    live = sum(int(masks.bool(each).sum()) for each in masks)
    for each, weight in sparsifier.forward_weights().items():
        if weight[~masks.bool(each)].any():
            raise harness.WrongResult(f"{name}: {each} has weights that are pruned and not zero")
    if name == "dense":
        promised = sum(sizes)
    elif entry.patterns == ("n:m",):  # one of ten along the input axis, and one of what is left at the end of a row
        shapes = [masks.parameter(each).shape for each in masks]
        promised = sum(shape.numel() // shape[1] * -(-shape[1] // round(1 / (1 - SPARSITY))) for shape in shapes)
    elif name == "extended-gmp":
        promised = sizes[0] + sk.keep_count(sizes[-1], 0.8) + sk.keep_count(sum(sizes[1:-1]), SPARSITY)
    else:
        promised = sk.keep_count(sum(sizes), SPARSITY) if entry.exact else live
    if abs(live - promised) > len(sizes):
        raise harness.WrongResult(f"{name}: {live} of {sum(sizes)} weights are live at the end, promised: {promised}")


def interval(name: str) -> tuple[float, int]:
    """Steps from one change of masks to the next in a run of ImageNet's length, inf if none comes; and `gathered`."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    optimizer = torch.optim.AdamW if sk.METHODS[name].optimizer == "adam" else torch.optim.SGD
    if sk.METHODS[name].start != "scratch":
        return float("inf"), 0
    sparsifier = sk.build_method(name, SPARSITY, epochs=EPOCHS, steps_per_epoch=STEPS_PER_EPOCH)
    sparsifier.attach(model, optimizer(model.parameters(), lr=0.1), STEPS_PER_EPOCH, verbose=False)
    phases = getattr(sparsifier.schedule, "phases", ())
    every = getattr(sparsifier, "every", None) or getattr(sparsifier.schedule, "every", None)
    sparsifier.finalize()
    if isinstance(sparsifier, sk.STEP):
        # Masks change in every step from the switch on, which is at the latest here.
        every = sparsifier.total_steps / (sparsifier.total_steps - sparsifier.latest)
    if every is None:
        every = EPOCHS * STEPS_PER_EPOCH / (len(phases) - 1) if len(phases) > 1 else float("inf")
    return every, gathered(sparsifier)


def watched(sparsifier: Sparsifier) -> float:
    """The share of steps in which STEP watches the variance, if it switches at the latest."""
    if not isinstance(sparsifier, sk.STEP):
        return 0.0
    return (sparsifier.latest - sparsifier.earliest) / sparsifier.total_steps


@dataclass(frozen=True)
class Overhead:
    """Milliseconds beyond a held step: of a `plain` one, and what more each other kind of step costs, by its share."""

    plain: float
    iqr: float
    more: dict[str, tuple[float, float]]

    @property
    def per_step(self) -> float:
        return self.plain + sum(extra * share for extra, share in self.more.values())

    def __str__(self) -> str:
        parts = [f"{extra:.1f} ms {kind} in {share:.3g} of the steps" for kind, (extra, share) in self.more.items()]
        return " + ".join([f"{self.plain:.2f} ms", *parts]) + f" = {self.per_step:.2f} ms a step"


def overhead(name: str, steps: int, convs: list[Conv]) -> Overhead:
    """What a step costs beyond one with held masks; WrongResult if the masks end up wrong."""
    adam = sk.METHODS[name].optimizer == "adam"
    tried, held = Trained(name, steps, convs, adam), Trained("one-shot", steps, convs, adam)
    extra: dict[str, list[float]] = {"plain": [], "gather": [], "update": [], "watch": []}
    for _ in range(steps):
        base, _ = held.step()
        own, kind = tried.step()
        extra[kind].append(own - base)
    check(name, tried.sparsifier)
    every, gathers = interval(name)
    plain = statistics.median(extra["plain"]) if extra["plain"] else 0.0
    shares = {"gather": min(1.0, gathers / every), "update": 1 / every, "watch": watched(tried.sparsifier)}
    more = {kind: (statistics.median(extra[kind]) - plain, share) for kind, share in shares.items() if extra[kind]}
    # A method that changes its masks in every step has nothing to amortise.
    values = extra["plain"] or extra["update"]
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [0.0] * 3
    return Overhead(plain, quarters[2] - quarters[0], more)


def scaled(found: Overhead, factor: float) -> Overhead:
    """The same of `factor` times as many weights."""
    more = {kind: (extra * factor, share) for kind, (extra, share) in found.more.items()}
    return Overhead(found.plain * factor, found.iqr * factor, more)


def weights(convs: list[Conv]) -> int:
    return sum(parameter.numel() for parameter in Layers(convs).parameters())


def training_step(smoke: bool) -> Callable[[], None]:
    """What the overheads are compared with."""
    model = resnet50(smoke)
    optimizer = sk.MaskedSGD(model.parameters(), **HYPER)
    size = 16 if smoke else 224
    return contender(model, optimizer, torch.randn(BATCH, 3, size, size), torch.arange(BATCH) % 10)


def collect(options: argparse.Namespace) -> Iterator[dict]:
    """One row per method."""
    convs = [Conv("stem", 3, 8, 3, 1, 8), Conv("conv", 8, 16, 3, 1, 8)] if options.smoke else resnet50_convs()
    step = training_step(options.smoke)
    step()
    samples = []
    for _ in range(3):
        start = time.perf_counter()
        step()
        samples.append((time.perf_counter() - start) * 1e3)
    whole = harness.Timing(statistics.median(samples), max(samples) - min(samples))
    for name in options.methods.split(","):
        if harness.left_out(options, name):
            continue
        part = convs[::4] if name == "obert" else convs
        extra = scaled(overhead(name, 12 if options.quick else 50, part), weights(convs) / weights(part))
        print(f"{name}: {extra}, {max(extra.per_step, 0) / whole.median_ms:.2%} of the training step")
        with_it = harness.Timing(whole.median_ms + max(extra.per_step, 0.0), extra.iqr)
        yield harness.make_row(
            with_it, BASELINE, whole, bench="methods", case=f"resnet50/{name}", role="goal", pass_="step",
            backend="reference" if sk.degradation else "native", sparsity=SPARSITY, dtype="float32", batch=BATCH,
        )  # fmt: skip


def main(argv: list[str] | None = None) -> list[dict]:
    parser = harness.parser(__doc__)
    parser.add_argument("--methods", default=",".join(sk.METHODS), help="names with commas between (default: all)")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.methods.split(",")) - set(sk.METHODS))
    if unknown:
        parser.error(f"--methods: given {unknown}, allowed are {list(sk.METHODS)}")
    return harness.run("methods", collect, options)


if __name__ == "__main__":
    main()
