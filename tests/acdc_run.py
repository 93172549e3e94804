"""A schedule of 14 steps on the small network of `method_steps`, for the tests of AC/DC."""

from method_steps import OPTIMIZERS, network

import sparsekern as sk
from sparsekern.phases import PhaseSchedule, PhaseSpan

SCHEDULE = PhaseSchedule(
    (
        PhaseSpan(0, 3, sk.Dense()),
        PhaseSpan(3, 6, sk.Sparse(0.9)),
        PhaseSpan(6, 9, sk.Dense()),
        PhaseSpan(9, 14, sk.Sparse(0.9)),
    )
)


def setup(kind="masked", **kwargs):
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    sparsifier = sk.ACDC(0.9, SCHEDULE, **kwargs).attach(model, optimizer, verbose=False)
    return model, optimizer, sparsifier


def zeros(sparsifier):
    return sum(int((sparsifier.masks.parameter(n) == 0).sum()) for n in sparsifier.masks)
