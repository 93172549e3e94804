"""GraNet (arXiv 2106.10404; VITA-Group/GraNet): gradual magnitude pruning whose every update also regrows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from sparsekern.distributions import check_sparsity
from sparsekern.methods.allocation import Allocation
from sparsekern.methods.regrow import Regrowing
from sparsekern.updates import cubic


class GraNet(Regrowing):
    """`schedule` is an `update_schedule(epochs)`: by default every 4,000 steps over the whole run.

    An update follows the optimizer's step. It prunes by one ranking over all layers to a sparsity that rises cubically
    from `initial` (0.5; 0 for the dense start) at the beginning of the run to `sparsity` at the share `prune_stop`;
    then it drops and grows by gradient, a share that falls from 0.5 to 0.005. Layers with a sparsity of their own have
    it from the start. The first masks are random, by `distribution`. Counts are exact, where the published code keeps
    all weights tied at a threshold. The other arguments are those of `Regrowing`.
    """

    DEFAULTS = (None, 1.0, 4000)
    FRACTIONS = (0.5, 0.005)
    ROUND = math.ceil

    def __init__(self, sparsity: float, schedule: Any, *, initial: float = 0.5, prune_stop: float = 0.3, **kwargs: Any):
        super().__init__(sparsity, schedule, **kwargs)
        if check_sparsity(initial, "initial") > check_sparsity(sparsity):
            raise ValueError(f"initial must be at most sparsity={sparsity}, got {initial}")
        if not check_sparsity(prune_stop, "prune_stop"):
            raise ValueError(f"prune_stop must be a share of the run above 0, got {prune_stop}")
        self.initial, self.prune_stop = initial, prune_stop
        self.ranking = Allocation(self.allocation.pattern, "global", self.allocation.layer_sparsity)

    def initial_sparsity(self) -> float:
        return self.initial

    def timeline(self) -> str:
        end = round(self.prune_stop * self.schedule.total_steps)
        return f"{super().timeline()}; sparsity {self.initial:.6g} to {self.sparsity:.6g} until step {end}"

    def at(self, step: int) -> float:
        """The sparsity after an update at `step`; that of the last update is the target."""
        if step >= min(self.prune_stop * self.schedule.total_steps, self.schedule.steps()[-1]):
            return self.sparsity
        return cubic(step / (self.prune_stop * self.schedule.total_steps), self.initial, self.sparsity)

    def _start(self) -> None:
        super()._start()
        self.ranking.bind(self.model, self.masks)

    def _prepare(self) -> None:
        budget = self.ranking.budget(self.at(self._steps()))
        # Uniform initial counts are rounded layer by layer, which may leave a few less than one rounding of the whole.
        live = sum(self.ranking.live(self.masks, name) for name in budget.pooled)
        self.ranking.select(self.masks, replace(budget, pool=min(budget.pool, live)), nested=True)
