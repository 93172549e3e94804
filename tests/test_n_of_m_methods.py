"""SR-STE and STEP: n:m masks, decay of what is left out, the frozen second moment."""

import copy

import pytest
import torch
from method_helpers import check_resume, gradients, setup
from method_steps import iterate, network

import sparsekern as sk


def check_groups(sparsifier, n=2, m=4):
    for name in sparsifier.masks:
        for group in sparsifier.masks.bool(name).split(m, 1):
            assert (group.sum(1) == min(n, group.shape[1])).all()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_srste_keeps_n_of_every_m_of_the_present_weights(pattern):
    model, optimizer, sparsifier = setup(lambda: sk.SRSTE(pattern=pattern))
    for i in range(3):
        iterate(model, optimizer, sparsifier, i, i + 1)
        check_groups(sparsifier, *map(int, pattern.split(":")))
        want = sk.ops.topk_mask([model[3].weight.detach()], None, pattern=pattern)[0]
        assert torch.equal(sparsifier.masks.packed("3.weight"), want)


@pytest.mark.parametrize("sgd", [sk.MaskedSGD, torch.optim.SGD])
@pytest.mark.parametrize("scale", [None, 8.0])
def test_srste_gradient(scale, sgd):
    """w=[4,-3,2,-1], 2:4, c=.5: the two left out get .5 w on top of the straight-through gradient."""
    model = torch.nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, -3, 2, -1]]))
    optimizer = sgd(model.parameters(), lr=0.1)
    sk.SRSTE(decay=0.5).attach(model, optimizer, verbose=False)
    output = model(torch.tensor([[1.0, 10, 100, 1000]])).sum()
    assert output == 4 - 30
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0)
    scaler.scale(output).backward()
    scaler.step(optimizer)
    gradient = torch.tensor([[1.0, 10, 100 + 1, 1000 - 0.5]])
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[4.0, -3, 2, -1]]) - 0.1 * gradient)


def adam(kind, model, **kwargs):
    return getattr(torch.optim, kind)(model.parameters(), lr=0.01, weight_decay=0.1, **kwargs)


def attached(kind="Adam", **kwargs):
    model = network()
    optimizer = adam(kind, model)
    return model, optimizer, sk.STEP(20, **kwargs).attach(model, optimizer, verbose=False)


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_step_is_adam_before_and_freezes_the_variance_after(kind):
    model, optimizer, sparsifier = attached(kind, switch=4)
    plain = network()
    other = adam(kind, plain)
    for i in range(8):
        variance = {p: copy.deepcopy(optimizer.state[p].get("exp_avg_sq")) for p in model.parameters()}
        first = copy.deepcopy(optimizer.state[model[3].weight].get("exp_avg"))
        iterate(model, optimizer, sparsifier, i, i + 1)
        if i < 4:
            gradients(plain, other, i)
            other.step()
            torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
            assert sparsifier.masks.density() == 1 or i == 3
        else:
            check_groups(sparsifier)
            assert all(torch.equal(optimizer.state[p]["exp_avg_sq"], variance[p]) for p in model.parameters())
            assert not torch.equal(optimizer.state[model[3].weight]["exp_avg"], first)
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_step_with_the_frozen_variance_by_hand(kind, maximize):
    model = torch.nn.Linear(4, 1, bias=False)
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, weight_decay=0.2, maximize=maximize)
    sparsifier = sk.STEP(10, switch=1).attach(model, optimizer, verbose=False)
    first, second = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[4.0, 3, 2, 1]])
    model.weight.grad = first.clone()
    optimizer.step()
    sparsifier.step()
    w, state = model.weight.detach().clone(), optimizer.state[model.weight]
    momentum, variance = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    model.weight.grad = second.clone()
    optimizer.step()
    g = -second if maximize else second
    g = g + 0.2 * w if kind == "Adam" else g
    shrunk = w * (1 - 0.1 * 0.2) if kind == "AdamW" else w
    average = (0.9 * momentum + 0.1 * g) / (1 - 0.9**2)
    want = shrunk - 0.1 * average / ((variance / (1 - 0.999)).sqrt() + 1e-8)
    torch.testing.assert_close(model.weight.detach(), want)


def test_step_switches_by_itself_between_its_bounds():
    def switched_at(eps, **kwargs):
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), eps=eps)
        sparsifier = sk.STEP(20, **kwargs).attach(model, optimizer, verbose=False)
        for i in range(20):
            iterate(model, optimizer, sparsifier, i, i + 1)
            if isinstance(sparsifier.phase, sk.Sparse):
                return i + 1
        return None

    assert switched_at(1.0, bounds=(0.2, 0.5)) == 4
    assert switched_at(1e-20) == 10


def test_step_finds_the_switch_by_the_mean_change_of_the_variance():
    """At a constant gradient of 1 and beta2 = 1/2 the change is 2^-t, over two steps on average below 0.01 at t = 8."""
    model = torch.nn.Linear(4, 2, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.5), eps=0.01)
    sparsifier = sk.STEP(20, bounds=(0.1, 0.9)).attach(model, optimizer, verbose=False)
    for _ in range(8):
        assert sparsifier.phase == sk.Dense()
        model.weight.grad = torch.ones(2, 4)
        optimizer.step()
        sparsifier.step()
    assert sparsifier.phase == sk.Sparse(0.5)


def test_step_resumes_at_any_step_when_it_finds_the_switch(monkeypatch):
    import method_helpers

    monkeypatch.setitem(method_helpers.OPTIMIZERS, "adam", lambda p: torch.optim.Adam(p, lr=0.01))
    check_resume(lambda: sk.STEP(20, bounds=(0.1, 0.2)), 7, "adam")


def test_step_refuses_what_it_has_no_second_moment_for():
    model, optimizer, sparsifier = attached(switch=1)
    iterate(model, optimizer, sparsifier, 0, 1)
    late = torch.nn.Linear(2, 2)
    optimizer.add_param_group({"params": list(late.parameters())})
    iterate(model, optimizer, sparsifier, 1, 2)
    late(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="first got a gradient after STEP froze the second moment"):
        optimizer.step()


def test_bad_input_is_named():
    for pattern in ("unstructured", "4x1", "3:2"):
        with pytest.raises(ValueError, match="pattern must be n:m"):
            sk.SRSTE(pattern=pattern)
        with pytest.raises(ValueError, match="pattern must be n:m"):
            sk.STEP(10, pattern=pattern)
    with pytest.raises(ValueError, match="sparsity must be 0.5 or left out"):
        sk.SRSTE(0.9)
    with pytest.raises(ValueError, match="decay must be"):
        sk.SRSTE(decay=-1.0)
    with pytest.raises(ValueError, match="switch must be from 1 to total_steps - 1 = 9"):
        sk.STEP(10, switch=10)
    with pytest.raises(ValueError, match="bounds must be two rising shares"):
        sk.STEP(10, bounds=(0.5, 0.1))
    model = network()
    with pytest.raises(TypeError, match="optimizer must be torch.optim.Adam or AdamW"):
        sk.STEP(10).attach(model, sk.MaskedSGD(model.parameters()))
    with pytest.raises(ValueError, match="amsgrad must be off"):
        sk.STEP(10).attach(model, torch.optim.Adam(model.parameters(), amsgrad=True))
