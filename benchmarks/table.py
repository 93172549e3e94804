"""python -m benchmarks.table: writes the speed section of README.md from the last recorded runs of each benchmark.

Those of the machine that recorded last: one run for each number of threads and images.

Nothing is left out: the convolutions, too many for one table, are given as the median over layers with the slowest and
the fastest of them and the number of layers that lose against dense.
"""

import csv
import itertools
import statistics
from pathlib import Path

from benchmarks.harness import RESULTS, is_noisy

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- speed: written by python -m benchmarks.table -->", "<!-- end of speed -->"
NOTHING = (
    "`make bench` prints the table for your machine. No figure is quoted here until it is recorded with its machine."
)
SHORT = "`make bench` prints the short forms for your machine; the command of each table stands below it."
RUN = ("date", "commit", "command", "cpu")
TITLES = {
    "masked_sgd": "One optimizer step of ResNet-50, all 25.6M parameters, momentum and weight decay",
    "masked_adamw": "The same step with AdamW, weight decay and both moments",
    "topk_mask": "Exact top-k masks of ResNet-50's 25.5M prunable weights (x floor: reading them once)",
    "sparse_conv2d": "Convolutions of ResNet-50 and pointwise ones of MobileNetV1, float32, against torch's best dense "
    "ones: median speedup (range), and that of ResNet-50's behind the first together",
    "batch_norm": "Batch-norms of ResNet-50 in training, with the residual and the ReLU that follow them",
    "list_operators": "Operators of methods with a dense store, each one pass over ResNet-50's 25.5M weights",
    "training": "One training step of ResNet-50 in a sparse phase, through `sk.nn.accelerate`, and where its time goes",
}


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
    threads, batch = run["threads"], f", batch {run['batch']}" if run["batch"] else ""
    noisy = sum(bool(_noise(row)) for row in rows)
    reference = sum(row["backend"] == "reference" for row in rows)
    remarks = [
        f"`{run['command']}` at commit {run['commit']}, {run['date']}",
        f"{run['cpu']}, {run['isa']}, {threads} threads{batch}, torch {run['torch']}",
        f"load {run['load_before']} before and {run['load_after']} after",
        f"{noisy} of {len(rows)} rows noisy (interquartile range over 20% of the median)",
        *([f"{reference} of {len(rows)} rows run the plain PyTorch reference"] if reference else []),
    ]
    return "; ".join(remarks) + "."


def render(folder: Path = RESULTS) -> str:
    """The speed section."""
    parts = []
    for bench, title in TITLES.items():
        runs = last_runs(bench, folder)
        tables = [
            "\n".join([*(_summary if bench == "sparse_conv2d" else _lines)(run), "", _origin(run)]) for run in runs
        ]
        parts += [f"**{title}**", *tables] if tables else []
    return "\n\n".join([SHORT, *parts] if parts else [NOTHING])


def main() -> None:
    text = README.read_text()
    head, rest = text.split(BEGIN)
    README.write_text(f"{head}{BEGIN}\n{render()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
