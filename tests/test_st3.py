"""ST-3: the published oracle, quantiles, the curve, straight-through gradients."""

import math

import pytest
import torch
from method_helpers import gradients, setup
from method_steps import iterate

import sparsekern as sk
from sparsekern.methods.st3 import quantile, soft_threshold
from sparsekern.updates import UpdateSchedule

W = torch.tensor([[1.0, -0.5, 0.25, -2.0]])


def test_oracle():
    want = torch.tensor([[0.642403, -0.107067, 0, -1.713074]])
    torch.testing.assert_close(soft_threshold(W, torch.tensor(0.4)), want, rtol=0, atol=1e-6)
    two = soft_threshold(torch.cat([W, 10 * W]), torch.tensor(0.4))
    torch.testing.assert_close(two[:1], want, rtol=0, atol=1e-6)
    assert torch.equal(soft_threshold(W, torch.tensor(0.0)), W)
    assert not soft_threshold(W, torch.tensor(2.0)).any()


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.77, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantile_is_that_of_torch(ratio, dtype):
    values = [torch.rand(n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (7, 1, 31)]
    want = torch.quantile(torch.cat(values).double(), ratio)
    torch.testing.assert_close(quantile(values, ratio), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sigma", [False, True])
def test_ratio_follows_the_curve_and_the_mask_moves_after_it(sigma):
    schedule = UpdateSchedule(2, 6, 1, 12)
    model, optimizer, sparsifier = setup(lambda: sk.ST3(0.9, schedule, sigma=sigma))
    weights = {n: sparsifier.masks.parameter(n) for n in sparsifier.masks}
    total, hashes = sum(w.numel() for w in weights.values()), []
    for i in range(10):
        iterate(model, optimizer, sparsifier, i, i + 1)
        sparsifier.state_dict()
        hashes.append(sparsifier.masks.hash())
        ratio = 0.9 * (1 - (1 - min(max((i + 1 - 2) / 4, 0), 1)) ** 3)
        pruned = sum(int((~sparsifier.masks.bool(n)).sum()) for n in weights)
        want = math.floor(ratio * (total - 1)) + 1 if ratio else 0
        assert abs(pruned - want) <= 1, i
        rank = {n: w.detach().abs() * (math.sqrt(sum(w.shape)) if sigma else 1) for n, w in weights.items()}
        kept = torch.cat([rank[n][sparsifier.masks.bool(n)] for n in weights])
        left = torch.cat([rank[n][~sparsifier.masks.bool(n)] for n in weights])
        assert not len(left) or kept.min() >= left.max() * (1 - 1e-6)
    assert hashes[8] != hashes[9]


def test_gradient_passes_straight_through():
    model = torch.nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(W)
    optimizer = sk.MaskedSGD(model.parameters(), lr=0.1)
    sk.ST3(0.5, UpdateSchedule(0, 0, 1, 2)).attach(model, optimizer, verbose=False)
    x = torch.tensor([[1.0, 2, 3, 4]])
    output = model(x)
    th = torch.tensor(0.75)  # between 0.5 and 1
    torch.testing.assert_close(output, x @ soft_threshold(W, th).T)
    output.sum().backward()
    assert torch.equal(model.weight.grad, x)


def test_before_the_start_training_is_dense():
    plan = sk.update_schedule(total_steps=100)
    model, optimizer, sparsifier = setup(lambda: sk.ST3(0.9, plan))
    dense = setup(sk.DenseTraining)
    for i in range(4):
        gradients(model, optimizer, i)
        optimizer.step()
        sparsifier.step()
        iterate(*dense, i, i + 1)
        assert sparsifier.phase == sk.Dense()
    torch.testing.assert_close(model.state_dict(), dense[0].state_dict(), rtol=0, atol=0)
    assert (sparsifier.schedule.start, sparsifier.schedule.stop, sparsifier.every) == (5, 50, 1)


def test_bad_input_is_named():
    plan = sk.update_schedule(total_steps=10)
    for pattern in ("4x1", "2:4"):
        with pytest.raises(ValueError, match="pattern must be 'unstructured', got .*subtracts a threshold"):
            sk.ST3(0.9, plan, pattern=pattern)
    with pytest.raises(TypeError, match="schedule must be update_schedule"):
        sk.ST3(0.9, 100)
    with pytest.raises(ValueError, match="sparsity must be below 1"):
        sk.ST3(1, plan)
    model, optimizer, sparsifier = setup(lambda: sk.ST3(0.9, plan))
    good = sparsifier.state_dict()
    for change, words in [
        ({"thresholds": {}}, r"state\['thresholds'\] must have the entries"),
        ({"thresholds": {**good["thresholds"], "0.weight": 3}}, r"state\['thresholds'\]\['0.weight'\] must be"),
        ({"updated": -1}, r"state\['updated'\] must be"),
    ]:
        with pytest.raises(ValueError, match=words):
            sparsifier.load_state_dict({**good, "position": 3, **change})
        assert sparsifier.position == 0
