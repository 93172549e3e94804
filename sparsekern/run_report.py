"""The end of a run for people: tables for the terminal, curves.png, and report.html that needs no other file."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from typing import Any

_PANELS = (
    ("Loss", (("loss", "training"), ("validation_loss", "validation"))),
    ("Accuracy", (("accuracy", "validation"),)),
    ("Output entropy (nats)", (("entropy", "validation"),)),
    ("Sparsity", (("sparsity", "counted"),)),
)


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of text; columns after the first `left` ones hold numbers."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    left: int = 1

    def text(self) -> str:
        """For a terminal."""
        cells = [self.head, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.head))]
        lines = [
            "  ".join(
                text.ljust(width) if i < self.left else text.rjust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        return "\n".join([self.title, "-" * len(self.title), *lines])

    def markdown(self) -> str:
        """For a note or a README."""
        rule = ["---" if i < self.left else "---:" for i in range(len(self.head))]
        rows = [
            "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in (self.head, rule, *self.rows)
        ]
        return "\n".join([f"**{self.title}**", "", *rows])

    def html(self) -> str:
        """For a page."""

        def line(tag: str, row: tuple[str, ...]) -> str:
            kinds = ["" if i < self.left else ' class="number"' for i in range(len(row))]
            cells = zip(kinds, row, strict=True)
            return "<tr>" + "".join(f"<{tag}{kind}>{html.escape(text)}</{tag}>" for kind, text in cells) + "</tr>"

        body = "\n".join(line("td", row) for row in self.rows)
        head = line("th", self.head)
        return f"<h2>{html.escape(self.title)}</h2>\n<div><table>\n{head}\n{body}\n</table></div>"


def tables(result: dict[str, Any]) -> list[Table]:
    """The final tables of a run's results: networks, layers, and the speeds if they were measured."""
    networks = Table(
        "Networks",
        ("network", "accuracy", "validation loss", "output entropy", "sparsity"),
        [
            (label, f"{n['accuracy']:.4f}", f"{n['loss']:.4f}", f"{n['entropy']:.4f}", f"{n['sparsity']:.4f}")
            for label, n in (("sparse", result["sparse"]), ("dense twin", result["dense"]))
            if n is not None
        ],
    )
    rows = [
        (e["name"], "x".join(map(str, e["shape"])), f"{e['weights']:,}", f"{e['live']:,}",
         f"{1 - e['live'] / e['weights']:.4f}", e["ran"]) for e in result["layers"]
    ]  # fmt: skip
    weights, live = (sum(entry[key] for entry in result["layers"]) for key in ("weights", "live"))
    rows.append(("overall", "", f"{weights:,}", f"{live:,}", f"{1 - live / weights:.4f}", ""))
    head = ("layer", "shape", "weights", "live", "sparsity", "last trained as")
    layers = Table("Sparsity of the sparse network", head, rows)
    if not result["speeds"]:
        return [networks, layers]
    return [networks, layers, *_speed_tables(result)]


def acceleration(result: dict[str, Any]) -> str:
    """The share of prunable layers that trained on the sparse kernels in the last phase, as a sentence."""
    count, total = sum(entry["ran"].startswith("sparse") for entry in result["layers"]), len(result["layers"])
    return f"{count} of {total} prunable layers ({count / total:.0%}) ran on the sparse kernels in the last phase."


def _speed_tables(result: dict[str, Any]) -> list[Table]:
    """Ours against each baseline; then the convolutions, one line a layer."""
    title = "Speeds on this machine: medians of interleaved runs, ~ marks a noisy one"
    head = ("what", "case", "baseline", "ours ms", "baseline ms", "speedup")
    rows, layers = [], {}
    for speed in result["speeds"]:
        times = (_time(speed, "ours"), _time(speed, "baseline"), _speedup(speed["speedup"]))
        if speed["what"].startswith("convolution"):
            layers.setdefault(speed["case"], []).extend(times)
        else:
            rows.append((speed["what"], speed["case"], speed["baseline"], *times))
    convolutions = Table(
        "Convolutions: sparse_conv2d against torch's dense one, forward and forward + backward",
        ("layer", "sparse ms", "dense ms", "speedup", "sparse f+b ms", "dense f+b ms", "speedup"),
        [(case, *times) for case, times in layers.items()],
    )
    return [Table(title, head, rows, left=3), convolutions]


def _time(row: dict[str, Any], whose: str) -> str:
    noisy = row[f"{whose}_iqr_ms"] > 0.2 * row[f"{whose}_ms"]
    return f"{'~' if noisy else ''}{row[f'{whose}_ms']:.3f}"


def _speedup(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio >= 1 else f"{ratio:.2f}x slower"


def curves(rows: list[dict[str, Any]], phases: list[dict[str, Any]]) -> bytes:
    """A PNG of loss, accuracy, output entropy and sparsity over the optimizer steps, sparse phases shaded.

    Raises ModuleNotFoundError without matplotlib.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    steps = [row["step"] for row in rows]
    colours = ("#1f5fa8", "#c2410c")
    figure = Figure(figsize=(10, 6.4), dpi=150, layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(2, 2, sharex=True).flat, _PANELS, strict=True):
        for phase in phases:
            if phase["sparsity"] is not None:
                axes.axvspan(phase["start"], phase["stop"], color="#f0b429", alpha=0.22, linewidth=0)
        for (key, label), colour in zip(lines, colours, strict=False):
            # A row speaks of the steps up to its own; masks change at once, in between nothing does.
            style = "steps-pre" if key == "sparsity" else "default"
            values = [row[key] for row in rows]
            axes.plot(steps, values, color=colour, label=label, linewidth=1.6, marker=".", markersize=4, ds=style)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        if title.startswith(("Loss", "Output")):
            axes.set_yscale("log")
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)
    for axes in figure.axes[2:]:
        axes.set_xlabel("optimizer step (sparse phases shaded)")
    figure.axes[3].set_ylim(-0.03, 1.03)
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff; max-width: 1080px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
p { color: #55606e; margin-top: 0; }
img { width: 100%; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
td, th { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid #e4e8ed; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; padding-left: .8rem; }
pre { background: #f5f7f9; padding: 1rem; overflow-x: auto; font-size: .85rem; }
"""


def page(result: dict[str, Any], picture: bytes | None) -> str:
    """The whole report as one HTML page without links to anything outside it."""
    title = html.escape(f"Run {result['name']}")
    figure = "<p>Without curves: matplotlib is not installed.</p>"
    if picture is not None:
        source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        figure = f'<img alt="loss, accuracy, output entropy and sparsity over steps" src="{source}">'
    phases = Table(
        "Phases",
        ("phase", "first step", "last step", "steps"),
        [
            ("dense" if p["sparsity"] is None else f"sparse {p['sparsity']:.4g}", str(p["start"]), str(p["stop"] - 1),
             str(p["stop"] - p["start"]))
            for p in result["phases"]
        ],
    )  # fmt: skip
    curve_table = Table(
        "Metrics",
        tuple(result["metrics"][0]),
        [tuple(_cell(value) for value in row.values()) for row in result["metrics"]],
    )
    summary = f"{result['steps']} steps in {result['seconds']:.0f} s on {result['device']}; {result['machine']}. "
    summary += acceleration(result)
    networks, *rest = tables(result)
    parts = [networks.html(), "<h2>Curves</h2>", figure, *(table.html() for table in [*rest, phases, curve_table])]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p>{html.escape(summary)}</p>
{chr(10).join(parts)}
<h2>Recipe</h2>
<pre>{html.escape(result["recipe"])}</pre>
</body>
</html>
"""


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
