"""Every method on the sparse kernels computes what it computes without them, at any point of a user's loop."""

import pytest
import torch
from every_method import STEPS, every_method, setup
from method_steps import batch, iterate, network
from torch import nn

import sparsekern as sk


def outputs(name, given=None, freeze=False):
    """All that a loop sees that evaluates after each call, trains on after `finalize`, and evaluates again."""
    model, optimizer, sparsifier = setup(name, model=network().double())
    if given:
        sk.nn.accelerate(model, given(sparsifier), lambda *_: True)
    found, sparse = [], set()

    def look():
        with torch.no_grad():
            found.append(model(batch(99)[0].double()))
        sparse.update(n for n, how in sk.nn.acceleration_report(model).layers if how.startswith("sparse"))

    def train(i):
        x, y = batch(i)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
        look()

    for i in range(STEPS):
        model[3].weight.requires_grad_(not freeze or i < 2)
        train(i)
        sparsifier.step()
        look()
    ran = set(sparse)
    sparsifier.finalize()
    sparse.clear()
    look()
    for i in range(STEPS, STEPS + 3):
        train(i)
    assert not sparse, "after `finalize` nothing holds the zeros"
    return found, list(model.parameters()), ran


@pytest.mark.parametrize("freeze", [False, True])
@every_method
def test_results_agree_with_those_of_dense_kernels(name, freeze):
    plain = outputs(name, None, freeze)
    for given in (lambda sparsifier: sparsifier, lambda sparsifier: sparsifier.masks):
        fast = outputs(name, given, freeze)
        for got, want in zip(fast[:2], plain[:2], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
        assert bool(fast[2]) == (name not in ("dense", "str", "st3", "st3-sigma"))


def test_which_steps_of_rigl_read_the_dense_gradient():
    """Of 8 steps with updates at 2, 4 and 6, all others train on the sparse kernels."""
    model, optimizer, sparsifier = setup("rigl")
    sk.nn.accelerate(model, sparsifier, lambda *_: True)
    shares = []
    for i in range(STEPS):
        iterate(model, optimizer, sparsifier, i, i + 1)
        shares.append(sk.nn.acceleration_report(model).share)
    # The first of three layers is dense by "erk" in so small a network.
    assert [share > 0 for share in shares] == [i not in (2, 4, 6) for i in range(STEPS)]


def test_powerpropagation_trains_its_sparse_phases_on_the_sparse_kernels():
    model, optimizer, sparsifier = setup("powerpropagation")
    sk.nn.accelerate(model, sparsifier, lambda *_: True)
    for i in range(STEPS):
        phase = sparsifier.phase
        iterate(model, optimizer, sparsifier, i, i + 1)
        assert sk.nn.acceleration_report(model).share == isinstance(phase, sk.Sparse)
