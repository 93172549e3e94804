"""Loops that step twice or never, and damaged state."""

import copy

import pytest
import torch
from acdc_run import setup
from method_steps import OPTIMIZERS, batch, iterate
from torch import nn

import sparsekern as sk


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("cleared", [False, True])
def test_step_twice_or_never_raises(kind, cleared):
    model, optimizer, sparsifier = setup(kind)
    with pytest.raises(RuntimeError, match="must be called once after each optimizer.step"):
        sparsifier.step()
    iterate(model, optimizer, sparsifier, 0, 2)
    if cleared:
        optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="must be called once after each optimizer.step"):
        sparsifier.step()
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    if not cleared:  # a batch of a gradient accumulation is no step
        with pytest.raises(RuntimeError, match="with gradient accumulation"):
            sparsifier.step()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="was not called after the last"):
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    sparsifier.step()
    assert sparsifier.position == 3


def test_bad_state_changes_nothing():
    model, optimizer, sparsifier = setup()
    iterate(model, optimizer, sparsifier, 0, 4)
    good = sparsifier.state_dict()
    for change, words in [
        ({"position": -1}, r"state\['position'\] must be"),
        ({"position": True}, r"state\['position'\] must be"),
        ({"sparsity": 1.5}, r"state\['sparsity'\] must be"),
        ({"stepped": "yes"}, r"state\['stepped'\] must be"),
        ({"masks": {}}, "must hold the parameters"),
        ({"masks": {**good["masks"], "3.weight": {"shape": (10, 8, 3, 3), "bits": torch.zeros(3).byte()}}}, "'bits'"),
        ({"masks": {**good["masks"], "3.weight": None}}, "must hold 'shape' and 'bits'"),
        ({"extra": 1}, "state must hold"),
    ]:
        with pytest.raises(ValueError, match=words):
            sparsifier.load_state_dict({**good, "position": 9, **change})
        assert sparsifier.position == 4 and sparsifier.masks.hash() == good_hash(sparsifier, good)


def good_hash(sparsifier, good):
    again = sk.MaskSet({n: sparsifier.masks.parameter(n) for n in sparsifier.masks})
    again.load_state_dict(good["masks"])
    return again.hash()
