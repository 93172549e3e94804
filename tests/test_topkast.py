"""Top-KAST and Powerpropagation: sets, frozen weights, penalty, powers."""

import pickle

import pytest
import torch
from method_helpers import gradients, setup
from method_steps import OPTIMIZERS, iterate, network, resumed_from

import sparsekern as sk
from sparsekern.methods.powerpropagation import change_power, power
from sparsekern.phases import PhaseSchedule, PhaseSpan

ONCE = PhaseSchedule((PhaseSpan(0, 4, sk.Sparse(0.5)),))


def test_bad_input_is_named():
    for forward, backward in ((0.5, 0.8), (0.5, 0.5), (1.0, 0.5)):
        with pytest.raises(ValueError, match="backward_sparsity must be below sparsity.*other way round"):
            sk.TopKAST(forward, backward)
    for change, words in [
        ({"every": 0}, "every must be at least 1"),
        ({"penalty": -1.0}, "penalty must be a finite number"),
        ({"alpha": 0.5}, "alpha must be a finite number of at least 1"),
        ({"pattern": "2:4"}, "pattern must be one of"),
    ]:
        with pytest.raises(ValueError, match=words):
            sk.TopKAST(0.9, 0.8, **change)
    with pytest.raises(TypeError, match="schedule must be a PhaseSchedule"):
        sk.Powerpropagation(2.0, 100)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4"])
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_sets_are_nested_and_what_is_outside_is_frozen(kind, pattern, alpha):
    model, optimizer, sparsifier = setup(lambda: sk.TopKAST(0.8, 0.5, pattern=pattern, alpha=alpha), kind)
    for i in range(3):
        before = {n: sparsifier.masks.parameter(n).detach().clone() for n in sparsifier.masks}
        outside = {n: ~sparsifier.backward_masks.bool(n) for n in sparsifier.masks}
        for name in sparsifier.masks:
            assert not (sparsifier.masks.bool(name) & outside[name]).any()
        gradients(model, optimizer, i)
        between = sparsifier.backward_masks.bool("5.weight") & ~sparsifier.masks.bool("5.weight")
        assert model[5].weight.grad[between].all() and between.any()
        optimizer.step()
        for name, out in outside.items():
            parameter = sparsifier.masks.parameter(name)
            assert torch.equal(parameter[out], before[name][out])
            assert not torch.equal(parameter[~out], before[name][~out])
            assert not any(m[out].any() for m in sparsifier.momentum(parameter))
        sparsifier.step()
    if pattern == "unstructured":
        total = sum(p.numel() for p in before.values())
        for masks, sparsity in ((sparsifier.masks, 0.8), (sparsifier.backward_masks, 0.5)):
            assert sum(int(masks.bool(n).sum()) for n in masks) == sk.keep_count(total, sparsity)


def test_exploration_penalty():
    """Weight 1 on A, 1 / D on B without A, 0 outside; through the gradient."""
    model = torch.nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[8.0, -7, 6, -5, 4, -3, 2, -1]]))
    before = model.weight.detach().clone()
    optimizer = sk.MaskedSGD(model.parameters(), lr=0.5)
    sk.TopKAST(0.75, 0.5, penalty=0.01).attach(model, optimizer, verbose=False)
    model(torch.zeros(1, 8)).sum().backward()
    optimizer.step()
    factor = torch.tensor([[1.0, 1, 4, 4, 0, 0, 0, 0]])
    torch.testing.assert_close(model.weight.detach(), before - 0.5 * 0.01 * factor * before)


def test_masks_are_chosen_every_so_many_steps():
    model, optimizer, sparsifier = setup(lambda: sk.TopKAST(0.8, 0.5, every=3))
    hashes = []
    for i in range(7):
        iterate(model, optimizer, sparsifier, i, i + 1)
        hashes.append(sparsifier.masks.hash())
    assert [a == b for a, b in zip(hashes, hashes[1:], strict=False)] == [True, False, True, True, False, True]


def test_power_round_trip_and_gradient():
    phi = torch.tensor([0.0, -0.3, 2.0, 1e-3, -5.0], dtype=torch.float64, requires_grad=True)
    for alpha in (1.0, 1.5, 2.0, 5.0):
        assert torch.autograd.gradcheck(lambda p, a=alpha: power(p, a), phi, atol=2e-3)  # at 0, eps ** 0.5
        there = change_power(phi.detach(), 1, alpha)
        torch.testing.assert_close(power(there, alpha), phi.detach())
        torch.testing.assert_close(change_power(there, alpha, 1), phi.detach())
        (gradient,) = torch.autograd.grad(power(phi, alpha).sum(), phi)
        torch.testing.assert_close(gradient, alpha * phi.detach().abs() ** (alpha - 1))
    assert power(phi, 1.0) is phi


def test_attach_keeps_the_function_and_zero_stays_zero():
    model, x = network().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model[3].weight[0] = 0
    want = model(x)
    model, optimizer, sparsifier = setup(lambda: sk.Powerpropagation(3.0), model=model)
    torch.testing.assert_close(model(x), want)
    iterate(model, optimizer, sparsifier, 0, 3)
    assert not model[3].weight[0].any() and model[3].weight[1:].all()
    before = model(x)
    sparsifier.set_alpha(1.5)
    torch.testing.assert_close(model(x), before)
    assert not model[3].weight[0].any()
    assert not any(m.any() for n in sparsifier.masks for m in sparsifier.momentum(sparsifier.masks.parameter(n)))
    again = resumed_from((model, optimizer, sparsifier), setup(lambda: sk.Powerpropagation(3.0)))
    torch.testing.assert_close(again[0].eval()(x), model(x), rtol=0, atol=0)


def test_powerpropagation_prunes_by_theta_and_holds_the_mask():
    schedule = sk.acdc_schedule(epochs=4, rule="proportional").resolve(2, 0.8)
    model, optimizer, sparsifier = setup(lambda: sk.Powerpropagation(2.0, schedule, pattern="1x4"))
    edges = set(schedule.edges)
    for i in range(schedule.total_steps):
        before = sparsifier.masks.hash()
        iterate(model, optimizer, sparsifier, i, i + 1)
        assert (sparsifier.masks.hash() == before) == (i + 1 not in edges)
    theta = {n: sparsifier.masks.parameter(n).detach().abs() ** 2 for n in sparsifier.masks}
    groups = sum(-(-t.shape[1] // 4) * t.numel() // t.shape[1] for t in theta.values())
    live = sum(int(sparsifier.masks.bool(n)[:, ::4].sum()) for n in theta)
    assert live == sk.keep_count(groups, 0.8)


@pytest.mark.parametrize("method", ["topkast", "powerpropagation"])
def test_blocks_are_ranked_by_theta_not_by_phi(method):
    """|theta| sums to 2.8 and 3, |phi| to 3.3 and 1.7."""
    model = torch.nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.7, -0.7, 0.7, 0.7, 3.0, 0, 0, 0]]))
    if method == "topkast":
        make = lambda: sk.TopKAST(0.5, 0.0, alpha=2.0, pattern="1x4")  # noqa: E731
    else:
        make = lambda: sk.Powerpropagation(2.0, ONCE, pattern="1x4")  # noqa: E731
    _, _, sparsifier = setup(make, model=model)
    assert sparsifier.masks.bool("weight").tolist() == [[False] * 4 + [True] * 4]


def test_the_optimizer_freezes_while_attached_and_is_as_it_was_afterwards():
    model = torch.nn.Linear(8, 4, bias=False)
    optimizer = sk.MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, momentum_policy="decay")
    sparsifier = sk.TopKAST(0.75, 0.5).attach(model, optimizer, verbose=False)
    assert optimizer.momentum_policy == "freeze" and optimizer.masks is sparsifier.backward_masks
    sparsifier.finalize()
    assert optimizer.momentum_policy == "decay" and len(optimizer.masks) == 0


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("method", ["topkast", "powerpropagation"])
def test_gradients_are_those_of_the_power(method, alpha):
    """Everywhere for Top-KAST, straight through its mask; where the mask keeps for Powerpropagation."""
    model = torch.nn.Linear(6, 4, bias=False)
    make = sk.TopKAST(0.5, 0.25, alpha=alpha) if method == "topkast" else sk.Powerpropagation(alpha, ONCE)
    sparsifier = make.attach(model, sk.MaskedSGD(model.parameters(), lr=0.1), verbose=False)
    x = torch.randn(3, 6)
    model(x).square().sum().backward()
    phi, kept = model.weight.detach(), sparsifier.masks.bool("weight")
    theta = torch.where(kept, phi * phi.abs() ** (alpha - 1), 0).requires_grad_()
    (x @ theta.T).square().sum().backward()
    want = theta.grad * alpha * phi.abs() ** (alpha - 1)
    torch.testing.assert_close(model.weight.grad, want if method == "topkast" else torch.where(kept, want, 0))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_the_penalty_in_the_optimizers_own_step_is_that_through_the_gradient(alpha):
    """Beside weight decay, Nesterov momentum and parameters that no mask has; and it ends with the method."""
    found = {}
    for kind in ("masked", "sgd"):
        parts = setup(lambda: sk.TopKAST(0.8, 0.5, penalty=0.1, alpha=alpha, every=2), kind)
        iterate(*parts, 0, 5)
        found[kind] = {n: v.clone() for n, v in parts[0].state_dict().items()}
        if kind == "masked":
            assert pickle.loads(pickle.dumps(parts[1]))._inner[1:] == (0.1, 0.1 / (1 - 0.8))
            parts[2].finalize()
            assert parts[1]._inner is None
    torch.testing.assert_close(found["masked"], found["sgd"])
    parts = setup(lambda: sk.TopKAST(0.8, 0.5, penalty=0.0, alpha=alpha, every=2), "masked")
    iterate(*parts, 0, 5)
    assert parts[1]._inner is None and not torch.allclose(parts[0][5].weight, found["sgd"]["5.weight"])
