"""One-shot magnitude pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsekern.distributions import check_sparsity
from sparsekern.methods.allocation import Allocation
from sparsekern.methods.held import HeldSparsifier
from sparsekern.methods.n_of_m import check_n_of_m, is_n_of_m, select_n_of_m
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
        self.pattern = pattern
        if is_n_of_m(pattern):
            if layer_sparsity or distribution not in ("global", "uniform"):
                raise ValueError(f"pattern {pattern!r} fixes the sparsity of every layer; leave out layer_sparsity")
            self.sparsity, self.allocation = float(check_n_of_m(pattern, sparsity)), None
        else:
            check_sparsity(sparsity)
            self.sparsity, self.allocation = sparsity, Allocation(pattern, distribution, layer_sparsity)
        self.phase = Sparse(self.sparsity)
        super().__init__(None, include=include, exclude=exclude)

    def _start(self) -> None:
        self._choose()
        self._hold_zero()

    def _choose(self) -> None:
        if self.allocation is None:
            select_n_of_m(self.masks, self.pattern)
        else:
            self.allocation.bind(self.model, self.masks)
            self.allocation.select(self.masks, self.allocation.budget(self.sparsity))
