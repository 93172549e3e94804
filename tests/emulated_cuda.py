"""The operators of csrc/cuda, emulated, in place of those for CPU tensors."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import warnings
from collections.abc import Iterator

import emulator
import torch

NAMESPACE = "sparsekern_emulated"


@functools.cache
def _operators() -> dict[str, torch._ops.OpOverload]:
    """Name of each operator with a CUDA kernel -> its emulated twin. Built at most once per content of the sources."""
    built = str(emulator.build_operators())
    library = torch.library.Library(NAMESPACE, "DEF")
    names = []
    for name in emulator.OPERATORS:
        schema = str(getattr(torch.ops.sparsekern, name).default._schema)
        library.define(schema.removeprefix("sparsekern::"))
        names.append(name)
    _operators.library = library  # lives as long as the process
    torch.ops.load_library(built)
    return {name: getattr(getattr(torch.ops, NAMESPACE), name).default for name in names}


@contextlib.contextmanager
def installed(order: int = 0) -> Iterator[None]:
    """Serves CPU tensors by emulated CUDA kernels, whose threads run forward (0), in reverse (1) or at random (2).

    What has no such kernel stays as it is.
    """
    library = torch.library.Library("sparsekern", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the override, which is meant
        for name, twin in _operators().items():
            library.impl(name, twin, "CPU")
    ctypes.CDLL(str(emulator.build_operators())).set_schedule(order)
    try:
        yield
    finally:
        library._destroy()
