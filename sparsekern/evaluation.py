"""How good a network is, and how sparse: loss, accuracy, output entropy, counted zeros."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def output_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the predicted distributions; (N, classes) -> (N,). arXiv 2308.02060, section 3."""
    logs = logits.log_softmax(1)
    return -torch.where(logs == -math.inf, 0, logs.exp() * logs).sum(1)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 512) -> dict[str, float]:
    """Mean cross-entropy, share of right answers and mean output entropy in evaluation mode; the mode is restored."""
    training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        logits = model(x)
        loss = functional.cross_entropy(logits, y, reduction="sum")
        sums += torch.stack([loss, (logits.argmax(1) == y).sum(), output_entropy(logits).sum()]).double().cpu()
    model.train(training)
    return dict(zip(("loss", "accuracy", "entropy"), (sums / len(labels)).tolist(), strict=True))


def count_sparsity(weights: Sequence[Tensor]) -> float:
    """Share of exact zeros, counted from the weights; 0 of nothing."""
    total = sum(w.numel() for w in weights)
    return sum(w.numel() - int(w.count_nonzero()) for w in weights) / total if total else 0.0
