"""STR and movement pruning: what is learned beside the model, its gradients, its optimizer, its refusals."""

import pytest
import torch
from method_helpers import gradients, setup
from method_steps import batch, iterate, network
from torch import nn

import sparsekern as sk
from sparsekern.updates import UpdateSchedule

NOW = UpdateSchedule(0, 0, 1, 8)


def linear(values, make, lr=0.1, **kwargs):
    model = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
    optimizer = sk.MaskedSGD(model.parameters(), lr=lr, **kwargs)
    return model, optimizer, make().attach(model, optimizer, verbose=False)


def test_str_forward_and_gradients_are_those_of_autograd():
    model, optimizer, sparsifier = setup(lambda: sk.STR(start=-3.0, decay=0.01, momentum=0.5, lr_ratio=2.0), "sgd")
    x, y = batch(0)
    t = {n: torch.tensor(-3.0, requires_grad=True) for n in sparsifier.masks}
    other = network()
    shadow = {
        n: p.sign().detach() * torch.relu(p.abs() - t[n].sigmoid()) if n in t else p
        for n, p in other.named_parameters()
    }
    want = nn.functional.cross_entropy(torch.func.functional_call(other, shadow, x), y)
    want.backward()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    torch.testing.assert_close(loss, want)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    optimizer.step()
    for name, value in t.items():
        stepped = -3.0 - 2.0 * 0.05 * (value.grad + 0.01 * -3.0)
        torch.testing.assert_close(sparsifier.learned.values[name].detach(), stepped.reshape(1))


def test_str_decay_drives_the_published_start_up_and_the_rate_is_followed():
    model, optimizer, sparsifier = linear([1.0, -1.0], lambda: sk.STR(), lr=0.256)
    for i in range(3):
        optimizer.param_groups[0]["lr"] = 0.256 if i < 2 else 0.0
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        sparsifier.step()
        if i == 1:
            first = 3200 * 0.256 * 2.251757813e-5
            want = -3200 + first + first * (0.875 + 1)
            torch.testing.assert_close(sparsifier.learned.values["weight"].detach(), torch.tensor([want]))
            before = sparsifier.learned.values["weight"].clone()
    assert torch.equal(sparsifier.learned.values["weight"], before)
    assert torch.equal(sparsifier.effective("weight", model.weight), model.weight)


def test_scores_sum_up_minus_g_times_w():
    model, optimizer, sparsifier = linear([1.0, -2, 3, -4], lambda: sk.Movement(0.5, NOW, lr_ratio=0.5))
    total = torch.zeros(1, 4)
    for i in range(4):
        x = torch.randn(1, 4, generator=torch.Generator().manual_seed(i))
        weight, kept = model.weight.detach().clone(), sparsifier.masks.bool("weight")
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        assert torch.equal(model.weight[~kept], weight[~kept])  # no gradient for what is pruned
        torch.testing.assert_close(model.weight[kept], (weight - 0.1 * x)[kept])
        total += -0.05 * x * weight
        torch.testing.assert_close(sparsifier.learned.values["weight"].detach(), total)
        sparsifier.step()
        best = total.flatten().topk(2).indices
        assert sparsifier.masks.bool("weight").flatten()[best].all() and sparsifier.masks.density() == 0.5


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_scores_follow_a_model_laid_out_anew(momentum):
    """Masks are in the order of the weights, also where the scores were made in another."""
    model, optimizer, sparsifier = setup(lambda: sk.Movement(0.5, NOW, momentum=momentum))
    iterate(model, optimizer, sparsifier, 0, 2)
    model.to(memory_format=torch.channels_last)
    weight, name = model[3].weight, "3.weight"
    gradients(model, optimizer, 2)
    score, grad = sparsifier.learned.values[name].detach().clone(), weight.grad.clone()
    kept, before = sparsifier.masks.bool(name), weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight.grad, torch.where(kept, grad, 0)) and 0 < int(kept.sum()) < kept.numel()
    assert not torch.equal(weight.detach(), before)
    if not momentum:
        rate = sparsifier.lr_ratio * optimizer.param_groups[0]["lr"]
        torch.testing.assert_close(sparsifier.learned.values[name].detach(), score - rate * grad * before)


def test_rate_is_that_of_the_weights_own_group():
    model = network()
    optimizer = torch.optim.SGD(
        [{"params": model[:5].parameters(), "lr": 0.0}, {"params": model[5].parameters()}], lr=0.5
    )
    sparsifier = sk.STR(start=-3.0, decay=0.0, include=["^5"]).attach(model, optimizer, verbose=False)
    gradients(model, optimizer, 0)
    optimizer.step()
    assert sparsifier.learned.values["5.weight"] != -3.0


def test_soft_movement_ramps_threshold_and_penalty_averaged_over_layers():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    optimizer = sk.MaskedSGD(model.parameters(), lr=0.1)
    schedule = UpdateSchedule(0, 4, 1, 8)
    make = sk.SoftMovement(schedule, threshold=0.8, penalty=64.0, floor=0.0, lr_ratio=1.0)
    sparsifier = make.attach(model, optimizer, verbose=False)
    score = torch.zeros(())
    for step in range(6):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        ramp = 1 - (1 - min(step / 4, 1)) ** 3
        gate = score.sigmoid()
        score = score - 0.1 * 64 * ramp / 2 * gate * (1 - gate) / 16
        got = sparsifier.learned.values["0.weight"].detach()
        torch.testing.assert_close(got, score.expand(4, 4), rtol=1e-5, atol=1e-6)
        sparsifier.step()
        kept = bool(score.sigmoid() > 0.8 * (1 - (1 - min((step + 1) / 4, 1)) ** 3))
        assert sparsifier.masks.density("0.weight") == kept
    assert not kept


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4"])
@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_movement_counts_follow_the_curve(pattern, distribution):
    make = lambda: sk.Movement(0.8, UpdateSchedule(1, 4, 1, 8), pattern=pattern, distribution=distribution)  # noqa: E731
    model, optimizer, sparsifier = setup(make)
    axis = {"unstructured": None, "4x1": 0, "1x4": 1}[pattern]
    for i in range(5):
        iterate(model, optimizer, sparsifier, i, i + 1)
        sparsity = 0.8 * (1 - (1 - min(i / 3, 1)) ** 3)
        counts, groups = [], []
        for name in sparsifier.masks:
            mask = sparsifier.masks.bool(name)
            if axis is not None:
                assert all(torch.equal(b.any(axis), b.all(axis)) for b in mask.split(4, axis))
                mask = mask[::4] if axis == 0 else mask[:, ::4]
            counts.append(int(mask.sum())), groups.append(mask.numel())
        if distribution == "uniform":
            assert counts == [sk.keep_count(g, sparsity) for g in groups]
        else:
            assert sum(counts) == sk.keep_count(sum(groups), sparsity)


@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_soft_movement_penalty_threshold_and_floor(scale):
    make = lambda: sk.SoftMovement(NOW, threshold=0.4, penalty=8.0, floor=0.25, lr_ratio=10.0)  # noqa: E731
    model, optimizer, sparsifier = linear([1.0, 1, 1, 1], make)
    assert sparsifier.masks.density() == 1
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
    x = torch.tensor([[0.5, 1.0, -1.0, 0.0]])
    scaler.scale(model(x).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    # One layer of 4 weights at sigmoid(0): the penalty's gradient is 8 / 4 * 0.25.
    want = -1.0 * (x + 0.5)
    torch.testing.assert_close(sparsifier.learned.values["weight"].detach(), want)
    sparsifier.step()
    assert torch.equal(sparsifier.masks.bool("weight"), want.sigmoid() > 0.4)
    with torch.no_grad():
        sparsifier.learned.values["weight"].fill_(-5)
        sparsifier.learned.values["weight"][0, 2] = -4
    optimizer.zero_grad()
    optimizer.step()
    sparsifier.step()
    assert sparsifier.masks.bool("weight").tolist() == [[False, False, True, False]]


def test_bad_input_is_named():
    for make, words in [
        (lambda: sk.STR(pattern="4x1"), "pattern must be 'unstructured', got '4x1': STR subtracts"),
        (lambda: sk.STR(decay=-1.0), "decay must be a finite number of at least 0"),
        (lambda: sk.Movement(0.9, NOW, pattern="2:4"), "pattern must be one of"),
        (lambda: sk.Movement(0.9, NOW, distribution="erk"), "distribution must be one of"),
        (lambda: sk.SoftMovement(NOW, pattern="2:4"), "pattern must be 'unstructured'"),
        (lambda: sk.SoftMovement(NOW, threshold=2.0), "threshold must be a number from 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            make()
    model, optimizer, sparsifier = setup(lambda: sk.Movement(0.9, NOW))
    iterate(model, optimizer, sparsifier, 0, 2)
    good = sparsifier.state_dict()
    values = good["learned"]["values"]
    for learned, words in [
        (3, r"state\['learned'\] must hold"),
        ({**good["learned"], "values": {}}, r"\['values'\] must have the entries"),
        ({**good["learned"], "values": {**values, "0.weight": torch.zeros(2)}}, r"\['0.weight'\] must be of shape"),
    ]:
        with pytest.raises(ValueError, match=words):
            sparsifier.load_state_dict({**good, "learned": learned, "position": 9})
        assert sparsifier.position == 2
