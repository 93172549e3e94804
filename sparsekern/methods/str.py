"""STR: soft thresholds that are learned, one per layer (arXiv 2002.03231; RAIVNLab/STR).

The forward weight is sign(w) * relu(|w| - sigmoid(t)). Weight decay on t drives the sparsity up: from a very negative
start, where sigmoid(t) is 0, t rises until its gradient holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsekern.methods.effective import EffectiveSparsifier, only_unstructured, to_device
from sparsekern.methods.held import Constant
from sparsekern.methods.layer_calls import shrink_layers
from sparsekern.methods.learnables import Learnables, check_number
from sparsekern.methods.memory import Memory
from sparsekern.ops import signed_sums
from sparsekern.phases import Dense


class _Shrunk(torch.autograd.Function):
    """`value`, which is `weight` with a soft threshold: gradients pass where it cuts nothing off."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor, threshold: Tensor, memory: Memory, name: str) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.threshold, ctx.memory, ctx.name = threshold, memory, name
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        result = ctx.memory.gradient(ctx.name, weight)
        shrink_layers([result], [weight], [ctx.threshold], [gradient])
        return result, None, None, None, None


class STR(EffectiveSparsifier):
    """Trains a threshold per prunable weight. The sparsity is found, not chosen: `decay` and `start` decide it.

    Defaults are those of the published 90.23% ResNet-50 run at learning rate 0.256. The thresholds have an SGD of their
    own with `momentum`, weight decay `decay` and `lr_ratio` times the learning rate of the model's optimizer, whose
    weight decay should be `decay` too. A threshold's gradient follows from that of its weight: a clipped or scaled
    gradient clips or scales both. Patterns other than "unstructured" are refused.
    """

    def __init__(
        self,
        *,
        start: float = -3200.0,
        decay: float = 2.251757813e-5,
        momentum: float = 0.875,
        lr_ratio: float = 1.0,
        pattern: str = "unstructured",
        include: Sequence[str] = (".*",),
        exclude: Sequence[str] = (),
    ):
        only_unstructured(pattern, "STR subtracts a threshold from each weight")
        self.start = check_number("start", start, -float("inf"))
        self.decay, self.momentum_factor = check_number("decay", decay), check_number("momentum", momentum)
        self.lr_ratio = check_number("lr_ratio", lr_ratio)
        # Until the first thresholds matter it is dense, and nobody knows when that is.
        self.phase = Dense()
        super().__init__(Constant(self.phase), include=include, exclude=exclude)

    def timeline(self) -> str:
        return f"thresholds are learned from sigmoid({self.start:g}) on; the sparsity is what they make it"

    def _begin(self) -> None:
        starts = {n: torch.full((1,), float(self.start), device=self.masks.parameter(n).device) for n in self.masks}
        self.learned = Learnables(starts, self.lr_ratio, self.momentum_factor, self.decay)
        self._present: dict[str, Tensor] = {}

    def threshold(self, name: str, weight: Tensor) -> Tensor:
        """sigmoid(t) of that weight, on its device and in its type."""
        return to_device(self.learned.values[name].detach(), weight).sigmoid().to(weight.dtype)

    def effective(self, name: str, weight: Tensor) -> Tensor:
        return weight.sign() * (weight.abs() - self.threshold(name, weight)).relu()

    def _fill(self, names: Sequence[str], weights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        # One for both, in as few passes of small tensors as can be.
        self._present.update({n: self.threshold(n, w) for n, w in zip(names, weights, strict=True)})
        shrink_layers(outs, weights, [self._present[n] for n in names])

    def _connect(self, name: str, weight: Tensor, value: Tensor) -> Tensor:
        return _Shrunk.apply(weight, value, self._present[name], self.memory, name)

    def _cause(self, name: str) -> Any:
        return self.learned.values[name]._version

    @torch.no_grad()
    def _before_step(self) -> bool:
        names, weights, gradients = self._gradients()
        by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, weight in enumerate(weights):
            by_kind.setdefault((weight.device, weight.dtype), []).append(i)
        of_thresholds: dict[str, Tensor] = {}
        for chosen in by_kind.values():
            # The weight's gradient is 0 where the threshold cuts it off, so this sums over the live weights.
            sums = signed_sums([gradients[i] for i in chosen], [weights[i] for i in chosen]).float()
            slope = torch.cat([to_device(self.learned.values[names[i]].detach(), sums) for i in chosen]).sigmoid()
            found = (slope * (slope - 1) * sums).split(1)
            of_thresholds.update(zip((names[i] for i in chosen), found, strict=True))
        if weights:
            self.learned.step(self.optimizer, weights[0], of_thresholds)
        return False

    def masks_are_current(self) -> bool:
        return False  # they follow from weights and thresholds, which move in every step

    @torch.no_grad()
    def _sync_masks(self) -> None:
        for name in self.masks:
            weight = self.masks.parameter(name).detach()
            self.masks.set(name, weight.abs() > self.threshold(name, weight))

    def _extra_state(self) -> dict[str, Any]:
        return {"learned": self.learned.state_dict()}

    def _load_extra_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        return self.learned.prepare(state["learned"])
