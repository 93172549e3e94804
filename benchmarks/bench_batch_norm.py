"""The batch-norms of ResNet-50 in training, with what follows each of them, against torch's operators in a row.

    python -m benchmarks.bench_batch_norm [--quick] [--threads N] [--batch N] [--json FILE] [--plot FILE] [--record]

Candidate: `sk.ops.batch_norm` on contiguous float32 images. A case is a batch-norm of torchvision's name, then what
follows it: `+relu`, `+add+relu` at the end of a block, nothing in a downsampling branch; one case for all of equal
shape. `resnet50/all` sums all 53. Passes: `forward`, and `both`, which is forward and all gradients.

Baseline: the faster of contiguous and channels_last images with torch.nn.functional.batch_norm, `add_` and `relu_`.
Outputs and gradients must be equal to a tolerance.

Floor: what must be read and written at least, forward 2 tensors and the residual, backward 3 and each one more for a
ReLU and a residual, over the best rate at which this run copied, scaled or added arrays of 100 MB. Tensors of a case
that stay in a cache from call to call, and results that go past the caches, may beat it.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import sparsekern as sk
from benchmarks import harness, roofline
from benchmarks.networks import Conv, resnet50_convs
from benchmarks.optimizer_step import COPIES, floor_ms
from benchmarks.roofline import Work

PASSES = ("forward", "both")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
COPIED = 25_000_000
OPERATIONS = {"forward": 8, "both": 18}
"""Per number: a difference and a sum, a difference and a multiply-add, and those again; backward likewise."""


@dataclass(frozen=True)
class Norm:
    """One batch-norm with what follows it."""

    name: str
    channels: int
    size: int
    after: str

    @property
    def key(self) -> tuple[int, int, str]:
        """Equal for batch-norms of the same speed."""
        return self.channels, self.size, self.after

    def tensors(self, pass_: str) -> int:
        """How many tensors of the input's size must be moved."""
        forward = 3 if "add" in self.after else 2
        return forward if pass_ == "forward" else forward + {"": 3, "+relu": 4, "+add+relu": 5}[self.after]


def norm_of(conv: Conv) -> Norm:
    """The batch-norm behind a convolution of ResNet-50."""
    after = "" if "downsample" in conv.name else "+add+relu" if conv.name.endswith("conv3") else "+relu"
    name = conv.name.replace("downsample.0", "downsample.1").replace("conv", "bn")
    return Norm(name + after, conv.outputs, conv.output_size, after)


SMOKE = [Norm("resnet50/layer0.bn" + after, 8, 9, after) for after in ("", "+relu", "+add+relu")]
QUICK = ("layer1.0.bn1", "layer1.0.bn3", "layer1.0.downsample.1", "layer2.0.bn3", "layer3.0.bn2", "layer4.0.bn3")

Forward = Callable[..., Tensor]


def fused(norm: Norm) -> Forward:
    activation = "relu" if norm.after else None
    return lambda x, w, b, residual=None: sk.ops.batch_norm(x, w, b, residual, activation=activation)[0]


def in_a_row(norm: Norm) -> Forward:
    statistics = torch.zeros(norm.channels), torch.ones(norm.channels)

    def run(x: Tensor, w: Tensor, b: Tensor, residual: Tensor | None = None) -> Tensor:
        y = torch.nn.functional.batch_norm(x, *statistics, w, b, training=True)
        y = y if residual is None else y.add_(residual)
        return y.relu_() if norm.after else y

    return run


def contender(forward: Forward, given: list[Tensor], grad: Tensor, pass_: str) -> Callable[[], tuple[Tensor, ...]]:
    """A call of one pass: its output, and the gradients of all that is given for `both`."""
    if pass_ == "forward":

        def run_forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (forward(*given),)

        return run_forward
    leaves = [t.detach().requires_grad_() for t in given]

    def run_both() -> tuple[Tensor, ...]:
        y = forward(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    return run_both


def check(found: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """AssertionError unless all are equal. Numbers near 0 may pass the ReLU of one side only: whole tensors count."""
    for got, expected in zip(found, want, strict=True):
        error = float((got - expected).norm() / expected.norm())
        assert error < 1e-3, f"a result is off by {error:.1%}"


def norm_rows(norm: Norm, pass_: str, batch: int, copied: int) -> Iterator[dict]:
    """One pass of one batch-norm, with a floor from arrays of `copied` numbers."""
    shape = (batch, norm.channels, norm.size, norm.size)
    given = [torch.randn(shape), torch.rand(norm.channels), torch.randn(norm.channels)]
    given += [torch.randn(shape)] if "add" in norm.after else []
    grad = torch.randn(shape)
    run, baselines = contender(fused(norm), given, grad, pass_), {}
    for layout, form in FORMATS.items():
        placed = [t.contiguous(memory_format=form) if t.dim() == 4 else t for t in (*given, grad)]
        baselines[f"torch {layout}"] = contender(in_a_row(norm), placed[:-1], placed[-1], pass_)
    source = torch.ones(copied)
    target = source.clone()
    copies: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "scale": lambda: target.mul_(1.0),
        "add": lambda: target.add_(source, alpha=0.0),
    }
    assert set(copies) == set(COPIES)
    timings = harness.measure(
        f"{norm.name} {pass_}", lambda: check(run(), baselines["torch contiguous"]()),
        {"candidate": run, **baselines, **copies},
    )  # fmt: skip
    best = harness.fastest(timings, list(baselines))
    yield harness.make_row(
        timings["candidate"], best, timings[best], bench="batch_norm", case=norm.name, role="info",
        backend=harness.backend_of(run), pass_=pass_, dtype="float32", layout="contiguous", batch=batch,
        floor_ms=floor_ms(timings, copied, 4 * norm.tensors(pass_) * grad.numel()),
    )  # fmt: skip


def total(rows: list[dict], counts: dict[str, int], pass_: str) -> dict:
    """One row that sums those of a pass, each as often as its batch-norm occurs."""
    chosen = [row for row in rows if row["pass"] == pass_]

    def sum_of(key: str) -> float:
        return sum(row[key] * counts[row["case"]] for row in chosen)

    return harness.make_row(
        harness.Timing(sum_of("median_ms"), sum_of("iqr_ms")), "torch, best per batch-norm",
        harness.Timing(sum_of("baseline_ms"), 0.0), bench="batch_norm", case="resnet50/all", role="info",
        backend=max(row["backend"] for row in chosen), pass_=pass_, dtype="float32", layout="contiguous",
        batch=chosen[0]["batch"], floor_ms=sum_of("floor_ms"),
    )  # fmt: skip


def collect(options: argparse.Namespace) -> Iterator[dict]:
    """Rows of each distinct batch-norm, then the sums."""
    everything = SMOKE if options.smoke else [norm_of(conv) for conv in resnet50_convs()]
    norms = list({norm.key: norm for norm in reversed(everything)}.values())[::-1]
    counts = {norm.name: sum(norm.key == other.key for other in everything) for norm in norms}
    if options.quick:
        names = [norm.name.removeprefix("resnet50/").partition("+")[0] for norm in norms]
        norms = [norm for norm, name in zip(norms, names, strict=True) if name in QUICK]
    rows = []
    for i, norm in enumerate(norms):
        if harness.left_out(options, ", ".join(n.name for n in norms[i:])):
            return
        for pass_ in PASSES:
            for row in norm_rows(norm, pass_, options.batch, 1000 if options.smoke else COPIED):
                rows.append(row)
                yield row
    if not options.quick:
        for pass_ in PASSES:
            yield total(rows, counts, pass_)


def work(row: dict) -> tuple[Work, Work]:
    """The same for both sides: what must be computed and moved."""
    norms = {norm.name: norm for norm in (*SMOKE, *(norm_of(conv) for conv in resnet50_convs()))}
    norm = norms[row["case"]]
    numbers = row["batch"] * norm.channels * norm.size**2
    done = Work(OPERATIONS[row["pass"]] * numbers, 4 * norm.tensors(row["pass"]) * numbers)
    return done, done


def main(argv: list[str] | None = None) -> list[dict]:
    parser = roofline.add_option(harness.parser(__doc__))
    parser.add_argument("--batch", type=int, default=16, help="images (default: %(default)s)")
    options = parser.parse_args(argv)
    rows = harness.run("batch_norm", collect, options)
    roofline.save(options, [r for r in rows if not r["case"].endswith("/all")], work, "batch-norms of ResNet-50")
    return rows


if __name__ == "__main__":
    main()
