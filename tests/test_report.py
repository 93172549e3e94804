"""The table of a model's zeros."""

import torch
from torch import nn

import sparsekern as sk


def test_sparsity_report():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[3].weight = model[2].weight
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.0, -0.0, 1, 2, torch.nan, 3, 4, 5]).reshape(2, 1, 2, 2))
        model[2].weight.fill_(1)
    report = sk.sparsity_report(model)
    assert report.layers == (("0.weight", (2, 1, 2, 2), 2), ("2.weight", (2, 2), 0))
    assert (report.zeros, report.weights, report.sparsity) == (2, 12, 2 / 12)
    assert "0.weight" in str(report) and "0.1667" in str(report)
    assert sk.sparsity_report(nn.ReLU()).sparsity == 0.0
