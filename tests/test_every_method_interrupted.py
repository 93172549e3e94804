"""Every method when steps are skipped by the gradient scaler, and when the run is cut and goes on."""

import copy
import io

import torch
from every_method import CONSTANT, STEPS, check_sparse, kinds, masks_of, setup
from method_helpers import check_equal
from method_steps import batch, iterate
from torch import nn

import sparsekern as sk


def scaled(parts, i, scaler, bad, finish=True):
    """Iteration `i` under a loss scale, which overflows if `bad`."""
    model, optimizer, sparsifier = parts
    x, y = batch(i)
    optimizer.zero_grad()
    scaler.scale(nn.functional.cross_entropy(model(x), y) * (float("inf") if bad else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    if finish:
        sparsifier.step()


def first_change(name, kind):
    """The step after the first one that changes masks; any for methods without."""
    parts = setup(name, kind)
    iterate(*parts, 0, 1)
    for i in range(1, STEPS):
        before = masks_of(parts[2])
        iterate(*parts, i, i + 1)
        if any(not torch.equal(a, b) for a, b in zip(masks_of(parts[2]).values(), before.values(), strict=True)):
            return i
    assert name in CONSTANT
    return 2


@kinds("masked", "sgd", "adamw", "adamw-fused")
def test_skipped_step_changes_nothing_and_a_change_due_there_waits(name, kind):
    parts, plain, bad = setup(name, kind), setup(name, kind), first_change(name, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    for i in range(bad):
        scaled(parts, i, scaler, False)
    masks = overflow_changes_nothing(parts, bad, scaler)
    scaled(parts, bad + 1, scaler, False)
    check_sparse(*parts)
    assert all(bool(p.isfinite().all()) for p in parts[0].parameters())
    now = masks_of(parts[2])
    assert (name in CONSTANT) == all(torch.equal(a, b) for a, b in zip(now.values(), masks.values(), strict=True))
    overflow_changes_nothing(parts, bad + 2, scaler)
    iterate(*parts, bad + 3, STEPS)
    iterate(*plain, 0, STEPS)
    if sk.METHODS[name].exact:
        masks_of(parts[2]), masks_of(plain[2])
        assert parts[2].masks.density() == plain[2].masks.density()


def overflow_changes_nothing(parts, i, scaler):
    before = copy.deepcopy(learned(parts))
    weights, masks = [p.detach().clone() for p in parts[0].parameters()], masks_of(parts[2])
    scaled(parts, i, scaler, True)
    assert all(torch.equal(p, w) for p, w in zip(parts[0].parameters(), weights, strict=True))
    check_equal(masks_of(parts[2]), masks)
    check_equal(learned(parts), before)
    return masks


def learned(parts):
    """What a method trains beside the model."""
    return parts[2].state_dict().get("learned")


@kinds("masked", "sgd", "adamw", "adamw-fused")
def test_loss_scale_leaves_no_trace(name, kind):
    """With powers of two as loss scales, bit for bit."""
    parts, plain = setup(name, kind), setup(name, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    for i in range(STEPS):
        scaled(parts, i, scaler, False)
    iterate(*plain, 0, STEPS)
    check_equal(dict(parts[0].state_dict()), dict(plain[0].state_dict()))
    check_equal(masks_of(parts[2]), masks_of(plain[2]))


@kinds("masked", "sgd", "masked-adamw", "adamw-fused")
def test_resume_with_a_change_waiting(name, kind):
    """Steps 1 and 2 overflow; the run is cut after the first of them, before and after `sparsifier.step()`."""

    def run(cut):
        parts, scaler = setup(name, kind), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
        for i in range(5):
            scaled(parts, i, scaler, i in (1, 2), finish=False)
            if (i, cut) == (1, "before"):
                parts = resumed(name, kind, parts)
            parts[2].step()
            if (i, cut) == (1, "after"):
                parts = resumed(name, kind, parts)
        return [part.state_dict() for part in parts]

    want = run(None)
    for cut in ("before", "after"):
        check_equal(run(cut), want)


def resumed(name, kind, parts):
    """Through a file that holds nothing but tensors and plain values."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return loaded(setup(name, kind), torch.load(file, weights_only=True))


def loaded(parts, states):
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    return parts


@kinds("masked", "adamw")
def test_resume_at_any_step_is_bit_identical(name, kind):
    whole, saved = setup(name, kind), []
    for i in range(STEPS):
        saved.append(copy.deepcopy([part.state_dict() for part in whole]))
        iterate(*whole, i, i + 1)
    want = [part.state_dict() for part in whole]
    for stop, states in enumerate(saved):
        again = loaded(setup(name, kind), states)
        iterate(*again, stop, STEPS)
        check_equal([part.state_dict() for part in again], want)
