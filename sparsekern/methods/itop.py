"""RigL-ITOP (arXiv 2102.02887): RigL that explores more, with long intervals and many weights dropped at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from sparsekern.masks import MaskSet
from sparsekern.methods.regrow import Regrowing


class RigLITOP(Regrowing):
    """`schedule` is an `update_schedule(epochs)`: by default every 4,000 steps over the whole run.

    The drop fraction falls from 0.5 to 0.005, as in Shiweiliuiiiiiii/In-Time-Over-Parameterization. An update follows
    the optimizer's step. The published code drops all weights tied at the threshold; here the count is exact. The other
    arguments are those of `Regrowing`.
    """

    DEFAULTS = (None, 1.0, 4000)
    FRACTIONS = (0.5, 0.005)
    ROUND = math.ceil

    def _start(self) -> None:
        super()._start()
        self.explored = MaskSet({name: self.masks.parameter(name) for name in self.masks})
        for name in self.masks:
            self.explored.set_packed(name, self.masks.packed(name))

    def exploration(self) -> float:
        """R_s: the share of the prunable weights that have been live at least once, now included."""
        return self.explored.density()

    def _regrow(self, *args: Any) -> None:
        super()._regrow(*args)
        for name in self.masks:
            self.explored.set_packed(name, self.explored.packed(name) | self.masks.packed(name))

    def _extra_state(self) -> dict[str, Any]:
        return {**super()._extra_state(), "explored": self.explored.state_dict()}

    def _load_extra_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        install_updates = super()._load_extra_state(state)
        loaded = MaskSet({name: self.masks.parameter(name) for name in self.masks})
        loaded.load_state_dict(state["explored"])

        def install() -> None:
            install_updates()
            self.explored = loaded

        return install
