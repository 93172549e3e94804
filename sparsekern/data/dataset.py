"""What every data set gives to the training loop."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DataError(RuntimeError):
    """A data set is not there, or is not what it should be; the message says how to get it."""


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

    def limited(self, count: int) -> Dataset:
        """The same with the first `count` images to train on, all if 0; DataError if there are fewer."""
        if count > len(self.labels):
            raise DataError(f"data.train_images: given {count}, allowed is at most {len(self.labels)}, all there are")
        return self._replace(images=self.images[:count], labels=self.labels[:count]) if count else self
