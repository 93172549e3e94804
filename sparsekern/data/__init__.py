"""Data sets small enough for memory; one file each, with a `load()` that returns a `Dataset`."""

from __future__ import annotations

from importlib import import_module

from sparsekern.data.dataset import DataError, Dataset

__all__ = ["DataError", "Dataset", "load"]


def load(name: str, train_images: int = 0) -> Dataset:
    """The data set of that name, with its first `train_images` to train on (0: all); DataError if it cannot be had."""
    return import_module(f"sparsekern.data.{name}").load().limited(train_images)
