"""What methods share whose masks never change."""

from __future__ import annotations

from dataclasses import dataclass

from sparsekern.methods.base import Sparsifier
from sparsekern.phases import Phase


@dataclass(frozen=True)
class Constant:
    """One phase from the first step to the last, however many there are."""

    phase: Phase

    def at(self, step: int) -> Phase:
        return self.phase

    def timeline(self) -> str:
        return f"one phase: {self.phase}"


class HeldSparsifier(Sparsifier):
    """Base of the methods whose masks are chosen once, in `attach`, and held."""

    phase: Phase

    def _resolve(self, steps_per_epoch: int | None) -> Constant:
        return Constant(self.phase)
