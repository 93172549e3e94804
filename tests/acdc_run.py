"""A small network, a schedule of 14 steps and the loop that the tests of AC/DC run."""

import torch
from torch import nn

import sparsekern as sk
from sparsekern.schedules import PhaseSchedule, PhaseSpan

SCHEDULE = PhaseSchedule(
    (
        PhaseSpan(0, 3, sk.Dense()),
        PhaseSpan(3, 6, sk.Sparse(0.9)),
        PhaseSpan(6, 9, sk.Dense()),
        PhaseSpan(9, 14, sk.Sparse(0.9)),
    )
)
OPTIMIZERS = {
    "masked": lambda p: sk.MaskedSGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.Flatten(), nn.Linear(160, 6)
    )


def setup(kind="masked", **kwargs):
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    sparsifier = sk.ACDC(0.9, SCHEDULE, **kwargs).attach(model, optimizer, verbose=False)
    return model, optimizer, sparsifier


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


def zeros(sparsifier):
    return sum(int((sparsifier.masks.parameter(n) == 0).sum()) for n in sparsifier.masks)


def momenta(optimizer, parameter):
    return [v for k, v in optimizer.state[parameter].items() if k in ("momentum_buffer", "exp_avg")]
