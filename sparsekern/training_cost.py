"""The FLOPs of a training run, counted along the way as `sparsekern.flops` counts them."""

from __future__ import annotations

from torch import Tensor, nn

from sparsekern.flops import forward_flops, layer_costs
from sparsekern.masks import MaskSet
from sparsekern.methods import Sparsifier


class TrainingCost:
    """FLOPs per sample: `dense` of one forward pass without masks, `spent` by all steps so far.

    A step costs a forward pass and the gradients of inputs, both with the live weights, and the gradients of weights:
    of all of them where the method reads those of pruned ones, of its `backward_masks` if it has such, else of the
    live ones.
    """

    def __init__(self, model: nn.Module, images: Tensor):
        self.costs, self.spent = layer_costs(model, images), 0.0
        self.dense = forward_flops(self.costs)
        self._known: dict[str, tuple[MaskSet, int, float]] = {}

    def forward(self, sparsifier: Sparsifier) -> float:
        """Of one forward pass with the present masks."""
        return self._with("forward", sparsifier.forward_masks())

    def add_step(self, sparsifier: Sparsifier) -> None:
        """Count the step that is about to be taken."""
        sparse = self.forward(sparsifier)
        backward = getattr(sparsifier, "backward_masks", None)
        if backward is not None:
            weight_gradient = self._with("backward", backward)
        else:
            weight_gradient = self.dense if sparsifier.needs_dense_gradient() else sparse
        self.spent += 2 * sparse + weight_gradient

    def _with(self, role: str, masks: MaskSet) -> float:
        # Masks seldom change from step to step, and counting their bits costs more than asking for their versions.
        version = sum(masks.version(name) for name in masks)
        known = self._known.get(role)
        if known is None or known[0] is not masks or known[1] != version:
            live = {name: round(masks.density(name) * masks.parameter(name).numel()) for name in masks}
            self._known[role] = known = masks, version, forward_flops(self.costs, live)
        return known[2]
