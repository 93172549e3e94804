"""oBERT: gradual pruning by second-order scores (arXiv 2203.07259; neuralmagic/sparseml).

A weight, or a block of four, is scored by what its removal costs the loss in a quadratic model whose Hessian is the
block-diagonal empirical Fisher information; the weights that stay are moved to make up for those that go. Both formulas
are those of the quadratic model, tested against it; they were not compared with the published code, whose defaults for
damping, block and number of gradients these are. A training step stands for one of its calibration gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsekern.methods.fisher import InverseFisher
from sparsekern.methods.gmp import GMP
from sparsekern.methods.learnables import check_number
from sparsekern.updates import UpdatePlan, UpdateSchedule


class OBERT(GMP):
    """GMP's cubic curve from `initial` to `sparsity`, with second-order scores and a compensating update.

    The Fisher information before each pruning step is that of the last `gradients` training steps, or of all since the
    last pruning step if they are fewer; published: 1,024 gradients of calibration batches. `fisher_block` weights form
    a block (default 50, for blocks of four 32); `damp` is added to the diagonal. `pattern` is "unstructured" or "1x4" /
    "block4"; others are refused, their groups do not lie within a block. Gradients of pruned weights are left out: the
    quadratic model is over the live ones. A step that overflowed counts as a gradient of zero.

    Until the first update the model is dense; that update reaches `initial`. By default updates are made at epochs 2,
    6, .. 26 of 30, as published for downstream tasks. Memory while gradients are collected: `fisher_block` float32
    numbers for each prunable weight, which `state_dict` then holds too.
    """

    DEFAULTS = (2 / 30, 26 / 30, 4 / 30)

    def __init__(
        self,
        sparsity: float,
        schedule: UpdatePlan | UpdateSchedule,
        *,
        initial: float = 0.7,
        gradients: int = 1024,
        damp: float = 1e-7,
        fisher_block: int | None = None,
        pattern: str = "unstructured",
        distribution: str = "global",
        layer_sparsity: Mapping[str, float] | None = None,
        include: Sequence[str] = (".*",),
        exclude: Sequence[str] = (),
    ):
        if pattern not in ("unstructured", "1x4", "block4"):
            raise ValueError(
                f"pattern must be 'unstructured', '1x4' or 'block4' for oBERT, whose blocks run along the input axis, "
                f"got {pattern!r}"
            )
        self.group = 1 if pattern == "unstructured" else 4
        self.fisher_block = (50 if self.group == 1 else 32) if fisher_block is None else fisher_block
        for name, value in (("gradients", gradients), ("fisher_block", self.fisher_block)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.fisher_block % self.group:
            raise ValueError(f"fisher_block must be a multiple of 4 with pattern {pattern!r}, got {fisher_block}")
        if not check_number("damp", damp) > 0:
            raise ValueError(f"damp must be greater than 0, got {damp!r}")
        self.gradients, self.damp = gradients, damp
        super().__init__(
            sparsity, schedule, initial=initial, pattern=pattern, distribution=distribution,
            layer_sparsity=layer_sparsity, include=include, exclude=exclude,
        )  # fmt: skip
        self.fishers: dict[str, InverseFisher] = {}

    def _resolve(self, steps_per_epoch: int | None) -> UpdateSchedule:
        self.updates, schedule = 0, self._schedule
        if isinstance(schedule, UpdatePlan):  # the published interval is a share of the run, whatever its length
            schedule = schedule.with_defaults(*self.DEFAULTS).resolve(steps_per_epoch)
            if self._schedule.start is None and schedule.stop:  # in a run of a few steps epoch 2 of 30 is step 0
                schedule = replace(schedule, start=max(1, schedule.start))
        if schedule.start < 1:
            raise ValueError("schedule: its first update must come after at least one step, whose gradient it needs")
        return schedule

    def _start(self) -> None:
        self.allocation.bind(self.model, self.masks)
        self.fishers = {}

    def needs_dense_gradient(self) -> bool:
        return self._window() > 0

    def _window(self) -> int:
        """Of how many steps the Fisher information of the next update is made, if this step is one of them, else 0."""
        steps = self.schedule.steps()
        if self._waiting(self.position):
            return next((fisher.count for fisher in self.fishers.values()), 1)
        made = self.schedule.count(self.position)
        if made >= len(steps):
            return 0
        since = steps[made] - (steps[made - 1] if made else 0)
        window = min(self.gradients, since)
        return window if self.position >= steps[made] - window else 0

    @torch.no_grad()
    def _before_step(self) -> bool:
        window = self._window()
        if not window:
            return False
        scale, found = (getattr(self.optimizer, key, None) for key in ("grad_scale", "found_inf"))
        for name in self.masks:
            weight = self.masks.parameter(name)
            if name not in self.fishers:
                self.fishers[name] = InverseFisher(weight, self.fisher_block, self.group, self.damp, window)
            if weight.grad is not None:
                g = weight.grad if scale is None else weight.grad / scale.to(weight.device, weight.dtype)
                good = g.isfinite().all() if found is None else g.isfinite().all() & (found.to(g.device) == 0)
                pruned = self._pruned_of(name)
                self.fishers[name].add(g.masked_fill(~good if pruned is None else pruned | ~good, 0))
        return False

    @torch.no_grad()
    def _prune(self, step: int) -> None:
        weights = {name: self.masks.parameter(name) for name in self.masks}
        before = {name: self.masks.bool(name) for name in self.masks}
        scores = {n: torch.empty_like(w, dtype=torch.float32).copy_(self._score(n)) for n, w in weights.items()}
        budget = self.allocation.budget(self.at(step), lambda own: self._curve(step, own))
        self.allocation.select(self.masks, budget, scores, nested=True)
        for name, weight in weights.items():
            if name in self.fishers and weight.requires_grad:  # frozen meanwhile: pruned, but not moved
                gone = before[name] & ~self.masks.bool(name)
                weight.add_(self.fishers[name].compensation(weight, gone).to(weight.dtype))
        self.fishers = {}
        self._hold_zero()

    def _score(self, name: str) -> Tensor:
        return self.fishers[name].scores(self.masks.parameter(name))

    def _extra_state(self) -> dict[str, Any]:
        return {**super()._extra_state(), "fishers": {n: (f.count, f.inverse.clone()) for n, f in self.fishers.items()}}

    def _load_extra_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        rest, given, made = super()._load_extra_state(state), state["fishers"], {}
        if not isinstance(given, Mapping) or not set(given) <= set(self.masks):
            raise ValueError(f"state['fishers'] must be of the prunable weights {list(self.masks)}, got {given!r:.80}")
        for name, (count, inverse) in given.items():
            fisher = InverseFisher(self.masks.parameter(name), self.fisher_block, self.group, self.damp, count)
            if inverse.shape != fisher.inverse.shape:
                raise ValueError(
                    f"state['fishers'][{name!r}] must be of shape {tuple(fisher.inverse.shape)}, "
                    f"got {tuple(inverse.shape)}"
                )
            fisher.inverse.copy_(inverse)
            made[name] = fisher

        def install() -> None:
            rest()
            self.fishers = made

        return install
