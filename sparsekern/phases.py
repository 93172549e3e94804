"""What a model trains as at each optimizer step: phases, dense or sparse, and the list of them for a whole run."""

from __future__ import annotations

import operator
from bisect import bisect_right
from dataclasses import dataclass

from sparsekern.distributions import check_sparsity


@dataclass(frozen=True)
class Dense:
    """A phase in which every weight trains."""

    def __str__(self) -> str:
        return "dense"


@dataclass(frozen=True)
class Sparse:
    """A phase in which the share `sparsity` of the prunable weights is held at zero."""

    sparsity: float

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)

    def __str__(self) -> str:
        return f"sparse {float(self.sparsity) * 100:.6g}%"


Phase = Dense | Sparse


@dataclass(frozen=True)
class PhaseSpan:
    """One phase and the optimizer steps it covers: `start` is its first step, `stop` the first step after it."""

    start: int
    stop: int
    phase: Phase

    def __post_init__(self) -> None:
        start, stop = check_whole(self.start, "start", least=0), check_whole(self.stop, "stop", least=0)
        if stop <= start:
            raise ValueError(f"stop must be greater than start, got start={start} and stop={stop}")
        if not isinstance(self.phase, Dense | Sparse):
            raise TypeError(f"phase must be Dense() or Sparse(sparsity), got {self.phase!r}")

    @property
    def steps(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class PhaseSchedule:
    """The phases of a whole run, in optimizer steps: without gaps or overlaps, from step 0 on."""

    phases: tuple[PhaseSpan, ...]

    def __post_init__(self) -> None:
        # A list would be accepted by everything below and then make this "frozen" value changeable and unhashable.
        if not isinstance(self.phases, tuple):
            raise TypeError(f"phases must be a tuple of PhaseSpan, got {type(self.phases).__name__}")
        if not self.phases:
            raise ValueError("phases must hold at least one PhaseSpan, got an empty tuple")
        expected = 0
        for index, span in enumerate(self.phases):
            if not isinstance(span, PhaseSpan):
                raise TypeError(f"phases[{index}] must be a PhaseSpan, got {span!r}")
            if span.start != expected:
                raise ValueError(f"phases[{index}] must start at step {expected}, got start={span.start}")
            expected = span.stop

    @property
    def total_steps(self) -> int:
        return self.phases[-1].stop

    @property
    def edges(self) -> tuple[int, ...]:
        """The steps at which a new phase begins, in order. Step 0, where nothing changes, is not an edge."""
        return tuple(span.start for span in self.phases[1:])

    def at(self, step: int) -> Phase:
        """The phase of optimizer step `step`, counted from 0.

        From `total_steps` on it is the last phase: a run that trains on stays as it ended.
        """
        step = check_whole(step, "step", least=0)
        return self.phases[bisect_right(self.phases, step, key=lambda span: span.start) - 1].phase

    def timeline(self) -> str:
        """A table for people: one line for each phase with its first and last step, then the totals."""
        head = ("#", "phase", "first step", "last step", "steps")
        rows = [
            (str(index), str(span.phase), str(span.start), str(span.stop - 1), str(span.steps))
            for index, span in enumerate(self.phases, start=1)
        ]
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 1 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (head, *rows)
        ]
        dense = sum(span.steps for span in self.phases if isinstance(span.phase, Dense))
        share = 100 * dense / self.total_steps
        noun = "phase" if len(self.phases) == 1 else "phases"
        lines.append(f"{len(self.phases)} {noun}, {self.total_steps} steps, {dense} of them dense ({share:.1f}%)")
        return "\n".join(lines)


def check_whole(value: int | None, name: str, least: int) -> int:
    """`value` as an int of at least `least`, or a TypeError or ValueError that names the argument `name`."""
    try:
        number = None if isinstance(value, bool) or value is None else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be a whole number of at least {least}, got {value!r} of {type(value).__name__}")
    if number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number
