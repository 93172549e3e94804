"""Accelerated training gives the losses and weights of plain training."""

import pytest
import torch
from test_nn import always, masked, network
from torch import nn

import sparsekern as sk
from sparsekern.phases import PhaseSchedule, PhaseSpan


@pytest.mark.parametrize("pattern", ["4x1", "unstructured"])
def test_losses_of_fifty_steps_agree_with_plain_training(pattern):
    """A sparse phase with momentum: the same data, once on the sparse kernels and once on torch's convolutions."""
    torch.manual_seed(1)
    x = torch.randn(32, 4, 8, 8)
    y = x.mean((2, 3)).argmax(1)

    def losses(accelerated):
        model = network()
        masks = masked(model, pattern, 0.6)
        optimizer = sk.MaskedSGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4, masks=masks)
        if accelerated:
            sk.nn.accelerate(model, masks, choose=always)
        found = []
        for step in range(50):
            batch = torch.arange(step * 16, step * 16 + 16) % 32
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        if accelerated:
            assert sk.nn.acceleration_report(model).share == 1.0
        return torch.tensor(found)

    plain, fast = losses(False), losses(True)
    assert plain[-4:].mean() < 0.8 * plain[:4].mean(), "it must learn something, or agreement means little"
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["masked", "sgd"])
def test_acdc_training_agrees_with_and_without(kind):
    schedule = PhaseSchedule(
        (PhaseSpan(0, 2, sk.Dense()), PhaseSpan(2, 5, sk.Sparse(0.8)), PhaseSpan(5, 6, sk.Dense()),
         PhaseSpan(6, 9, sk.Sparse(0.8)))
    )  # fmt: skip
    make = {"masked": sk.MaskedSGD, "sgd": torch.optim.SGD}[kind]

    def train(fast):
        model = network()
        optimizer = make(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
        sparsifier = sk.ACDC(0.8, schedule, pattern="4x1").attach(model, optimizer, verbose=False)
        if fast:
            sk.nn.accelerate(model, sparsifier, choose=always)
        shares = []
        for i in range(9):
            x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            sparsifier.step()
            shares.append(sk.nn.acceleration_report(model).share)
        return model, shares

    (got, shares), (want, _) = train(True), train(False)
    # A phase edge belongs to the iteration after it.
    assert shares == [0, 0, 1, 1, 1, 0, 1, 1, 1]
    torch.testing.assert_close(got.state_dict(), want.state_dict(), rtol=1e-4, atol=1e-5)
