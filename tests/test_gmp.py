"""Gradual magnitude pruning: the curve, nested masks with exact counts, layer rules."""

import pytest
import torch
from method_steps import OPTIMIZERS, assert_pruned_are_zero, iterate, momenta, network

import sparsekern as sk
from sparsekern.methods.gmp import EXTENDED
from sparsekern.updates import UpdateSchedule

SCHEDULE = UpdateSchedule(start=2, stop=10, every=2, total_steps=14)


def setup(kind="masked", sparsity=0.9, schedule=SCHEDULE, **kwargs):
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    return model, optimizer, sk.GMP(sparsity, schedule, **kwargs).attach(model, optimizer, verbose=False)


def test_curve_at_quarters_and_default_schedule():
    _, _, sparsifier = setup()
    values = [0.0, 0.0, 0.0, 0.0, 0.52031, 0.52031, 0.7875, 0.7875, 0.88594, 0.88594, 0.9, 0.9]
    assert [round(sparsifier.at(t), 5) for t in range(12)] == values
    assert setup(schedule=UpdateSchedule(4, 4, 1, 14))[2].at(4) == 0.9  # a lone update has no curve
    _, _, sparsifier = setup(schedule=sk.update_schedule(total_steps=32_000))
    assert sparsifier.schedule == UpdateSchedule(10_000, 25_000, 1_000, 32_000)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("kwargs", [{}, {"distribution": "uniform"}, {"layer_sparsity": EXTENDED}, {"pattern": "4x1"}])
def test_masks_are_nested_with_exact_counts_and_pruned_stay_zero(kind, kwargs):
    parts = setup(kind, **kwargs)
    masks, sparsifier = parts[2].masks, parts[2]
    before = {n: masks.bool(n) for n in masks}
    for i in range(14):
        iterate(*parts, i, i + 1)
        assert_pruned_are_zero(*parts)
        now = {n: masks.bool(n) for n in masks}
        assert all((now[n] <= before[n]).all() for n in masks)
        before = now
        budget = sparsifier.allocation.budget(sparsifier.at(i + 1), lambda own, t=i + 1: sparsifier._curve(t, own))
        live = sum(sparsifier.allocation.live(masks, n) for n in masks)
        assert live == budget.pool + sum(budget.each.values())
    if "layer_sparsity" in kwargs:
        first, middle, last = masks
        kept = [int(now[n].sum()) for n in masks]
        assert kept == [masks.parameter(first).numel(), sk.keep_count(720, 0.9), sk.keep_count(960, 0.8)]
    elif "pattern" not in kwargs:
        expected = (
            sk.keep_count(216 + 720 + 960, 0.9) if not kwargs else sum(sk.keep_count(n, 0.9) for n in (216, 720, 960))
        )
        assert sum(int(m.sum()) for m in now.values()) == expected


def test_overlap_of_consecutive_masks_has_its_closed_form():
    parts = setup()
    iterate(*parts, 0, 4)
    earlier = sk.MaskSet({n: parts[2].masks.parameter(n) for n in parts[2].masks})
    earlier.load_state_dict(parts[2].masks.state_dict())
    iterate(*parts, 4, 6)
    assert parts[2].masks.overlap(earlier) == pytest.approx((1 - 0.7875) / (1 - 0.52031), abs=2e-3)


def test_updates_missed_by_overflows_are_made_as_one():
    model, optimizer, sparsifier = setup()
    iterate(model, optimizer, sparsifier, 0, 1)
    optimizer.found_inf = torch.ones(())
    iterate(model, optimizer, sparsifier, 1, 5)
    assert sparsifier.updates == 0
    optimizer.found_inf = torch.zeros(())
    iterate(model, optimizer, sparsifier, 5, 6)
    assert sparsifier.updates == 3 and sparsifier.masks.density() == sk.keep_count(1896, sparsifier.at(6)) / 1896


def test_a_pruned_weight_never_returns_not_even_in_a_tie():
    model, optimizer, sparsifier = parts = setup()
    iterate(*parts, 0, 4)
    before = {n: sparsifier.masks.bool(n) for n in sparsifier.masks}
    with torch.no_grad():
        for name in sparsifier.masks:
            sparsifier.masks.parameter(name).zero_()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        for m in momenta(optimizer, p):
            m.zero_()
    for _ in range(2):
        optimizer.step()
        sparsifier.step()
    assert sparsifier.updates == 3 and all((sparsifier.masks.bool(n) <= before[n]).all() for n in before)


def test_timeline_says_what_is_pruned_when(capsys):
    model = network()
    sk.GMP(0.9, SCHEDULE).attach(model, OPTIMIZERS["sgd"](model.parameters()))
    line = "5 mask updates: every 2 steps from step 2 to 10 of 14; sparsity 0 to 0.9 by a cubic curve\n\nprunable"
    assert capsys.readouterr().out.startswith(line)


def test_initial_sparsity_holds_from_the_first_step():
    _, _, sparsifier = setup(initial=0.5)
    assert sum(int(sparsifier.masks.bool(n).sum()) for n in sparsifier.masks) == 948
    assert sparsifier.at(4) == pytest.approx(0.9 - 0.4 * 0.75**3)
    masks = setup(initial=0.5, layer_sparsity={"first": 0.0, "last": 0.25})[2].masks
    assert [int(masks.bool(n).sum()) for n in masks] == [216, 360, 720]


def test_bad_input_is_named():
    for kwargs, words in [
        ({"initial": 0.95}, "initial must be at most sparsity"),
        ({"distribution": "erk"}, "distribution must be one of"),
        ({"pattern": "2:4"}, "pattern must be one of"),
        ({"sparsity": 2}, "sparsity must be"),
    ]:
        with pytest.raises(ValueError, match=words):
            setup(**kwargs)
    with pytest.raises(TypeError, match="schedule must be update_schedule"):
        setup(schedule=100)
    parts = setup()
    with pytest.raises(ValueError, match=r"state\['updates'\] must be"):
        parts[2].load_state_dict({**parts[2].state_dict(), "updates": -1})
