"""A small network, its batches and optimizers, and the checks that every method owes."""

import copy

import torch
from torch import nn

import sparsekern as sk

OPTIMIZERS = {
    "masked": lambda p: sk.MaskedSGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.Flatten(), nn.Linear(160, 6)
    )


def setup(make, kind="masked", model=None):
    model = model or network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    return model, optimizer, make().attach(model, optimizer, verbose=False)


def batch(i):
    g = torch.Generator().manual_seed(i)
    return torch.randn(4, 4, 8, 8, generator=g), torch.randint(6, (4,), generator=g)


def gradients(model, optimizer, i):
    x, y = batch(i)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def iterate(model, optimizer, sparsifier, start, stop):
    for i in range(start, stop):
        gradients(model, optimizer, i)
        optimizer.step()
        sparsifier.step()


def resumed(make, parts, kind="masked"):
    """A fresh model, optimizer and sparsifier that were given the saved state of `parts`."""
    saved = copy.deepcopy([part.state_dict() for part in parts])
    again = setup(make, kind)
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    return again


def check_resume(make, steps, kind="masked", stops=None):
    whole = setup(make, kind)
    iterate(*whole, 0, steps)
    for stop in stops or range(1, steps):
        first = setup(make, kind)
        iterate(*first, 0, stop)
        again = resumed(make, first, kind)
        iterate(*again, stop, steps)
        torch.testing.assert_close(again[0].state_dict(), whole[0].state_dict(), rtol=0, atol=0)
        assert again[2].state_dict()["position"] == steps
        assert again[2].masks.hash() == whole[2].masks.hash()


def check_zero(optimizer, sparsifier):
    """Pruned weights and their momentum are exactly zero."""
    for name in sparsifier.masks:
        pruned, parameter = ~sparsifier.masks.bool(name), sparsifier.masks.parameter(name)
        assert not parameter[pruned].any()
        assert not any(m[pruned].any() for m in sparsifier.momentum(parameter))
