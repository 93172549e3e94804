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
from sparsekern.methods.effective import (
    EffectiveSparsifier,
    fill_shrunk,
    only_unstructured,
    straight_through,
    to_device,
)
from sparsekern.methods.repeated import Ramped
from sparsekern.ops import topk_bounds
from sparsekern.phases import Dense, Phase, Sparse
from sparsekern.updates import UpdatePlan, UpdateSchedule


def soft_threshold(weight: Tensor, threshold: Tensor) -> Tensor:
    """The forward weight of ST-3: soft-thresholded, each output channel (dim 0) brought back to about its old size.

    The scale of a channel is 1.01 / (r + 0.01), r the share of its mean magnitude that |w| > threshold keeps.
    """
    size = weight.abs()
    kept = torch.where(size > threshold, size, 0)
    dims = tuple(range(1, weight.dim()))
    share = (kept.mean(dims, keepdim=True) + 1e-6) / (size.mean(dims, keepdim=True) + 1e-6)
    return 1.01 / (share + 0.01) * weight.sign() * torch.where(size > threshold, size - threshold, 0)


def fill_soft_threshold(weight: Tensor, threshold: float, out: Tensor, size: Tensor) -> None:
    """Write the value of `soft_threshold` into `out`; `size` is another tensor laid out as `weight`, to work in."""
    dims = tuple(range(1, weight.dim()))
    whole = torch.abs(weight, out=size).mean(dims, keepdim=True).add_(1e-6)
    share = torch.hardshrink(size, threshold, out=out).mean(dims, keepdim=True).add_(1e-6).div_(whole)
    fill_shrunk(weight, threshold, out)
    out.mul_(1.01 / share.add_(0.01))


def quantile(values: Sequence[Tensor], ratio: float) -> Tensor:
    """The `ratio` quantile of the magnitudes of all `values` together, by linear interpolation, in float64.

    As torch.quantile, which is limited to 2^24 values and sorts them. There must be a value, and no NaN.
    """
    total = sum(v.numel() for v in values)
    place = ratio * (total - 1)
    below = math.floor(place)
    high, low = topk_bounds(values, total - 1 - below).unbind()
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
    _fills_on_gpu = False  # the threshold is a number to these kernels

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
        self._update()

    @torch.no_grad()
    def _update(self) -> None:
        weights = {name: self.masks.parameter(name) for name in self.masks}
        factors = {name: math.sqrt(sum(w.shape)) if self.sigma else 1.0 for name, w in weights.items()}
        ratio = self.ramp(self.position, self.sparsity)
        threshold = None
        if ratio and any(w.numel() for w in weights.values()):
            values = [w.detach() for w in weights.values()]
            if self.sigma:
                values = [
                    torch.mul(w, factors[name], out=self.memory.own(f"{name} ranked", w))
                    for name, w in zip(weights, values, strict=True)
                ]
            threshold = quantile(values, ratio)
        for name, w in weights.items():
            value = 0.0 if threshold is None else threshold / factors[name]
            self.thresholds[name] = torch.as_tensor(value, dtype=w.dtype, device=w.device)

    def effective(self, name: str, weight: Tensor) -> Tensor:
        from_store = weight.detach()
        return straight_through(weight, soft_threshold(from_store, to_device(self.thresholds[name], weight)))

    def _fill(self, name: str, weight: Tensor, out: Tensor) -> None:
        fill_soft_threshold(weight, float(self.thresholds[name]), out, self.memory.workspace(weight))

    def _cause(self, name: str) -> Any:
        return float(self.thresholds[name])

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
            for name, old in self.thresholds.items():
                self.thresholds[name] = given[name].to(old.device, old.dtype).clone()

        return install
