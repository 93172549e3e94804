"""AC/DC stopped and resumed, steps that overflow, loops that step twice or never, and damaged state."""

import copy

import pytest
import torch
from acdc_run import setup
from method_steps import OPTIMIZERS, batch, iterate, resumed_from
from torch import nn

import sparsekern as sk


@pytest.mark.parametrize("stop", range(1, 14))
def test_resume_at_any_step_is_bit_identical(stop):
    whole = setup()
    iterate(*whole, 0, 14)
    first = setup()
    iterate(*first, 0, stop)
    saved = copy.deepcopy([part.state_dict() for part in first])
    again = setup()
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    iterate(*again, stop, 14)
    torch.testing.assert_close(again[0].state_dict(), whole[0].state_dict(), rtol=0, atol=0)
    assert again[2].masks.hash() == whole[2].masks.hash()


@pytest.mark.parametrize("kind", ["masked", "sgd"])
def test_change_due_on_a_skipped_step_waits(kind):
    model, optimizer, sparsifier = setup(kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i in range(4):
        x, y = batch(i)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y) * (float("inf") if i == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        sparsifier.step()
        assert isinstance(sparsifier.phase, sk.Sparse) == (i == 3)


@pytest.mark.parametrize("kind", ["masked", "sgd"])
@pytest.mark.parametrize("pause", [None, "before step", "after step"])
def test_resume_with_a_change_waiting(kind, pause):
    """Steps 2 and 3 overflow, so the change due after step 2 waits; the run is cut in the middle of the wait."""

    def run(pause):
        parts, scaler = setup(kind), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
        phases = []
        for i in range(8):
            model, optimizer, sparsifier = parts
            x, y = batch(i)
            optimizer.zero_grad()
            bad = i in (2, 3)
            scaler.scale(nn.functional.cross_entropy(model(x), y) * (float("inf") if bad else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            if i == 3 and pause == "before step":
                parts = resumed(parts, kind)
            parts[2].step()
            if i == 3 and pause == "after step":
                parts = resumed(parts, kind)
            phases.append(str(parts[2].phase))
        return parts, phases

    got, want = run(pause), run(None)
    assert got[1] == want[1] == ["dense"] * 4 + ["sparse 90%"] + ["dense"] * 3
    torch.testing.assert_close(got[0][0].state_dict(), want[0][0].state_dict(), rtol=0, atol=0)


def resumed(parts, kind):
    return resumed_from(parts, setup(kind))


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
