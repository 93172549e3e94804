"""Movement pruning: weights are kept that move away from zero (arXiv 2005.07683; huggingface/transformers).

Every weight has a score S, whose gradient is that of the loss by the masked weight, times the weight, straight through
the mask. S therefore sums up -g * w. The hard form keeps the best scores, the soft one those above a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekern.distributions import check_sparsity, keep_count, uniform
from sparsekern.methods.allocation import PATTERNS
from sparsekern.methods.effective import EffectiveSparsifier, only_unstructured
from sparsekern.methods.learnables import Learnables, check_number
from sparsekern.methods.repeated import Ramped
from sparsekern.ops import threshold_mask, topk_mask
from sparsekern.ops.movement_step import launch as step_scores
from sparsekern.ops.operands import same_layout
from sparsekern.ops.topk_mask import group_count
from sparsekern.phases import Dense, Phase, Sparse
from sparsekern.updates import UpdatePlan, UpdateSchedule

_PUBLISHED_RATIO = 1e-2 / 3e-5


class _Movement(Ramped, EffectiveSparsifier):
    """Scores, their optimizer and their gradients."""

    DEFAULTS = (0.1, 0.8, 1)

    def _begin(self) -> None:
        self.updated = 0
        zeros = {name: torch.zeros_like(self.masks.parameter(name), dtype=torch.float32) for name in self.masks}
        self.learned = Learnables(zeros, self.lr_ratio, self.momentum_factor)

    def effective(self, name: str, weight: Tensor) -> Tensor:
        return self.masked(name, weight)

    def _fill(self, names: Sequence[str], weights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        self._fill_masked(names, weights, outs)

    def _scores(self, name: str) -> Tensor:
        """In the layout and on the device of the weight, which packed masks have."""
        weight, value = self.masks.parameter(name), self.learned.values[name].detach()
        if value.device == weight.device and same_layout(value, weight):
            return value
        return torch.empty_like(weight, dtype=torch.float32).copy_(value)

    def _penalty(self, name: str) -> float:
        """The factor of sigmoid'(score) in the gradient of each score."""
        return 0.0

    @torch.no_grad()
    def _before_step(self) -> bool:
        names, weights, gradients = self._gradients()
        # One pass for what the published methods do. Another type of weights, or momentum, takes several.
        if not self.momentum_factor and all(w.dtype != torch.float64 for w in weights):
            return self._step_scores(names, weights, gradients)
        of_scores = {}
        for name, weight, gradient in zip(names, weights, gradients, strict=True):
            of_scores[name] = torch.mul(gradient, weight, out=self.memory.own(f"{name} score", weight, torch.float32))
            if self._penalty(name):
                score = self._scores(name)
                slope = score.sigmoid() * (-score).sigmoid()
                of_scores[name].add_(self._scaled(self._penalty(name) * slope))
        self._combine(gradients, gradients, [], self.masks, names, live=(1, 0), pruned=(0, 0))
        if weights:
            self.learned.step(self.optimizer, weights[0], of_scores)
        return False

    def _step_scores(self, names: list[str], weights: list[Tensor], gradients: list[Tensor]) -> bool:
        by_device: dict[torch.device, list[int]] = {}
        for i, weight in enumerate(weights):
            by_device.setdefault(weight.device, []).append(i)
            self.learned.values[names[i]].data = self._scores(names[i])  # in the order of the mask from now on
        for device, chosen in by_device.items():
            own = [names[i] for i in chosen]
            scaler = {n: getattr(self.optimizer, n, None) for n in ("grad_scale", "found_inf")}
            step_scores(
                [self.learned.values[n].detach() for n in own], [gradients[i] for i in chosen],
                [weights[i] for i in chosen], [self.masks.packed(n) for n in own],
                lr=self.learned.rate(self.optimizer, weights[0]), penalties=[self._penalty(n) for n in own],
                **{n: None if t is None else t.to(device) for n, t in scaler.items()},
            )  # fmt: skip
        return False

    def _extra_state(self) -> dict[str, Any]:
        return {**super()._extra_state(), "learned": self.learned.state_dict()}

    def _load_extra_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        rest, learned = super()._load_extra_state(state), self.learned.prepare(state["learned"])

        def install() -> None:
            rest()
            learned()

        return install


class Movement(_Movement):
    """Hard movement pruning: forward with the weights of the highest scores, down to `sparsity`.

    The pruned share rises by the cubic curve over `schedule`, an `update_schedule(epochs)`, by default from 10% to 80%
    of the run, every step; masks then move to the end. `distribution` is "uniform" (published: the best of each layer)
    or "global". Blocks are ranked by the sum of their scores; n:m patterns are refused, for their sparsity cannot rise.
    Scores start at 0 and have an SGD of their own with `momentum` and `lr_ratio` times the learning rate (published:
    Adam at this ratio; with plain SGD the hard masks do not depend on it). Pruned weights get no gradient.
    """

    def __init__(
        self,
        sparsity: float,
        schedule: UpdatePlan | UpdateSchedule,
        *,
        pattern: str = "unstructured",
        distribution: str = "uniform",
        lr_ratio: float = _PUBLISHED_RATIO,
        momentum: float = 0.0,
        include: Sequence[str] = (".*",),
        exclude: Sequence[str] = (),
    ):
        check_sparsity(sparsity)
        for name, value, allowed in (
            ("pattern", pattern, PATTERNS),
            ("distribution", distribution, ("uniform", "global")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        self.sparsity, self.pattern, self.distribution = sparsity, pattern, distribution
        self.lr_ratio, self.momentum_factor = check_number("lr_ratio", lr_ratio), check_number("momentum", momentum)
        super().__init__(self._check_schedule(schedule), include=include, exclude=exclude)

    def _begin(self) -> None:
        super()._begin()
        self._groups = {n: group_count(tuple(self.masks.parameter(n).shape), self.pattern) for n in self.masks}

    @property
    def phase(self) -> Phase:
        sparsity = self.ramp(self.position, self.sparsity)
        return Sparse(sparsity) if sparsity else Dense()

    @torch.no_grad()
    def _update(self) -> None:
        sparsity = self.ramp(self.position, self.sparsity)
        if self.distribution == "uniform":
            keep = list(uniform(self._groups, sparsity).values())
        else:
            keep = keep_count(sum(self._groups.values()), sparsity)
        scores = [self._scores(n) for n in self.masks]
        for name, packed in zip(
            self.masks, topk_mask(scores, keep, pattern=self.pattern, magnitude=False), strict=True
        ):
            self.masks.set_packed(name, packed)
        self._refresh_kept()


class SoftMovement(_Movement):
    """Soft movement pruning: forward with the weights whose sigmoid(S) exceeds a threshold.

    The sparsity is found, not chosen: a penalty of up to `penalty` times the mean of sigmoid(S), averaged over layers,
    pushes scores down to where the threshold cuts them off. Penalty and threshold rise by the cubic curve over
    `schedule`, as in `Movement`. In every layer at least the share `floor` of its weights stays. Patterns other than
    "unstructured" are refused.
    """

    def __init__(
        self,
        schedule: UpdatePlan | UpdateSchedule,
        *,
        threshold: float = 0.1,
        penalty: float = 400.0,
        floor: float = 0.005,
        lr_ratio: float = _PUBLISHED_RATIO,
        momentum: float = 0.0,
        pattern: str = "unstructured",
        include: Sequence[str] = (".*",),
        exclude: Sequence[str] = (),
    ):
        only_unstructured(pattern, "soft movement pruning compares each score with a threshold")
        check_sparsity(threshold, "threshold")
        check_sparsity(floor, "floor")
        self.final_threshold, self.penalty, self.floor = threshold, check_number("penalty", penalty), floor
        self.lr_ratio, self.momentum_factor = check_number("lr_ratio", lr_ratio), check_number("momentum", momentum)
        super().__init__(self._check_schedule(schedule), include=include, exclude=exclude)

    @property
    def phase(self) -> Phase:
        return Dense() if self.masks.density() == 1 else Sparse(1 - self.masks.density())

    def _penalty(self, name: str) -> float:
        return self.ramp(self.position, self.penalty) / self.masks.parameter(name).numel() / len(self.masks)

    @torch.no_grad()
    def _update(self) -> None:
        threshold = self.ramp(self.position, self.final_threshold)
        # Comparing scores is much cheaper than taking the sigmoid of each.
        least_score = math.log(threshold / (1 - threshold)) if 0 < threshold < 1 else (threshold - 0.5) * math.inf
        scores = {name: self._scores(name) for name in self.masks}
        by_device: dict[torch.device, list[str]] = {}
        for name, score in scores.items():
            by_device.setdefault(score.device, []).append(name)
        for names in by_device.values():
            kept, counts = threshold_mask([scores[n] for n in names], least_score)
            for name, packed, count in zip(names, kept, counts.tolist(), strict=True):
                least = keep_count(scores[name].numel(), 1 - self.floor)
                few = count < least
                self.masks.set_packed(name, topk_mask([scores[name]], least, magnitude=False)[0] if few else packed)
        self._refresh_kept()
