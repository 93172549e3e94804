"""Every method by name, attached to the small network for 8 steps in which something happens."""

import copy

import pytest
import torch
from method_helpers import check_zero
from method_steps import OPTIMIZERS, network

import sparsekern as sk
from sparsekern.methods.effective import EffectiveSparsifier
from sparsekern.updates import UpdateSchedule

STEPS = 8
UPDATES = {"schedule": UpdateSchedule(2, 6, 2, STEPS)}
PHASES = {"schedule": sk.acdc_schedule(STEPS, rule="sparseml", start=0, freq=2, end=STEPS).resolve(1, 0.5)}
# Defaults are made for longer runs.
OPTIONS = {
    **dict.fromkeys(["acdc", "powerpropagation"], PHASES),
    **dict.fromkeys(["gmp", "extended-gmp", "rigl", "set", "rigl-itop", "st3", "st3-sigma"], UPDATES),
    **dict.fromkeys(["granet", "obert"], {**UPDATES, "initial": 0.3}),
    "soft-movement": {**UPDATES, "threshold": 0.5, "penalty": 1.0, "lr_ratio": 1.0},
    "movement": {**UPDATES, "momentum": 0.5},
    **dict.fromkeys(["topkast", "powerpropagation-topkast"], {"every": 2, "backward_sparsity": 0.25}),
    "str": {"start": -3.0, "decay": 0.05},
    "step": {"switch": 3},
}
# Takes loss scale and overflow from GradScaler as MaskedSGD does; the others of torch are not called after an overflow.
KINDS = {**OPTIMIZERS, "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True)}
# Masks of these never change; those of the others do within 8 steps.
CONSTANT = {"dense", "one-shot", "lottery-ticket", "fixed-mask"}
every_method = pytest.mark.parametrize("name", sk.METHODS)


def kinds(*names):
    """Each method with each of these optimizers, those it refuses left out."""
    cases = [(m, k) for m in sk.METHODS for k in names if sk.METHODS[m].optimizer == "any" or k.startswith("adamw")]
    return pytest.mark.parametrize(("name", "kind"), cases)


def ready(name, model):
    """The optimizer, and what a method needs to find in a model or among its arguments."""
    entry = sk.METHODS[name]
    options = {"initial": copy.deepcopy(model.state_dict())} if name == "lottery-ticket" else {}
    if entry.start == "sparse":
        with torch.no_grad():
            model[5].weight[0] = 0
    optimizer = torch.optim.Adam if entry.optimizer == "adam" else OPTIMIZERS["masked"]
    return optimizer(model.parameters()), options


def setup(name, kind=None, model=None):
    """The small network, or `model`, with a method attached for 8 steps at 50%."""
    kind = kind or ("adamw" if sk.METHODS[name].optimizer == "adam" else "masked")
    model = network() if model is None else model
    options = {**ready(name, model)[1], **OPTIONS.get(name, {})}
    optimizer = KINDS[kind](model.parameters())
    sparsifier = sk.build_method(name, 0.5, epochs=STEPS, steps_per_epoch=1, **options)
    return model, optimizer, sparsifier.attach(model, optimizer, 1, verbose=False)


def masks_of(sparsifier):
    return {n: entry["bits"] for n, entry in sparsifier.state_dict()["masks"].items()}


def check_sparse(model, optimizer, sparsifier):
    """What the masks leave out is exactly zero: weight and momentum, or the weight that layers compute with."""
    if not isinstance(sparsifier, EffectiveSparsifier):
        check_zero(optimizer, sparsifier)
    sparsifier.state_dict()  # masks that follow from the weights are brought up to date
    state = sparsifier.sparse_state_dict()
    for name in sparsifier.masks:
        assert not state[name][~sparsifier.masks.bool(name)].any()
