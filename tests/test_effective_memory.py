"""Effective weights and gradients in memory that is kept from step to step: never stale, never somebody else's."""

import copy

import pytest
import torch
from method_helpers import setup
from method_steps import iterate
from test_effective import METHODS, every_method
from torch import nn

import sparsekern as sk


def attached(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Linear(16, 8, bias=False))
    return setup(METHODS[method], "masked", model)


def inputs(i, **options):
    return torch.randn(4, 12, generator=torch.Generator().manual_seed(i), **options)


def train(model, optimizer, sparsifier, i):
    optimizer.zero_grad()
    model(inputs(i)).square().sum().backward()
    optimizer.step()
    sparsifier.step()


def check_seen(model, sparsifier, x):
    """Layers compute with the effective weight of what is stored now."""
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(lambda m, _, n=name: seen.__setitem__(f"{n}.weight", m.weight.detach().clone()))
        for name, layer in model.named_children()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    for name, weight in seen.items():
        with torch.no_grad():
            assert torch.equal(weight, sparsifier.effective(name, sparsifier.masks.parameter(name))), name
    assert seen.keys() == set(sparsifier.masks)


@every_method
def test_the_memory_is_the_same_in_every_step_and_follows_weights_and_masks(method):
    model, optimizer, sparsifier = parts = attached(method)
    places = set()
    for i in range(4):
        train(*parts, i)
        check_seen(model, sparsifier, inputs(i))
        places.add(sparsifier.shadow("0.weight", model[0].weight).data_ptr())
    assert len(places) == 1


@every_method
def test_backward_after_a_change_raises_as_for_a_parameter(method):
    model, optimizer, sparsifier = parts = attached(method)
    train(*parts, 0)

    def forward():
        return model(inputs(1, requires_grad=True)).square().sum()

    def in_place():
        with torch.no_grad():
            model[1].weight.mul_(1.5)

    changes = [lambda: train(*parts, 2), in_place, lambda: model.load_state_dict(copy.deepcopy(model.state_dict()))]
    for change in changes:
        first = forward()
        change()
        forward()  # writes the memory that the first one saved
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            first.backward()


@every_method
def test_forward_passes_at_the_same_weights_share_a_backward_pass(method):
    model, optimizer, sparsifier = attached(method)
    want = []
    for i in (0, 1):
        optimizer.zero_grad()
        model(inputs(i, requires_grad=True)).square().sum().backward()
        want.append([p.grad.clone() for p in model.parameters()])
    optimizer.zero_grad()
    losses = [model(inputs(i, requires_grad=True)).square().sum() for i in (0, 1)]
    with torch.no_grad():
        model(inputs(2))
    with torch.inference_mode():
        model(inputs(3))
    sum(losses).backward()
    for p, a, b in zip(model.parameters(), *want, strict=True):
        torch.testing.assert_close(p.grad, a + b)


@every_method
def test_first_forward_in_inference_mode(method):
    model, *rest = parts = attached(method)
    with torch.inference_mode():
        model(inputs(0))
    train(*parts, 1)


@every_method
def test_weights_changed_behind_the_back_of_autograd_are_seen(method):
    model, optimizer, sparsifier = parts = attached(method)
    train(*parts, 0)
    other = {n: torch.randn_like(v) for n, v in model.state_dict().items()}
    for change in (
        lambda: model[0].weight.data.mul_(-2),
        lambda: setattr(model[0].weight, "data", torch.randn(16, 12)),
        lambda: model.load_state_dict(other),
        lambda: model.load_state_dict({n: v.clone() for n, v in other.items()}, assign=False),
    ):
        check_seen(model, sparsifier, inputs(0))
        change()
        check_seen(model, sparsifier, inputs(0))
    model.double()
    check_seen(model, sparsifier, inputs(0).double())


@every_method
def test_layouts(method):
    model, optimizer, sparsifier = setup(METHODS[method])
    iterate(model, optimizer, sparsifier, 0, 2)
    model.to(memory_format=torch.channels_last)
    layer, x = model[3], torch.randn(2, 8, 5, 5)
    want = nn.functional.conv2d(x, sparsifier.effective("3.weight", layer.weight).detach(), layer.bias)
    torch.testing.assert_close(layer(x), want, rtol=0, atol=0)
    assert sparsifier.shadow("3.weight", layer.weight).stride() == layer.weight.stride()


@every_method
def test_copies_have_memory_of_their_own(method):
    model, optimizer, sparsifier = parts = attached(method)
    train(*parts, 0)
    average = copy.deepcopy(model)
    loss = model(inputs(1, requires_grad=True)).square().sum()
    with torch.no_grad():
        for p in average.parameters():
            p.mul_(3)
        tripled = average(inputs(1))
    loss.backward()
    with torch.no_grad():
        for p, q in zip(average.parameters(), model.parameters(), strict=True):
            p.copy_(q)
        assert torch.equal(average(inputs(1)), model(inputs(1))) and not torch.equal(tripled, model(inputs(1)))


@pytest.mark.parametrize("method", ["str", "power", "topkast-power"])
def test_gradients_that_somebody_holds_are_left_alone(method):
    model, optimizer, sparsifier = attached(method)

    def backward(i):
        model(inputs(i)).square().sum().backward()
        return model[0].weight.grad

    first = backward(0)
    held, view = first.clone(), first[:2]
    place = first.data_ptr()
    del first
    optimizer.zero_grad()
    other = backward(1)  # `view` still looks at the first
    assert torch.equal(view, held[:2]) and other.data_ptr() != place
    backward(0)
    torch.testing.assert_close(model[0].weight.grad, other)  # accumulated in place
    both = other.clone()
    optimizer.zero_grad()
    del view, other
    assert torch.equal(backward(0), held) and model[0].weight.grad.data_ptr() == place  # nobody does
    optimizer.zero_grad(set_to_none=False)
    backward(1), backward(0)
    torch.testing.assert_close(model[0].weight.grad, both)


def test_graphs_over_several_copies_of_one_layer():
    """A layer called more than once in a forward pass, as recurrent networks do."""
    layer = nn.Linear(6, 6, bias=False)
    model, optimizer, sparsifier = setup(lambda: sk.TopKAST(0.5, 0.25), "masked", nn.Sequential(layer))
    x = torch.randn(3, 6, requires_grad=True)
    weight = sparsifier.effective("0.weight", layer.weight).detach().requires_grad_()
    layer(layer(layer(x))).sum().backward()
    (want,) = torch.autograd.grad((x @ weight.T @ weight.T @ weight.T).sum(), weight)
    torch.testing.assert_close(layer.weight.grad, want)


@every_method
def test_one_call_at_the_start_of_a_pass_serves_all_layers_that_the_last_one_used(method, monkeypatch):
    model, optimizer, sparsifier = attached(method)
    calls, fill = [], sparsifier._fill

    def counted(names, weights, outs):
        calls.append(list(names))
        fill(names, weights, outs)

    monkeypatch.setattr(sparsifier, "_fill", counted)
    first, second = sorted(sparsifier.masks)
    for wanted in ([[first], [second]], [[first, second]]):
        calls.clear()
        model(inputs(0))
        assert calls == wanted
    model[1] = nn.Identity()
    model(inputs(0)), calls.clear()
    torch.testing.assert_close(model(inputs(1)), inputs(1) @ sparsifier.effective(first, model[0].weight).detach().T)
    assert calls == [[first]]


class Twice(nn.Module):
    """Uses a layer, does something, uses it again."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6, bias=False)
        self.between = lambda: None

    def forward(self, x):
        first = self.layer(x)
        self.between()
        return first, self.layer(x)


@every_method
def test_a_weight_changed_within_a_pass_or_after_one_that_failed_is_seen(method):
    torch.manual_seed(0)
    model, _, sparsifier = setup(METHODS[method], "masked", Twice())
    x, stored = torch.randn(3, 6), model.layer.weight

    def want():
        return x @ sparsifier.effective("layer.weight", stored).detach().T

    def double():
        stored.data.mul_(2)  # behind the back of autograd

    def fail():
        double()
        raise KeyError

    model(x)
    before, model.between = want(), double
    torch.testing.assert_close(model(x), (before, want()))
    assert not torch.equal(before, want())
    hook = model.register_forward_pre_hook(lambda *_: fail())
    with pytest.raises(KeyError):
        model(x)
    hook.remove()
    torch.testing.assert_close(model.layer(x), want())
