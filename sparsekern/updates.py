"""When a method that changes its masks every so many steps does so, and the curves it follows: functions of numbers.

An `UpdateSchedule` counts optimizer steps; `update_schedule` states one as shares of a run of any length.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from fractions import Fraction

from sparsekern.distributions import check_sparsity
from sparsekern.phases import PhaseSchedule, Sparse

__all__ = ["UpdatePlan", "UpdateSchedule", "cosine", "cubic", "rising_phases", "update_schedule"]


@dataclass(frozen=True)
class UpdateSchedule:
    """Updates at step `start`, every `every` steps after it, and none after step `stop`, in a run of `total_steps`.

    Steps count from 0: an update at step t is made with t steps behind it.
    """

    start: int
    stop: int
    every: int
    total_steps: int

    def __post_init__(self) -> None:
        for name, least in (("start", 0), ("stop", 0), ("every", 1), ("total_steps", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{name} must be a whole number of steps, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not self.start <= self.stop <= self.total_steps:
            raise ValueError(
                f"start, stop and total_steps must not decrease, got {self.start}, {self.stop} and {self.total_steps}"
            )

    def count(self, step: int) -> int:
        """How many updates are due from the beginning up to and with step `step`."""
        return 0 if step < self.start else (min(step, self.stop) - self.start) // self.every + 1

    def last(self, step: int) -> int | None:
        """The step of the latest update due up to and with step `step`; None before the first."""
        count = self.count(step)
        return self.start + (count - 1) * self.every if count else None

    def steps(self) -> range:
        """The steps of all updates."""
        return range(self.start, self.stop + 1, self.every)

    def timeline(self) -> str:
        """One line for people."""
        steps = self.steps()
        noun = "update" if len(steps) == 1 else "updates"
        return (
            f"{len(steps)} mask {noun}: every {self.every} steps from step {steps[0]} to {steps[-1]} "
            f"of {self.total_steps}"
        )


@dataclass(frozen=True)
class UpdatePlan:
    """What `update_schedule` was told; None stands for the default of the method."""

    epochs: int | float | None = None
    total_steps: int | None = None
    start: float | None = None
    stop: float | None = None
    every: int | float | None = None

    def with_defaults(self, start: float | None, stop: float, every: int | float) -> UpdatePlan:
        """The plan with its gaps filled; `start` None is one interval after the beginning."""
        chosen = {"start": start, "stop": stop, "every": every}
        return replace(self, **{k: v for k, v in chosen.items() if getattr(self, k) is None})

    def resolve(self, steps_per_epoch: int | None) -> UpdateSchedule:
        """The schedule in optimizer steps; shares of the run are rounded to whole steps, halves upwards."""
        total = self.total_steps
        if total is None:
            if steps_per_epoch is None:
                raise ValueError("steps_per_epoch must be given for a schedule in epochs, got None")
            total = _round(Fraction(repr(self.epochs)) * operator.index(steps_per_epoch))
        if self.stop is None or self.every is None:
            raise ValueError(f"stop and every must be given where no method supplies them, got {self}")
        every = self.every if isinstance(self.every, int) else max(1, _round(Fraction(repr(self.every)) * total))
        stop = _round(Fraction(repr(self.stop)) * total)
        start = min(every, stop) if self.start is None else _round(Fraction(repr(self.start)) * total)
        return UpdateSchedule(start, stop, every, total)


def update_schedule(
    epochs: int | float | None = None,
    *,
    total_steps: int | None = None,
    start: float | None = None,
    stop: float | None = None,
    every: int | float | None = None,
) -> UpdatePlan:
    """When masks are updated, for a run of `epochs` epochs or of `total_steps` optimizer steps.

    `start` and `stop` are shares of the run, 0 to 1: no update before or after. `every` is the interval, in optimizer
    steps as an int, as a share of the run as a float. What is left out is the default of the method that gets the
    schedule, described there. For exact steps build an UpdateSchedule.
    """
    if (epochs is None) == (total_steps is None):
        raise ValueError(f"epochs or total_steps must be given, not both, got {epochs!r} and {total_steps!r}")
    for name, value in (("epochs", epochs), ("total_steps", total_steps), ("every", every)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be greater than 0, got {value!r}")
    if total_steps is not None and not isinstance(total_steps, int):
        raise TypeError(f"total_steps must be a whole number of steps, got {total_steps!r}")
    if isinstance(every, float) and every > 1:
        raise ValueError(f"every must be a share of the run up to 1.0 or an int of steps, got {every!r}")
    for name, value in (("start", start), ("stop", stop)):
        if value is not None:
            check_sparsity(value, name)
    if start is not None and stop is not None and start > stop:
        raise ValueError(f"stop must be at least start, got start={start!r} and stop={stop!r}")
    return UpdatePlan(epochs, total_steps, start, stop, every)


def cubic(progress: float, initial: float, final: float) -> float:
    """The sparsity of gradual pruning: from `initial` at progress 0 to `final` at 1, fast at first; clamped outside."""
    return final + (initial - final) * (1 - min(max(progress, 0.0), 1.0)) ** 3


def cosine(progress: float, first: float, last: float = 0.0) -> float:
    """Half a cosine from `first` at progress 0 to `last` at 1; clamped outside."""
    return last + (first - last) / 2 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def rising_phases(schedule: PhaseSchedule, first: float) -> PhaseSchedule:
    """The same phases with sparse ones that rise in equal steps from `first` to their sparsity.

    The last but one sparse phase has reached it; with fewer than three, all have it. arXiv 2308.02060 (the CelebA runs)
    has the sparsity rise from 90% to the target; the straight line and its end are a choice of this package.
    """
    low, spans = check_sparsity(first, "first"), [s for s in schedule.phases if isinstance(s.phase, Sparse)]
    for span in spans:
        if span.phase.sparsity < first:
            raise ValueError(f"first must be at most the sparsity {span.phase.sparsity}, got {first!r}")
    rise = len(spans) - 2
    risen = {}
    for index, span in enumerate(spans[: max(rise, 0)]):
        high = check_sparsity(span.phase.sparsity)
        risen[span.start] = replace(span, phase=Sparse(float(low + (high - low) * index / rise)))
    return PhaseSchedule(tuple(risen.get(span.start, span) for span in schedule.phases))


def _round(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))
