"""ST-3 and ST-3-sigma: soft thresholding with straight-through gradients (WACV 2023; vanderschuea/stthree).

The forward weight is scale_o * sign(w) * (|w| - th) where |w| > th, else 0; gradients pass to all of w. One global
threshold rises with the ratio of pruned weights, so the mask moves freely to the end of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekern.distributions import check_sparsity
from sparsekern.methods.effective import EffectiveSparsifier, only_unstructured, straight_through, to_device
from sparsekern.methods.layer_calls import shrink_layers
from sparsekern.methods.repeated import Ramped
from sparsekern.ops import soft_threshold_, topk_bounds
from sparsekern.phases import Dense, Phase, Sparse
from sparsekern.updates import UpdatePlan, UpdateSchedule


def soft_threshold(weight: Tensor, threshold: Tensor) -> Tensor:
    """The forward weight of ST-3: soft-thresholded, each output channel (dim 0) brought back to about its old size.

    The scale of a channel is 1.01 / (r + 0.01), r the share of its mean magnitude that |w| > threshold keeps.
    """
    out = torch.empty_like(weight)
    # A compiled model takes the formula into its graph.
    run = soft_threshold_.reference if torch.compiler.is_compiling() else soft_threshold_
    run([out], [weight], [threshold], [], rescale=True)
    return out


def quantile(values: Sequence[Tensor], ratio: float, factors: Sequence[float] = ()) -> Tensor:
    """The `ratio` quantile of the magnitudes of all `values` together, by linear interpolation, in float64.

    With `factors`, one per tensor, of |factor * value|. As torch.quantile, which is limited to 2^24 values and sorts
    them. There must be a value, and no NaN.
    """
    total = sum(v.numel() for v in values)
    place = ratio * (total - 1)
    below = math.floor(place)
    high, low = topk_bounds(values, total - 1 - below, factors).unbind()
    if bool(low.isnan()):
        raise ValueError("weights: NaN among them, so that there is no threshold: expected numbers")
    # At ratio 1 nothing lies above.
    return torch.where(high.isfinite(), low + (place - below) * (high - low), low)


class ST3(Ramped, EffectiveSparsifier):
    """Prunes to `sparsity`, the ratio rising by the cubic curve over `schedule` and then held.

    `schedule` is an `update_schedule(epochs)`, by default from 5% to 50% of the run, every step. `sigma` ranks
    |w| * sqrt(sum of the weight's dimensions), which spares layers with few weights and saves more operations: the
    variant that arXiv 2308.02060 compares. The ranking is global and of single weights; other patterns are refused,
    since the threshold is subtracted from each weight. The final sparsity is exact but for ties.
    """

    DEFAULTS = (0.05, 0.5, 1)

    def __init__(
        self,
        sparsity: float,
        schedule: UpdatePlan | UpdateSchedule,
        *,
        sigma: bool = False,
        pattern: str = "unstructured",
        include: Sequence[str] = (".*",),
        exclude: Sequence[str] = (),
    ):
        only_unstructured(pattern, "ST-3 subtracts a threshold from each weight")
        if check_sparsity(sparsity) == 1:
            raise ValueError("sparsity must be below 1 for ST-3, which rescales what is left, got 1")
        self.sparsity, self.sigma = sparsity, sigma
        super().__init__(self._check_schedule(schedule), include=include, exclude=exclude)

    @property
    def phase(self) -> Phase:
        ratio = self.ramp(self.position, self.sparsity)
        return Sparse(ratio) if ratio else Dense()

    def _begin(self) -> None:
        self.updated = 0
        self.thresholds: dict[str, Tensor] = {}
        self._changes = 0
        self._update()

    @torch.no_grad()
    def _update(self) -> None:
        weights = {name: self.masks.parameter(name) for name in self.masks}
        factors = {name: math.sqrt(sum(w.shape)) if self.sigma else 1.0 for name, w in weights.items()}
        ratio = self.ramp(self.position, self.sparsity)
        threshold = None
        if ratio and any(w.numel() for w in weights.values()):
            values = [w.detach() for w in weights.values()]
            threshold = quantile(values, ratio, list(factors.values()) if self.sigma else ())
        self._changes += 1
        for name, w in weights.items():
            value = 0.0 if threshold is None else threshold / factors[name]
            self.thresholds[name] = torch.as_tensor(value, dtype=w.dtype, device=w.device)

    def effective(self, name: str, weight: Tensor) -> Tensor:
        from_store = weight.detach()
        return straight_through(weight, soft_threshold(from_store, to_device(self.thresholds[name], weight)))

    def _fill(self, names: Sequence[str], weights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        thresholds = [to_device(self.thresholds[n], w) for n, w in zip(names, weights, strict=True)]
        shrink_layers(outs, weights, thresholds, rescale=True)

    def _cause(self, name: str) -> Any:
        return self._changes

    def masks_are_current(self) -> bool:
        return False  # they follow from weights, which move in every step

    def _sync_masks(self) -> None:
        for name in self.masks:
            weight = self.masks.parameter(name).detach()
            self.masks.set(name, weight.abs() > to_device(self.thresholds[name], weight))

    def _extra_state(self) -> dict[str, Any]:
        return {**super()._extra_state(), "thresholds": {n: t.clone() for n, t in self.thresholds.items()}}

    def _load_extra_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        rest, given = super()._load_extra_state(state), state["thresholds"]
        if not isinstance(given, Mapping) or set(given) != set(self.thresholds):
            raise ValueError(f"state['thresholds'] must have the entries {list(self.thresholds)}, got {given!r:.80}")
        for name, value in given.items():
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ValueError(f"state['thresholds'][{name!r}] must be one number in a tensor, got {value!r:.80}")

        def install() -> None:
            rest()
            self._changes += 1
            for name, old in self.thresholds.items():
                self.thresholds[name] = given[name].to(old.device, old.dtype).clone()

        return install
