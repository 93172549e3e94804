"""What methods share that choose their masks or thresholds anew every so many steps, to the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparsekern.updates import UpdatePlan, UpdateSchedule, cubic


class Repeated:
    """Mixed into a Sparsifier: `_update` every `every` steps; one that falls on a skipped step waits.

    `updated` is the step of the last update.
    """

    every: int
    updated: int = 0
    position: int

    @staticmethod
    def _check_every(every: int) -> int:
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every must be a whole number of steps, got {every!r}")
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        return every

    def _update(self) -> None:
        raise NotImplementedError

    def _due(self) -> bool:
        return self.position // self.every > self.updated // self.every

    def _change(self) -> None:
        self._update()
        self.updated = self.position

    def _extra_state(self) -> dict[str, Any]:
        return {"updated": self.updated}

    def _load_extra_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        updated = state["updated"]
        if isinstance(updated, bool) or not isinstance(updated, int) or updated < 0:
            raise ValueError(f"state['updated'] must be a whole number of steps, got {updated!r}")

        def install() -> None:
            self.updated = updated

        return install


class Ramped(Repeated):
    """As Repeated, with something that rises by the cubic curve from the schedule's `start` to its `stop`.

    `every` is the schedule's, and updates go on after `stop`, as the weights move on.
    """

    DEFAULTS: tuple[float, float, int | float]
    schedule: UpdateSchedule

    @staticmethod
    def _check_schedule(schedule: UpdatePlan | UpdateSchedule) -> UpdatePlan | UpdateSchedule:
        if not isinstance(schedule, (UpdatePlan, UpdateSchedule)):
            raise TypeError(f"schedule must be update_schedule(...) or an UpdateSchedule, got {schedule!r:.60}")
        return schedule

    def _resolve(self, steps_per_epoch: int | None) -> UpdateSchedule:
        schedule = self._schedule
        if isinstance(schedule, UpdatePlan):
            schedule = schedule.with_defaults(*self.DEFAULTS).resolve(steps_per_epoch)
        self.every = schedule.every
        return schedule

    def timeline(self) -> str:
        return f"{self.schedule.timeline()}, then every {self.every} to the end"

    def ramp(self, step: int, final: float, initial: float = 0.0) -> float:
        """The value at `step` of the curve from `initial` to `final`."""
        start, stop = self.schedule.start, self.schedule.stop
        if step >= stop:
            return final
        return initial if step <= start else cubic((step - start) / (stop - start), initial, final)
