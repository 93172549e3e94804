"""What the base class of all methods does for a method that needs the gradients of a step."""

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.methods import Sparsifier
from sparsekern.phases import PhaseSchedule, PhaseSpan

SCHEDULE = PhaseSchedule((PhaseSpan(0, 10, sk.Dense()),))


class ReplacesThirdStep(Sparsifier):
    """Reads the gradients of the third step, which then changes nothing, and notes what each step shows."""

    def _start(self):
        self.masks.set("1.weight", torch.arange(16).reshape(4, 4) % 4 == 0)
        self._hold_zero()
        self.seen = []

    def needs_dense_gradient(self):
        return self.position == 2

    def _before_step(self):
        self.seen.append(("before", self.masks.parameter("1.weight").grad is not None))
        return self.position == 2

    def _after_step(self):
        self.seen.append(("after", self.masks.parameter("1.weight").grad is not None))


def setup(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = optimizer(model.parameters())
    return model, optimizer, ReplacesThirdStep(SCHEDULE).attach(model, optimizer, verbose=False)


OPTIMIZERS = [
    lambda p: sk.MaskedSGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.AdamW(p, lr=0.1),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replaced_step_changes_nothing_and_gives_the_gradients_back(optimizer):
    model, optimizer, sparsifier = setup(optimizer)
    for i in range(4):
        before = [p.clone() for p in model.parameters()]
        optimizer.zero_grad()
        model(torch.full((2, 4), 0.5)).square().sum().backward()
        gradients = [p.grad for p in model.parameters()]
        optimizer.step()
        sparsifier.step()
        assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
        same = [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert same == [i == 2] * 4
        assert not model[1].weight[~sparsifier.masks.bool("1.weight")].any()
    assert sparsifier.seen == [("before", True), ("after", True)] * 4


def test_closure_is_refused_where_the_gradients_are_read_before_the_step():
    model, optimizer, sparsifier = setup(OPTIMIZERS[1])

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
        sparsifier.step()
    with pytest.raises(RuntimeError, match="without a closure for ReplacesThirdStep"):
        optimizer.step(closure)
    with pytest.raises(RuntimeError, match="without a closure"):
        optimizer.step(closure=closure)


def test_accelerated_layers_run_dense_where_pruned_weights_need_their_gradient():
    model, optimizer, sparsifier = setup(OPTIMIZERS[0])
    sk.nn.accelerate(model, sparsifier, choose=lambda *_: True)
    pruned = ~sparsifier.masks.bool("1.weight")
    for i in range(4):
        optimizer.zero_grad()
        model(torch.full((2, 4), 0.5)).square().sum().backward()
        assert bool(model[1].weight.grad[pruned].any()) == (i == 2)
        with torch.no_grad():
            model(torch.ones(2, 4))
        assert dict(sk.nn.acceleration_report(model).layers)["1"].startswith("sparse")
        optimizer.step()
        sparsifier.step()
