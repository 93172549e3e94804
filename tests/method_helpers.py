"""The checks that several methods owe, over the network of method_steps."""

import torch
from method_steps import OPTIMIZERS, batch, iterate, network, resumed_from
from torch import nn


def setup(make, kind="masked", model=None):
    model = model or network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    return model, optimizer, make().attach(model, optimizer, verbose=False)


def gradients(model, optimizer, i):
    x, y = batch(i)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


def check_resume(make, steps, kind="masked", stops=None):
    """Going on from the saved state at any step ends bit for bit where the run without a break ends."""
    whole = setup(make, kind)
    iterate(*whole, 0, steps)
    for stop in stops or range(1, steps):
        first = setup(make, kind)
        iterate(*first, 0, stop)
        again = resumed_from(first, setup(make, kind))
        iterate(*again, stop, steps)
        torch.testing.assert_close(again[0].state_dict(), whole[0].state_dict(), rtol=0, atol=0)
        check_equal(again[2].state_dict(), whole[2].state_dict())


def check_equal(got, want):
    """Two states of numbers, strings and tensors, nested in mappings and lists, agree bit for bit."""
    assert type(got) is type(want)
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            check_equal(got[key], want[key])
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            check_equal(g, w)
    else:
        assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want


def check_zero(optimizer, sparsifier):
    """Pruned weights and their momentum are exactly zero."""
    for name in sparsifier.masks:
        pruned, parameter = ~sparsifier.masks.bool(name), sparsifier.masks.parameter(name)
        assert not parameter[pruned].any()
        assert not any(m[pruned].any() for m in sparsifier.momentum(parameter))
