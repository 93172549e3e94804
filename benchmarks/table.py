"""python -m benchmarks.table: writes the speed section of README.md and benchmarks/results/README.md.

Both come from the last recorded runs of each benchmark on the machine that recorded last, one run for each number of
threads and images. The README has an overview, against the fastest baseline of each case, and says how many cases lose;
the other file leaves nothing out: the convolutions, too many for one table, are given as the median over layers with
the slowest and the fastest of them and the number of layers that lose against dense.
"""

import csv
import itertools
import math
import statistics
from pathlib import Path

from benchmarks.harness import RESULTS, is_noisy

README, DETAILS = Path(__file__).parents[1] / "README.md", RESULTS / "README.md"
BEGIN, END = "<!-- speed: written by python -m benchmarks.table -->", "<!-- end of speed -->"
NOTHING = (
    "`make bench` prints the table for your machine. No figure is quoted here until it is recorded with its machine."
)
SHORT = (
    "How much faster than the fastest stock function of each case (higher is better; below 1 is slower). `make bench` "
    "prints the short forms for your machine."
)
FULL = """# All recorded figures

Written by `python -m benchmarks.table`. The command of each table stands below it."""
SPARSITIES = ("0.9", "0.95", "0.98")
RUN = ("date", "commit", "command", "cpu")
TITLES = {
    "masked_sgd": (
        "SGD step, 25.6M weights",
        "One optimizer step of ResNet-50, all 25.6M parameters, momentum and weight decay",
    ),
    "masked_adamw": (
        "AdamW step, 25.6M weights",
        "The same step with AdamW, weight decay and both moments",
    ),
    "topk_mask": (
        "top-k masks, 25.5M weights",
        "Exact top-k masks of ResNet-50's 25.5M prunable weights (x floor: reading them once)",
    ),
    "sparse_conv2d": (
        "52 convolutions of ResNet-50",
        "Convolutions of ResNet-50 and pointwise ones of MobileNetV1, float32, against torch's best dense ones: "
        "median speedup (range), and that of ResNet-50's behind the first together",
    ),
    "sparse_linear": (
        "72 linear layers of BERT-base",
        "Linear layers of BERT-base, float32, sequences of 128 tokens, against torch's dense and CSR ones: "
        "median speedup (range), and that of all 72 together",
    ),
    "sparse_structure": (
        "structures of 52 convolutions from masks",
        "What is made once per mask of ResNet-50's 52 convolutions: structures, and the plans of all passes, batch 16",
    ),
    "batch_norm": (
        "batch-norm of ResNet-50, training",
        "Batch-norms of ResNet-50 in training, with the residual and the ReLU that follow them",
    ),
    "list_operators": (
        "pass over 25.5M weights",
        "Operators of methods with a dense store, each one pass over ResNet-50's 25.5M weights",
    ),
    "training": (
        "training step of ResNet-50",
        "One training step of ResNet-50 in a sparse phase, through `sk.nn.accelerate`, and where its time goes",
    ),
}
"""Benchmark -> what a row of the overview and a table of all figures are called."""


def last_runs(bench: str, folder: Path = RESULTS) -> list[list[dict[str, str]]]:
    """The rows of the last run for each number of threads and images, on the CPU of the very last; in order of time."""
    path = folder / f"{bench}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    runs: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for _, group in itertools.groupby(rows, lambda row: [row[key] for key in RUN]):
        found = list(group)
        if found[0]["cpu"] == rows[-1]["cpu"]:
            key = found[0]["threads"], found[0]["batch"]
            runs.pop(key, None)  # its place is that of the newer one
            runs[key] = found
    return list(runs.values())


def _run(rows: list[dict[str, str]]) -> str:
    threads, batch = rows[0]["threads"], rows[0]["batch"]
    return f"{threads} thread{'s' * (threads != '1')}" + f", batch {batch}" * bool(batch)


def _noise(row: dict[str, str]) -> str:
    return " noisy" if is_noisy({key: float(row[key]) for key in ("median_ms", "iqr_ms")}) else ""


def _lines(rows: list[dict[str, str]]) -> list[str]:
    """One line per row."""
    lines = ["| case | pattern | sparsity | ms | x floor | against | ms | speedup |", "|" + " --- |" * 8]
    for row in rows:
        floors = f"{float(row['median_ms']) / float(row['floor_ms']):.1f}" if row["floor_ms"] else ""
        against = ("", "", "")  # parts of a step are compared with nothing
        if row["baseline"]:
            against = row["baseline"], f"{float(row['baseline_ms']):.1f}", f"{float(row['speedup']):.2f}x"
        cells = (
            row["case"] + f", {row['pass']}" * (row["pass"] != "step"),
            row["pattern"] + ", packed" * (row["layout"] == "packed"), row["sparsity"],
            f"{float(row['median_ms']):.1f}{_noise(row)}",
            floors, *against,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _summary(rows: list[dict[str, str]]) -> list[str]:
    """One line per pass, layout of the weight and pattern, a column per sparsity."""
    sparsities = sorted({row["sparsity"] for row in rows}, key=float)
    lines = ["| pass | weight | pattern | " + " | ".join(sparsities) + " |", "|" + " --- |" * (3 + len(sparsities))]
    for pass_, layout, pattern in dict.fromkeys((row["pass"], row["layout"], row["pattern"]) for row in rows):
        cells = []
        for sparsity in sparsities:
            key = pass_, layout, pattern, sparsity
            chosen = [r for r in rows if (r["pass"], r["layout"], r["pattern"], r["sparsity"]) == key]
            # Sums over the network stand for themselves; layers are what is summarised.
            speedups = [float(r["speedup"]) for r in chosen if not r["case"].endswith("/all")]
            whole = [f"; whole network {float(r['speedup']):.2f}x" for r in chosen if r["case"].endswith("/all")]
            if speedups:
                slower = sum(speedup < 1 for speedup in speedups)
                text = f"{statistics.median(speedups):.2f}x ({min(speedups):.2f} to {max(speedups):.2f}"
                cells.append(f"{text}; {slower} of {len(speedups)} slower){''.join(whole)}")
            else:
                cells.append("".join(whole).removeprefix("; "))
        weight = "packed" if layout == "packed" else "dense"
        lines.append(f"| {pass_} | {weight} | {pattern} | " + " | ".join(cells) + " |")
    return lines


def _origin(rows: list[dict[str, str]]) -> str:
    """Command, machine and quality of a run."""
    run = rows[0]
    noisy = sum(bool(_noise(row)) for row in rows)
    reference = sum(row["backend"] == "reference" for row in rows)
    remarks = [
        f"`{run['command']}` at commit {run['commit']}, {run['date']}",
        f"{run['cpu']}, {run['isa']}, {_run(rows)}, torch {run['torch']}",
        f"load {run['load_before']} before and {run['load_after']} after",
        f"{noisy} of {len(rows)} rows noisy (interquartile range over 20% of the median)",
        *([f"{reference} of {len(rows)} rows run the plain PyTorch reference"] if reference else []),
    ]
    return "; ".join(remarks) + "."


def _speedups(rows: list[dict[str, str]]) -> dict[tuple[str, ...], float]:
    """Case, pass, layout, pattern and sparsity -> speedup over the fastest baseline, but for parts of a step."""
    found: dict[tuple[str, ...], float] = {}
    for row in rows:
        part = row["bench"] == "training" and row["case"] != "resnet50/step"
        if row["baseline"] and not part and row["sparsity"] in ("", *SPARSITIES):
            key = row["case"], row["pass"], row["layout"], row["pattern"], row["sparsity"]
            found[key] = min(found.get(key, math.inf), float(row["speedup"]))
    return found


def _overview_lines(bench: str, rows: list[dict[str, str]]) -> list[str]:
    """One line per case that stands for the whole; the range of benchmarks that have only single layers."""
    speedups = _speedups(rows)
    run = _run(rows)
    if not any(key[-1] for key in speedups):
        text = f"{min(speedups.values()):.2f}x to {max(speedups.values()):.2f}x"
        return [f"| {TITLES[bench][0]} | {run} | {len(speedups)} cases, no sparsity | {text} | | |"]
    lines = []
    for case, pass_, layout, pattern in dict.fromkeys(key[:-1] for key in speedups):
        whole = case.rpartition("/")[2]
        if whole not in ("all", "per-tensor", "step", "structures") or pass_.endswith("_grad") or not pattern:
            continue
        if pass_ == "forward" and layout != "packed":
            continue
        what = {"forward": ", forward", "both": ", forward and backward"}.get(pass_, "") + ", per tensor" * (
            whole == "per-tensor"
        )
        cells = [speedups.get((case, pass_, layout, pattern, sparsity)) for sparsity in SPARSITIES]
        texts = [f"{cell:.2f}x" if cell else "" for cell in cells]
        weights = pattern + ", packed" * (layout == "packed")
        lines.append(f"| {TITLES[bench][0]}{what} | {run} | {weights} | " + " | ".join(texts) + " |")
    return lines


def overview(folder: Path = RESULTS) -> str:
    """The speed section of the README."""
    runs = [(bench, run) for bench in TITLES for run in last_runs(bench, folder)]
    if not runs:
        return NOTHING
    lines = ["| | | weights | 90% | 95% | 98% |", "|" + " --- |" * 6]
    lines += [line for bench, run in runs for line in _overview_lines(bench, run)]
    cases = [
        (speedup, f"{key[0]} {key[1]}, {key[3]} {key[4]}, {_run(run)}")
        for _, run in runs
        for key, speedup in _speedups(run).items()
    ]
    slower = sorted(case for case in cases if case[0] < 1)
    worst = "; ".join(f"{name}: {speedup:.2f}x" for speedup, name in slower[:3])
    dates = sorted(run[0]["date"] for _, run in runs)
    machine = f"{runs[-1][1][0]['cpu']}, {runs[-1][1][0]['isa']}, torch {runs[-1][1][0]['torch']}"
    said = f"Of all {len(cases)} cases, single layers and passes too, {len(slower)} are slower"
    said += f" ({worst}); `sk.nn.accelerate` leaves layers dense that would lose against dense ones" * bool(slower)
    where = "[benchmarks/results](benchmarks/results/README.md) has all of them, with commands, times and floors"
    return "\n".join([SHORT, "", *lines, "", f"{said}. {where}. {machine}; {dates[0][:10]} to {dates[-1][:10]}."])


def render(folder: Path = RESULTS) -> str:
    """All tables."""
    parts = []
    for bench, (_, title) in TITLES.items():
        runs = last_runs(bench, folder)
        tables = [
            "\n".join([*(_summary if bench in ("sparse_conv2d", "sparse_linear") else _lines)(run), "", _origin(run)])
            for run in runs
        ]
        parts += [f"## {title}", *tables] if tables else []
    return "\n\n".join([FULL, *parts] if parts else [NOTHING])


def main() -> None:
    text = README.read_text()
    head, rest = text.split(BEGIN)
    README.write_text(f"{head}{BEGIN}\n{overview()}\n{END}{rest.split(END)[1]}")
    DETAILS.write_text(render() + "\n")


if __name__ == "__main__":
    main()
