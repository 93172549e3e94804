"""What methods share that change their masks every so many optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sparsekern.distributions import check_sparsity
from sparsekern.methods.allocation import Allocation
from sparsekern.methods.base import Sparsifier
from sparsekern.updates import UpdatePlan, UpdateSchedule

_LEAST_UPDATES = 25


class IntervalSparsifier(Sparsifier):
    """Counts the updates made; an update that was due and could not be made waits for the next good step.

    `DEFAULTS` (start, stop, every) fill what the user's `update_schedule` leaves out. Published intervals are meant for
    long runs: in one shorter than 25 default intervals the default is 1/25 of the run.
    """

    DEFAULTS: tuple[float | None, float, int | float] = (None, 1.0, 100)

    def __init__(
        self,
        sparsity: float,
        schedule: UpdatePlan | UpdateSchedule,
        allocation: Allocation,
        include: Sequence[str],
        exclude: Sequence[str],
    ):
        check_sparsity(sparsity)
        if not isinstance(schedule, (UpdatePlan, UpdateSchedule)):
            raise TypeError(f"schedule must be update_schedule(...) or an UpdateSchedule, got {schedule!r:.60}")
        super().__init__(schedule, include=include, exclude=exclude)
        self.sparsity, self.allocation, self.updates = sparsity, allocation, 0

    def _resolve(self, steps_per_epoch: int | None) -> UpdateSchedule:
        self.updates = 0
        if isinstance(self._schedule, UpdateSchedule):
            return self._schedule
        plan = self._schedule.with_defaults(*self.DEFAULTS)
        schedule = plan.resolve(steps_per_epoch)
        short = max(1, schedule.total_steps // _LEAST_UPDATES)
        if self._schedule.every is None and short < schedule.every:
            schedule = replace(plan, every=short).resolve(steps_per_epoch)
        return schedule

    def _start(self) -> None:
        self.allocation.bind(self.model, self.masks)

    def _waiting(self, steps: int) -> bool:
        """Whether an update is still to be made once `steps` optimizer steps are behind."""
        return self.schedule.count(steps) > self.updates

    def _made(self, steps: int) -> None:
        # One update, however long it waited.
        self.updates = self.schedule.count(steps)

    def _extra_state(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def _load_extra_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        updates = state["updates"]
        if not isinstance(updates, int) or isinstance(updates, bool) or updates < 0:
            raise ValueError(f"state['updates'] must be a whole number of updates, got {updates!r}")

        def install() -> None:
            self.updates = updates

        return install
