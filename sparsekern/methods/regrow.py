"""Dropping live weights and growing others: what RigL, SET, ITOP and GraNet share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsekern.distributions import check_sparsity
from sparsekern.methods.allocation import Allocation
from sparsekern.methods.interval import IntervalSparsifier
from sparsekern.ops import topk_mask, unpack_mask
from sparsekern.ops.operands import as_layout
from sparsekern.updates import UpdatePlan, UpdateSchedule, cosine


class Regrowing(IntervalSparsifier):
    """Starts from random masks; an update drops the smallest live weights of a layer and grows as many others.

    The share dropped falls by a cosine from `drop_fraction` at step 0 to `last_fraction` at the end of updates. What an
    update drops may be grown again by it, and then keeps value and momentum; a weight that was not live before starts
    from zero with zero momentum. Ties go to the lowest index (google-research/rigl adds noise). A layer without a
    gradient is left as it is. `seed` makes the random choices, equally on every device and rank. `pattern`,
    `distribution` ("erk" or "uniform") and `layer_sparsity` are described in `sparsekern.methods.allocation`.
    """

    BY_GRADIENT = True
    AFTER_STEP = True
    """Whether an update follows the optimizer's step or replaces it."""
    FRACTIONS = (0.3, 0.0)
    ROUND = math.floor
    """How the number of weights to drop becomes whole; the published codes differ."""

    def __init__(
        self,
        sparsity: float,
        schedule: UpdatePlan | UpdateSchedule,
        *,
        drop_fraction: float | None = None,
        last_fraction: float | None = None,
        seed: int = 0,
        pattern: str = "unstructured",
        distribution: str = "erk",
        layer_sparsity: Mapping[str, float] | None = None,
        include: Sequence[str] = (".*",),
        exclude: Sequence[str] = (),
    ):
        allocation = Allocation(pattern, distribution, layer_sparsity, distributions=("erk", "uniform"))
        super().__init__(sparsity, schedule, allocation, include, exclude)
        self.drop_fraction = self.FRACTIONS[0] if drop_fraction is None else drop_fraction
        self.last_fraction = self.FRACTIONS[1] if last_fraction is None else last_fraction
        check_sparsity(self.drop_fraction, "drop_fraction")
        check_sparsity(self.last_fraction, "last_fraction")
        self.seed = seed

    def _resolve(self, steps_per_epoch: int | None) -> UpdateSchedule:
        """Without an update at the end of the run: what it grows would stay zero, and what it drops was of use."""
        schedule = super()._resolve(steps_per_epoch)
        if schedule.start >= schedule.total_steps:
            raise ValueError(f"schedule: its first update must come before the end of the run, got {schedule}")
        return replace(schedule, stop=min(schedule.stop, schedule.total_steps - 1))

    def timeline(self) -> str:
        how = "after the step there" if self.AFTER_STEP else "instead of the step there"
        share = f"drops {self.fraction(0):.6g} of a layer's live weights at first, {self.last_fraction:.6g} at the end"
        return f"{super().timeline()}, each {how}; an update {share}"

    def initial_sparsity(self) -> float:
        """The sparsity of the random masks that training starts with."""
        return self.sparsity

    def _start(self) -> None:
        super()._start()
        scores = self.allocation.random(self.masks, self.seed, 0)
        self.allocation.select(self.masks, self.allocation.budget(self.initial_sparsity()), scores)
        self._hold_zero()

    def fraction(self, step: int) -> float:
        """The share of live weights that an update at `step` drops."""
        return cosine(step / max(self.schedule.stop, 1), self.drop_fraction, self.last_fraction)

    def _steps(self) -> int:
        """The number of steps that the update of the step now being taken would have behind it."""
        return self.position + self.AFTER_STEP

    def needs_dense_gradient(self) -> bool:
        return self.BY_GRADIENT and self._waiting(self._steps())

    def _before_step(self) -> bool:
        return not self.AFTER_STEP and self._waiting(self._steps()) and not self._overflowed() and self._update()

    def _after_step(self) -> None:
        if self.AFTER_STEP and self._waiting(self._steps()) and self._good_step():
            self._update()

    def _update(self) -> bool:
        """Drop and grow, unless there is no gradient to grow by."""
        growth = self._growth()
        if growth:
            self._prepare()
            self._regrow(self.fraction(self._steps()), growth)
            self._made(self._steps())
        return bool(growth)

    def _growth(self) -> dict[str, Tensor]:
        """What ranks the weights to grow, by magnitude, in the memory layout of the parameter."""
        if not self.BY_GRADIENT:
            return self.allocation.random(self.masks, self.seed, 1 + self.updates)
        parameters = {name: self.masks.parameter(name) for name in self.masks}
        return {name: as_layout(p.grad, p) for name, p in parameters.items() if p.grad is not None}

    def _prepare(self) -> None:
        """What a method does in an update before weights are dropped."""

    @torch.no_grad()
    def _regrow(self, fraction: float, growth: Mapping[str, Tensor]) -> None:
        names, pattern = list(growth), self.allocation.pattern
        weights = [self.masks.parameter(name).detach() for name in names]
        before = [self.masks.packed(name) for name in names]
        live = [self.allocation.live(self.masks, name) for name in names]
        dropped = [type(self).ROUND(fraction * count) for count in live]
        keep = [count - drop for count, drop in zip(live, dropped, strict=True)]
        kept = topk_mask(weights, keep, pattern=pattern, candidates=before)
        free = [_complement(k, w.numel()) for k, w in zip(kept, weights, strict=True)]
        grown = topk_mask([growth[name] for name in names], dropped, pattern=pattern, candidates=free)
        for name, old, k, g in zip(names, before, kept, grown, strict=True):
            # Pruned weights are zero, and so is their momentum unless the optimizer lets it decay.
            if getattr(self.optimizer, "momentum_policy", "mask") != "mask":
                parameter = self.masks.parameter(name)
                fresh = unpack_mask(g & ~old, parameter)
                for buffer in self.momentum(parameter):
                    buffer.masked_fill_(fresh, 0)
            self.masks.set_packed(name, k | g)
        self._hold_zero()


def _complement(packed: Tensor, count: int) -> Tensor:
    """The packed mask of what `packed` leaves out of `count` weights; padding bits stay zero."""
    left = ~packed
    if count % 8:
        left[-1] &= (1 << count % 8) - 1
    return left
