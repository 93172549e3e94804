"""AC/DC with rising sparsity, with sparse dense phases, and with layers of their own sparsity."""

import pytest
import torch
from method_helpers import check_resume, gradients
from method_steps import OPTIMIZERS, iterate, network, resumed_from
from test_acdc import SCHEDULE

import sparsekern as sk
from sparsekern.phases import PhaseSchedule, PhaseSpan


def setup(kind="masked", sparsity=0.9, schedule=SCHEDULE, **kwargs):
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    return model, optimizer, sk.ACDC(sparsity, schedule, **kwargs).attach(model, optimizer, verbose=False)


def kept(sparsifier):
    return sum(int(sparsifier.masks.bool(n).sum()) for n in sparsifier.masks)


def test_rising_sparsity_of_sparse_phases():
    schedule = sk.acdc_schedule(100)
    model, optimizer, sparsifier = setup(sparsity=0.97, schedule=schedule.resolve(1, 0.97), first_sparsity=0.9)
    total = sum(sparsifier.masks.parameter(n).numel() for n in sparsifier.masks)
    seen = {}
    for i in range(100):
        iterate(model, optimizer, sparsifier, i, i + 1)
        seen[i + 1] = kept(sparsifier)
    expected = [0.9, 0.9 + 0.07 / 6, 0.9 + 0.14 / 6, 0.935, 0.9 + 0.28 / 6, 0.9 + 0.35 / 6, 0.97, 0.97]
    starts = [10, 20, 30, 40, 50, 60, 70, 85]
    assert [seen[t] for t in starts] == [sk.keep_count(total, s) for s in expected]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("distribution", ["global", "uniform", "erk"])
def test_dense_phases_keep_a_minimum_sparsity(kind, distribution):
    model, optimizer, sparsifier = setup(kind, dense_sparsity=0.6, distribution=distribution)
    sizes = {n: sparsifier.masks.parameter(n).numel() for n in sparsifier.masks}
    dense = sparsifier.allocation.budget(0.6)
    count = sum(dense.each.values()) + dense.pool
    initial = sparsifier.masks.hash()
    before, after = None, None
    for i in range(7):
        assert kept(sparsifier) == count or isinstance(sparsifier.phase, sk.Sparse)
        before = {n: sparsifier.masks.bool(n) for n in sparsifier.masks} if i == 5 else before
        iterate(model, optimizer, sparsifier, i, i + 1)
        after = {n: sparsifier.masks.bool(n) for n in sparsifier.masks} if i == 5 else after
        for name in sizes:
            assert not sparsifier.masks.parameter(name)[~sparsifier.masks.bool(name)].any()
    # The live weights of the sparse phase stay, the sample beyond them is no function of the initial magnitudes.
    assert all((before[n] <= after[n]).all() for n in sizes) and sparsifier.masks.hash() != initial
    assert "dense phases keep 0.6 of the weights at zero" in sparsifier.timeline()


def test_dense_phases_leave_layers_no_sparser_than_their_own_sparsity():
    parts = setup(dense_sparsity=0.6, layer_sparsity={"first": 0.25, "last": 0.8})
    for _ in range(2):  # in the first dense phase and in the one after the first sparse phase
        masks = parts[2].masks
        kept = [int(masks.bool(n).sum()) for n in masks]
        assert kept == [sk.keep_count(216, 0.25), sk.keep_count(720, 0.6), sk.keep_count(960, 0.6)]
        iterate(*parts, 0, 6)


CYCLES = PhaseSchedule(
    tuple(PhaseSpan(3 * i, 3 * i + 3, sk.Dense() if i % 2 == 0 else sk.Sparse(0.9)) for i in range(6))
)


def flat_masks(sparsifier):
    return torch.cat([sparsifier.masks.bool(n).flatten() for n in sparsifier.masks])


@pytest.mark.parametrize("pattern", ["unstructured", "4x1"])
def test_support_of_the_last_compression(pattern):
    parts = setup(schedule=CYCLES, dense_sparsity=0.6, dense_support="magnitude", pattern=pattern)
    sparsifier, groups = parts[2], 216 + 720 + 960 if pattern == "unstructured" else 54 + 3 * 72 + 2 * 160
    supports = []
    for start in (0, 6):
        iterate(*parts, start, start + 2)
        gradients(parts[0], parts[1], start + 2)
        parts[1].step()
        weights = [sparsifier.masks.parameter(n).detach().clone() for n in sparsifier.masks]
        best = sk.ops.topk_mask(weights, sk.keep_count(groups, 0.6), pattern=pattern)
        want = torch.cat([sk.ops.unpack_mask(b, w).flatten() for b, w in zip(best, weights, strict=True)])
        sparsifier.step()
        iterate(*parts, start + 3, start + 6)
        assert sparsifier.phase == sk.Dense() and torch.equal(flat_masks(sparsifier), want)
        supports.append(want)
    assert torch.equal(*supports), "what was outside stays zero, so the support is frozen"


@pytest.mark.parametrize("kind", ["masked", "sgd"])
def test_support_by_gradient(kind):
    parts = setup(kind, schedule=CYCLES, dense_sparsity=0.6, dense_support="gradient")
    model, optimizer, sparsifier = parts
    sk.nn.accelerate(model, sparsifier, lambda *_: True)
    for i in range(5):
        assert not sparsifier.needs_dense_gradient()
        iterate(*parts, i, i + 1)
    live, how = flat_masks(sparsifier), sk.nn.acceleration_report(model)
    assert how.share == 1 and sparsifier.needs_dense_gradient()
    gradients(model, optimizer, 5)
    size = torch.cat([sparsifier.masks.parameter(n).grad.abs().flatten() for n in sparsifier.masks])
    optimizer.step()
    optimizer.zero_grad()
    sparsifier.step()
    now, count = flat_masks(sparsifier), sk.keep_count(216 + 720 + 960, 0.6)
    assert sparsifier.phase == sk.Dense() and int(now.sum()) == count and bool(now[live].all())
    opened = now & ~live
    assert size[opened].min() >= size[~now].max() > 0
    assert not any(m.any() for p in model.parameters() for m in sparsifier.momentum(p))


@pytest.mark.parametrize("support", ["magnitude", "gradient"])
def test_supports_resume_and_wait_for_a_good_step(support):
    make = lambda: sk.ACDC(0.9, CYCLES, dense_sparsity=0.6, dense_support=support)  # noqa: E731
    check_resume(make, 14)
    model, optimizer, sparsifier = parts = setup(schedule=CYCLES, dense_sparsity=0.6, dense_support=support)
    iterate(*parts, 0, 5)
    optimizer.found_inf, before = torch.ones(()), sparsifier.masks.hash()
    iterate(*parts, 5, 6)
    assert sparsifier.masks.hash() == before and isinstance(sparsifier.phase, sk.Sparse)
    optimizer.found_inf = torch.zeros(())
    iterate(*parts, 6, 7)
    assert sparsifier.phase == sk.Dense() and kept(sparsifier) == sk.keep_count(216 + 720 + 960, 0.6)


def test_sample_is_redrawn_by_seed_and_phase_and_survives_a_resume():
    masks = []
    for seed in (0, 0, 1):
        parts = setup(dense_sparsity=0.5, seed=seed)
        iterate(*parts, 0, 6)
        masks.append(parts[2].masks.hash())
    assert masks[0] == masks[1] != masks[2]
    whole, first = setup(dense_sparsity=0.5), setup(dense_sparsity=0.5)
    iterate(*whole, 0, 8)
    iterate(*first, 0, 5)
    again = resumed_from(first, setup(dense_sparsity=0.5))
    iterate(*again, 5, 8)
    torch.testing.assert_close(again[0].state_dict(), whole[0].state_dict(), rtol=0, atol=0)


def test_each_dense_phase_opens_another_sample():
    kinds = [sk.Sparse(0.9), sk.Dense()] * 3
    spans = [PhaseSpan(2 * i, 2 * i + 2, kind) for i, kind in enumerate([*kinds, sk.Sparse(0.9)])]
    schedule = PhaseSchedule(tuple(spans))
    parts, samples = setup(schedule=schedule, dense_sparsity=0.5), []
    for i in range(12):
        held = {n: parts[2].masks.bool(n) for n in parts[2].masks}
        iterate(*parts, i, i + 1)
        if i in (1, 5, 9):
            samples.append(torch.cat([(parts[2].masks.bool(n) & ~held[n]).flatten() for n in held]))
    for a, b in ((0, 1), (1, 2), (0, 2)):
        # Independent samples of about 44% of the weights overlap by 0.44 / (2 - 0.44) = 0.28.
        assert 0.2 < int((samples[a] & samples[b]).sum()) / int((samples[a] | samples[b]).sum()) < 0.45


def test_layers_of_their_own_sparsity_are_outside_the_distribution():
    model, optimizer, sparsifier = setup(layer_sparsity={"first": 0.0, "last": 0.8})
    iterate(model, optimizer, sparsifier, 0, 3)
    masks, (first, middle, last) = sparsifier.masks, list(sparsifier.masks)
    assert masks.density(first) == 1.0
    assert int(masks.bool(last).sum()) == sk.keep_count(960, 0.8)
    assert int(masks.bool(middle).sum()) == sk.keep_count(720, 0.9)


def test_depthwise_regular_expression_and_order():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3), torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.Conv2d(8, 8, 3, groups=4),
        torch.nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = {".": 0.5, "depthwise": 0.25, "^3": 1.0}
    sparsifier = sk.ACDC(0.9, SCHEDULE, layer_sparsity=own).attach(model, optimizer, verbose=False)
    found = sparsifier.allocation.own
    assert found == {"0.weight": 0.5, "1.weight": 0.25, "2.weight": 0.5, "3.weight": 1.0}


def test_bad_input_is_named():
    for kwargs, words in [
        ({"first_sparsity": 0.95}, "first_sparsity must be at most"),
        ({"dense_sparsity": 0.95}, "dense_sparsity must be at most"),
        ({"dense_support": "largest"}, "dense_support must be one of"),
        ({"first_sparsity": 0.5, "dense_sparsity": 0.6}, "dense_sparsity must be at most"),
        ({"layer_sparsity": {"first": 2}}, r"layer_sparsity\['first'\] must be"),
        ({"layer_sparsity": {"stem": 0.0}}, "layer_sparsity: 'stem' matches none"),
        ({"layer_sparsity": {"depthwise": 0.0}}, "layer_sparsity: 'depthwise' matches none"),
        # The first layer of the model is not pruned here, and no other one takes its place.
        ({"layer_sparsity": {"first": 0.0}, "exclude": ["^0"]}, "layer_sparsity: 'first' matches none"),
        ({"pattern": "2:4"}, "sparsity must be 0.5 or left out with pattern"),
        ({"pattern": "1:10", "first_sparsity": 0.8}, "first_sparsity, dense_sparsity: must be left out"),
        ({"pattern": "1:10", "dense_sparsity": 0.2}, "first_sparsity, dense_sparsity: must be left out"),
        ({"pattern": "1:10", "distribution": "erk"}, "distribution must be one of"),
        ({"pattern": "1:10", "layer_sparsity": {"first": 0.8}}, r"layer_sparsity\['first'\] must be 0 with pattern"),
        ({"pattern": "4:1"}, "pattern must be n:m with 1 <= n <= m"),
    ]:
        with pytest.raises(ValueError, match=words):
            setup(**kwargs)


def test_n_of_m_sparse_phases_with_a_dense_first_layer():
    model, optimizer = network(), OPTIMIZERS["masked"]
    optimizer = optimizer(model.parameters())
    sparsifier = sk.ACDC(0.5, sk.acdc_schedule(2), pattern="2:4", layer_sparsity={"first": 0.0})
    sparsifier.attach(model, optimizer, 8, verbose=False)
    for i in range(16):
        iterate(model, optimizer, sparsifier, i, i + 1)
        assert sparsifier.masks.density("0.weight") == 1
        for name in ("3.weight", "5.weight"):
            mask = sparsifier.masks.bool(name)
            live = mask.unflatten(1, (-1, 4)).sum(2)
            assert bool((live == (2 if sparsifier.phase == sk.Sparse(0.5) else 4)).all())
