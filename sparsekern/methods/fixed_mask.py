"""Training with the support that a sparse model brings along, as in transfer (arXiv 2308.02060)."""

from __future__ import annotations

from collections.abc import Sequence

from sparsekern.methods.held import Constant, HeldSparsifier
from sparsekern.phases import Dense, Sparse


class FixedMask(HeldSparsifier):
    """Trains a sparse model on, its zeros held: transfer of a pruned network.

    The exact zeros that prunable weights have when `attach` is called stay zero, whatever their pattern. Raises
    ValueError in `attach` if there are none.
    """

    def __init__(self, *, include: Sequence[str] = (".*",), exclude: Sequence[str] = ()):
        self.phase = Dense()
        super().__init__(None, include=include, exclude=exclude)

    def _start(self) -> None:
        found = {name: self.masks.parameter(name).detach() != 0 for name in self.masks}
        if all(bool(mask.all()) for mask in found.values()):
            raise ValueError("model: none of its prunable weights has a zero, so there is no mask to infer")
        for name, mask in found.items():
            self.masks.set(name, mask)
        self.phase = Sparse(min(1 - self.masks.density(), 1.0))
        self.schedule = Constant(self.phase)
        self._hold_zero()
