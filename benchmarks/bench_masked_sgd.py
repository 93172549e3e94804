"""masked_sgd_ over weight-sized tensors against torch.optim.SGD's fused step; memory-bound.

    python -m benchmarks.bench_masked_sgd [--quick] [--threads N] [--json FILE]

Candidates run interleaved, after the result was checked against the reference. The floor is the 20 bytes and one bit
of each float32 weight over the copy bandwidth measured in the same run.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

import sparsekern as sk

WEIGHTS = 25_502_912  # the prunable weights of a ResNet-50
HYPER = dict(lr=0.1, momentum=0.9, weight_decay=1e-4)


def contenders(n: int, sparsity: float) -> dict:
    """Name -> callable of one step; every contender owns its tensors, so that none finds them in cache."""
    keep = torch.rand(n) >= sparsity
    grad = torch.randn(n)

    def make(optimizer_type, masked=None, **kwargs):
        w = torch.where(keep, torch.ones(n), 0).requires_grad_()
        w.grad = grad.clone()
        optimizer = optimizer_type([w], **HYPER, **kwargs)
        if optimizer_type is sk.MaskedSGD:
            optimizer.set_masks({w: keep})
        if masked is None:
            return optimizer.step

        def step():
            optimizer.step()
            w.detach().mul_(masked)

        return step

    source, target = torch.ones(n), torch.zeros(n)
    return {
        "sparsekern MaskedSGD": make(sk.MaskedSGD),
        "torch SGD fused, no mask": make(torch.optim.SGD, fused=True),
        "torch SGD fused + mask multiply": make(torch.optim.SGD, keep.float(), fused=True),
        "copy": lambda: target.copy_(source),
    }


def check(n: int = 100_003) -> None:
    """A wrong result is never timed."""
    w, g, v = torch.randn(3, n)
    args = [g], [v], [sk.ops.pack_mask(torch.rand(n) < 0.1)]
    want_w, want_v = w.clone(), v.clone()
    hyper = dict(lr=0.1, mu=0.9, dampening=0.0, weight_decay=1e-4, nesterov=False, maximize=False)
    fresh = torch.zeros(1, dtype=torch.uint8)
    sk.ops.masked_sgd_.reference([want_w], args[0], [want_v], args[2], fresh.clone(), **hyper, momentum_policy="mask")
    sk.ops.masked_sgd_([w], *args, fresh, **hyper)
    torch.testing.assert_close((w, v), (want_w, want_v), rtol=0, atol=0)


def measure(steps: dict, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 2:  # the first two rounds warm up
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def rows_for(n: int, sparsity: float, rounds: int, threads: int) -> list[dict]:
    times = measure(contenders(n, sparsity), rounds)
    median = {name: statistics.median(t) for name, t in times.items()}
    floor = median["copy"] * (20 + 1 / 8) / 8
    rows = []
    for name in times:
        if name == "copy":
            continue
        quarters = statistics.quantiles(times[name], n=4)
        rows.append(
            {
                "bench": "masked_sgd", "case": f"resnet50/{n}", "role": "goal", "pass": "step", "dtype": "float32",
                "backend": "reference" if sk.degradation else "native", "pattern": "unstructured",
                "candidate": name, "sparsity": sparsity, "threads": threads, "median_ms": median[name],
                "iqr_ms": quarters[2] - quarters[0], "baseline": "torch SGD fused, no mask",
                "baseline_ms": median["torch SGD fused, no mask"],
                "speedup": median["torch SGD fused, no mask"] / median[name], "floor_ms": floor,
            }
        )  # fmt: skip
    return rows


def machine() -> dict:
    isa = "reference" if sk.degradation else torch.ops.sparsekern.cpu_isa()
    return {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "isa": isa,
            "torch": torch.__version__, "load": os.getloadavg()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one sparsity, ends within 60 s on two cores")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    check()
    before = machine()
    rows = []
    print(f"{'candidate':34} {'sparsity':>8} {'median ms':>10} {'IQR':>6} {'speedup':>8} {'x floor':>8}")
    for sparsity in [0.95] if options.quick else [0.9, 0.95, 0.98]:
        for row in rows_for(WEIGHTS, sparsity, 11, options.threads):
            rows.append(row)
            noisy = "  noisy" if row["iqr_ms"] > 0.2 * row["median_ms"] else ""
            print(f"{row['candidate']:34} {sparsity:8} {row['median_ms']:10.2f} {row['iqr_ms']:6.2f} "
                  f"{row['speedup']:7.2f}x {row['median_ms'] / row['floor_ms']:7.2f}x{noisy}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"machine": {**before, "load_after": os.getloadavg()}, "rows": rows}))


if __name__ == "__main__":
    main()
