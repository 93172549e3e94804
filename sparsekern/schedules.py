"""When a model trains dense and when sparse: a pure function of the step number.

A schedule here knows nothing of models. `acdc_schedule` builds the alternation of dense and sparse phases of AC/DC for
a run of any length; its `resolve` gives a `PhaseSchedule`, which answers "which phase is step t in".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from numbers import Rational, Real
from typing import Literal, get_args

from sparsekern.distributions import check_sparsity
from sparsekern.phases import Dense, Phase, PhaseSchedule, PhaseSpan, Sparse, check_whole

__all__ = [
    "AcdcRule",
    "AcdcSchedule",
    "Dense",
    "Phase",
    "PhaseKind",
    "PhaseSchedule",
    "PhaseSpan",
    "Sparse",
    "acdc_schedule",
]

PhaseKind = Literal["D", "S"]
AcdcRule = Literal["reference", "sparseml", "proportional"]

# The reference rule, in epochs, read from the published configurations of IST-DASLab/ACDC for 100, 150 and 200 epochs:
# the warm-up, the last dense phase and the last sparse phase do not grow with the run, only the number of cycles does.
_FIRST_DENSE = 10
_PHASE = 5
_LAST_DENSE = 10
_LAST_SPARSE = 15
# The shortest run that holds the warm-up, one short sparse phase and both last phases. Below it the list is scaled.
_SHORTEST_REFERENCE = _FIRST_DENSE + _PHASE + _LAST_DENSE + _LAST_SPARSE
_SCALED_FROM = 100


@dataclass(frozen=True)
class AcdcSchedule:
    """The alternation of AC/DC in epochs; `acdc_schedule` builds it and describes the rules.

    `start`, `end` and `freq` belong to the rule "sparseml" alone and are None for the others.
    """

    epochs: int | float | Fraction
    rule: AcdcRule = "reference"
    sparsity: float | None = None
    start: int | None = None
    end: int | None = None
    freq: int | None = None

    def __post_init__(self) -> None:
        epochs = _exact_epochs(self.epochs)
        if self.rule not in get_args(AcdcRule):
            raise ValueError(f"rule must be one of {list(get_args(AcdcRule))}, got {self.rule!r}")
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        if self.rule != "sparseml":
            for name in ("start", "end", "freq"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} must be left out unless rule='sparseml', got {name}={getattr(self, name)!r} "
                        f"with rule={self.rule!r}"
                    )
            return
        for name in ("start", "end", "freq"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} must be a whole number of epochs with rule='sparseml', got None")
        start, end, freq = self._sparseml()
        if end > epochs:
            raise ValueError(f"end must be at most epochs, got end={end} and epochs={self.epochs!r}")
        if end < start + 2 * freq:
            raise ValueError(
                f"end must be at least start + 2 * freq = {start + 2 * freq}, so that one dense and one sparse phase "
                f"fit, got end={end}"
            )

    def phase_list(self) -> list[tuple[Fraction, PhaseKind]]:
        """Each phase as (first epoch, kind), kind "D" for dense or "S" for sparse; starts with "D", ends with "S"."""
        epochs = _exact_epochs(self.epochs)
        if self.rule == "sparseml":
            return self._sparseml_list()
        if self.rule == "reference" and epochs >= _SHORTEST_REFERENCE:
            return _reference_list(epochs)
        scale = epochs / _SCALED_FROM
        return [(start * scale, kind) for start, kind in _reference_list(Fraction(_SCALED_FROM))]

    def resolve(self, steps_per_epoch: int, sparsity: float | None = None) -> PhaseSchedule:
        """The same schedule in optimizer steps.

        Edges are rounded to whole steps, halves upwards. Where this leaves a phase without a step, as happens in very
        short runs, its two edges coincide and both are dropped; the first step stays dense and the last one sparse.
        `sparsity` may be left out if the schedule carries one.
        """
        per_epoch = check_whole(steps_per_epoch, "steps_per_epoch", least=1)
        if sparsity is not None:
            check_sparsity(sparsity)
        if sparsity is not None and self.sparsity is not None and sparsity != self.sparsity:
            raise ValueError(
                f"sparsity must be given once or agree, got sparsity={sparsity!r} here and {self.sparsity!r} "
                "in the schedule"
            )
        target = self.sparsity if sparsity is None else sparsity
        if target is None:
            raise ValueError("sparsity must be a number from 0 to 1, given here or to acdc_schedule, got None in both")
        total = _round_half_up(_exact_epochs(self.epochs) * per_epoch)
        if total < 2:
            raise ValueError(
                f"epochs * steps_per_epoch must be at least 2 steps, one dense and one sparse, got "
                f"epochs={self.epochs!r} and steps_per_epoch={per_epoch}"
            )
        plan = self.phase_list()
        # Keeping the inner edges off both ends is what guarantees a dense first step and a sparse last one.
        starts = [0] + [min(max(_round_half_up(start * per_epoch), 1), total - 1) for start, _ in plan[1:]]
        kept: list[tuple[int, PhaseKind]] = []
        for start, stop, (_, kind) in zip(starts, [*starts[1:], total], plan, strict=True):
            if stop > start and (not kept or kept[-1][1] != kind):
                kept.append((start, kind))
        stops = [start for start, _ in kept[1:]] + [total]
        return PhaseSchedule(
            tuple(
                PhaseSpan(start, stop, Dense() if kind == "D" else Sparse(target))
                for (start, kind), stop in zip(kept, stops, strict=True)
            )
        )

    def _sparseml(self) -> tuple[int, int, int]:
        # Only reached with the three set; the checks double as the conversion from None-able to int.
        return (
            check_whole(self.start, "start", least=0),
            check_whole(self.end, "end", least=1),
            check_whole(self.freq, "freq", least=1),
        )

    def _sparseml_list(self) -> list[tuple[Fraction, PhaseKind]]:
        start, end, freq = self._sparseml()
        forced = end - freq
        # Index 0 is dense as is everything before `start`, so the first edge is that of index 1.
        plan: list[tuple[int, PhaseKind]] = [(0, "D")]
        plan += [(epoch, "S" if index % 2 else "D") for index, epoch in enumerate(range(start, forced, freq)) if index]
        plan.append((forced, "S"))
        return _merge((Fraction(epoch), kind) for epoch, kind in plan)


def acdc_schedule(
    epochs: int | float | Fraction,
    *,
    rule: AcdcRule = "reference",
    sparsity: float | None = None,
    start: int | None = None,
    end: int | None = None,
    freq: int | None = None,
) -> AcdcSchedule:
    """When AC/DC trains dense and when sparse, for a run of `epochs` epochs; always starts dense and ends sparse.

    The rules:

    - "reference": the published configurations of IST-DASLab/ACDC. 10 dense epochs, then sparse and dense phases of
      5 epochs in turn, a last dense phase of 10 and a last sparse phase of 15. A longer run has more phases of the same
      length; epochs that fill no further cycle lengthen the last dense phase. Under 40 epochs, where these lengths do
      not fit, it is the same as "proportional".
    - "proportional": the 100-epoch reference list scaled to the run, 8 dense and 8 sparse phases at any length.
    - "sparseml": phases of `freq` epochs (default 5) from epoch `start` (default 5) on, even ones dense and odd ones
      sparse, dense before; sparse from `end - freq` to the end of the run (`end` defaults to the run's whole epochs).

    Accurate Neural Network Pruning Requires Rethinking Sparse Optimization (arXiv 2308.02060), section 3.2.1, ties the
    number of phases to the run length and leaves the exact edges open; the default is the rule that follows from the
    published configurations, not a claim about the edges used there.
    """
    if rule == "sparseml":
        start = 5 if start is None else start
        freq = 5 if freq is None else freq
        end = math.floor(_exact_epochs(epochs)) if end is None else end
    return AcdcSchedule(epochs=epochs, rule=rule, sparsity=sparsity, start=start, end=end, freq=freq)


def _reference_list(epochs: Fraction) -> list[tuple[Fraction, PhaseKind]]:
    plan: list[tuple[Fraction, PhaseKind]] = [(Fraction(0), "D")]
    start = Fraction(_FIRST_DENSE)
    # One more sparse/dense cycle as long as its dense phase still has the full length of a last dense phase before it.
    while start + _PHASE + _LAST_DENSE + _LAST_SPARSE <= epochs:
        plan += [(start, "S"), (start + _PHASE, "D")]
        start += 2 * _PHASE
    plan.append((epochs - _LAST_SPARSE, "S"))
    return plan


def _merge(plan: Iterable[tuple[Fraction, PhaseKind]]) -> list[tuple[Fraction, PhaseKind]]:
    merged: list[tuple[Fraction, PhaseKind]] = []
    for start, kind in plan:
        if not merged or merged[-1][1] != kind:
            merged.append((start, kind))
    return merged


def _exact_epochs(epochs: int | float | Fraction) -> Fraction:
    if isinstance(epochs, bool) or not isinstance(epochs, Real):
        raise TypeError(f"epochs must be a number greater than 0, got {epochs!r} of type {type(epochs).__name__}")
    if not 0 < epochs < math.inf:
        raise ValueError(f"epochs must be a finite number greater than 0, got {epochs!r}")
    if isinstance(epochs, Rational):
        return Fraction(epochs.numerator, epochs.denominator)
    # Through the decimal text, so that 0.1 epochs of 10 steps is exactly one step.
    return Fraction(repr(float(epochs)))


def _round_half_up(value: Fraction) -> int:
    # Not round(): its halves go to the even neighbour, which makes equal phases at half steps unequal in length.
    return math.floor(value + Fraction(1, 2))
