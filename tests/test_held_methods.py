"""Dense training, fixed masks, one-shot pruning, lottery tickets, batch-norm re-estimation."""

import copy

import pytest
import torch
from method_helpers import check_resume, check_zero, setup
from method_steps import OPTIMIZERS, iterate, network
from torch import nn
from torch.nn.utils import prune

import sparsekern as sk


def sparse_network():
    model = network()
    with torch.no_grad():
        for weight in (model[0].weight, model[5].weight):
            weight.masked_fill_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.7, 0)
    return model


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_dense_training_is_plain_training(kind):
    got, want = setup(sk.DenseTraining, kind), network()
    iterate(*got, 0, 4)
    optimizer = OPTIMIZERS[kind](want.parameters())

    class Nothing:
        def step(self):
            pass

    iterate(want, optimizer, Nothing(), 0, 4)
    torch.testing.assert_close(got[0].state_dict(), want.state_dict(), rtol=0, atol=0)
    assert got[2].masks.density() == 1 and got[2].phase == sk.Dense()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fixed_mask_holds_the_zeros_it_found(kind):
    model = sparse_network()
    zeros = model[0].weight == 0
    model, optimizer, sparsifier = setup(sk.FixedMask, kind, model)
    iterate(model, optimizer, sparsifier, 0, 4)
    check_zero(optimizer, sparsifier)
    assert torch.equal(model[0].weight == 0, zeros) and model[3].weight.all()
    assert torch.equal(~sparsifier.masks.bool("0.weight"), zeros)
    assert sparsifier.phase.sparsity == pytest.approx(1 - sparsifier.masks.density())


def test_fixed_mask_needs_zeros():
    with pytest.raises(ValueError, match="none of its prunable weights has a zero"):
        setup(sk.FixedMask)
    model = network()
    with torch.no_grad():
        model[0].weight[0] = 0
    with pytest.raises(ValueError, match="none of its prunable weights has a zero"):
        setup(lambda: sk.FixedMask(exclude=["^0"]), model=model)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4", "2:4"])
def test_one_shot_keeps_the_largest_and_holds_them(kind, pattern):
    before = network()
    model, optimizer, sparsifier = setup(lambda: sk.OneShot(0.5, pattern=pattern, distribution="uniform"), kind)
    for name in sparsifier.masks:
        mask, weight = sparsifier.masks.bool(name), before.state_dict()[name]
        assert torch.equal(model.state_dict()[name], weight * mask)
        if pattern == "unstructured":
            assert weight[mask].abs().min() >= weight[~mask].abs().max()
            assert int(mask.sum()) == sk.keep_count(mask.numel(), 0.5)
        elif pattern == "2:4":
            assert all((group.sum(1) == 2).all() for group in mask.split(4, 1))
        else:
            axis = 0 if pattern == "4x1" else 1
            assert all(torch.equal(b.any(axis), b.all(axis)) for b in mask.split(4, axis))
    masks = sparsifier.masks.hash()
    iterate(model, optimizer, sparsifier, 0, 3)
    check_zero(optimizer, sparsifier)
    assert sparsifier.masks.hash() == masks
    assert sparsifier.finalize() is model


def test_one_shot_agrees_with_torch_prune():
    model, _, _ = setup(lambda: sk.OneShot(0.8))
    other = network()
    weights = [(other[i], "weight") for i in (0, 3, 5)]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=0.8)
    for i in (0, 3, 5):
        assert torch.equal(model[i].weight, other[i].weight)


@pytest.mark.parametrize(
    "make",
    [lambda: sk.OneShot(0.9), sk.DenseTraining, lambda: sk.LotteryTicket(0.9, initial=network().state_dict())],
    ids=["one-shot", "dense", "lottery"],
)
def test_resume_at_any_step(make):
    check_resume(make, 4)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_lottery_ticket_rewinds(kind):
    model = network()
    initial = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS[kind](model.parameters())
    dense = sk.DenseTraining().attach(model, optimizer, verbose=False)
    iterate(model, optimizer, dense, 0, 5)
    dense.finalize()
    trained = copy.deepcopy(model.state_dict())
    ticket = sk.LotteryTicket(0.8, initial=initial).attach(model, optimizer, verbose=False)
    flat = torch.cat([trained[n].abs().flatten() for n in ticket.masks])
    mask = torch.cat([ticket.masks.bool(n).flatten() for n in ticket.masks])
    assert flat[mask].min() >= flat[~mask].max() and int(mask.sum()) == sk.keep_count(flat.numel(), 0.8)
    for name, value in model.state_dict().items():
        want = initial[name] * ticket.masks.bool(name) if name in list(ticket.masks) else initial[name]
        assert torch.equal(value, want), name
    assert not optimizer.state
    iterate(model, optimizer, ticket, 0, 3)
    check_zero(optimizer, ticket)
    ticket.finalize()
    once = ticket.masks
    again = sk.LotteryTicket(0.9, initial=initial).attach(model, optimizer, verbose=False)
    assert not any((again.masks.bool(n) & ~once.bool(n)).any() for n in once)


def test_bad_input_is_named_and_changes_nothing():
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    short = {k: v for k, v in before.items() if k != "0.bias"}
    wrong = {**before, "0.bias": torch.zeros(3)}
    for initial, words in [
        (short, "initial must have the keys"),
        (wrong, r"initial\['0.bias'\] must be of shape \(8,\)"),
        (model.state_dict(), "is the trained tensor itself"),
    ]:
        with pytest.raises(ValueError, match=words):
            sk.LotteryTicket(0.9, initial=initial).attach(model, optimizer)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(TypeError, match="initial must be a state dict"):
        sk.LotteryTicket(0.9, initial=3)
    with pytest.raises(ValueError, match="sparsity must be 0.5 or left out"):
        sk.OneShot(0.9, pattern="2:4")
    with pytest.raises(ValueError, match=r"layer_sparsity\[.*\] must be 0 with pattern"):
        sk.OneShot(pattern="2:4", layer_sparsity={"first": 0.2})
    with pytest.raises(ValueError, match="pattern must be"):
        sk.OneShot(0.9, pattern="8x1")
    with pytest.raises(TypeError, match="sparsity must be a number"):
        sk.OneShot()


def test_batch_norm_statistics_are_the_plain_average():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5))
    inputs = [torch.randn(4, 4, 8, 8) for _ in range(3)]
    for _ in range(5):
        model(10 + torch.randn(4, 4, 8, 8))
    model.eval()
    model[1].train()
    weights = copy.deepcopy(dict(model.named_parameters()))
    with torch.no_grad():
        outputs = [model[0](x).transpose(0, 1).flatten(1) for x in inputs]
    assert sk.reestimate_batch_norm(model, [(x, None) for x in inputs]) is model
    torch.testing.assert_close(model[1].running_mean, torch.stack([o.mean(1) for o in outputs]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([o.var(1) for o in outputs]).mean(0))
    assert [m.training for m in model] == [False, True, False] and model[1].momentum == 0.1
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_batch_norm_refusals_leave_the_statistics():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    model(torch.randn(4, 4, 8, 8))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="inputs must hold at least one batch"):
        sk.reestimate_batch_norm(model, [])
    with pytest.raises(RuntimeError):
        sk.reestimate_batch_norm(model, [torch.randn(4, 4, 8, 8), torch.randn(4, 3, 8, 8)])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model[1].momentum == 0.1 and model.training
    with pytest.raises(ValueError, match="model must have a batch norm"):
        sk.reestimate_batch_norm(nn.Linear(2, 2), [torch.randn(1, 2)])
