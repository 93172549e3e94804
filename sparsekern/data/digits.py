"""scikit-learn's digits: 1797 handwritten digits, 8x8 pixels, 10 classes; real images that come with the package."""

from __future__ import annotations

import torch

from sparsekern.data.dataset import Dataset

VALIDATION = 360


def load() -> Dataset:
    """1437 images to train on and 360 to validate on, split by a fixed permutation; pixels scaled to -1..1."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install 'sparsekern[train]'") from error
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(found.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held = order[:-VALIDATION], order[-VALIDATION:]
    return Dataset(images[train], labels[train], images[held], labels[held], classes=10)
