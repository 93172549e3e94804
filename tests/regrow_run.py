"""A schedule of 12 steps on the small network of `method_steps`, for the tests of methods that drop and grow."""

from method_steps import OPTIMIZERS, network

import sparsekern as sk
from sparsekern.updates import UpdateSchedule

SCHEDULE = UpdateSchedule(start=3, stop=9, every=3, total_steps=12)
METHODS = {"rigl": sk.RigL, "set": sk.SET, "itop": sk.RigLITOP, "granet": sk.GraNet}


def setup(method="rigl", kind="masked", schedule=SCHEDULE, sparsity=0.8, **kwargs):
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    return model, optimizer, METHODS[method](sparsity, schedule, **kwargs).attach(model, optimizer, verbose=False)


def live(sparsifier):
    return [sparsifier.allocation.live(sparsifier.masks, name) for name in sparsifier.masks]
