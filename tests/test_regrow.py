"""RigL, SET, RigL-ITOP and GraNet: which weights an update drops and grows, counts, momentum, resume, overflow."""

import copy
import math

import pytest
import torch
from method_steps import (
    OPTIMIZERS,
    assert_pruned_are_zero,
    batch,
    iterate,
    momenta,
)
from regrow_run import METHODS, live, setup
from torch import nn

import sparsekern as sk
from sparsekern.methods.regrow import _complement
from sparsekern.updates import UpdateSchedule


def one_layer(gradient, kind, weight=(0.9, -0.8, 0.1, 0, 0, 0), policy="mask", live=(0, 1, 2)):
    """One update of a single row with three live weights."""
    layer = nn.Linear(6, 1, bias=False)
    if kind == "masked":
        optimizer = sk.MaskedSGD(layer.parameters(), lr=0.1, momentum=0.9, momentum_policy=policy)
    else:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    sparsifier = sk.RigL(0.5, UpdateSchedule(1, 1, 1, 2), drop_fraction=0.34, last_fraction=0.34)
    sparsifier.attach(layer, optimizer, verbose=False)
    sparsifier.masks.set("weight", torch.tensor([[i in live for i in range(6)]]))
    layer.weight.data = torch.tensor([weight])
    layer.weight.grad = torch.zeros(1, 6)
    optimizer.step()
    sparsifier.step()
    buffer = optimizer.state[layer.weight]["momentum_buffer"]
    buffer.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.0, 0.4 if policy == "decay" else 0.0, 0.0]]))
    layer.weight.grad = torch.tensor([gradient])
    optimizer.step()
    sparsifier.step()
    return layer.weight.detach()[0], buffer[0], sparsifier.masks.bool("weight")[0]


@pytest.mark.parametrize("kind", ["masked", "sgd"])
def test_drops_the_smallest_and_grows_the_steepest_from_zero(kind):
    weight, momentum, mask = one_layer([0.0, 0.0, 0.0, 0.5, -0.7, 0.2], kind)
    assert mask.tolist() == [True, True, False, False, True, False]
    torch.testing.assert_close(weight, torch.tensor([0.9, -0.8, 0, 0, 0, 0]), rtol=0, atol=0)
    torch.testing.assert_close(momentum, torch.tensor([0.1, 0.2, 0, 0, 0, 0]), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["masked", "sgd"])
def test_what_is_dropped_and_grown_again_keeps_value_and_momentum(kind):
    weight, momentum, mask = one_layer([0.0, 0.0, 0.9, 0.5, -0.7, 0.2], kind)
    assert mask.tolist() == [True, True, True, False, False, False]
    torch.testing.assert_close(weight, torch.tensor([0.9, -0.8, 0.1, 0, 0, 0]), rtol=0, atol=0)
    torch.testing.assert_close(momentum, torch.tensor([0.1, 0.2, 0.3, 0, 0, 0]), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["masked", "sgd"])
def test_live_zeros_stay_before_pruned_ones(kind):
    _, _, mask = one_layer([0.0, 0.0, 0.9, 0.5, 0.5, 0.5], kind, weight=[0.0] * 6, live=(3, 4, 5))
    assert mask.tolist() == [False, False, True, True, True, False]


def test_grown_weight_has_no_momentum_where_pruned_momentum_decays():
    _, momentum, mask = one_layer([0.0, 0.0, 0.0, 0.5, -0.7, 0.2], "masked", policy="decay")
    assert mask[4] and momentum[4] == 0


@pytest.mark.parametrize("count", [0, 5, 8, 13])
def test_complement_of_packed_bits_leaves_padding_zero(count):
    mask = torch.arange(count) % 3 == 0
    assert torch.equal(_complement(sk.ops.pack_mask(mask), count), sk.ops.pack_mask(~mask))


def test_drop_fraction_follows_the_cosine():
    sparsifier = setup(schedule=sk.update_schedule(total_steps=32_000))[2]
    assert sparsifier.schedule == UpdateSchedule(100, 25_000, 100, 32_000)
    found = [round(sparsifier.fraction(t), 5) for t in (0, 6_250, 12_500, 18_750, 25_000)]
    assert found == [0.3, 0.25607, 0.15, 0.04393, 0]


@pytest.mark.parametrize("name", ["rigl", "itop", "granet"])
def test_counts_are_rounded_as_published(name):
    """google-research/rigl rounds down, the codes of ITOP and GraNet up."""
    found = setup(name, schedule=UpdateSchedule(1, 11, 5, 12), distribution="uniform", drop_fraction=0.1,
                  last_fraction=0.1, **({"initial": 0.8} if name == "granet" else {}))  # fmt: skip
    before = {n: found[2].masks.bool(n) for n in found[2].masks}
    for p in found[0].parameters():  # growth is told apart from what is dropped
        p.grad = torch.ones_like(p)
    for n, mask in before.items():
        found[2].masks.parameter(n).grad.masked_fill_(mask, 0)
    found[1].step()
    if name == "rigl":
        found[2].step()
        found[1].step()
    gone = [int((before[n] & ~found[2].masks.bool(n)).sum()) for n in before]
    live = [int(mask.sum()) for mask in before.values()]
    assert gone == [(math.floor if name == "rigl" else math.ceil)(0.1 * count) for count in live]
    assert any(0.1 * count % 1 for count in live)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_counts_zeros_and_update_steps(method, kind):
    parts = setup(method, kind)
    sparsifier = parts[2]
    counts, changed = live(sparsifier), []
    start = sparsifier.allocation.budget(0.5 if method == "granet" else 0.8)
    assert counts == list(start.each.values())
    for i in range(12):
        before = sparsifier.masks.hash()
        weights = [p.detach().clone() for p in parts[0].parameters()]
        iterate(*parts, i, i + 1)
        assert_pruned_are_zero(*parts)
        if sparsifier.masks.hash() != before:
            changed.append(i)
        if method != "granet":
            assert live(sparsifier) == counts
        moved = any(not torch.equal(p[p != 0], w[p != 0]) for p, w in zip(parts[0].parameters(), weights, strict=True))
        assert moved != (method == "rigl" and i in (3, 6, 9))
    # RigL's updates replace steps 3, 6 and 9, the last with nothing to drop; the others' follow steps 2, 5 and 8.
    assert changed == ([3, 6] if method == "rigl" else [2, 5] if method == "set" else [2, 5, 8])
    assert sum(live(sparsifier)) == sk.keep_count(216 + 720 + 960, 0.8)


def test_rigl_overlap_has_its_closed_form():
    parts = setup(drop_fraction=0.5)
    iterate(*parts, 0, 3)
    model, optimizer, sparsifier = parts
    masks = {n: sparsifier.masks.bool(n) for n in sparsifier.masks}
    x, y = batch(3)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    for name in masks:  # nothing dropped comes back
        sparsifier.masks.parameter(name).grad[masks[name]] = 0
    optimizer.step()
    sparsifier.step()
    f = sparsifier.fraction(3)
    for name, mask in masks.items():
        n, now = int(mask.sum()), sparsifier.masks.bool(name)
        drop = int(f * n)
        assert int((mask & now).sum()) / int((mask | now).sum()) == (n - drop) / (n + drop)
    assert (n - drop) / (n + drop) == pytest.approx((1 - f) / (1 + f), abs=0.01)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["4x1", "1x4", "block4"])
def test_blocks_are_dropped_and_grown_whole(method, pattern):
    parts = setup(method, pattern=pattern, sparsity=0.5, **({"initial": 0.5} if method == "granet" else {}))
    counts, before = live(parts[2]), parts[2].masks.hash()
    iterate(*parts, 0, 5)
    assert parts[2].masks.hash() != before and (method == "granet" or live(parts[2]) == counts)
    dim = 0 if pattern == "4x1" else 1
    for name in parts[2].masks:
        for block in parts[2].masks.bool(name).split(4, dim):
            assert torch.equal(block.any(dim), block.all(dim))


def test_timeline_says_what_an_update_does():
    assert setup()[2].timeline().startswith("3 mask updates: every 3 steps from step 3 to 9 of 12, each instead of the")
    assert "drops 0.3 of a layer's live weights at first, 0 at the end" in setup()[2].timeline()
    assert setup("granet")[2].timeline().endswith("sparsity 0.5 to 0.8 until step 4")


def test_random_masks_depend_on_the_seed_alone():
    hashes = [setup(seed=s)[2].masks.hash() for s in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    a, b = setup("set"), setup("set", seed=0)
    torch.manual_seed(5)
    for parts in (a, b):
        iterate(*parts, 0, 4)
        torch.rand(3)
    assert a[2].masks.hash() == b[2].masks.hash()


@pytest.mark.parametrize("seed", [0, 1])
def test_random_masks_do_not_follow_weights_of_the_same_seed(seed):
    """With one random stream for both, the masks would keep the positive weights, and such a network learns slowly."""
    torch.manual_seed(seed * 1_000_003)
    model = torch.nn.Sequential(torch.nn.Linear(64, 100, bias=False), torch.nn.Linear(100, 100, bias=False))
    positive = [p.detach() > 0 for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = sk.SET(0.5, UpdateSchedule(3, 9, 3, 12), distribution="uniform", seed=seed)
    sparsifier.attach(model, optimizer, verbose=False)
    for name, above in zip(sparsifier.masks, positive, strict=True):
        assert abs(float(above[sparsifier.masks.bool(name)].float().mean()) - 0.5) < 0.04  # four deviations


@pytest.mark.parametrize("sparsity", [0.95, 0.98])
def test_random_masks_overlap_as_independent_ones_do(sparsity):
    sets = []
    for seed in (0, 1):
        layer = nn.Linear(1000, 1000, bias=False)
        sparsifier = sk.SET(sparsity, UpdateSchedule(1, 1, 1, 2), seed=seed)
        sparsifier.attach(layer, torch.optim.SGD(layer.parameters(), lr=0.1), verbose=False)
        sets.append(sparsifier.masks)
    density = 1 - sparsity
    assert sets[0].overlap(sets[1]) == pytest.approx(density / (2 - density), rel=0.05)


def test_set_grows_at_random_whatever_the_gradient():
    grown = []
    for seed in (1, 2):
        model, optimizer, sparsifier = setup("set", schedule=UpdateSchedule(1, 11, 5, 12), drop_fraction=0.5)
        before = {n: sparsifier.masks.bool(n) for n in sparsifier.masks}
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.param_groups[0]["lr"] = 0.0  # so that both drop the same
        optimizer.step()
        grown.append({n: sparsifier.masks.bool(n) & ~before[n] for n in before})
        assert all(g.any() for g in grown[-1].values())
    assert all(torch.equal(grown[0][n], grown[1][n]) for n in grown[0])


@pytest.mark.parametrize("method", ["rigl", "itop", "granet"])
def test_accelerated_training_grows_by_the_dense_gradient(method):
    plain, fast = setup(method), setup(method)
    sk.nn.accelerate(fast[0], fast[2], choose=lambda *_: True)
    iterate(*plain, 0, 8)
    iterate(*fast, 0, 8)
    assert fast[2].masks.overlap(plain[2].masks) == 1.0
    torch.testing.assert_close(fast[0].state_dict(), plain[0].state_dict(), rtol=1e-4, atol=1e-5)


def test_layer_without_gradient_and_channels_last():
    parts = setup()
    model, optimizer, sparsifier = parts
    model.to(memory_format=torch.channels_last)
    iterate(*parts, 0, 3)
    plain = setup()
    iterate(*plain, 0, 3)
    for model, optimizer, sparsifier in (parts, plain):
        x, y = batch(3)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        model[0].weight.grad = None
        before = sparsifier.masks.bool("0.weight")
        optimizer.step()
        sparsifier.step()
        assert torch.equal(before, sparsifier.masks.bool("0.weight")) and sparsifier.updates == 1
    assert parts[2].masks.hash() == plain[2].masks.hash()


def test_nan_gradient_is_refused_before_anything_changes():
    model, optimizer, sparsifier = setup()
    iterate(model, optimizer, sparsifier, 0, 3)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    before = copy.deepcopy(model.state_dict())
    masks, buffer = sparsifier.masks.hash(), momenta(optimizer, model[0].weight)[0].clone()
    with pytest.raises(ValueError, match="NaN"):
        optimizer.step()
    assert sparsifier.masks.hash() == masks and torch.equal(buffer, momenta(optimizer, model[0].weight)[0])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_bad_input_is_named():
    for method, kwargs, words in [
        ("rigl", {"drop_fraction": 1.5}, "drop_fraction must be"),
        ("set", {"last_fraction": -1}, "last_fraction must be"),
        ("rigl", {"distribution": "global"}, "distribution must be one of"),
        ("itop", {"pattern": "2:4"}, "pattern must be one of"),
        ("granet", {"initial": 0.9}, "initial must be at most sparsity"),
        ("granet", {"prune_stop": 0.0}, "prune_stop must be"),
    ]:
        with pytest.raises(ValueError, match=words):
            setup(method, **kwargs)
    parts = setup("itop")
    good = parts[2].state_dict()
    for change in ({"updates": "x"}, {"explored": {}}):
        with pytest.raises(ValueError, match="must"):
            parts[2].load_state_dict({**good, "position": 5, **change})
        assert parts[2].position == 0
