"""What each method costs per training step of ResNet-50 beyond the masked optimizer step, mask updates amortised.

    python -m benchmarks.bench_methods [--quick] [--threads N] [--methods M,M] [--json FILE] [--record]

Needs torchvision for the training step that it is compared with: forward, cross entropy, backward and MaskedSGD on 16
random 224x224 images. The goal is to stay below 2% of it, a speedup of 0.98x.

A method's own work does not depend on the images. So it is timed on the 54 layers of ResNet-50, each applied to one
pixel, forward, backward and step, against the same with MaskedSGD and held masks of the same sparsity, step by step in
turn. That is done in a short run, which holds all of the method's updates close together; the steps that changed masks
are told apart, and their extra cost is divided by the interval that the method has in a run of 90 epochs of ImageNet.
A row is the training step plus that overhead; its baseline is the training step. Its range is that of the overhead.

Masks must have about the sparsity asked for at the end of the short run, where the method promises it (rules for single
layers and the ends of n:m rows move it). `--quick` takes methods in their order until its time is over, and fewer
steps. obert, which collects 50 numbers per weight (6 GB of memory here), runs only where --methods names it.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

import sparsekern as sk
from benchmarks import harness
from benchmarks.bench_training import HYPER, contender
from benchmarks.bench_training import network as resnet50
from benchmarks.networks import Conv, resnet50_convs

SPARSITY, BATCH, STEPS_PER_EPOCH, EPOCHS = 0.9, 16, 80_072, 90
BASELINE = "ResNet-50 training step, batch 16"
# Chosen once and held, or nothing to choose: no work after `attach`; the others need another model to start from.
LEFT_OUT = ("lottery-ticket", "fixed-mask")


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

    def __init__(self, name: str, steps: int, convs: list[Conv]):
        torch.manual_seed(0)
        self.model = Layers(convs)
        adam = sk.METHODS[name].optimizer == "adam"
        parameters = self.model.parameters()
        self.optimizer = torch.optim.AdamW(parameters) if adam else sk.MaskedSGD(parameters, **HYPER)
        # Learnables have optimizers of their own at the rate of this one.
        self.sparsifier = sk.build_method(name, SPARSITY, epochs=1, steps_per_epoch=steps)
        self.sparsifier.attach(self.model, self.optimizer, steps, verbose=False)

    def step(self) -> tuple[float, bool]:
        """Milliseconds of one step, and whether it made a change."""
        before = self._versions()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.model().backward()
        self.optimizer.step()
        self.sparsifier.step()
        return (time.perf_counter() - start) * 1e3, self._versions() != before

    def _versions(self) -> list[int]:
        masks = self.sparsifier.masks
        return [masks.version(name) for name in masks]


def interval(name: str) -> float:
    """Steps from one change of masks to the next in a run of ImageNet's length; inf if there is none."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    optimizer = torch.optim.AdamW if sk.METHODS[name].optimizer == "adam" else torch.optim.SGD
    sparsifier = sk.build_method(name, SPARSITY, epochs=EPOCHS, steps_per_epoch=STEPS_PER_EPOCH)
    sparsifier.attach(model, optimizer(model.parameters(), lr=0.1), STEPS_PER_EPOCH, verbose=False)
    phases = getattr(sparsifier.schedule, "phases", ())
    every = getattr(sparsifier, "every", None) or getattr(sparsifier.schedule, "every", None)
    sparsifier.finalize()
    if every is None:
        return EPOCHS * STEPS_PER_EPOCH / (len(phases) - 1) if len(phases) > 1 else float("inf")
    return every


def overhead(name: str, steps: int, convs: list[Conv]) -> harness.Timing:
    """Milliseconds per step beyond those of MaskedSGD with held masks; WrongResult if the masks end up wrong."""
    tried = Trained(name, steps, convs)
    held = Trained("step" if sk.METHODS[name].optimizer == "adam" else "one-shot", steps, convs)
    extra: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(steps):
        base, _ = held.step()
        own, changed = tried.step()
        extra[changed].append(own - base)
    density = tried.sparsifier.forward_masks().density()
    if sk.METHODS[name].exact and sk.METHODS[name].patterns and abs(1 - density - SPARSITY) > 0.12:
        raise harness.WrongResult(f"{name}: sparsity {1 - density:.4f} at the end, asked for was {SPARSITY}")
    every = interval(name)
    ordinary = statistics.median(extra[False]) if extra[False] else 0.0
    update = statistics.median(extra[True]) - ordinary if extra[True] else 0.0
    # A method that changes its masks in every step has nothing to amortise.
    values = extra[False] if extra[False] else extra[True]
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [0.0] * 3
    return harness.Timing(ordinary + update / every, quarters[2] - quarters[0])


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
        extra = overhead(name, 12 if options.quick else 50, convs)
        with_it = harness.Timing(whole.median_ms + max(extra.median_ms, 0.0), extra.iqr_ms)
        yield harness.make_row(
            with_it, BASELINE, whole, bench="methods", case=f"resnet50/{name}", role="goal", pass_="step",
            backend="reference" if sk.degradation else "native", sparsity=SPARSITY, dtype="float32", batch=BATCH,
        )  # fmt: skip


def main(argv: list[str] | None = None) -> list[dict]:
    parser = harness.parser(__doc__)
    chosen = [name for name in sk.METHODS if name not in LEFT_OUT]
    usual = ",".join(name for name in chosen if name != "obert")
    parser.add_argument("--methods", default=usual, help="names with commas between (default: all but obert)")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.methods.split(",")) - set(chosen))
    if unknown:
        parser.error(f"--methods: given {unknown}, allowed are {chosen}")
    return harness.run("methods", collect, options)


if __name__ == "__main__":
    main()
