"""Everything that needs a GPU, in one go: `make gpu`, or

    python -m benchmarks.gpu [--quick]

1. The kernels must be built. 2. The operator tests run on the GPU, under compute-sanitizer too where that is
installed. 3. Each operator is checked on the device and timed by device events, with the second-level cache warm and
cold (overwritten before each call), against the best that torch has: fused SGD or AdamW and a mask multiply, topk and
kthvalue, cuDNN's dense convolution, the product with a block-sparse matrix. Rows with the device's name are appended
to benchmarks/results/gpu.csv.

Exit status: 0, 1 for a wrong result or a failed test, 3 where no GPU is visible, after what can be done without one.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import sparsekern as sk
from benchmarks import machine
from benchmarks.networks import Conv, resnet50_convs, resnet50_parameters
from sparsekern import _library

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/gpu.csv"
ROUNDS, COLD_BYTES = 20, 256 << 20
Contenders = dict[str, Callable[[], object]]


class Stopped(SystemExit):
    """The run cannot go on; `code` is its exit status."""

    def __init__(self, code: int, reason: str):
        print(f"benchmarks.gpu: {reason}", file=sys.stderr)
        super().__init__(code)


def prepare() -> str:
    """The name of the GPU; Stopped where there are no kernels or nothing to run them."""
    if _library.cuda_obstacle:
        raise Stopped(1, f"no CUDA kernels: {_library.cuda_obstacle}")
    print(f"kernels: {_library.build_info()['decisions']['CUDA']}")
    if not torch.cuda.is_available():
        raise Stopped(3, "no GPU is visible; from here on one is needed")
    return torch.cuda.get_device_name()


def run_tests(quick: bool) -> None:
    """The operator tests on the device, and the shorter ones under compute-sanitizer."""
    tests = sorted(map(str, [*ROOT.glob("tests/test_masked_*.py"), *ROOT.glob("tests/test_topk_mask*.py"),
                             *ROOT.glob("tests/test_sparse_*.py")]))  # fmt: skip
    suite = [sys.executable, "-m", "pytest", "-q", "-m", "cuda"]
    if subprocess.run([*suite, *tests], cwd=ROOT).returncode:
        raise Stopped(1, "the operator tests failed on the device")
    checker = shutil.which("compute-sanitizer")
    if not checker:
        print("compute-sanitizer is not installed: skipped")
        return
    for tool in ("memcheck",) if quick else ("memcheck", "racecheck", "synccheck"):
        command = [checker, "--tool", tool, "--error-exitcode", "1", *suite, "-k", "published or order or linear"]
        if subprocess.run([*command, *tests], cwd=ROOT).returncode:
            raise Stopped(1, f"compute-sanitizer {tool} has found an error")


def seconds(run: Callable[[], object], device: torch.device, cold: bool) -> tuple[float, float]:
    """Median and interquartile range over ROUNDS calls."""
    for _ in range(3):
        run()
    flush = torch.empty(COLD_BYTES if cold and device.type == "cuda" else 1, dtype=torch.uint8, device=device)
    samples = [_once(run, flush, device) for _ in range(ROUNDS)]
    quarters = statistics.quantiles(samples, n=4)
    return statistics.median(samples), quarters[2] - quarters[0]


def _once(run: Callable[[], object], flush: Tensor, device: torch.device) -> float:
    flush.zero_()
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


SGD = dict(lr=0.1, mu=0.9, dampening=0.0, weight_decay=1e-4, nesterov=False, maximize=False, momentum_policy="mask")
ADAMW = dict(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-4, maximize=False)


def optimizer_cases(shapes: list[tuple[int, ...]], device: torch.device) -> Iterator[tuple[str, Contenders]]:
    """One step at 90% sparsity, checked against the reference of the operator."""
    for name in ("masked_sgd_", "masked_adamw_"):
        for dtype in (torch.float32, torch.bfloat16):
            yield f"{name} {dtype}", _optimizer_case(name, dtype, shapes, device)


def _optimizer_case(name: str, dtype: torch.dtype, shapes: list[tuple[int, ...]], device: torch.device) -> Contenders:
    adam, operator = name == "masked_adamw_", getattr(sk.ops, name)
    grads = [torch.randn(s, device=device).to(dtype) for s in shapes]
    keeps = [torch.rand(s, device=device) < 0.1 for s in shapes]
    masks = [sk.ops.pack_mask(keep) for keep in keeps]

    def stepper(run: Callable[..., object]) -> tuple[list[Tensor], Callable[[], object]]:
        params = [g.clone() for g in grads]
        states = [[torch.ones_like(g) for g in grads] for _ in range(1 + adam)]
        counts = torch.zeros(len(shapes), dtype=torch.float32 if adam else torch.uint8, device=device)
        return params, lambda: run(params, grads, *states, masks, counts, **(ADAMW if adam else SGD))

    (expected, reference), (found, ours) = stepper(operator.reference), stepper(operator)
    reference()
    ours()
    rtol = 0 if dtype == torch.float32 else 2**-7  # of bfloat16: one rounding apart
    if not all(torch.allclose(a, b, rtol=rtol, atol=0) for a, b in zip(found, expected, strict=True)):
        raise Stopped(1, f"{name} differs from its reference in {dtype}")
    params = [g.clone().requires_grad_() for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    rest = {} if adam else {"momentum": 0.9}
    theirs = (torch.optim.AdamW if adam else torch.optim.SGD)(params, lr=0.1, weight_decay=1e-4, fused=True, **rest)
    factors = [keep.to(dtype) for keep in keeps]

    def baseline() -> None:
        theirs.step()
        with torch.no_grad():
            torch._foreach_mul_(params, factors)

    return {"ours": ours, f"torch fused {'AdamW' if adam else 'SGD'}, mask multiply": baseline}


def selection_cases(shapes: list[tuple[int, ...]], device: torch.device) -> Iterator[tuple[str, Contenders]]:
    """A global budget of 10%, checked bit for bit."""
    weights = [torch.randn(s, device=device) for s in shapes if len(s) > 1]
    flat = torch.cat([w.flatten() for w in weights]).abs()
    for pattern in ("unstructured", "4x1"):
        groups = sum(w.numel() if pattern == "unstructured" else -(-w.shape[0] // 4) * w[0].numel() for w in weights)
        keep = groups // 10
        found = sk.ops.topk_mask(weights, keep, pattern=pattern)
        expected, _ = sk.ops.topk_mask.reference(weights, [keep], True, pattern, True, [])
        if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
            raise Stopped(1, f"topk_mask {pattern} differs from its reference")

        def ours(keep=keep, pattern=pattern) -> object:
            return sk.ops.topk_mask(weights, keep, pattern=pattern, check=False)

        contenders: Contenders = {"ours": ours}
        if pattern == "unstructured":
            contenders["torch.topk"] = lambda k=keep: flat.topk(k, sorted=False)
            contenders["torch.kthvalue"] = lambda k=keep: flat.kthvalue(flat.numel() - k)
        yield f"topk_mask {pattern}", contenders


def layer_cases(convs: list[Conv], batch: int, device: torch.device) -> Iterator[tuple[str, Contenders]]:
    """Each kind of convolution at 90% and 98% in float32, TF32 off, checked to rounding."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for conv in {conv.shape_key: conv for conv in reversed(convs)}.values():
        for sparsity in (0.9, 0.98):
            yield from _layer_case(conv, sparsity, batch, device)


def _layer_case(conv: Conv, sparsity: float, batch: int, device: torch.device) -> Iterator[tuple[str, Contenders]]:
    last = torch.channels_last
    out, *rest = conv.weight_shape
    keep = (torch.rand(out // 4, *rest, device=device) >= sparsity).repeat_interleave(4, 0)
    w = torch.where(keep, torch.randn(keep.shape, device=device), 0).to(memory_format=last)
    x = torch.randn(batch, conv.inputs, conv.size, conv.size, device=device).to(memory_format=last)
    s = sk.ops.sparse_structure(keep, "4x1")
    where = dict(stride=conv.stride, padding=conv.padding)
    contenders = {
        "ours": lambda x, w: sk.ops.sparse_conv2d(x, w, s, **where),
        "cuDNN dense": lambda x, w: torch.nn.functional.conv2d(x, w, **where),
    }
    ours, dense = (run(x, w) for run in contenders.values())
    if not torch.allclose(ours, dense, rtol=1e-3, atol=1e-3):
        raise Stopped(1, f"sparse_conv2d differs from the dense convolution for {conv.name}")
    case = f"{conv.name.removeprefix('resnet50/')} {sparsity:.0%}"
    yield f"sparse_conv2d forward {case}", {n: lambda run=run: run(x, w) for n, run in contenders.items()}
    leaves = x.requires_grad_(), w.requires_grad_()
    results = {name: run(*leaves) for name, run in contenders.items()}
    grads = [torch.autograd.grad(y, leaves, dense, retain_graph=True) for y in results.values()]
    masked = torch.where(keep, grads[1][1], 0)
    scale = float(masked.abs().max())
    if not (torch.allclose(grads[0][0], grads[1][0], rtol=1e-3, atol=1e-2)
            and torch.allclose(grads[0][1], masked, rtol=1e-3, atol=1e-4 * scale)):  # fmt: skip
        raise Stopped(1, f"the gradients of sparse_conv2d differ from the dense ones for {conv.name}")
    yield (
        f"sparse_conv2d backward {case}",
        {name: lambda y=y: torch.autograd.grad(y, leaves, dense, retain_graph=True) for name, y in results.items()},
    )


def product_cases(size: int, rows: int, device: torch.device) -> Iterator[tuple[str, Contenders]]:
    """A linear layer with 4x1 blocks, against torch's block-sparse product, whose blocks must be 16 x 16 at least."""
    keep = (torch.rand(size // 4, size, device=device) < 0.1).repeat_interleave(4, 0)
    tiles = (torch.rand(size // 16, size // 16, device=device) < 0.1).repeat_interleave(16, 0).repeat_interleave(16, 1)
    x, w = torch.randn(rows, size, device=device), torch.randn(size, size, device=device)
    s, blocks = sk.ops.sparse_structure(keep, "4x1"), (w * tiles).to_sparse_bsr((16, 16))
    expected = x @ torch.where(keep, w, 0).t()
    if not torch.allclose(sk.ops.sparse_linear(x, w, s), expected, rtol=1e-3, atol=1e-2):
        raise Stopped(1, "sparse_linear differs from the dense product")
    yield (
        f"sparse_linear {size}x{size} 90%",
        {
            "ours": lambda: sk.ops.sparse_linear(x, w, s),
            "torch dense": lambda: x @ w.t(),
            "torch BSR 16x16": lambda: torch.nn.functional.linear(x, blocks),
        },
    )


def measure(cases: Iterator[tuple[str, Contenders]], device: torch.device) -> list[dict[str, object]]:
    """Print and return a row per case, contender and state of the cache."""
    rows = []
    for case, contenders in cases:
        for cache in ("warm", "cold"):
            for name, run in contenders.items():
                median, spread = seconds(run, device, cache == "cold")
                rows.append(
                    {"case": case, "contender": name, "cache": cache, "ms": median * 1e3, "iqr_ms": spread * 1e3}
                )
                print(f"{case:48} {name:32} {cache}  {median * 1e3:9.4f} ms  +- {spread * 1e3:.4f}")
    return rows


def record(rows: list[dict[str, object]], device: str, path: Path = RESULTS) -> None:
    """Append rows with what they were measured on."""
    stamp = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": machine.commit(),
        "device": device,
        "torch": torch.__version__,
    }
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*stamp, *rows[0]])
        if new:
            writer.writeheader()
        writer.writerows(stamp | row for row in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four layers, one tool of compute-sanitizer")
    options = parser.parse_args(arguments)
    name = prepare()
    print(f"GPU: {name}")
    run_tests(options.quick)
    device, shapes = torch.device("cuda"), list(resnet50_parameters().values())
    convs = resnet50_convs()[1:5] if options.quick else resnet50_convs()[1:]
    rows = measure(optimizer_cases(shapes, device), device) + measure(selection_cases(shapes, device), device)
    rows += measure(layer_cases(convs, 64 if options.quick else 256, device), device)
    rows += measure(product_cases(4096, 8192, device), device)
    record(rows, name)


if __name__ == "__main__":
    main()
