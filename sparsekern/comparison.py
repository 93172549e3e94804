"""What a comparison of methods comes to: its table, as text, Markdown and CSV, and its plots."""

from __future__ import annotations

import csv
import io
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekern import checkpoint
from sparsekern.run_report import Table

HEAD = ("method", "sparsity asked", "epochs", "accuracy", "loss", "entropy", "sparsity", "inference FLOPs",
        "training FLOPs", "seconds", "runs", "note")  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One run: what result.json holds, or None and the reason; `sparsity` None where it means nothing to the method.

    `targets` are the sparsities that it may end with, none if any will do; `shifted` says why its method may miss them.
    """

    method: str
    sparsity: float | None
    epochs: int
    result: dict[str, Any] | None
    reason: str = ""
    targets: tuple[float, ...] = ()
    shifted: str = ""


TOLERANCE = 0.05
"""How many of the live weights asked for a run may have too many or too few without a remark.

Capacity and FLOPs go with the live weights, so it is a share of them. Where half of them cost a network a point of
accuracy or two, this share costs a tenth, which is less than seeds differ by; and rounding each layer to whole weights
or blocks stays far below it.
"""


def missed(outcome: Outcome) -> str:
    """The remark on a run that ended with another sparsity than asked for; empty if it did not."""
    if outcome.result is None or not outcome.targets:
        return ""
    found = outcome.result["sparse"]["sparsity"]
    target = min(outcome.targets, key=lambda each: abs(each - found))
    live, asked = 1 - found, 1 - target
    if abs(live - asked) <= TOLERANCE * asked:
        return ""
    ratio = f", {live / asked:.2f} times the live weights" if asked else ""
    return f"misses sparsity {target:g}{ratio}{': ' if outcome.shifted else ''}{outcome.shifted}"


def collapsed(outcome: Outcome) -> str:
    """The remark on a run whose masks cut the network in two: layers without a live weight."""
    layers = [] if outcome.result is None else outcome.result.get("layers", [])
    empty = [layer["name"] for layer in layers if not layer["live"]]
    return f"no live weight in {', '.join(empty)}" if empty else ""


Key = tuple[str, float | None, int]


def grouped(outcomes: list[Outcome]) -> dict[Key, list[Outcome]]:
    """The runs that differ in nothing but their seed."""
    groups: dict[Key, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.method, outcome.sparsity, outcome.epochs), []).append(outcome)
    return groups


def rows(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """One row per method, sparsity and length, of numbers: means over the seeds; FLOPs as shares of dense ones."""
    found = []
    for (method, sparsity, epochs), group in grouped(outcomes).items():
        results = [outcome.result for outcome in group if outcome.result is not None]
        remarks = [text for outcome in group for text in (outcome.reason, missed(outcome), collapsed(outcome)) if text]
        reasons = "; ".join(dict.fromkeys(" ".join(text.split()) for text in remarks))
        row = {"method": method, "sparsity asked": sparsity, "epochs": epochs, "runs": len(results), "note": reasons}
        if results:
            row |= {name: statistics.fmean(map(value, results)) for name, value in _VALUES.items()}
        found.append({name: row.get(name) for name in HEAD})
    return found


_VALUES: dict[str, Callable[[dict[str, Any]], float]] = {
    "accuracy": lambda r: r["sparse"]["accuracy"],
    "loss": lambda r: r["sparse"]["loss"],
    "entropy": lambda r: r["sparse"]["entropy"],
    "sparsity": lambda r: r["sparse"]["sparsity"],
    "inference FLOPs": lambda r: r["flops"]["inference"] / r["flops"]["dense"],
    "training FLOPs": lambda r: r["flops"]["training"] / (3 * r["steps"] * r["flops"]["dense"]),
    "seconds": lambda r: r["seconds"],
}
_FORMATS = {**dict.fromkeys(_VALUES, ".4f"), "seconds": ".1f", "sparsity asked": "g", "epochs": "d", "runs": "d"}


def table(outcomes: list[Outcome], title: str) -> Table:
    """The rows as text."""

    def cell(name: str, value: Any) -> str:
        return "" if value is None else format(value, _FORMATS.get(name, ""))

    return Table(title, HEAD, [tuple(cell(*item) for item in row.items()) for row in rows(outcomes)])


def to_csv(outcomes: list[Outcome]) -> str:
    """The rows with all digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, HEAD, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(outcomes))
    return text.getvalue()


def write(folder: Path, outcomes: list[Outcome], sparsities: list[float], own: list[str]) -> None:
    """Print the table and write table.md, table.csv and a plot per sparsity; `own` are settings of one method alone."""
    machines = sorted({outcome.result["machine"].split(", load")[0] for outcome in outcomes if outcome.result})
    found = table(outcomes, "Methods under the same budget")
    note = (
        "Accuracy, loss and output entropy (nats) on the validation images at the end, means over the seeds. "
        "FLOPs as shares of the dense network's and of its training. Seconds of training, evaluation included; "
        f"runs side by side disturb each other. {'; '.join(machines)}."
    )
    if own:
        note += f" Settings of one method alone: {', '.join(own)}."
    print(f"\n{found.text()}\n\n{note}")
    checkpoint.write_atomically(folder / "table.md", f"{found.markdown()}\n\n{note}\n".encode())
    checkpoint.write_atomically(folder / "table.csv", to_csv(outcomes).encode())
    try:
        for sparsity in sparsities:
            picture = plot([o for o in outcomes if o.sparsity in (None, sparsity)], sparsity)
            checkpoint.write_atomically(folder / f"accuracy-{sparsity:g}.png", picture)
    except ModuleNotFoundError:
        print("no plots: matplotlib is missing, install it with pip install 'sparsekern[train]'", file=sys.stderr)
    print(f"\nFiles in {folder}: {', '.join(sorted(path.name for path in folder.iterdir() if path.is_file()))}")


def mean_curve(group: list[Outcome]) -> list[float]:
    """Accuracy at the end of each epoch, the mean over runs; empty without any."""
    curves = [[row["accuracy"] for row in outcome.result["metrics"]] for outcome in group if outcome.result]
    return [statistics.fmean(values) for values in zip(*curves, strict=True)]


def label(group: list[Outcome], lengths: list[int]) -> str:
    """What a plot calls the runs of a method: their length if there are several, and a sparsity that was missed."""
    found = group[0].method if len(lengths) == 1 else f"{group[0].method}, {group[0].epochs} epochs"
    if not any(map(missed, group)):
        return found
    sparsity = statistics.fmean(outcome.result["sparse"]["sparsity"] for outcome in group if outcome.result)
    return f"{found} (sparsity {sparsity:.3g})"


def plot(outcomes: list[Outcome], sparsity: float) -> bytes:
    """A PNG: accuracy over epochs, a line per method and length, and in order what they end with.

    ModuleNotFoundError without matplotlib.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(11, 6), dpi=150, layout="constrained")
    axes, ends = figure.subplots(1, 2, width_ratios=(3, 2))
    methods = list(dict.fromkeys(outcome.method for outcome in outcomes))
    lengths = sorted({outcome.epochs for outcome in outcomes})
    found = []
    for (method, _, epochs), group in grouped(outcomes).items():
        if curve := mean_curve(group):
            index = methods.index(method)
            # Neighbours in tab20 are shades of one colour; their markers differ.
            colour = "black" if method == "dense" else colormaps["tab20"](index % 20)
            style = {"color": colour, "marker": "os^DvPX"[index % 7], "markersize": 4}
            line = ("-", "--", ":", "-.")[lengths.index(epochs) % 4]
            axes.plot(range(1, epochs + 1), curve, linewidth=1.2, linestyle=line, **style)
            # Not the end of the curve: what the last step changes comes after the metrics of the last epoch.
            found.append(
                (
                    statistics.fmean(o.result["sparse"]["accuracy"] for o in group if o.result),
                    label(group, lengths),
                    style,
                )
            )
    axes.set_title(
        f"Validation accuracy at {sparsity:.4%} sparsity".replace("0000%", "%").replace(".%", "%"), loc="left"
    )
    axes.set_xlabel("epoch")
    ends.set_title("at the end", loc="left")
    if found:
        found.sort(key=lambda entry: entry[0])
        worst, best = found[0][0], found[-1][0]
        # Methods differ at the end by little; a fall to chance on the way must not hide it.
        low = worst - max(2 * (best - worst), 0.05)
        axes.set_ylim(max(0.0, low), max(y for each in axes.lines for y in each.get_ydata()) + 0.05 * (best - low))
        _draw_ends(ends, found)
    for each in (axes, ends):
        each.grid(alpha=0.25, linewidth=0.6)
        each.spines[["top", "right"]].set_visible(False)
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()


def _draw_ends(axes: Any, found: list[tuple[float, str, dict[str, Any]]]) -> None:
    """A marker for each accuracy, in rows that are called what the lines are."""
    for row, (accuracy, _, style) in enumerate(found):
        axes.plot(accuracy, row, **style | {"markersize": 6})
        axes.annotate(f"{accuracy:.4f}", (accuracy, row), (7, 0), textcoords="offset points", va="center", size=8)
    axes.set_yticks(range(len(found)), [name for _, name, _ in found], fontsize=8)
    axes.margins(x=0.2)
