"""RigL-ITOP and GraNet: what they have beside RigL."""

import pytest
import torch
from method_steps import iterate
from regrow_run import live, setup

import sparsekern as sk


@pytest.mark.parametrize("name", ["itop", "granet"])
def test_published_intervals_and_those_of_short_runs(name):
    sparsifier = setup(name, schedule=sk.update_schedule(total_steps=1_000_000))[2]
    assert sparsifier.schedule.every == 4000 and sparsifier.schedule.steps()[-1] == 996_000
    assert sparsifier.fraction(0) == 0.5 and sparsifier.fraction(1_000_000) == pytest.approx(0.005)
    assert setup(name, schedule=sk.update_schedule(total_steps=500))[2].schedule.every == 20
    assert setup(name, schedule=sk.update_schedule(total_steps=500, every=100))[2].schedule.every == 100


def test_exploration_is_the_union_of_all_masks():
    parts = setup("itop")
    union = {n: parts[2].masks.bool(n) for n in parts[2].masks}
    assert parts[2].exploration() == pytest.approx(parts[2].masks.density())
    for i in range(12):
        iterate(*parts, i, i + 1)
        union = {n: union[n] | parts[2].masks.bool(n) for n in union}
    share = sum(int(u.sum()) for u in union.values()) / sum(u.numel() for u in union.values())
    assert parts[2].exploration() == share > parts[2].masks.density()


def test_granet_prunes_by_its_curve_over_all_layers():
    parts = setup("granet", sparsity=0.9, prune_stop=0.5)
    at = [parts[2].at(t) for t in (3, 6, 9)]
    assert at == [pytest.approx(0.9 - 0.4 * 0.5**3), 0.9, 0.9]
    found = []
    for i in range(9):
        iterate(*parts, i, i + 1)
        found.append(sum(live(parts[2])))
    total = 216 + 720 + 960
    assert found[2] == sk.keep_count(total, at[0]) and found[5] == found[8] == sk.keep_count(total, 0.9)
    assert setup("granet", initial=0.0)[2].masks.density() == 1.0


def test_granet_prunes_among_live_weights_also_in_a_tie():
    model, optimizer, sparsifier = setup("granet", drop_fraction=0.0, last_fraction=0.0)
    before = {n: sparsifier.masks.bool(n) for n in sparsifier.masks}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
            p.grad = torch.zeros_like(p)
    for _ in range(3):
        optimizer.step()
        sparsifier.step()
    assert sparsifier.updates == 1 and all((sparsifier.masks.bool(n) <= before[n]).all() for n in before)
