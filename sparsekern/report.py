"""How sparse a model is, counted from its weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sparsekern.methods.selection import layer_weights


@dataclass(frozen=True)
class SparsityReport:
    """(name, shape, zeros) of every convolution and linear weight; negative zero counts as zero, NaN does not."""

    layers: tuple[tuple[str, tuple[int, ...], int], ...]

    @property
    def weights(self) -> int:
        """How many weights there are."""
        return sum(_count(shape) for _, shape, _ in self.layers)

    @property
    def zeros(self) -> int:
        """How many of them are zero."""
        return sum(zeros for _, _, zeros in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of zeros; 0.0 of nothing."""
        return self.zeros / self.weights if self.weights else 0.0

    def __str__(self) -> str:
        rows = [(name, "x".join(map(str, shape)), _count(shape), zeros) for name, shape, zeros in self.layers]
        rows.append(("all", "", self.weights, self.zeros))
        lines = [f"{'weight':40} {'shape':>20} {'weights':>12} {'zeros':>12} {'sparsity':>9}"]
        lines += [f"{n:40} {s:>20} {c:12,} {z:12,} {z / c if c else 0.0:9.4f}" for n, s, c, z in rows]
        return "\n".join(lines)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def sparsity_report(model: nn.Module) -> SparsityReport:
    """Exact zeros of every convolution and linear layer; a weight shared between layers counts once."""
    return SparsityReport(
        tuple(
            (name, tuple(w.shape), w.numel() - int(w.detach().count_nonzero()))
            for name, w in layer_weights(model).items()
        )
    )
