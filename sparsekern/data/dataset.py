"""What every data set gives to the training loop."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Dataset(NamedTuple):
    """Images float32 (N, channels, H, W), labels int64 (N,), for training and for validation."""

    images: Tensor
    labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    classes: int

    def to(self, device: torch.device) -> Dataset:
        """The same on another device."""
        return Dataset(*(item.to(device) for item in self[:4]), self.classes)
