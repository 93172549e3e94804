"""A small network, its batches and optimizers, for the tests of methods."""

import copy

import torch
from torch import nn

import sparsekern as sk

OPTIMIZERS = {
    "masked": lambda p: sk.MaskedSGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "masked-adamw": lambda p: sk.MaskedAdamW(p, lr=0.01),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.Flatten(), nn.Linear(160, 6)
    )


def batch(i):
    g = torch.Generator().manual_seed(i)
    return torch.randn(4, 3, 8, 8, generator=g), torch.randint(6, (4,), generator=g)


def iterate(model, optimizer, sparsifier, start, stop):
    for i in range(start, stop):
        x, y = batch(i)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        sparsifier.step()


def momenta(optimizer, parameter):
    return [v for k, v in optimizer.state[parameter].items() if k in ("momentum_buffer", "exp_avg")]


def resumed_from(parts, again):
    saved = copy.deepcopy([part.state_dict() for part in parts])
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    return again


def assert_pruned_are_zero(model, optimizer, sparsifier):
    for name in sparsifier.masks:
        parameter, pruned = sparsifier.masks.parameter(name), ~sparsifier.masks.bool(name)
        assert not parameter[pruned].any()
        assert not any(m[pruned].any() for m in momenta(optimizer, parameter))


def assert_compiles_once(setup, steps):
    """A compiled model trains as the plain one, without a graph break, and is compiled only before the first step."""
    model, optimizer, sparsifier = setup()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    iterate(compiled, optimizer, sparsifier, 0, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        iterate(compiled, optimizer, sparsifier, 1, steps)
    plain = setup()
    iterate(*plain, 0, steps)
    torch.testing.assert_close(model.state_dict(), plain[0].state_dict())
