"""A roofline picture of a benchmark run (`--plot FILE.png` or `.svg`): how near each row comes to what the machine can.

Across: operations per byte that must be moved. Up: operations per second. The roof is memory's rate times the former
and, at most, the rate of arithmetic; its upper edge is for what only reads, the dashed one for what also writes. All
three are measured in the process of the run, with its threads. Circles are candidates, crosses their baselines, whose
useless operations on pruned weights count for them. Needs matplotlib (the `train` extra).
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Work:
    """What one call computes, and the bytes that it must read or write."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class Roof:
    """The most that this machine does in a second: bytes read, bytes read and written, float32 operations computed."""

    reads: float
    moves: float
    operations: float


Row = dict[str, Any]
RowWork = Callable[[Row], tuple[Work, Work | None]]
"""Row -> the candidate's work, and the baseline's if it is to be drawn."""


def add_option(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the roofline of the rows (.png, .svg, .pdf)")
    return parser


def measure_roof(elements: int = 25_000_000, size: int = 1536) -> Roof:
    """The best of seven: reading by sum and dot, moving by copy, scale and add, computing by a dense product."""
    source = torch.ones(elements)
    target, square = source.clone(), torch.rand(size, size)
    reads: list[tuple[Callable[[], Any], float]] = [
        (source.sum, 4.0 * elements),
        (lambda: source.dot(target), 8.0 * elements),
    ]
    moves: list[tuple[Callable[[], Any], float]] = [
        (lambda: target.copy_(source), 8.0 * elements),
        (lambda: target.mul_(1.0), 8.0 * elements),
        (lambda: target.add_(source, alpha=0.0), 12.0 * elements),
    ]
    best = [max(_rate(run, amount) for run, amount in kind) for kind in (reads, moves)]
    return Roof(*best, _rate(lambda: square @ square, 2.0 * size**3))


def _rate(run: Callable[[], Any], amount: float) -> float:
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return amount / best


def points(rows: list[Row], work: RowWork) -> dict[str, list[tuple[float, float, str]]]:
    """Name of a series -> its points (operations per byte, operations per second, label), none of them twice."""
    series: dict[str, dict[tuple[float, float, str], None]] = {}
    for row in rows:
        candidate, baseline = work(row)
        name = " ".join(str(row[key]) for key in ("pass", "pattern", "layout") if key in row).removeprefix("step ")
        label = f"{row['sparsity']:.0%}" if "sparsity" in row else ""
        both = [(name, candidate, row["median_ms"], label)]
        if baseline is not None and "baseline" in row:
            both.append((row["baseline"], baseline, row["baseline_ms"], ""))
        for series_name, done, ms, text in both:
            point = (done.operations / done.bytes, done.operations / ms * 1e3, text)
            series.setdefault(series_name, {})[point] = None
    return {name: list(found) for name, found in series.items()}


def draw(path: Path, rows: list[Row], work: RowWork, title: str, roof: Roof | None = None) -> None:
    """Save the picture; its format is that of the suffix."""
    from matplotlib.figure import Figure

    roof, found = roof or measure_roof(), points(rows, work)
    baselines = {row.get("baseline") for row in rows}
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    places = [x for series in found.values() for x, _, _ in series]
    left, right = min(places) / 3, max([*places, roof.operations / roof.moves]) * 3
    for rate, style, what in ((roof.reads, "-", "read"), (roof.moves, "--", "read and written")):
        ridge = min(max(roof.operations / rate, left), right)
        edge = [left, ridge, right]
        label = f"{rate / 1e9:.0f} GB/s {what}"
        axes.plot(edge, [min(rate * x, roof.operations) / 1e9 for x in edge], style, color="black", label=label)
    axes.annotate(
        f"{roof.operations / 1e9:.0f} GFLOP/s", (right, roof.operations / 1e9), xytext=(-4, 4),
        textcoords="offset points", ha="right",
    )  # fmt: skip
    for name, series in found.items():
        style = dict(marker="x", alpha=0.6) if name in baselines else dict(marker="o")
        axes.scatter([x for x, _, _ in series], [y / 1e9 for _, y, _ in series], s=28, label=name, **style)
        for x, y, label in series:
            axes.annotate(label, (x, y / 1e9), xytext=(4, -3), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlim=(left, right), title=title)
    axes.set(xlabel="operations per byte that must be moved", ylabel="10^9 operations per second")
    axes.legend(fontsize=7, loc="lower right")
    axes.grid(True, which="both", alpha=0.2)
    figure.savefig(path, dpi=120)


def save(options: argparse.Namespace, rows: list[Row], work: RowWork, title: str) -> None:
    """`draw` if `--plot` asks for it."""
    if options.plot is None or not rows:
        return
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        draw(options.plot, rows, work, f"{title}, {options.threads} threads")
    finally:
        torch.set_num_threads(before)
    print(f"drawn in {options.plot}")
