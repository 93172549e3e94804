"""FLOPs counted along a run: which of the three passes of a step are sparse."""

import pytest
from every_method import STEPS, setup
from method_steps import batch, iterate

from sparsekern.flops import forward_flops
from sparsekern.training_cost import TrainingCost


def live(masks):
    return {name: int(masks.bool(name).sum()) for name in masks}


@pytest.mark.parametrize("name", ["dense", "acdc", "rigl", "topkast", "powerpropagation", "str"])
def test_steps_cost_what_their_masks_and_gradients_cost(name):
    model, optimizer, sparsifier = setup(name)
    cost, want = TrainingCost(model, batch(0)[0]), 0.0
    flops = lambda masks: forward_flops(cost.costs, live(masks))  # noqa: E731
    for i in range(STEPS):
        forward = flops(sparsifier.forward_masks())
        if name == "topkast":
            gradient = flops(sparsifier.backward_masks)
        else:  # updates of RigL replace steps 2, 4 and 6
            gradient = cost.dense if name == "str" or (name == "rigl" and i in (2, 4, 6)) else forward
        want += 2 * forward + gradient
        cost.add_step(sparsifier)
        assert cost.spent == pytest.approx(want, rel=1e-12)
        iterate(model, optimizer, sparsifier, i, i + 1)
    assert cost.spent < 3 * STEPS * cost.dense or name == "dense"
