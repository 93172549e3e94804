"""What methods share that choose their masks anew every so many steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Intervals:
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

    @staticmethod
    def _check_updated(state: Mapping[str, Any]) -> int:
        updated = state["updated"]
        if isinstance(updated, bool) or not isinstance(updated, int) or updated < 0:
            raise ValueError(f"state['updated'] must be a whole number of steps, got {updated!r}")
        return updated
