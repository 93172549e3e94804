"""Which code runs an operator. `chosen` decides, for each operator and kind of tensor:

    CPU tensors    the compiled kernels, else the PyTorch reference
    GPU tensors    the CUDA library if it was built and loads, else the Triton kernels, else the reference

SPARSEKERN_BACKEND narrows the choice: "reference" leaves everything else alone; "cuda" and "triton" name what GPU
tensors shall run on, and stop the import where it is not there. What a backend has no kernel for runs on the reference.
With "triton" and TRITON_INTERPRET=1 CPU tensors run on the Triton kernels too, interpreted and slow, for tests.

Nothing here looks at a device, so an import works without one: the library is chosen without asking whether it holds
code for the GPU at hand. `sparsekern doctor` asks.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from sparsekern import _library

TRITON = {
    "masked_adamw_": "masked_adamw", "masked_sgd_": "masked_sgd", "topk_mask": "topk_mask",
    "sparse_conv2d": "sparse_conv2d", "sparse_conv2d_backward": "sparse_conv2d", "sparse_linear": "sparse_linear",
    "sparse_linear_backward": "sparse_linear",
}  # fmt: skip
"""Operators with Triton kernels -> their module in sparsekern.triton."""
LOOK_THROUGH = {"sparse_conv2d", "sparse_linear"}
"""Operators that torch.compile looks through at their Triton kernels. It runs the others as they are: the steps and the
selection need tables made on the host, and the gradients store where an index says, from which torch concludes that
they write to the indices."""

PLAIN_ON_GPU = {
    "batch_norm", "batch_norm_backward", "masked_combine_", "movement_step_", "signed_sums", "soft_threshold_",
    "threshold_mask", "topk_bounds", "topk_nested",
}  # fmt: skip
"""Operators whose references do on a GPU: a few of torch's own passes, or (batch_norm) nothing calls them there."""


def chosen(name: str, key: str) -> str:
    """What runs operator ``name`` on tensors of dispatch key ``key`` ("CPU", "CUDA"): "compiled", "cuda", "triton" or
    "reference"."""
    setting = _library.backend_setting()
    if setting == "reference":
        return "reference"
    if key == "CPU":
        if _library.interpreted():
            return "triton" if name in TRITON else "reference"
        return "compiled" if _library.has_kernel(name, "CPU") else "reference"
    if setting in ("auto", "cuda") and name in _library.cuda_operators:
        return "cuda"
    return "triton" if setting in ("auto", "triton") and name in TRITON and not why_no_triton() else "reference"


@functools.cache
def why_no_triton() -> str:
    """Why there can be no Triton kernels here, or ''; found out without importing Triton."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return "TRITON_INTERPRET=1 is set" if os.environ.get("TRITON_INTERPRET") == "1" else ""


def install() -> None:
    """Register the Triton kernels where they are chosen. Raises RuntimeError where SPARSEKERN_BACKEND cannot be met."""
    setting = _library.backend_setting()
    if setting == "cuda" and _library.cuda_obstacle:
        raise RuntimeError(f"SPARSEKERN_BACKEND=cuda: {_library.cuda_obstacle}")
    if setting == "triton" and importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"SPARSEKERN_BACKEND=triton: {why_no_triton()}")
    for name in TRITON:
        for key in ("CPU", "CUDA"):
            if chosen(name, key) == "triton":
                _register(name, key)
    slow = without_gpu_kernels()
    if slow and setting != "reference" and not _library.interpreted() and torch.cuda.is_available():
        text = f"GPU tensors take the slow PyTorch references in {', '.join(slow)}: {why_no_gpu_kernels()}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def without_gpu_kernels() -> list[str]:
    """The operators that are slow on a GPU."""
    return sorted(name for name in _library.OPS if name not in PLAIN_ON_GPU and chosen(name, "CUDA") == "reference")


def why_no_gpu_kernels() -> str:
    """Why neither the CUDA library nor Triton serves what the references serve."""
    return " and ".join(filter(None, (_library.cuda_obstacle, why_no_triton()))) or "there are no kernels for them yet"


def _register(name: str, key: str) -> None:
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    @functools.cache
    def kernel() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"sparsekern.triton.{TRITON[name]}"), name)

    def run(*args: Any, **kwargs: Any) -> Any:
        return kernel()(*args, **kwargs)

    def look_through(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        # What torch.library.triton_op does, for an operator that has other backends as well.
        from sparsekern.triton import launch

        device = launch.first_device(args)
        outside = device is None or device.type != "cuda" or torch.compiler.is_exporting()
        if outside or kernel().uncovered(*args, **kwargs):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        token = launch.tracing.set(True)
        try:
            with mode:
                return kernel()(*args, **kwargs)
        finally:
            launch.tracing.reset(token)

    _library.register(name, run, key)
    if name in LOOK_THROUGH and key == "CUDA":
        torch.library.register_torch_dispatch(
            f"sparsekern::{name}", FunctionalTensorMode, look_through, lib=_library._definitions
        )
