"""Gradual magnitude pruning (arXiv 1710.01878): the sparsity rises by a cubic curve, pruned weights never return.

Extended GMP, as arXiv 2308.02060 compares it, is `layer_sparsity=EXTENDED`: first layer dense, last layer at 80%, the
rest by global magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsekern.distributions import check_sparsity
from sparsekern.methods.allocation import Allocation
from sparsekern.methods.interval import IntervalSparsifier
from sparsekern.updates import UpdatePlan, UpdateSchedule, cubic

EXTENDED = {"first": 0.0, "last": 0.8}
"""Layer rules of Extended GMP."""


class GMP(IntervalSparsifier):
    """Prunes to the exact count of the curve at each update of `schedule`; the last one reaches `sparsity`.

    The curve runs from `initial` at the first update to `sparsity` at the last. `schedule` is an
    `update_schedule(epochs)`, by default from 10/32 to 25/32 of the run, every 1/32: the ratios of the magnitude
    pruning baseline of google-research/rigl, for want of those of arXiv 2308.02060. `pattern`, `distribution` and
    `layer_sparsity` are described in `sparsekern.methods.allocation` ("erk" is refused); a layer's own sparsity is
    reached by the same curve.
    """

    DEFAULTS = (10 / 32, 25 / 32, 1 / 32)

    def __init__(
        self,
        sparsity: float,
        schedule: UpdatePlan | UpdateSchedule,
        *,
        initial: float = 0.0,
        pattern: str = "unstructured",
        distribution: str = "global",
        layer_sparsity: Mapping[str, float] | None = None,
        include: Sequence[str] = (".*",),
        exclude: Sequence[str] = (),
    ):
        # Counts of "erk" are not nested: by rounding a layer may keep one weight more at a higher sparsity.
        allocation = Allocation(pattern, distribution, layer_sparsity, distributions=("global", "uniform"))
        super().__init__(sparsity, schedule, allocation, include, exclude)
        if check_sparsity(initial, "initial") > check_sparsity(sparsity):
            raise ValueError(f"initial must be at most sparsity={sparsity}, got {initial}")
        self.initial = initial

    def timeline(self) -> str:
        return f"{super().timeline()}; sparsity {self.initial:.6g} to {self.sparsity:.6g} by a cubic curve"

    def at(self, step: int) -> float:
        """The sparsity once the updates due up to `step` are made; `initial` before the first, also if it is 0."""
        return self._curve(step, self.sparsity)

    def _curve(self, step: int, target: float) -> float:
        schedule, latest = self.schedule, self.schedule.last(step)
        initial, steps = min(self.initial, target), schedule.steps()
        if latest is None:
            return initial
        # The exact target, not what rounding makes of it; a lone update has no curve to follow.
        if latest == steps[-1]:
            return target
        return cubic((latest - steps[0]) / (steps[-1] - steps[0]), initial, target)

    def _start(self) -> None:
        super()._start()
        if self.initial:
            self._prune(-1)

    def _due(self) -> bool:
        return self._waiting(self.position)

    def _change(self) -> None:
        self._prune(self.position)
        self._made(self.position)

    def _prune(self, step: int) -> None:
        budget = self.allocation.budget(self.at(step), lambda own: self._curve(step, own))
        self.allocation.select(self.masks, budget, nested=True)
        self._hold_zero()
