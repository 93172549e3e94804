"""How a number is made: check, then time all contenders interleaved, then print and record rows.

- `measure` runs the correctness check first, in the same process; a wrong result raises WrongResult, nothing is timed.
- All contenders run once per round, ROUNDS times, after a warm-up of three calls (one of those slower than SLOW_MS).
  Each round has another order, always the same ones: a contender that always followed the same one would be measured
  with what that leaves in the caches (5% of an optimizer step). A row holds the median and the interquartile range
  (IQR); one whose IQR exceeds 20% of its median says "noisy". A sample of a fast contender is the mean of as many calls
  as fill SAMPLE_MS.
- Where there are several baselines, the fastest is the one that a speedup names, unless the row says otherwise.
- A row has the keys of ROW_KEYS, without those that mean nothing for it. `speedup` = baseline_ms / median_ms;
  `floor_ms`: the time in which this machine moves the bytes that must move, measured in the same run; `efficiency` =
  speedup x density, 1.0 if all of the skipped work became saved time. `role`: goal or info.
- Freed memory is kept for reuse (`machine.keep_freed_memory`), for all contenders.
- On a machine with more runnable processes than cores a warning is printed and nothing recorded.
- `--json FILE` writes {"machine", "rows"}; `--record` appends rows with their machine to benchmarks/results/NAME.csv.
"""

import argparse
import csv
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from sparsekern._library import OPS

ROUNDS, SAMPLE_MS, SLOW_MS, NOISY = 9, 2.0, 100.0, 0.2
QUICK_S = 40.0  # `--quick` starts nothing new after this
RESULTS = Path(__file__).parent / "results"
ROW_KEYS = (
    "bench", "case", "role", "backend", "pass", "pattern", "sparsity", "dtype", "layout", "batch", "threads",
    "median_ms", "iqr_ms", "baseline", "baseline_ms", "speedup", "floor_ms", "efficiency",
)  # fmt: skip
OPTIONAL = ("pattern", "sparsity", "layout", "batch", "baseline", "baseline_ms", "speedup", "floor_ms", "efficiency")
ALLOWED = {
    "role": ("goal", "info"),
    "backend": ("native", "reference"),
    "pass": ("forward", "input_grad", "weight_grad", "both", "step"),
}
MACHINE_KEYS = (
    "date", "commit", "cpu", "isa", "cores", "torch", "torch_isa", "compiler", "load_before", "load_after",
    "huge_pages_mib", "command",
)  # fmt: skip


class WrongResult(RuntimeError):
    """A contender computed something else than it claims to; it is not timed."""


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range of one contender, in milliseconds."""

    median_ms: float
    iqr_ms: float


def measure(
    case: str, check: Callable[[], None], contenders: dict[str, Callable[[], Any]], settle: int = 0
) -> dict[str, Timing]:
    """Time all contenders interleaved, once `check` has returned; WrongResult if it raises AssertionError.

    `settle` calls that are not timed come before each sample, for what always follows its like, as a training step
    does: caches and freed memory are then those of the contender before it.
    """
    try:
        check()
    except AssertionError as error:
        raise WrongResult(f"{case}: wrong result, so nothing was timed: {error}") from error
    calls = {}
    for name, run in contenders.items():
        first = _sample(run, 1)
        if first < SLOW_MS:
            first = _sample(run, 2)
        calls[name] = max(1, math.ceil(SAMPLE_MS / max(first, 1e-3)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(ROUNDS):
        for name in random.Random(turn).sample(list(contenders), len(contenders)):
            for _ in range(settle):
                contenders[name]()
            samples[name].append(_sample(contenders[name], calls[name]))
    timings = {}
    for name, values in samples.items():
        quarters = statistics.quantiles(values, n=4, method="inclusive")
        timings[name] = Timing(quarters[1], quarters[2] - quarters[0])
    return timings


def _sample(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) * 1e3 / calls


def fastest(timings: dict[str, Timing], names: list[str]) -> str:
    """The best baseline."""
    return min(names, key=lambda name: timings[name].median_ms)


def backend_of(call: Callable[[], Any]) -> str:
    """ "native" if a call runs compiled kernels only, "reference" if any operator's plain PyTorch reference runs."""
    references, entered = {reference.__code__ for reference in OPS.values()}, []

    def watch(frame, event, _):
        if event == "call" and frame.f_code in references:
            entered.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return "reference" if entered else "native"


def make_row(timing: Timing, baseline: str = "", base: Timing | None = None, **fields: Any) -> dict[str, Any]:
    """One row in the order of ROW_KEYS; None leaves a key out. `pass` is given as `pass_`, a reserved word."""
    fields["pass"] = fields.pop("pass_")
    density = fields.pop("density", None)
    fields |= {"median_ms": timing.median_ms, "iqr_ms": timing.iqr_ms, "threads": torch.get_num_threads()}
    if base is not None:
        fields |= {"baseline": baseline, "baseline_ms": base.median_ms, "speedup": base.median_ms / timing.median_ms}
        if density is not None:
            fields["efficiency"] = fields["speedup"] * density
    row = {key: fields.pop(key) for key in ROW_KEYS if fields.get(key) is not None}
    unknown = sorted(key for key, value in fields.items() if value is not None)
    missing = [key for key in ROW_KEYS if key not in row and key not in OPTIONAL]
    if unknown or missing:
        raise ValueError(f"row: unknown keys {unknown}, missing keys {missing}; allowed are {ROW_KEYS}")
    for key, values in ALLOWED.items():
        if row[key] not in values:
            raise ValueError(f"row: {key}={row[key]!r}; allowed are {values}")
    return row


def is_noisy(row: dict[str, Any]) -> bool:
    return row["iqr_ms"] > NOISY * row["median_ms"]


HEADER = (
    f"{'case':31} {'pass':11} {'pattern':12} {'sparsity':>8} {'layout':13} {'batch':>5} {'ms':>9} {'IQR':>7} "
    f"{'speedup':>8} {'x floor':>8} {'effic.':>6}  baseline"
)


def format_row(row: dict[str, Any]) -> str:
    def number(value: float | None, width: int, digits: int, unit: str = "") -> str:
        return f"{'' if value is None else f'{value:.{digits}f}{unit}':>{width}}"

    floors = row["median_ms"] / row["floor_ms"] if "floor_ms" in row else None
    base = f"{row['baseline']} {row['baseline_ms']:.3f} ms" if "baseline" in row else ""
    notes = [*(["reference"] if row["backend"] == "reference" else []), *(["noisy"] if is_noisy(row) else [])]
    return (
        f"{row['case']:31} {row['pass']:11} {row.get('pattern', ''):12} {row.get('sparsity', ''):>8} "
        f"{row.get('layout', ''):13} {row.get('batch', ''):>5} {number(row['median_ms'], 9, 3)} "
        f"{number(row['iqr_ms'], 7, 3)} {number(row.get('speedup'), 8, 2, 'x')} {number(floors, 8, 2, 'x')} "
        f"{number(row.get('efficiency'), 6, 2)}  {base}{'  [' + ', '.join(notes) + ']' if notes else ''}"
    )


def record(bench: str, rows: list[dict[str, Any]], where: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Append rows, each with its machine, to `folder`/`bench`.csv."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{bench}.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*MACHINE_KEYS, *ROW_KEYS], restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({**where, **{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}})
    return path


def parser(doc: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share; `doc` is the module's docstring."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--quick", action="store_true", help="a selection that ends within 60 s on two cores")
    found.add_argument("--smoke", action="store_true", help="tiny sizes for tests; the numbers mean nothing")
    found.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    found.add_argument("--json", type=Path, metavar="FILE", help="write machine and rows to FILE")
    found.add_argument("--record", action="store_true", help="append the rows to benchmarks/results")
    return found


def left_out(options: argparse.Namespace, what: str) -> bool:
    """True, said aloud, if `--quick`, or `--minutes` where a benchmark has it, leaves no time for `what`."""
    minutes = getattr(options, "minutes", None)
    limit = min(QUICK_S if options.quick else math.inf, math.inf if minutes is None else 60 * minutes)
    if time.monotonic() - options.started < limit:
        return False
    print(f"left out after {limit:.0f} s: {what}", flush=True)
    return True


class Progress:
    """Rows of finished parts in a file, so that a long run can be stopped and gone on with: `rows(part, measure)`.

    A part is named by a string. A file of another commit or machine, or of other options, is refused.
    """

    def __init__(self, path: Path | None, where: dict[str, Any]):
        self.path, self.parts = path, {}
        self.where = {key: where[key] for key in ("commit", "cpu", "isa", "torch", "command")}
        if path is not None and path.exists():
            found = json.loads(path.read_text())
            if found["where"] != self.where:
                raise SystemExit(f"--resume {path}: it is of {found['where']}, this run is {self.where}")
            self.parts = found["parts"]

    def rows(self, part: str, measure: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        if part not in self.parts:
            self.parts[part] = list(measure())
            if self.path is not None:
                partial = self.path.with_suffix(".partial")
                partial.write_text(json.dumps({"where": self.where, "parts": self.parts}) + "\n")
                partial.replace(self.path)
        yield from self.parts[part]


def command(bench: str, options: argparse.Namespace) -> str:
    """What to type for the same rows again."""
    chosen = vars(options).items()
    flags = [f"--{k.replace('_', '-')}" for k, v in chosen if v is True and k != "record"]
    left = ("json", "plot", "resume", "minutes", "started", "where")
    given = [(k, v) for k, v in chosen if v is not None and not isinstance(v, bool) and k not in left]
    values = [f"--{k.replace('_', '-')} {v}" for k, v in given]
    return " ".join([f"python -m benchmarks.bench_{bench}", *flags, *values])


def run(
    bench: str, collect: Callable[[argparse.Namespace], Iterator[dict[str, Any]]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Print the rows of `collect` as they come and store them as `options` say."""
    where = {**machine.machine(), "command": command(bench, options)}
    if options.threads < 1:
        raise SystemExit(f"--threads must be 1 or more, got {options.threads}")
    if options.record and (options.smoke or where["commit"].endswith(("-dirty", "unknown"))):
        raise SystemExit(f"--record needs committed sources and no --smoke; the commit is {where['commit']}")
    # A contender that shares its core waits whole time slices: medians are then wrong without being noisy.
    busy = f"load {where['load_before']} on {where['cores']} cores: other programs disturb these timings"
    if where["load_before"] > where["cores"]:
        if options.record:
            raise SystemExit(f"--record refused: {busy}; wait until they are done")
        print(f"warning: {busy}")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    machine.keep_freed_memory()
    torch.manual_seed(0)
    rows, options.started, options.where = [], time.monotonic(), where
    try:
        threads = f"{where['cores']} cores, {options.threads} threads"
        print(f"{bench}: {where['cpu']}, {threads}, kernels {where['isa']}, torch {where['torch']}, {where['commit']}")
        print(HEADER, flush=True)
        for row in collect(options):
            rows.append(row)
            print(format_row(row), flush=True)
    finally:
        torch.set_num_threads(before)
    where = machine.finished(where)
    loads = f"load {where['load_before']} before, {where['load_after']} after"
    print(f"{loads}; {where['huge_pages_mib']} MiB in huge pages")
    if options.json:
        options.json.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")
    if options.record:
        print(f"recorded in {record(bench, rows, where)}")
    return rows
