"""Dense training, the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Sequence

from sparsekern.methods.held import HeldSparsifier
from sparsekern.phases import Dense


class DenseTraining(HeldSparsifier):
    """The baseline as a method: nothing is pruned, every mask keeps all."""

    def __init__(self, *, include: Sequence[str] = (".*",), exclude: Sequence[str] = ()):
        self.phase = Dense()
        super().__init__(None, include=include, exclude=exclude)
