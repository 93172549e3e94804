"""SR-STE: n:m sparsity learned from scratch (arXiv 2102.04010; aojunzz/NM-sparsity)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern.methods.effective import EffectiveSparsifier
from sparsekern.methods.held import Constant
from sparsekern.methods.n_of_m import check_n_of_m, select_n_of_m
from sparsekern.methods.repeated import Repeated
from sparsekern.phases import Sparse


class SRSTE(Repeated, EffectiveSparsifier):
    """Forward with the n:m mask of the present weights, chosen anew every step; gradients straight through to all.

    `decay` c pulls the weights that the mask leaves out towards zero, which keeps masks from flapping: the gradient of
    w is g + c (1 - M) w. MaskedSGD adds the second term in its own step. `sparsity` may be left out, the pattern fixes
    it. Patterns other than n:m are refused.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        pattern: str = "2:4",
        decay: float = 2e-4,
        every: int = 1,
        include: Sequence[str] = (".*",),
        exclude: Sequence[str] = (),
    ):
        self.sparsity = float(check_n_of_m(pattern, sparsity))
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < float("inf"):
            raise ValueError(f"decay must be a finite number of at least 0, got {decay!r}")
        self.pattern, self.decay, self.every = pattern, decay, self._check_every(every)
        self.phase = Sparse(self.sparsity)
        super().__init__(Constant(self.phase), include=include, exclude=exclude)

    def _begin(self) -> None:
        self.updated = 0
        select_n_of_m(self.masks, self.pattern)

    def _update(self) -> None:
        select_n_of_m(self.masks, self.pattern)
        self._refresh_kept()

    def effective(self, name: str, weight: Tensor) -> Tensor:
        return self.masked(name, weight)

    def _fill(self, names: Sequence[str], weights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        self._fill_masked(names, weights, outs)

    def _register(self) -> None:
        super()._register()
        self._decayed = self._decay_in_step(0.0, self.decay)

    @torch.no_grad()
    def _before_step(self) -> bool:
        if self._decayed:
            return False
        names, weights, gradients = self._gradients()
        self._combine(
            gradients, gradients, weights, self.masks, names, scaled=True, live=(1, 0), pruned=(1, self.decay)
        )
        return False
