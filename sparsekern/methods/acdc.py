"""AC/DC: training that alternates between dense and sparse phases (arXiv 2308.02060, section 3; IST-DASLab/ACDC).

A sparse phase starts with the exact top-k magnitude mask of the present weights and holds it; a dense phase starts with
every weight free, the pruned ones from exactly zero, and with momentum reset, since the buffers stem from another
network. The reset comes before the first dense step, as in IST-DASLab/ACDC (neuralmagic/sparseml: after it); batch-norm
statistics are not measured anew at an edge. AC/DC++ is the same at longer schedules. Section 3 has two variants: sparse
phases whose sparsity rises to the target (`first_sparsity`), and dense phases that stay sparse at a lower level
(`dense_sparsity`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekern.distributions import check_sparsity
from sparsekern.masks import MaskSet
from sparsekern.methods.allocation import Allocation, Budget
from sparsekern.methods.base import Sparsifier
from sparsekern.ops.operands import as_layout
from sparsekern.phases import Dense, Phase, PhaseSchedule, Sparse
from sparsekern.schedules import AcdcSchedule
from sparsekern.updates import rising_phases


class ACDC(Sparsifier):
    """Drives the phases of one model; `attach` once, then `step` last in every iteration.

    `schedule` is an `acdc_schedule(epochs=...)`, or a PhaseSchedule in optimizer steps whose last phase is sparse at
    `sparsity`. `pattern` (n:m too), `distribution` and `layer_sparsity` are those of `sparsekern.methods.allocation`;
    `include` and `exclude` choose weights by name (re.search). `reset` says whose momentum a new dense phase clears:
    "all" (default, as published), "pruned" or "none".

    `first_sparsity`: the first sparse phase has this sparsity, the following ones rise linearly, the last but one has
    the target. `dense_sparsity`: at least this share of the weights stays at zero in dense phases. Each keeps the live
    weights of the sparse phase before it, the first one the largest initial weights, and opens others by
    `dense_support`, since the paper does not say which: "sample", a new uniform sample (`seed`); "magnitude", the
    largest when the sparse phase began (after one cycle always the same); "gradient", those of the largest gradient in
    the last step of the sparse phase, where gradients are dense (a layer without one: the lowest index).
    """

    def __init__(
        self,
        sparsity: float,
        schedule: AcdcSchedule | PhaseSchedule,
        *,
        pattern: str = "unstructured",
        distribution: str = "global",
        include: Sequence[str] = (".*",),
        exclude: Sequence[str] = (),
        reset: str = "all",
        layer_sparsity: Mapping[str, float] | None = None,
        first_sparsity: float | None = None,
        dense_sparsity: float = 0.0,
        dense_support: str = "sample",
        seed: int = 0,
    ):
        check_sparsity(sparsity)
        self.allocation = Allocation(pattern, distribution, layer_sparsity, n_of_m=True)
        self.allocation.sparsity(sparsity)
        if reset not in (allowed := ("all", "pruned", "none")):
            raise ValueError(f"reset must be one of {allowed}, got {reset!r}")
        if dense_support not in (allowed := ("sample", "magnitude", "gradient")):
            raise ValueError(f"dense_support must be one of {allowed}, got {dense_support!r}")
        lowest = sparsity if first_sparsity is None else first_sparsity
        for name, value, top in (("first_sparsity", lowest, sparsity), ("dense_sparsity", dense_sparsity, lowest)):
            if check_sparsity(value, name) > check_sparsity(top):
                raise ValueError(f"{name} must be at most the sparsity of sparse phases, {top}, got {value}")
        if self.allocation.fixed is not None and (lowest != sparsity or dense_sparsity):
            raise ValueError(f"first_sparsity, dense_sparsity: must be left out with pattern {pattern!r}")
        if not isinstance(schedule, (AcdcSchedule, PhaseSchedule)):
            raise TypeError(f"schedule must be acdc_schedule(...) or a PhaseSchedule, got {type(schedule).__name__}")
        if isinstance(schedule, PhaseSchedule) and schedule.phases[-1].phase != Sparse(sparsity):
            raise ValueError(f"schedule must end with {Sparse(sparsity)}, got {schedule.phases[-1].phase}")
        super().__init__(schedule, include=include, exclude=exclude)
        self.sparsity, self.pattern, self.distribution, self.reset = sparsity, pattern, distribution, reset
        self.first_sparsity, self.dense_sparsity, self.seed = first_sparsity, dense_sparsity, seed
        self.dense_support = dense_support if dense_sparsity else "all"
        self.phase: Phase = Dense()

    def _resolve(self, steps_per_epoch: int | None) -> PhaseSchedule:
        self.phase = Dense()
        if isinstance(self._schedule, AcdcSchedule) and steps_per_epoch is not None:
            schedule = self._schedule.resolve(steps_per_epoch, self.sparsity)
        else:
            schedule = super()._resolve(steps_per_epoch)
        return schedule if self.first_sparsity is None else rising_phases(schedule, self.first_sparsity)

    def timeline(self) -> str:
        least = f"\ndense phases keep {self.dense_sparsity:.6g} of the weights at zero" if self.dense_sparsity else ""
        return super().timeline() + least

    def _start(self) -> None:
        self.allocation.bind(self.model, self.masks)
        if self.dense_support == "magnitude":
            self.support = MaskSet({name: self.masks.parameter(name) for name in self.masks})
        if self.dense_sparsity and self.schedule.at(0) == Dense():
            self.allocation.select(self.masks, self._dense_budget())
            self._hold_zero()

    def _due(self) -> bool:
        return self.schedule.at(self.position) != self.phase

    def _change(self) -> None:
        self._enter(self.schedule.at(self.position))

    def needs_dense_gradient(self) -> bool:
        if self.dense_support != "gradient":  # asked by every accelerated layer
            return False
        return isinstance(self.phase, Sparse) and self.schedule.at(self.position + 1) == Dense()

    def _after_step(self) -> None:
        if self.needs_dense_gradient() and self._good_step():  # in `step` the gradients may be gone
            self._enter(Dense())

    @torch.no_grad()
    def _enter(self, phase: Phase) -> None:
        if isinstance(phase, Sparse):
            if self.dense_support == "magnitude":
                self.allocation.select(self.support, self._dense_budget())
            self.allocation.select(self.masks, self.allocation.budget(phase.sparsity))
            self._hold_zero()
        else:
            scores = self._opening()
            self._reset_momentum()
            if scores is None:
                for name in self.masks:
                    self.masks.set(name, torch.ones_like(self.masks.parameter(name), dtype=torch.bool))
            else:
                live = {name: self.masks.bool(name) for name in scores}
                scores = {name: score.masked_fill(live[name], float("inf")) for name, score in scores.items()}
                self.allocation.select(self.masks, self._dense_budget(), scores)
        self.phase = phase

    def _opening(self) -> dict[str, Tensor] | None:
        """What ranks the pruned weights that a dense phase opens, None if it opens all."""
        weights = {name: self.masks.parameter(name) for name in self.masks}
        if self.dense_support == "sample":
            # A seeded function of the phase's number, so that a resumed run draws the same.
            draw = sum(edge <= self.position for edge in self.schedule.edges)
            return self.allocation.random(self.masks, self.seed, draw)
        if self.dense_support == "magnitude":
            return {name: self.support.bool(name).float() for name in weights}
        if self.dense_support == "gradient":
            return {n: torch.zeros_like(w) if w.grad is None else as_layout(w.grad, w) for n, w in weights.items()}
        return None

    def _dense_budget(self) -> Budget:
        return self.allocation.budget(self.dense_sparsity, lambda own: min(own, self.dense_sparsity))

    def _reset_momentum(self) -> None:
        # Whatever the gradients: the published code skips parameters without one, which under
        # zero_grad(set_to_none=True) is all of them.
        if self.reset == "all":
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    for buffer in self.momentum(parameter):
                        buffer.zero_()
        elif self.reset == "pruned":
            for name in self.masks:
                for buffer in self.momentum(self.masks.parameter(name)):
                    buffer.masked_fill_(~self.masks.bool(name), 0)

    def _extra_state(self) -> dict[str, Any]:
        support = {"support": self.support.state_dict()} if self.dense_support == "magnitude" else {}
        return {"sparsity": self.phase.sparsity if isinstance(self.phase, Sparse) else None, **support}

    def _load_extra_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        sparsity = state["sparsity"]
        if sparsity is not None:
            check_sparsity(sparsity, "state['sparsity']")
        if "support" in state:
            loaded = MaskSet({name: self.masks.parameter(name) for name in self.masks})
            loaded.load_state_dict(state["support"])

        def install() -> None:
            self.phase = Dense() if sparsity is None else Sparse(sparsity)
            if "support" in state:
                self.support = loaded

        return install
