"""One-shot magnitude pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsekern.methods.allocation import Allocation
from sparsekern.methods.held import HeldSparsifier
from sparsekern.phases import Sparse


class OneShot(HeldSparsifier):
    """Magnitude pruning of a trained model, once, in `attach`; training on is fine-tuning with that mask.

    `pattern` may also be n:m, which fixes `sparsity`. `distribution` and `layer_sparsity` as in
    `sparsekern.methods.allocation.Allocation`. Afterwards batch-norm statistics belong to another network:
    `sparsekern.reestimate_batch_norm` measures them anew (as in IST-DASLab/CrAM).
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        pattern: str = "unstructured",
        distribution: str = "global",
        layer_sparsity: Mapping[str, float] | None = None,
        include: Sequence[str] = (".*",),
        exclude: Sequence[str] = (),
    ):
        self.allocation = Allocation(pattern, distribution, layer_sparsity, n_of_m=True)
        self.pattern, self.sparsity = pattern, self.allocation.sparsity(sparsity)
        self.phase = Sparse(self.sparsity)
        super().__init__(None, include=include, exclude=exclude)

    def _start(self) -> None:
        self._choose()
        self._hold_zero()

    def _choose(self) -> None:
        self.allocation.bind(self.model, self.masks)
        self.allocation.select(self.masks, self.allocation.budget(self.sparsity))
