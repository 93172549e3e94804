"""Batch-norm statistics measured anew, for a network whose weights were changed without training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, inputs: Iterable[Any]) -> nn.Module:
    """Replace the running mean and variance of every batch norm by the plain average over `inputs`; returns `model`.

    `inputs` are batches for `model(batch)`, about 1,000 samples (as in IST-DASLab/CrAM); of a tuple or list, such as
    (images, labels), the first entry is used. Every batch counts alike. All other modules run in evaluation mode, so
    dropout is off; modes and momenta are restored. Weights are not touched. Raises ValueError, with the old statistics
    in place, if the model has no batch norm that tracks statistics or `inputs` is empty.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        raise ValueError("model must have a batch norm that tracks statistics, found none")
    modes = {module: module.training for module in model.modules()}
    before = [{key: value.clone() for key, value in norm.named_buffers()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    batches, done = 0, False
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # torch's own word for the cumulative average
        for batch in inputs:
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)
            batches += 1
        if not batches:
            raise ValueError("inputs must hold at least one batch, got none")
        done = True
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum, buffers in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            for key, value in norm.named_buffers():
                if not done:
                    value.copy_(buffers[key])
    return model
