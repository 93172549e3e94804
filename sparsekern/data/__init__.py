"""Data sets small enough for memory; one file each, with a `load()` that returns a `Dataset`."""

from __future__ import annotations

from importlib import import_module

from sparsekern.data.dataset import Dataset

__all__ = ["Dataset", "load"]


def load(name: str) -> Dataset:
    """The data set of that name."""
    return import_module(f"sparsekern.data.{name}").load()
